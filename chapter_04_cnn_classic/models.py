"""名字 -> 网络：``train.py`` 与测试共用的一张表。

都是 28/32 像素的小图形式；ImageNet 形式见各自的文件，只用来装官方权重与核对参数量。
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from chapter_04_cnn_classic.alexnet import alexnet_small
from chapter_04_cnn_classic.lenet import LeNet5, LeNet1998
from chapter_04_cnn_classic.nin import nin_small
from chapter_04_cnn_classic.vgg import vgg_small
from utils import UserError


class Recipe(NamedTuple):
    """一个网络怎样构造、怎样训练。

    ``make(num_classes, in_channels, image_size)`` 返回网络；``lr`` 是 AdamW 的峰值学习率，
    在 synth-digits 与 CIFAR-10 的验证集上粗调得出。
    """

    make: Callable[[int, int, int], nn.Module]
    lr: float
    threads: int | None = None  # 太小的网络，多线程的同步比运算还贵；``None`` 用 torch 的缺省


def _lenet1998(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    if (num_classes, in_channels) != (10, 1) or image_size not in (28, 32):
        raise UserError(
            f"lenet1998 照论文只认 10 类、单通道、28 或 32 像素的图，这里是 {num_classes} 类、"
            f"{in_channels} 通道、{image_size} 像素：请改用 --model lenet"
        )
    return LeNet1998()


def _lenet(num_classes: int, in_channels: int, image_size: int, width: int = 1) -> nn.Module:
    return LeNet5(num_classes, in_channels, image_size, tuple(w * width for w in (6, 16, 120, 84)))


def _by_width(build: Callable[..., nn.Module], **options: object) -> Callable[..., nn.Module]:
    """只看通道数、不看图的大小的网络（它们的末端是自适应池化）。"""
    return lambda num_classes, in_channels, image_size: build(
        num_classes=num_classes, in_channels=in_channels, **options
    )


MODELS: dict[str, Recipe] = {
    "lenet": Recipe(_lenet, 2e-3, threads=1),
    "lenet1998": Recipe(_lenet1998, 4e-3, threads=1),
    "lenet-wide": Recipe(partial(_lenet, width=4), 2e-3, threads=1),
    "alexnet": Recipe(_by_width(alexnet_small), 1e-3),
    "nin": Recipe(_by_width(nin_small), 2e-3),
    **{
        f"vgg{depth}": Recipe(_by_width(partial(vgg_small, depth), batch_norm=False), 1e-3)
        for depth in (11, 13, 16, 19)
    },
    **{
        f"vgg{depth}_bn": Recipe(_by_width(partial(vgg_small, depth)), 2e-3)
        for depth in (11, 13, 16, 19)
    },
}


def build_model(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """按名字构造小图网络；图太小等不相配之处变成一行错误。"""
    try:
        model = MODELS[name].make(num_classes, in_channels, image_size)
        with torch.no_grad():  # 送进一张空图：图太小的网络这时就会报错
            model.eval()(torch.zeros(1, in_channels, image_size, image_size))
        return model.train()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--model {name} 与数据不相配：{error}") from error
