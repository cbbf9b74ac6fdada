"""名字 -> 网络：小图网络与它的训练配方，以及与 torchvision 同名的 ImageNet 形式，各一张表。"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from chapter_05_resnet_modern_cnn import convnext, densenet, efficientnet, mobilenet, resnet
from chapter_05_resnet_modern_cnn.convnext import convnext_cifar
from chapter_05_resnet_modern_cnn.densenet import densenet_cifar
from chapter_05_resnet_modern_cnn.efficientnet import efficientnet_cifar
from chapter_05_resnet_modern_cnn.mobilenet import mobilenet_v1_cifar, mobilenet_v2_cifar
from chapter_05_resnet_modern_cnn.mobilenet_v3 import mobilenet_v3_cifar
from chapter_05_resnet_modern_cnn.repvgg import repvgg_cifar
from chapter_05_resnet_modern_cnn.resnet import resnet10_cifar, resnet18_cifar
from chapter_05_resnet_modern_cnn.resnet_cifar import CifarResNet, PreActBlock, SEBlock
from utils import UserError


class Recipe(NamedTuple):
    """一个网络怎样构造、怎样训练。

    ``make(num_classes, in_channels, stem_stride=...)`` 返回网络；``lr`` 是峰值学习率。
    """

    make: Callable[..., nn.Module]
    optimizer: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4


DEPTHS = (20, 32, 44, 56, 110)
MODELS: dict[str, Recipe] = {
    **{f"resnet{d}": Recipe(partial(CifarResNet, d)) for d in DEPTHS},
    **{f"plain{d}": Recipe(partial(CifarResNet, d, shortcut=False)) for d in DEPTHS},
    **{f"preact_resnet{d}": Recipe(partial(CifarResNet, d, block=PreActBlock)) for d in DEPTHS},
    **{f"se_resnet{d}": Recipe(partial(CifarResNet, d, block=SEBlock)) for d in DEPTHS},
    "resnet10": Recipe(resnet10_cifar),
    "resnet18": Recipe(partial(resnet18_cifar, width=32)),
    "densenet": Recipe(densenet_cifar),
    "mobilenet_v1": Recipe(mobilenet_v1_cifar),
    "mobilenet_v2": Recipe(mobilenet_v2_cifar),
    "mobilenet_v3": Recipe(mobilenet_v3_cifar),
    "efficientnet": Recipe(efficientnet_cifar),
    "repvgg": Recipe(repvgg_cifar),
    # 轮数少：块从 0.1 而不是 1e-6 的份量起步
    "convnext": Recipe(partial(convnext_cifar, layer_scale=0.1), "adamw", 2e-3, 0.05),
}


# 每个 ImageNet 形式由哪个文件构造；名字与 torchvision 相同
_FAMILIES = {
    resnet: (
        "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
        "wide_resnet50_2",
    ),
    densenet: ("densenet121", "densenet169", "densenet201"),
    mobilenet: ("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"),
    efficientnet: (*(f"efficientnet_b{n}" for n in range(8)), "efficientnet_v2_s"),
    convnext: ("convnext_tiny",),
}  # fmt: skip
OFFICIAL: dict[str, Callable[..., nn.Module]] = {
    name: getattr(module, name) for module, names in _FAMILIES.items() for name in names
}


def twin(name: str) -> str | None:
    """``resnetN`` 的孪生网络 ``plainN``；别的网络没有，为 ``None``。"""
    plain = name.replace("resnet", "plain", 1)
    return plain if plain != name and plain in MODELS else None


def usual_stem_stride(dataset: str) -> int:
    """起始卷积的步幅：合成物体的轮廓缩一半仍看得清，省去四分之三的运算；别的不缩。"""
    return 2 if dataset == "synth-objects" else 1


def build_model(
    name: str, num_classes: int, shape: tuple[int, ...], stem_stride: int = 1
) -> nn.Module:
    """按名字构造小图网络。

    参数:
        name: ``MODELS`` 之一。
        num_classes: 类别数。
        shape: 一张图的形状 ``(C, H, W)``。
        stem_stride: 起始卷积的步幅；2 时各层的边长减半，运算量约为四分之一。

    异常:
        UserError: 图太小等不相配之处。
    """
    try:
        model = MODELS[name].make(num_classes, shape[0], stem_stride=stem_stride)
        with torch.no_grad():  # 送进一张空图：图太小的网络这时就会报错
            model.eval()(torch.zeros(1, *shape))
        return model.train()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--model {name} 与数据不相配：{error}") from error
