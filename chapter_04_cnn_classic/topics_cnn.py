"""demo.py 的专题：学出边缘核、平移等变、打乱像素、增强与 BatchNorm。对应 visualization.md。"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_04_cnn_classic import figures_demo as figures
from chapter_04_cnn_classic.augment import Augment, shift
from chapter_04_cnn_classic.conv import conv2d_im2col
from chapter_04_cnn_classic.fitting import (
    Images,
    accuracy,
    fit,
    normalized,
    small_mlp,
)
from chapter_04_cnn_classic.lenet import lenet5
from chapter_04_cnn_classic.pooling import avg_pool2d, max_pool2d
from utils import make_generator, set_seed
from utils.topics import Check, Outcome, Topic


def digits(train: int, test: int) -> tuple[Images, Images]:
    """合成数字的训练集与测试集，都按训练集的统计量归一化。"""
    data = normalized("synth-digits", "train", train)
    return data, normalized("synth-digits", "test", test, (data.mean, data.std))


def mean_std(values: list[float]) -> tuple[float, float]:
    """平均与样本标准差。"""
    return statistics.mean(values), statistics.stdev(values)


# ---------------------------------------------------------------- 边缘核

SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))


def patch_hessian(x: Tensor) -> Tensor:
    """损失 ``½·mean (w ⋆ x − y)²`` 对 ``3×3`` 核的海森矩阵：3×3 小块的二阶矩，``(9, 9)``。"""
    patches = torch.stack(
        [x[..., r : x.shape[2] - 2 + r, s : x.shape[3] - 2 + s] for r in range(3) for s in range(3)]
    ).flatten(1)
    return patches @ patches.T / patches.shape[1]


def learn_kernel(x: Tensor, target: Tensor, steps: int) -> tuple[Tensor, list[float], float]:
    """从零出发的梯度下降，学习率取最优的 ``2/(λ_max+λ_min)``。

    返回:
        (学到的核 ``(3, 3)``, 每步之后与 Sobel 核的最大差, 海森矩阵的条件数)。
    """
    eigenvalues = torch.linalg.eigvalsh(patch_hessian(x))
    lr = 2 / (eigenvalues[0] + eigenvalues[-1]).item()
    weight = torch.zeros(1, 1, 3, 3, dtype=x.dtype, requires_grad=True)
    truth, errors = torch.tensor(SOBEL, dtype=x.dtype), []
    for _ in range(steps):
        loss = (conv2d_im2col(x, weight) - target).square().mean() / 2
        (gradient,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            weight -= lr * gradient
        errors.append((weight[0, 0] - truth).abs().max().item())
    return weight.detach()[0, 0], errors, (eigenvalues[-1] / eigenvalues[0]).item()


def topic_edge(seed: int, smoke: bool) -> Outcome:
    """只给输入与边缘图，梯度下降能不能自己找出 Sobel 核？"""
    count, steps = (4, 5) if smoke else (16, 600)
    sobel = torch.tensor(SOBEL, dtype=torch.float64)[None, None]
    picture = normalized("synth-digits", "train", count).x.double()
    inputs = {
        "white noise": torch.randn(
            picture.shape, generator=make_generator(seed), dtype=torch.float64
        ),
        "digits": picture,
    }
    runs = {}
    for name, x in inputs.items():
        kernel, errors, condition = learn_kernel(x, conv2d_im2col(x, sobel), steps)
        runs[name] = (kernel.numpy(), errors, condition)
        rate = (condition - 1) / (condition + 1)
        first = next((i + 1 for i, e in enumerate(errors) if e < 1e-3), None)
        print(
            f"  {name:11s} 条件数 {condition:7.2f}  理论上每步缩小到 {rate:.4f} 倍"
            f"  误差到 1e-3 用了 {first} 步  末尾误差 {errors[-1]:.1e}"
        )
    shown = [picture[0, 0], conv2d_im2col(picture[:1], sobel)[0, 0]]
    learned = torch.from_numpy(runs["digits"][0])[None, None]
    shown.append(conv2d_im2col(picture[:1], learned)[0, 0])
    worst = max(errors[-1] for _, errors, _ in runs.values())
    checks = [
        (Check("学到的核与 Sobel 核的最大差", 2.0, (0.0, 1e-3)), worst),
        (
            Check("条件数：数字 ÷ 白噪声", 1.0, (20.0, 500.0)),
            runs["digits"][2] / runs["white noise"][2],
        ),
    ]
    return Outcome(figures.edge_figure([v.numpy() for v in shown], runs), checks)


# ---------------------------------------------------------------- 平移等变


def relative_gap(a: Tensor, b: Tensor) -> float:
    """``‖a − b‖ / ‖b‖``。"""
    return ((a - b).norm() / b.norm()).item()


def equivariance_gaps(x: Tensor, weight: Tensor) -> dict[str, list[float]]:
    """各种层：先移 1 或 2 像素再算，与先算再移，相差多少（相对）。

    循环平移 ``roll`` 没有边界的问题，配循环填充；``stride`` 与池化把格子变稀，移 1 个像素对应半格，
    没有哪个输出的平移与之相配，这里取不移与移一格两者中较小的差。
    """

    def circular(v: Tensor, stride: int = 1) -> Tensor:
        return conv2d_im2col(F.pad(v, (1, 1, 1, 1), mode="circular"), weight, stride=stride)

    layers: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
        "conv, circular": (circular, 1),
        "conv, zero pad": (lambda v: conv2d_im2col(v, weight, padding=1), 1),
        "conv, stride 2": (lambda v: circular(v, 2), 2),
        "max pool 2": (lambda v: max_pool2d(v, 2)[0], 2),
        "avg pool 2": (lambda v: avg_pool2d(v, 2), 2),
        "global avg": (lambda v: v.mean(dim=(2, 3), keepdim=True), 1),
    }
    gaps = {}
    for name, (layer, stride) in layers.items():
        plain, found = layer(x), []
        for step in (1, 2):
            moved = layer(x.roll(step, dims=3))
            options = {step // stride, -(-step // stride)}
            found.append(min(relative_gap(moved, plain.roll(o, dims=3)) for o in options))
        gaps[name] = found
    return gaps


def paper(x: Tensor) -> Tensor:
    """每张图的底色：像素的中位数，``(B, C, 1, 1)``。"""
    return x.flatten(2).median(dim=2).values[..., None, None]


def conv_with_head(global_pool: bool, width: int = 12) -> nn.Sequential:
    """同样的三层 3×3 卷积（28 -> 7），末尾展平，或全局平均池化，再接一个线性层。"""
    head: list[nn.Module] = [nn.AdaptiveAvgPool2d(1)] if global_pool else []
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 4 * width, 3, padding=1),
        nn.ReLU(),
        *head,
        nn.Flatten(),
        nn.Linear(4 * width * (1 if global_pool else 49), 10),
    )


def topic_equivariance(seed: int, smoke: bool) -> Outcome:
    """卷积「平移等变」是什么意思？步幅与池化之后还剩多少？整个网络认得出移了位的数字吗？"""
    train, test = digits(*((200, 100) if smoke else (4000, 1000)))
    generator = make_generator(seed)
    weight = torch.randn(4, 1, 3, 3, generator=generator, dtype=torch.float64)
    gaps = equivariance_gaps(test.x[:32].double(), weight)
    for name, (one, two) in gaps.items():
        print(f"  {name:15s} 先移后算与先算后移的相对差：移 1 像素 {one:.1e}，移 2 像素 {two:.1e}")
    models = {
        "MLP": small_mlp(784),
        "LeNet": lenet5(),
        "conv + flatten": conv_with_head(False),
        "conv + global pool": conv_with_head(True),
    }
    shifts, curves = list(range(0, 7)), {}
    fill = paper(test.x)
    for name, model in models.items():
        lr = 4e-3 if name.startswith("conv") else 2e-3
        fit(model, train[:2], 1 if smoke else 6, make_generator(seed), lr=lr)
        curves[name] = [accuracy(model, shift(test.x, 0, s, fill), test.y) for s in shifts]
        row = "  ".join(f"{s}px {100 * a:.1f}%" for s, a in zip(shifts, curves[name], strict=True))
        print(f"  {name:18s} 向右平移的测试准确率  {row}")
    middle = shift(test.x[:1], 0, 4, fill[:1])[0, 0]
    kept = {name: values[6] / values[0] for name, values in curves.items()}
    lead = curves["LeNet"][4] - curves["MLP"][4]
    checks = [
        (Check("循环填充的卷积：等变的相对差", 1.0, (0.0, 1e-12)), gaps["conv, circular"][0]),
        (Check("步幅 2 的卷积移 1 像素的相对差", 0.0, (0.1, 1.5)), gaps["conv, stride 2"][0]),
        (Check("移 4 像素的准确率：LeNet − MLP", 0.0, (0.1, 0.6)), lead),
        (Check("移 6 像素留下的准确率：展平", 1.0, (0.1, 0.5)), kept["conv + flatten"]),
        (Check("移 6 像素留下的准确率：全局池化", 0.1, (0.85, 1.05)), kept["conv + global pool"]),
    ]
    pictures = (test.x[0, 0].numpy(), middle.numpy())
    return Outcome(figures.equivariance_figure(gaps, shifts, curves, pictures), checks)


# ---------------------------------------------------------------- 打乱像素


def permute_pixels(x: Tensor, order: Tensor) -> Tensor:
    """每张图的像素按同一个次序重排。"""
    return x.flatten(2)[..., order].view_as(x)


def permuted_training_gap(train: Images, order: Tensor, epochs: int, seed: int) -> float:
    """MLP 的第一层也按同一次序重排：训练之后的得分与不打乱时相差多少（float64，最大的绝对差）。

    ``W x = (W P⁻¹)(P x)``：打乱像素等于重排权重的列，而列的初值本来就可以任意排列。
    """
    x, y = train.x[:500].double(), train.y[:500]
    outputs = []
    for shuffle in (False, True):
        set_seed(seed)
        model = small_mlp(x[0].numel()).double()
        images = permute_pixels(x, order) if shuffle else x
        if shuffle:
            with torch.no_grad():
                model[1].weight.copy_(model[1].weight[:, order])
        fit(model, (images, y), epochs, make_generator(seed))
        outputs.append(model(images).detach())
    return (outputs[0] - outputs[1]).abs().max().item()


def topic_shuffled(seed: int, smoke: bool) -> Outcome:
    """把所有图的像素按同一个次序打乱：MLP 与卷积网络，谁在乎？"""
    train, test = digits(*((200, 100) if smoke else (2500, 1000)))
    epochs, seeds = (1, 2) if smoke else (6, 3)
    order = torch.randperm(784, generator=make_generator(seed + 7))
    makers = {"MLP": lambda: small_mlp(784), "LeNet": lenet5}
    scores: dict[tuple[str, bool], list[float]] = {}
    for name, make in makers.items():
        for shuffle in (False, True):
            data = [permute_pixels(v.x, order) if shuffle else v.x for v in (train, test)]
            for run in range(seeds):
                set_seed(seed + run)
                model = fit(make(), (data[0], train.y), epochs, make_generator(seed + run))
                scores.setdefault((name, shuffle), []).append(accuracy(model, data[1], test.y))
            mean, std = mean_std(scores[name, shuffle])
            print(
                f"  {name:6s} {'打乱' if shuffle else '原图'}  测试准确率 "
                f"{100 * mean:.2f} ± {100 * std:.2f} %（{seeds} 个种子）"
            )
    gap = permuted_training_gap(train, order, 1 if smoke else 3, seed)
    print(f"  MLP 的第一层按同一次序重排，训练之后的得分与不打乱时相差 {gap:.1e}")
    drop = {n: mean_std(scores[n, False])[0] - mean_std(scores[n, True])[0] for n in makers}
    checks = [
        (Check("打乱使 MLP 的准确率下降", 0.2, (-0.03, 0.03)), drop["MLP"]),
        (Check("打乱使 LeNet 的准确率下降", 0.0, (0.1, 0.4)), drop["LeNet"]),
        (Check("重排第一层的 MLP，训练之后的得分之差", 1.0, (0.0, 1e-8)), gap),
    ]
    pair = (test.x[0, 0].numpy(), permute_pixels(test.x[:1], order)[0, 0].numpy())
    return Outcome(figures.shuffled_figure(pair, scores), checks)


# ---------------------------------------------------------------- 增强与 BatchNorm


def lenet_bn() -> nn.Module:
    """LeNet-5，每个卷积之后插一个 BatchNorm。"""
    model = lenet5()
    layers: list[nn.Module] = []
    for layer in model.features:
        layers.append(layer)
        if isinstance(layer, nn.Conv2d):
            layers.append(nn.BatchNorm2d(layer.out_channels))
    model.features = nn.Sequential(*layers)
    return model


def topic_ablation(seed: int, smoke: bool) -> Outcome:
    """标签很少时，增强与 BatchNorm 各值多少？"""
    count, epochs, seeds = (50, 1, 2) if smoke else (300, 30, 3)
    train, test = digits(count, 200 if smoke else 2000)
    moved = Augment(shift=2, degrees=15, fill=-train.mean / train.std)
    scores: dict[tuple[bool, bool], list[float]] = {}
    for augment in (False, True):
        for norm in (False, True):
            for run in range(seeds):
                set_seed(seed + run)
                model = lenet_bn() if norm else lenet5()
                transform = moved if augment else None
                fit(model, train[:2], epochs, make_generator(seed + run), transform=transform)
                scores.setdefault((augment, norm), []).append(accuracy(model, test.x, test.y))
            mean, std = mean_std(scores[augment, norm])
            print(
                f"  增强 {'有' if augment else '无'}  BatchNorm {'有' if norm else '无'}"
                f"  测试准确率 {100 * mean:.2f} ± {100 * std:.2f} %"
            )
    means = {arm: mean_std(values)[0] for arm, values in scores.items()}
    spread = math.sqrt(statistics.mean(statistics.variance(v) for v in scores.values()))
    print(
        f"  {count} 张训练图，{epochs} 轮，{seeds} 个种子；"
        f"种子之间的标准差（合并）{100 * spread:.2f} %"
    )
    gain = [means[True, n] - means[False, n] for n in (False, True)]
    checks = [
        (Check("增强带来的准确率，较小的一个", 0.0, (0.02, 0.25)), min(gain)),
        (
            Check("BatchNorm 带来的准确率（无增强）", 0.0, (0.0, 0.2)),
            means[False, True] - means[False, False],
        ),
    ]
    samples = moved(train.x[:1].expand(7, -1, -1, -1), make_generator(seed))
    pictures = torch.cat([train.x[:1], samples])[:, 0].numpy()
    return Outcome(figures.ablation_figure(pictures, scores), checks)


TOPICS: dict[str, Topic] = {
    "edge": topic_edge,
    "equivariance": topic_equivariance,
    "shuffled": topic_shuffled,
    "ablation": topic_ablation,
}
