"""demo.py 的专题：梯度噪声、梯度累积、低精度、Muon 的正交化、样本的混合。对应 landscapes.md。"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from chapter_02_nn_basics_mlp.losses import cross_entropy
from chapter_02_nn_basics_mlp.mlp import MLP
from chapter_03_optimization_regularization import figures_precision as figures
from chapter_03_optimization_regularization.data import small_digits
from chapter_03_optimization_regularization.landscapes import (
    GradientNoise,
    gradient_noise,
    gradient_noise_from_batches,
    per_sample_gradients,
)
from chapter_03_optimization_regularization.networks import BlockMLP
from chapter_03_optimization_regularization.optimizers import SGD
from chapter_03_optimization_regularization.optimizers_modern import (
    Muon,
    muon_groups,
    newton_schulz,
)
from chapter_03_optimization_regularization.precision import (
    FORMATS,
    LossScaler,
    cast_loss,
    master_weights,
    mixed_precision_step,
)
from chapter_03_optimization_regularization.regularization import cutmix, mixup
from utils import make_generator
from utils.datasets import TensorBatches, load_images
from utils.topics import Check, Outcome, Topic

# ---------------------------------------------------------------- 梯度噪声


def drawn_gradients(
    per_sample: Tensor, size: int, draws: int, generator: torch.Generator
) -> Tensor:
    """有放回地抽 ``draws`` 个批，各批的平均梯度 ``(draws, P)``。"""
    chosen = torch.randint(len(per_sample), (draws, size), generator=generator)
    return torch.stack([per_sample[row].mean(dim=0) for row in chosen])


def exact_noise(per_sample: Tensor) -> GradientNoise:
    """批从这些样本里抽，它们就是总体：``G`` 是它们的平均，``Σ`` 是它们的协方差，不必估计。"""
    mean = per_sample.mean(dim=0)
    return GradientNoise(
        mean.square().sum().item(), per_sample.var(dim=0, unbiased=False).sum().item()
    )


def topic_noise(seed: int, smoke: bool) -> Outcome:
    """批大一倍，梯度的噪声小多少？批大到多少就不划算了？"""
    count, draws, steps = (64, 5, 20) if smoke else (1000, 200, 800)
    x, y = small_digits(count)
    model = MLP(x.shape[1], (32,), 10, generator=make_generator(seed))
    generator = make_generator(seed + 1)
    sizes = [1, 4, 16, 64, 256]
    grads = per_sample_gradients(model, cross_entropy, x, y)
    truth = exact_noise(grads)
    drawn = {size: drawn_gradients(grads, size, draws, generator) for size in sizes}
    mean = grads.mean(dim=0)
    variances = [(g - mean).square().sum(dim=1).mean().item() for g in drawn.values()]
    slope = (math.log(variances[-1]) - math.log(variances[0])) / math.log(sizes[-1])
    squares = {size: g.square().sum(dim=1).mean().item() for size, g in drawn.items()}
    two = gradient_noise_from_batches(squares[4], squares[64], 4, 64)
    some = gradient_noise(grads[torch.randperm(count, generator=generator)[: count // 5]])
    print(f"  tr Σ = {truth.noise:.3f}；批为 1 时量到 {variances[0]:.3f}，对数斜率 {slope:.3f}")
    print(
        f"  噪声尺度 {truth.scale:.0f}；只看五分之一的样本，估计为 {some.scale:.0f}；"
        f"只看批为 4 与 64 的梯度有多长，估计为 {two.scale:.0f}"
    )
    optimizer = SGD(model.parameters(), lr=0.05)
    train = TensorBatches(x, y, 50, generator=generator)
    taken, scales, losses = [], [], []
    for step in range(steps + 1):
        if step % max(1, steps // 20) == 0:
            taken.append(step)
            scales.append(exact_noise(per_sample_gradients(model, cross_entropy, x, y)).scale)
            losses.append(cross_entropy(model(x), y).item())
        inputs, labels = next(iter(train))  # 每次重新打乱，取第一批
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    for index in (0, len(taken) // 2, len(taken) - 1):
        print(f"  第 {taken[index]:4d} 步  损失 {losses[index]:.3f}  噪声尺度 {scales[index]:.0f}")
    figure = figures.noise_figure(sizes, variances, truth.noise, taken, scales, losses)
    late = statistics.median(scales[-max(1, len(scales) // 4) :])
    growth = late / scales[0]
    loose = (0.0, 1e9)
    return Outcome(
        figure,
        [
            (Check("梯度方差对批大小的对数斜率", 0.0, (-2, 0) if smoke else (-1.1, -0.9)), slope),
            (
                Check("由两种批大小估计的噪声尺度 ÷ 精确值", 0.0, loose if smoke else (0.7, 1.4)),
                two.scale / truth.scale,
            ),
            (
                Check("噪声尺度：末四分之一的中位数 ÷ 开头", 1.0, loose if smoke else (1.5, 20.0)),
                growth,
            ),
        ],
    )


# ---------------------------------------------------------------- 梯度累积


def flat_gradient(model: nn.Module) -> Tensor:
    """全部参数的梯度，排成一个向量。"""
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def accumulated(
    model: nn.Module, pieces: list[tuple[Tensor, Tensor]], weight: Callable[[int], float]
) -> Tensor:
    """各小批的损失乘上 ``weight(小批的样本数)`` 再反向，梯度累加。"""
    model.zero_grad()
    for x, y in pieces:
        (weight(len(y)) * cross_entropy(model(x), y)).backward()
    return flat_gradient(model)


def topic_accumulation(seed: int, smoke: bool) -> Outcome:
    """分成几个小批累积梯度，与一个大批相同吗？"""
    x, y = small_digits(100)
    x = x.double()
    sizes = [40, 40, 20]  # 末批不满
    pieces = list(zip(x.split(sizes), y.split(sizes), strict=True))
    gaps = {}
    for norm in ("none", "layer", "batch"):
        model = BlockMLP(x.shape[1], 32, 2, 10, norm=norm, generator=make_generator(seed)).double()
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        whole = flat_gradient(model)
        right = accumulated(model, pieces, lambda count: count / len(y))
        wrong = accumulated(model, pieces, lambda count: 1 / len(pieces))
        gaps[norm] = [((g - whole).norm() / whole.norm()).item() for g in (right, wrong)]
        print(
            f"  {norm:6s} 按样本数加权：相对误差 {gaps[norm][0]:.1e}；"
            f"各批平均再平均：{gaps[norm][1]:.1e}"
        )
    exact = max(gaps["none"][0], gaps["layer"][0])
    return Outcome(
        None,
        [
            (Check("按样本数加权的累积：相对误差", 0.1, (0.0, 1e-12)), exact),
            (Check("各批平均再平均：相对误差", 0.0, (0.02, 1.0)), gaps["none"][1]),
            (Check("有 BatchNorm 时按样本数加权：相对误差", 0.0, (0.01, 2.0)), gaps["batch"][0]),
        ],
    )


# ---------------------------------------------------------------- 低精度

TINY = 2.0**-20


class StepKept(NamedTuple):
    """一步更新写进低精度权重之后还剩多少。"""

    unchanged: float  # 梯度非零、权重却纹丝不动的比例
    progress: float  # 实际的更新在应有的更新上的投影 ÷ 后者之长；没有舍入时是 1


def step_kept(before: Tensor, after: Tensor, wanted: Tensor) -> StepKept:
    """比较权重实际的变化与应有的变化 ``wanted``，三者都是 ``(P,)``。"""
    moved, wanted = after.double() - before.double(), wanted.double()
    return StepKept(
        (moved[wanted != 0] == 0).double().mean().item(),
        (moved @ wanted / wanted.square().sum()).item(),
    )


def low_precision_losses(
    x: Tensor, y: Tensor, dtype: torch.dtype, scaler: LossScaler | None, master: bool, steps: int
) -> tuple[list[float], list[StepKept]]:
    """用 ``dtype`` 的权重与激活训练；``master`` 为真时优化器更新 fp32 的主权重。

    返回各步的损失，以及（没有主权重时）各步的更新还剩多少。

    损失乘了 ``TINY``，学习率相应放大：模拟梯度很小的情形（很深的网络、对许多项取平均）。
    """
    model = MLP(x.shape[1], (64,), 10, generator=make_generator(0)).to(dtype)
    weights = master_weights(model) if master else list(model.parameters())
    optimizer = SGD(weights, lr=0.5 / TINY)
    inputs = x.to(dtype)

    def loss_fn(network: nn.Module) -> Tensor:
        return TINY * cross_entropy(network(inputs).float(), y)

    losses, kept = [], []
    for _ in range(steps):
        if master:
            losses.append(mixed_precision_step(model, weights, optimizer, loss_fn, scaler) / TINY)
            continue
        optimizer.zero_grad()
        loss = loss_fn(model)
        loss.backward()
        before = nn.utils.parameters_to_vector(weights).detach()
        optimizer.step()
        after = nn.utils.parameters_to_vector(weights).detach()
        kept.append(step_kept(before, after, -0.5 / TINY * flat_gradient(model)))
        losses.append(loss.item() / TINY)
    return losses, kept


def print_formats() -> None:
    """三种格式的表。"""
    print("  格式        指数 尾数     最大值    最小正规数  最小次正规数      eps")
    for name, form in FORMATS.items():
        print(
            f"  {name:10s} {form.exponent_bits:4d} {form.mantissa_bits:4d}  {form.max:9.3g}"
            f"  {form.smallest_normal:11.3g} {form.smallest_subnormal:12.3g} {form.eps:10.3g}"
        )


def topic_precision(seed: int, smoke: bool) -> Outcome:
    """fp16 为什么要缩放损失，bf16 为什么不用？"""
    print_formats()
    x, y = small_digits(100 if smoke else 500)
    model = MLP(x.shape[1], (64,), 10, generator=make_generator(0))
    (TINY * cross_entropy(model(x), y)).backward()
    grads = flat_gradient(model)
    scale = 2.0**19
    lost = {
        "no scaling": cast_loss(grads, torch.float16).underflow,
        f"x 2^{math.log2(scale):.0f}": cast_loss(grads * scale, torch.float16).underflow,
    }
    for name, share in lost.items():
        print(f"  梯度转成 fp16，{name}：{100 * share:.1f}% 变成 0")
    steps = 5 if smoke else 300
    scaler = LossScaler(growth_interval=50)
    runs = {
        "fp32": low_precision_losses(x, y, torch.float32, None, False, steps),
        "fp16, no scaling": low_precision_losses(x, y, torch.float16, None, True, steps),
        "fp16, loss scaling": low_precision_losses(x, y, torch.float16, scaler, True, steps),
        "bf16, fp32 master weights": low_precision_losses(x, y, torch.bfloat16, None, True, steps),
        "bf16 weights only": low_precision_losses(x, y, torch.bfloat16, None, False, steps),
    }
    curves = {name: losses for name, (losses, _) in runs.items()}
    for name, losses in curves.items():
        print(f"  {name:26s} 损失 {losses[0]:.3f} -> {losses[-1]:.4f}")
    kept = runs["bf16 weights only"][1]
    for place, step in (("第一步", kept[0]), ("最后一步", kept[-1])):
        print(
            f"  只有 bf16 的权重，{place}：{100 * step.unchanged:.1f}% 的权重没有动，"
            f"沿应走的方向走了 {100 * step.progress:.1f}%"
        )
    last = {name: losses[-1] for name, losses in curves.items()}
    figure = figures.precision_figure(grads[grads != 0].abs().log2().numpy(), scale, curves)
    good, little = ((0.0, 9.0), (-9.0, 9.0)) if smoke else ((0.0, 0.05), (0.0, 0.3))
    results = [
        (Check("缩放之后下溢的比例", lost["no scaling"], (0.0, 0.01)), list(lost.values())[1]),
        (
            Check("fp16 不缩放：末尾损失 ÷ 开头", 0.0, (0.3, 1.1)),
            last["fp16, no scaling"] / curves["fp32"][0],
        ),
        (Check("只有 bf16 的权重：最后一步还剩", 1.0, little), kept[-1].progress),
    ]
    for name, run in (("fp16 加缩放", "fp16, loss scaling"), ("bf16", "bf16, fp32 master weights")):
        check = Check(f"{name}，fp32 主权重：末尾损失与 fp32 的相对差", 1.0, good)
        results.append((check, abs(last[run] / last["fp32"] - 1)))
    return Outcome(figure, results)


# ---------------------------------------------------------------- Muon


def topic_muon(seed: int, smoke: bool) -> Outcome:
    """Newton-Schulz 把奇异值变成什么样？"""
    sigma = torch.logspace(-3, 0, 200, dtype=torch.float64)
    maps = {}
    for steps in (1, 3, 5):
        # 对角阵的奇异值就是对角元；newton_schulz 先除以 Frobenius 范数，这里乘回来
        maps[steps] = [newton_schulz_scalar(s, steps) for s in sigma.tolist()]
    x, y = small_digits(128 if smoke else 2000, pool=1)
    model = MLP(x.shape[1], (128, 128), 10, generator=make_generator(seed))
    optimizer = Muon(muon_groups(model, 0.02, 0.004))
    batches = TensorBatches(x, y, 128, generator=make_generator(seed))
    for _ in range(1 if smoke else 4):
        for inputs, labels in batches:
            optimizer.zero_grad()
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    momentum = optimizer.state[model.layers[1].weight]["momentum_buffer"]
    u, before, vt = torch.linalg.svd(momentum)
    result = newton_schulz(momentum)
    after = torch.linalg.svdvals(result)
    cosine = nn.functional.cosine_similarity(result.flatten(), (u @ vt).flatten(), dim=0).item()
    inside = ((after > 0.6) & (after < 1.3)).float().mean().item()
    print(
        f"  128 × 128 的动量：最大与最小的奇异值之比 {before[0] / before[-1]:.0f}，"
        f"正交化之后 {after[0] / after[-1]:.1f}"
    )
    print(f"  落在 0.6 到 1.3 之间的 {100 * inside:.1f}%，与精确的 UVᵀ 的夹角余弦 {cosine:.4f}")
    figure = figures.muon_figure(sigma.numpy(), maps, before.numpy(), after.numpy())
    return Outcome(
        figure,
        [
            (Check("奇异值落在 0.6 到 1.3 之间的比例", 0.0, (0.8, 1.0)), inside),
            (Check("与 UVᵀ 的夹角余弦", 0.0, (0.95, 1.0)), cosine),
        ],
    )


def newton_schulz_scalar(sigma: float, steps: int) -> float:
    """一个奇异值经过 ``steps`` 次迭代变成多少；取 2 × 2 的对角阵，使范数恰为 1。"""
    other = math.sqrt(1 - sigma**2)
    matrix = torch.diag(torch.tensor([sigma, other], dtype=torch.float64))
    return newton_schulz(matrix, steps)[0, 0].item()


# ---------------------------------------------------------------- 样本的混合


def cutmix_label_gap(images: Tensor, generator: torch.Generator) -> float:
    """cutmix 的软标签与精确的像素份额的最大差。

    第 i 张图全部涂成 i、类别也是 i，混合之后数一数各个值占多少像素，就是应有的软标签。
    """
    labels = torch.arange(len(images))
    painted = labels.to(images.dtype).view(-1, 1, 1, 1).expand_as(images)
    mixed, targets = cutmix(painted, labels, len(images), 4.0, generator)
    shares = nn.functional.one_hot(mixed.long(), len(images)).to(images.dtype).mean(dim=(1, 2, 3))
    return (shares - targets).abs().max().item()


def topic_mixing(seed: int, smoke: bool) -> Outcome:
    """mixup 与 cutmix 把样本变成什么样？"""
    data = load_images("synth-digits", "train", limit=8)
    images, labels = data.images.float() / 255, data.labels
    mixed = {
        "mixup": mixup(images, labels, 10, 4.0, make_generator(seed)),
        "cutmix": cutmix(images, labels, 10, 4.0, make_generator(seed)),
    }
    rows = {"original": (images.numpy(), [str(label) for label in labels.tolist()])}
    for name, (inputs, targets) in mixed.items():
        titles = []
        for target in targets:
            parts = [
                f"{100 * share:.0f}% {digit}"
                for digit, share in enumerate(target.tolist())
                if share
            ]
            titles.append(" + ".join(parts))
        rows[name] = (inputs.numpy(), titles)
        print(f"  {name:7s} " + "，".join(titles))
    sums = torch.cat([targets.sum(dim=1) for _, targets in mixed.values()])
    gap = (sums - 1).abs().max().item()
    results = [
        (Check("软标签之和与 1 的最大差", 1.0, (0.0, 1e-6)), gap),
        (
            Check("cutmix 的软标签与像素份额的最大差", 0.1, (0.0, 1e-6)),
            cutmix_label_gap(images, make_generator(seed)),
        ),
    ]
    return Outcome(figures.mixing_figure(rows), results)


TOPICS: dict[str, Topic] = {
    "noise": topic_noise,
    "accumulation": topic_accumulation,
    "precision": topic_precision,
    "muon": topic_muon,
    "mixing": topic_mixing,
}
