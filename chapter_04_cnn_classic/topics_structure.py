"""demo.py 的专题：感受野、参数与运算都在哪里、三种下采样。对应 visualization.md。"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_04_cnn_classic import figures_structure as figures
from chapter_04_cnn_classic.alexnet import alexnet
from chapter_04_cnn_classic.conv import conv2d_im2col
from chapter_04_cnn_classic.lenet import lenet5
from chapter_04_cnn_classic.pooling import avg_pool2d, max_pool2d
from chapter_04_cnn_classic.receptive_field import (
    LayerSpec,
    conv_stack,
    effective_receptive_field,
    gradient_support,
    layer_specs,
    random_walk_std,
    receptive_fields,
    spread,
    support,
)
from chapter_04_cnn_classic.vgg import vgg16
from utils import make_generator, model_summary
from utils.datasets import load_images
from utils.model_summary import format_table
from utils.topics import Check, Outcome, Topic

Makers = dict[str, tuple[Callable[[], nn.Module], int]]
NETWORKS: Makers = {"LeNet-5": (lenet5, 28), "AlexNet": (alexnet, 224), "VGG-16": (vgg16, 224)}


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """只有形状、不占内存的网络：VGG-16 的权重真建起来要 0.5 GiB。"""
    with torch.device("meta"):
        return make().eval()


# ---------------------------------------------------------------- 感受野


def mismatches(features: nn.Module, size: int) -> tuple[int, int]:
    """四个角与中央的输出：公式与梯度不一致的像素数，以及一共比较了多少个像素。"""
    specs = [layer_specs(features, axis) for axis in (0, 1)]
    last = receptive_fields(specs[0], size)[-1].size - 1
    wrong = total = 0
    for row, column in ((0, 0), (0, last), (last, 0), (last, last), (last // 2, last // 2)):
        measured = gradient_support(features, (size, size), (row, column))
        formula = torch.outer(support(specs[0], size, row), support(specs[1], size, column))
        wrong += (measured != formula).sum().item()
        total += formula.numel()
    return wrong, total


def print_fields(name: str, specs: list[LayerSpec], size: int) -> None:
    """每层一行：输出、间隔（累积步幅）、感受野、起点。"""
    body = [
        [
            f.name,
            f"{s.kernel}/{s.stride}/{s.padding}",
            str(f.size),
            str(f.jump),
            str(f.field),
            str(f.start),
        ]
        for s, f in zip(specs, receptive_fields(specs, size), strict=True)
    ]
    table = format_table([name, "k/s/p", "输出", "间隔", "感受野", "起点"], body, (2, 3, 4, 5))
    print("\n".join("  " + line for line in table.splitlines()))


def slope(x: list[int], y: list[float]) -> float:
    """双对数坐标里最小二乘的斜率。"""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def topic_receptive(seed: int, smoke: bool) -> Outcome:
    """一个输出看得见多大一块？公式、梯度与实际用到的各是多少？"""
    growth, wrong, total = {}, 0, 0
    for name, (make, size) in NETWORKS.items():
        features = on_meta(make).features
        specs = layer_specs(features)
        print_fields(name, specs, size)
        growth[name] = [f.field / size for f in receptive_fields(specs, size)]
        bad, compared = mismatches(features, size)
        wrong, total = wrong + bad, total + compared
    print(f"  公式与梯度：五个位置、三个网络，比较 {total} 个像素，{wrong} 个不同")
    depths = [2, 4] if smoke else [2, 4, 8, 16, 32]
    draws, generator = 2 if smoke else 60, make_generator(seed)
    measured: dict[str, list[float]] = {"linear": [], "ReLU": []}
    for depth in depths:
        for name, values in measured.items():
            stack = conv_stack(depth, relu=name == "ReLU")
            energy = effective_receptive_field(stack, 2 * depth + 3, draws, generator)
            values.append(spread(energy))
        field, theory = 2 * depth + 1, random_walk_std(layer_specs(stack))
        print(
            f"  {depth:2d} 层 3×3：理论感受野 {field:2d}，标准差 理论 {theory:.3f}"
            f"  线性 {measured['linear'][-1]:.3f}  ReLU {measured['ReLU'][-1]:.3f}"
            f"；±2 个标准差占感受野的 {100 * 4 * measured['ReLU'][-1] / field:.0f}%"
        )
    walk = [math.sqrt(2 * n / 3) for n in depths]
    exponent = slope(depths, measured["ReLU"])
    print(f"  标准差随深度的幂次（ReLU）{exponent:.3f}，理论 0.5；理论感受野的幂次趋于 1")
    ratios = [m / t for v in measured.values() for m, t in zip(v, walk, strict=True)]
    checks = [
        (Check("公式与梯度不一致的像素数", 1.0, (0.0, 0.0)), float(wrong)),
        (
            Check("VGG-16 最后一个池化的感受野，像素", 0.0, (212.0, 212.0)),
            growth["VGG-16"][-1] * 224,
        ),
        (Check("有效感受野随深度的幂次", 1.0, (0.45, 0.55)), exponent),
        (
            Check("标准差：实测 ÷ 随机游走，离 1 最远的", 0.0, (0.93, 1.07)),
            max(ratios, key=lambda r: abs(r - 1)),
        ),
    ]
    maps = receptive_maps()
    return Outcome(figures.receptive_figure(growth, maps, energy, depths, measured), checks)


def receptive_maps() -> dict[tuple[int, int], tuple[Tensor, tuple[int, int, int]]]:
    """AlexNet 第二个池化的三个输出：梯度量出的像素，与公式的 (上, 左, 边长)（未裁）。"""
    features, maps = on_meta(alexnet).features[:6], {}
    field = receptive_fields(layer_specs(features), 224)[-1]
    for row, column in ((0, 0), (4, 7), (12, 10)):
        mask = gradient_support(features, (224, 224), (row, column))
        corner = [field.start + i * field.jump for i in (row, column)]
        maps[row, column] = (mask, (*corner, field.field))
    return maps


# ---------------------------------------------------------------- 参数与运算


def layer_costs(model: nn.Module, size: int) -> list[tuple[str, int, int, float]]:
    """每个卷积与全连接层的 (名字, 参数, 乘加, 激活 MiB)；一张图，float32。"""
    x = torch.empty(1, 3, size, size, device="meta")
    rows, convs, linears = [], 0, 0
    for row in model_summary(model, x).rows:
        if row.type == "Conv2d":
            convs += 1
            name = f"conv{convs}"
        elif row.type == "Linear":
            linears += 1
            name = f"fc{linears}"
        else:
            continue
        rows.append((name, row.params, row.macs, row.activation_bytes / 2**20))
    return rows


def topic_cost(seed: int, smoke: bool) -> Outcome:
    """AlexNet 与 VGG-16 的参数在哪里，运算在哪里，内存在哪里？"""
    costs, checks = {}, []
    for name, bands in (
        ("AlexNet", {"参数": (0.95, 0.97), "乘加": (0.91, 0.93)}),
        ("VGG-16", {"参数": (0.88, 0.90), "乘加": (0.99, 0.993)}),
    ):
        make, size = NETWORKS[name]
        rows = costs[name] = layer_costs(on_meta(make), size)
        params, macs, memory = (sum(row[i] for row in rows) for i in (1, 2, 3))
        body = [[r[0], f"{r[1]:,}", f"{r[2]:,}", f"{r[3]:.2f}"] for r in rows]
        body.append(["合计", f"{params:,}", f"{macs:,}", f"{memory:.2f}"])
        table = format_table([name, "参数", "乘加", "激活 MiB"], body, (1, 2, 3))
        print("\n".join("  " + line for line in table.splitlines()))
        dense = sum(r[1] for r in rows if r[0].startswith("fc")) / params
        conv = sum(r[2] for r in rows if r[0].startswith("conv")) / macs
        print(f"  {name}：全连接层占参数的 {100 * dense:.1f}%，卷积层占乘加的 {100 * conv:.1f}%")
        for what, share in (("参数", dense), ("乘加", conv)):
            layer = "全连接" if what == "参数" else "卷积"
            check = Check(f"{name} {layer}占{what}的比例", 0.5, bands[what], percent=True)
            checks.append((check, share))
    return Outcome(figures.cost_figure(costs), checks)


# ---------------------------------------------------------------- 下采样


def blur_pool(x: Tensor, stride: int) -> Tensor:
    """先取每个 ``stride`` 窗口的最大（步幅 1），再以 ``[1 2 1]/4`` 模糊，最后隔点取样。

    单独的隔点取样会把高频混进低频（混叠）；采样之前先滤掉高频（Zhang, 2019, arXiv:1904.11486）。
    """
    dense = max_pool2d(F.pad(x, (0, stride - 1, 0, stride - 1), mode="reflect"), stride, 1)[0]
    line = x.new_tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(line, line)[None, None].expand(x.shape[1], 1, 3, 3)
    dense = F.pad(dense, (1, 1, 1, 1), mode="replicate")
    return conv2d_im2col(dense, kernel, groups=x.shape[1])[..., ::stride, ::stride]


DOWNSAMPLERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "max": lambda x, s: max_pool2d(x, s)[0],
    "average": avg_pool2d,
    "strided": lambda x, s: x[..., ::s, ::s],
    "max + blur": blur_pool,
}


def stripes(size: int = 28, period: int = 2) -> Tensor:
    """竖条纹，``(1, 1, size, size)``，0 与 1。"""
    wave = (torch.arange(size) % period < period / 2).float()
    return wave.expand(1, 1, size, size).clone()


def thin_strokes(x: Tensor) -> Tensor:
    """只留最亮的一像素宽的脊：横竖斜四个方向上，某个方向的两侧都更暗。"""
    around = F.pad(x, (1, 1, 1, 1), mode="replicate")
    height, width = x.shape[2:]
    ridge = torch.zeros_like(x, dtype=torch.bool)
    for row, column in ((0, 1), (1, 0), (1, 1), (1, -1)):
        ahead, behind = (
            around[..., 1 + k * row : 1 + k * row + height, 1 + k * column : 1 + k * column + width]
            for k in (1, -1)
        )
        ridge |= (x > ahead) & (x >= behind)
    return x * (ridge & (x > 0.4))


def topic_pooling(seed: int, smoke: bool) -> Outcome:
    """最大、平均、隔点取样：同一张图缩小之后剩下什么？移一个像素，结果变多少？"""
    count, stride = 20 if smoke else 500, 2
    images = load_images("synth-digits", "test", limit=count).images.float() / 255
    thin = thin_strokes(images)
    changes, kept = {}, {}
    for name, down in DOWNSAMPLERS.items():
        a, b = down(images, stride), down(images.roll(1, dims=3), stride)
        changes[name] = ((a - b).norm() / a.norm()).item()
        kept[name] = (down(thin, stride).sum() * stride**2 / thin.sum()).item()
        bands = [down(stripes().roll(k, dims=3), stride)[..., 2:-2].mean().item() for k in (0, 1)]
        print(
            f"  {name:10s} 移 1 像素的相对变化 {changes[name]:.3f}"
            f"  细笔画的总亮度（相对原图）{kept[name]:.2f}"
            f"  周期 2 的条纹：平均亮度 {bands[0]:.2f}，移 1 像素之后 {bands[1]:.2f}"
        )
    pictures = {"digit": images[:1], "thin strokes": thin[:1], "stripes": stripes()}
    pictures["stripes, 1 px later"] = stripes().roll(1, dims=3)
    panels = {
        label: [picture[0, 0].numpy()]
        + [d(picture, stride)[0, 0].numpy() for d in DOWNSAMPLERS.values()]
        for label, picture in pictures.items()
    }
    checks = [
        (
            Check("移 1 像素的变化：平均 ÷ 隔点", 1.0, (0.3, 0.9)),
            changes["average"] / changes["strided"],
        ),
        (
            Check("移 1 像素的变化：最大加模糊 ÷ 最大", 1.0, (0.3, 0.95)),
            changes["max + blur"] / changes["max"],
        ),
        (Check("细笔画的总亮度：平均池化", 0.0, (0.999, 1.001)), kept["average"]),
    ]
    return Outcome(figures.pooling_figure(list(DOWNSAMPLERS), panels), checks)


TOPICS: dict[str, Topic] = {
    "receptive": topic_receptive,
    "cost": topic_cost,
    "pooling": topic_pooling,
}
