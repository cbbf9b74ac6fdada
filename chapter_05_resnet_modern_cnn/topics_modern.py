"""demo.py 的专题：拼接的内存、结构重参数化。对应 modern.md。

维度约定：``B, C, H, W``；L 是稠密块的层数，k 是 growth rate。
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_05_resnet_modern_cnn import figures_modern as figures
from chapter_05_resnet_modern_cnn.densenet import DenseBlock, densenet_cifar, stored_features
from chapter_05_resnet_modern_cnn.repvgg import RepVGG, RepVGGBlock, repvgg_cifar
from utils import make_generator
from utils.datasets import ImageBatches, channel_stats, load_images
from utils.memory import TensorMemory
from utils.topics import Check, Outcome, Topic

# ---------------------------------------------------------------- 拼接的内存

CHANNELS, GROWTH, SHAPE = 24, 12, (4, 16, 16)  # 块的输入通道 C，k，(B, H, W)


def feature_maps() -> Tensor:
    """块的输入 ``(B, C, H, W)``：内存与数值无关。"""
    batch, height, width = SHAPE
    return torch.ones(batch, CHANNELS, height, width)


def formula_bytes(layers: int, efficient: bool) -> int:
    """公式：留着的特征与块的输出，float32，字节。"""
    features = stored_features(layers, CHANNELS, GROWTH, efficient) + CHANNELS + layers * GROWTH
    return 4 * features * math.prod(SHAPE)


def stored_bytes(layers: int, efficient: bool) -> tuple[int, int]:
    """实测：一个稠密块前向之后活着的字节，整步的峰值。"""
    block = DenseBlock(layers, CHANNELS, GROWTH, efficient)
    x = feature_maps()
    with TensorMemory() as memory:
        y = block(x)
        live = memory.live
        y.sum().backward()
    return live, memory.peak


def step_timeline(layers: int, efficient: bool) -> list[int]:
    """一步之内每经过一层的峰值，字节：前向 L 段，反向 L 段；其中最大的就是整步的峰值。"""
    block = DenseBlock(layers, CHANNELS, GROWTH, efficient)
    x = feature_maps()
    peaks: list[int] = []
    with TensorMemory() as memory:

        def note(*_: object) -> None:
            peaks.append(memory.peak)
            memory.reset_peak()

        def forward_done(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
            note()
            output.register_hook(note)  # 它的梯度齐了：后面各层的反向已经做完

        for layer in block.children():
            layer.register_forward_hook(forward_done)
        y = block(x)
        y.sum().backward()
        note()  # 第一层自己的反向
    turn = peaks.pop(layers)  # 末尾的拼接，及它的反向：并入反向的第一段
    peaks[layers] = max(turn, peaks[layers])
    return peaks


def gradient_gap(seed: int) -> float:
    """小图 DenseNet 的一步：设与不设检查点，输出、梯度、滑动统计量的最大差。"""
    models = densenet_cifar(), densenet_cifar(memory_efficient=True)
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(4, 3, 16, 16, generator=make_generator(seed))
    found = []
    for model in models:
        output = model(x)
        output.square().sum().backward()
        found.append([output, *(p.grad for p in model.parameters()), *model.buffers()])
    return max((a - b).abs().max().item() for a, b in zip(*found, strict=True))


def log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """双对数图上末两点的斜率，即增长的幂次。"""
    return math.log(y[-1] / y[-2]) / math.log(x[-1] / x[-2])


def topic_concat(seed: int, smoke: bool) -> Outcome:
    """每层都拼接前面的全部特征，内存随深度怎样增长？检查点省下多少？"""
    # PyTorch 2.4 的检查点在反向时用着它自己已经弃用的写法
    warnings.filterwarnings("ignore", message=r"`torch\.cpu\.amp\.autocast")
    depths = [2, 4, 8] if smoke else [4, 8, 16, 24, 32, 48, 64]
    names = {"naive": False, "checkpointed": True}
    measured = {n: [stored_bytes(layers, flag) for layers in depths] for n, flag in names.items()}
    stored = {name: [pair[0] for pair in pairs] for name, pairs in measured.items()}
    peaks = {name: [pair[1] for pair in pairs] for name, pairs in measured.items()}
    for index, layers in enumerate(depths):
        row = "  ".join(
            f"{name} 留着 {stored[name][index] / 2**20:6.2f} 峰值 {peaks[name][index] / 2**20:6.2f}"
            for name in names
        )
        print(f"  L = {layers:2d}  {row} MiB")
    gap = max(
        1 - formula_bytes(layers, flag) / size
        for name, flag in names.items()
        for layers, size in zip(depths, stored[name], strict=True)
    )
    slopes = {name: log_slope(depths, stored[name]) for name in names}
    difference = gradient_gap(seed)
    print(f"  公式之外（各 BatchNorm 的统计量）至多占 {100 * gap:.3f}%")
    print(f"  末两点的幂次：naive {slopes['naive']:.2f}，checkpointed {slopes['checkpointed']:.2f}")
    print(f"  输出、梯度、滑动统计量的最大差 {difference}")
    curves = {
        name: [formula_bytes(layers, flag) for layers in range(1, depths[-1] + 1)]
        for name, flag in names.items()
    }
    timelines = {name: step_timeline(depths[-2], flag) for name, flag in names.items()}
    checks = [
        (Check("公式之外的内存所占", 1.0, (0.0, 0.005)), gap),
        (Check("留着的内存的幂次：朴素", 1.0, (1.5, 2.0)), slopes["naive"]),
        (Check("留着的内存的幂次：检查点", 2.0, (0.95, 1.05)), slopes["checkpointed"]),
        (
            Check("峰值：检查点 ÷ 朴素，最深的块", 1.0, (0.0, 0.5)),
            peaks["checkpointed"][-1] / peaks["naive"][-1],
        ),
        (Check("检查点引起的差别", 1.0, (0.0, 0.0)), difference),
    ]
    return Outcome(figures.concat_figure(depths, stored, curves, timelines), checks)


# ---------------------------------------------------------------- 结构重参数化


def images(split: str, count: int, stats: tuple[Tensor, Tensor] | None = None) -> tuple:
    """合成数字 ``(x, y, (均值, 标准差))``，测试集按训练集的统计量归一化。"""
    pixels, labels, _ = load_images("synth-digits", split, limit=count)
    mean, std = stats or channel_stats(pixels)
    x, y = next(iter(ImageBatches(pixels, labels, count, mean=mean, std=std)))
    return x, y, (mean, std)


def train_briefly(model: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int) -> nn.Module:
    """带动量的 SGD，学习率线性降到零；返回处于评估模式的 ``model``。"""
    generator, batch = make_generator(seed), 50
    steps = epochs * -(-len(x) // batch)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=generator).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def block_outputs(model: RepVGG, x: Tensor) -> list[Tensor]:
    """各块的输出。"""
    outputs = []
    for block in model.features:
        x = block(x)
        outputs.append(x)
    return outputs


def layer_gaps(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[float]:
    """逐块的 ``‖a − b‖ / ‖b‖``，在 float64 里算。"""
    return [
        max(((u.double() - v.double()).norm() / v.double().norm()).item(), 1e-17)
        for u, v in zip(a, b, strict=True)
    ]


def branch_shares(model: RepVGG, inputs: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """各分支的输出在 ReLU 之前的方差（逐通道，再平均），除以三者之和，``(块数,)``。"""
    names = ("3x3", "1x1", "identity")
    rows = []
    for block, x in zip(model.features, inputs, strict=True):
        variances = dict.fromkeys(names, 0.0)
        for name, (weight, bias) in block.branches().items():
            y = F.conv2d(x, weight, bias, block.conv3.stride, padding=1)
            variances[name] = y.var(dim=(0, 2, 3)).mean().item()
        total = sum(variances.values())
        rows.append([variances[name] / total for name in names])
    return dict(zip(names, np.array(rows).T, strict=True))


def without(block: RepVGGBlock, dropped: str) -> nn.Module:
    """折叠之后的一块，去掉名为 ``dropped`` 的分支。"""
    conv = block.fuse()
    if dropped in (branches := block.branches()):
        conv.weight -= branches[dropped][0]
        conv.bias -= branches[dropped][1]
    return nn.Sequential(conv, nn.ReLU())


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """准确率。"""
    return (model(x).argmax(dim=1) == y).double().mean().item()


@torch.no_grad()
def folding_report(model: RepVGG, x: Tensor) -> tuple[dict, dict, dict]:
    """``reparam_figure`` 的三组数组：逐块的相对差、各分支的份额、抽头的平均绝对值。"""
    deployed, double = model.fuse(), copy.deepcopy(model).double()
    exact, plain = block_outputs(double, x.double()), block_outputs(model, x)
    errors = {
        "float32: folded vs unfolded": layer_gaps(block_outputs(deployed, x), plain),
        "float32 vs float64, unfolded": layer_gaps(plain, exact),
        "float64: folded vs unfolded": layer_gaps(block_outputs(double.fuse(), x.double()), exact),
    }
    shares = branch_shares(model, [x, *plain[:-1]])
    kernels = {"3x3 branch": [], "all branches": []}
    for block in model.features:
        kernels["3x3 branch"].append(block.branches()["3x3"][0].flatten(0, 1))
        kernels["all branches"].append(block.fuse().weight.flatten(0, 1))
    taps = {name: torch.cat(rows).abs().mean(dim=0).numpy() for name, rows in kernels.items()}
    return errors, shares, taps


def topic_reparam(seed: int, smoke: bool) -> Outcome:
    """三个分支折叠成一个 3×3 卷积，输出差多少？每个分支各做了多少？"""
    x, y, stats = images("train", 100 if smoke else 1500)
    test_x, test_y, _ = images("test", 50 if smoke else 500, stats)
    model = train_briefly(repvgg_cifar(in_channels=1), x, y, 1 if smoke else 2, seed)
    errors, shares, taps = folding_report(model, test_x[:100])
    for name, values in errors.items():
        print(f"  {name:30s} 逐块的相对差：最大 {max(values):.1e}，末块 {values[-1]:.1e}")
    mean = {name: values.mean() for name, values in shares.items()}
    print("  各分支占输出方差（各块平均）  " + "  ".join(f"{n} {v:.2f}" for n, v in mean.items()))
    for name, values in taps.items():
        around = (values.sum() - values[1, 1]) / 8
        print(f"  {name:12s} 中央抽头 ÷ 其余八个的平均 {values[1, 1] / around:.2f}")
    with torch.no_grad():
        deployed = model.fuse()
        before, after = model(test_x), deployed(test_x)
        scores = {"全部": accuracy(deployed, test_x, test_y)}
        for dropped in ("3x3", "1x1", "identity"):
            deployed.features = nn.Sequential(*(without(b, dropped) for b in model.features))
            scores[f"去掉 {dropped}"] = accuracy(deployed, test_x, test_y)
    print("  测试准确率  " + "  ".join(f"{n} {100 * v:.1f}%" for n, v in scores.items()))
    agree = (before.argmax(dim=1) == after.argmax(dim=1)).double().mean().item()
    center = taps["all branches"][1, 1] / taps["3x3 branch"][1, 1]
    checks = [
        (Check("折叠前后逐块的相对差：float64", 1.0, (0.0, 1e-12)), max(list(errors.values())[2])),
        (Check("折叠前后逐块的相对差：float32", 1.0, (0.0, 1e-5)), max(list(errors.values())[0])),
        (Check("预测相同的比例", 0.1, (1.0, 1.0)), agree),
        (Check("中央抽头：合成的核 ÷ 3×3 分支", 1.0, (1.2, 20.0)), center),
        (Check("三个分支都在时的准确率", 0.1, (0.75, 1.0)), scores["全部"]),
    ]
    return Outcome(figures.reparam_figure(errors, shares, taps), checks)


TOPICS: dict[str, Topic] = {"concat": topic_concat, "reparam": topic_reparam}
