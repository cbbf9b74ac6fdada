"""特征从哪里来：当场预训练的小网络、train.py 存下的权重，或 torchvision 的官方权重。

维度约定：``B, C, H, W``。
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import nn

from chapter_04_cnn_classic.weights import load_torchvision_weights
from chapter_05_resnet_modern_cnn.data import Data, load_data
from chapter_05_resnet_modern_cnn.densenet import rename_old_keys
from chapter_05_resnet_modern_cnn.few_shot import Inputs
from chapter_05_resnet_modern_cnn.models import MODELS, OFFICIAL, build_model
from chapter_05_resnet_modern_cnn.recipe import evaluate, train_epochs
from chapter_05_resnet_modern_cnn.transfer import split_head
from utils import TorchDevice, UserError, model_summary, set_seed

DATASETS = ("synth-objects", "cifar10")  # 小网络在哪里预训练
EPOCHS, BATCH = 6, 128
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision 的约定


class Source(NamedTuple):
    """预训练的主干、随机的同一结构，与它们的输入；``model`` 与 ``data`` 只在小图时有。"""

    backbone: nn.Module
    random: nn.Module
    channels: int
    inputs: Inputs
    model: nn.Module | None = None
    data: Data | None = None


def imagenet_source(args: argparse.Namespace, device: TorchDevice) -> Source:
    """torchvision 的权重；图像用 ImageNet 的统计量归一化。

    异常:
        UserError: 权重不属于这个网络，或图太小。
    """
    make = OFFICIAL[args.backbone]
    rename = rename_old_keys if args.backbone.startswith("densenet") else None
    set_seed(args.seed)
    random, channels = split_head(make())
    model = load_torchvision_weights(make(), args.weights, rename)
    backbone, _ = split_head(model)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, 3, args.image_size, args.image_size))
    except ValueError as error:
        raise UserError(f"--image-size {args.image_size} 不合 {args.backbone}：{error}") from error
    inputs = Inputs(mean, std, args.image_size, device.device)
    return Source(backbone.to(device.device), random.to(device.device), channels, inputs)


def small_source(args: argparse.Namespace, device: TorchDevice) -> Source:
    """小图的网络：读入 train.py 的权重，或当场预训练。"""
    limit = 256 if args.smoke else None
    data = load_data(args.source, args.data_dir, download=args.download, limit=limit)
    shape, classes = data.shape, len(data.class_names)
    set_seed(args.seed)
    model = build_model(args.model, classes, shape, args.stem_stride)
    random, channels = split_head(model.to(device.device))
    print(model_summary(model, torch.zeros(1, *shape, device=device.device)).collapsed(1))
    if args.weights:
        load_torchvision_weights(model, args.weights)
    else:
        epochs = 1 if args.smoke else EPOCHS
        train_epochs(model, data, MODELS[args.model], epochs, BATCH, args.seed, device)
    score = evaluate(model, data.batches("test", device=device.device), classes, device)
    print(f"源域  {args.source}：测试准确率 {100 * score.accuracy:.2f}%")
    backbone, _ = split_head(model)
    inputs = Inputs(data.mean, data.std, 32, device.device)
    return Source(backbone, random, channels, inputs, model.eval(), data)
