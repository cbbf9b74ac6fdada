"""demo.py 的专题：分解的卷积省多少、丢多少，ReLU 在窄处丢多少信息。对应 efficient.md。"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_05_resnet_modern_cnn import figures_efficient as figures
from chapter_05_resnet_modern_cnn.linear_bottleneck import (
    recover,
    recoverable_probability,
    recovered_share,
    relu_embedding,
    spiral,
    surviving_dimensions,
)
from chapter_05_resnet_modern_cnn.separable import (
    compose_kernel,
    cost_ratio,
    factorize_kernel,
    rank_energy,
)
from utils import make_generator, model_summary
from utils.datasets import load_images
from utils.topics import Check, Outcome, Topic

# ---------------------------------------------------------------- 分解的卷积


def counted_ratio(kernel: int, channels: int) -> float:
    """搭出两种卷积（``channels`` 进、``channels`` 出，8×8 的图），数它们的乘加之比。"""
    with torch.device("meta"):
        full = nn.Conv2d(channels, channels, kernel, padding="same", bias=False)
        separable = nn.Sequential(
            nn.Conv2d(channels, channels, kernel, padding="same", groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
        )
        x = torch.empty(1, channels, 8, 8)
        return model_summary(separable, x).total_macs / model_summary(full, x).total_macs


def digits(split: str, count: int) -> tuple[Tensor, Tensor]:
    """合成数字，像素 0 到 1，``(N, 1, 28, 28)`` 与 ``(N,)``。"""
    data = load_images("synth-digits", split, limit=count)
    return data.images.float() / 255, data.labels


def two_layer_net() -> nn.Sequential:
    """两个 5×5 卷积的小网络；第二个 16 -> 32，是要分解的那一个。"""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, generator: torch.Generator) -> None:
    """Adam，批 64。"""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator).split(64):
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """认对的份额。"""
    return (model(x).argmax(dim=1) == y).double().mean().item()


@torch.no_grad()
def accuracy_by_rank(model: nn.Sequential, layer: int, x: Tensor, y: Tensor) -> list[float]:
    """把第 ``layer`` 层的核换成最佳的 r 个滤波器的逼近，r = 1, 2, ...，不再训练；之后复原。"""
    conv = model[layer]
    original, scores = conv.weight.clone(), []
    for rank in range(1, min(original.shape[0], original[0, 0].numel()) + 1):
        parts = factorize_kernel(original, rank)
        conv.weight.copy_(compose_kernel(*parts, in_channels=original.shape[1]))
        scores.append(accuracy(model, x, y))
    conv.weight.copy_(original)
    return scores


def topic_separable(seed: int, smoke: bool) -> Outcome:
    """深度可分离卷积省多少乘加？普通卷积学到的核，几个滤波器就够了？"""
    costs = {
        k: {n: (cost_ratio(k, n), counted_ratio(k, n)) for n in (8, 16, 32, 64, 128, 256, 512)}
        for k in (3, 5, 7)
    }
    gaps = [abs(a / b - 1) for row in costs.values() for a, b in row.values()]
    for kernel, row in costs.items():
        ratios = "  ".join(f"N={n}: 1/{1 / counted:.2f}" for n, (_, counted) in row.items())
        print(f"  {kernel}×{kernel}  乘加之比  {ratios}")
    sizes, epochs = ((300, 100), 1) if smoke else ((4000, 1000), 5)
    train_set, test_set = digits("train", sizes[0]), digits("test", sizes[1])
    model = two_layer_net()
    random = rank_energy(model[3].weight.detach().double())
    train(model, *train_set, epochs, make_generator(seed))
    learned = rank_energy(model[3].weight.detach().double())
    full = accuracy(model, *test_set)
    scores = accuracy_by_rank(model, 3, *test_set)
    for rank in (1, 2, 3, 4, 6, 8, 12, 25):
        print(
            f"  每个输入通道 {rank:2d} 个滤波器：能量 随机 {100 * random[rank - 1]:5.1f}%"
            f"  学到的 {100 * learned[rank - 1]:5.1f}%  测试准确率 {100 * scores[rank - 1]:5.1f}%"
            f"  乘加之比 {cost_ratio(5, 32, rank):.2f}"
        )
    print(f"  原来的卷积：测试准确率 {100 * full:.1f}%")
    checks = [
        (Check("乘加之比：公式与数出来的相对差", 1.0, (0.0, 1e-12)), max(gaps)),
        (Check("25 个滤波器：准确率之差", 1.0, (0.0, 0.002)), abs(scores[-1] - full)),
        (Check("前 4 个的能量：学到的 − 随机", 0.0, (0.02, 0.5)), (learned - random)[3].item()),
        (Check("4 个滤波器的准确率 − 原来的", -0.8, (-0.1, 0.02)), scores[3] - full),
    ]
    figure = figures.separable_figure(
        costs,
        {"trained": learned.tolist(), "random": random.tolist()},
        range(1, len(scores) + 1),
        scores,
        full,
        chance=0.1,
    )
    return Outcome(figure, checks)


# ---------------------------------------------------------------- ReLU 与窄处


def measured_share(dimension: int, width: int, draws: int, generator: torch.Generator) -> float:
    """``draws`` 个随机的 T，各取 10 个随机的 x，能复原的份额。"""
    shares = []
    for _ in range(draws):
        matrix, x = (
            torch.randn(rows, dimension, generator=generator, dtype=torch.float64)
            for rows in (width, 10)
        )
        shares.append(recovered_share(x, matrix))
    return sum(shares) / draws


def topic_bottleneck(seed: int, smoke: bool) -> Outcome:
    """ReLU 之前展开多少倍，信息才不会丢？"""
    generator = make_generator(seed)
    x, spirals, errors = spiral(300), {}, {}
    spirals["input"] = (x.numpy(), torch.zeros(len(x), dtype=torch.bool).numpy())
    for width in (2, 3, 5, 15, 30):
        matrix = torch.randn(width, 2, generator=generator, dtype=torch.float64)
        guess = recover(relu_embedding(x, matrix), matrix)
        distance = (guess - x).norm(dim=1)
        lost = distance > 1e-6
        errors[width] = (distance.norm() / x.norm()).item()
        spirals[f"n = {width}: {100 * lost.double().mean():.0f}% lost"] = (
            guess.numpy(),
            lost.numpy(),
        )
        print(
            f"  平面上的螺线，n = {width:2d}：丢失 {100 * lost.double().mean():5.1f}%"
            f"（T 随机时平均 {100 * (1 - recoverable_probability(2, width)):5.1f}%）"
            f"  相对误差 {errors[width]:.1e}"
        )
    dimensions, ratios = (2, 8, 24), (1, 1.5, 2, 2.5, 3, 4, 6)
    draws = 5 if smoke else 150
    predicted, measured, surviving = {}, {}, {}
    for d in dimensions:
        widths = [round(d * ratio) for ratio in ratios]
        predicted[d] = [recoverable_probability(d, n) for n in widths]
        measured[d] = [measured_share(d, n, draws, generator) for n in widths]
        surviving[d] = [surviving_dimensions(d, n) for n in widths]
        shares = zip(ratios, predicted[d], measured[d], surviving[d], strict=True)
        for ratio, p, m, s in shares:
            print(
                f"  d = {d:2d}  n/d = {ratio:3}  能复原：公式 {p:.4f}  实测 {m:.4f}  方向 {s:.4f}"
            )
    gaps = [abs(p - m) for d in dimensions for p, m in zip(predicted[d], measured[d], strict=True)]
    checks = [
        (Check("能复原的份额：公式与实测的最大差", 1.0, (0.0, 0.05)), max(gaps)),
        (Check("不展开（n = d = 24）时能复原的份额", 0.5, (0.0, 0.01)), measured[24][0]),
        (Check("展开 6 倍（d = 24）时能复原的份额", 0.0, (0.999, 1.0)), measured[24][-1]),
        (Check("螺线，n = 30：复原的相对误差", 1.0, (0.0, 1e-6)), errors[30]),
    ]
    figure = figures.bottleneck_figure(spirals, ratios, predicted, measured, surviving)
    return Outcome(figure, checks)


TOPICS: dict[str, Topic] = {"separable": topic_separable, "bottleneck": topic_bottleneck}
