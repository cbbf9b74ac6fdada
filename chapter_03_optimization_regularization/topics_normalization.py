"""demo.py 的专题：归一化对哪些维求、训练与推理、批的大小、手推的反向。

对应 normalization.md。
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from chapter_02_nn_basics_mlp.initialization import kaiming_normal_
from chapter_02_nn_basics_mlp.losses import cross_entropy, cross_entropy_grad
from chapter_03_optimization_regularization import figures_normalization as figures
from chapter_03_optimization_regularization.normalization import (
    BatchNorm1d,
    GroupNorm,
    InstanceNorm1d,
    LayerNorm,
)
from chapter_03_optimization_regularization.normalization_functions import (
    batch_norm,
    batch_norm_backward,
    batch_statistics,
    layer_norm,
    layer_norm_backward,
    moments,
    normalize,
)
from utils import make_generator
from utils.datasets import load_images
from utils.topics import Check, Outcome, Topic

# ---------------------------------------------------------------- 谁与谁共用统计量


def connected(function: Callable[[Tensor], Tensor], x: Tensor, index: Sequence[int]) -> Tensor:
    """输出的第 ``index`` 个元素取决于哪些输入：``∂y[index]/∂x[j] ≠ 0``，布尔，形状同 ``x``。"""
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(x)[tuple(index)], x)
    return grad != 0


def topic_axes(seed: int, smoke: bool) -> Outcome:
    """(N, C, L) 的激活上，每种归一化让哪些元素共用一份均值与方差？"""
    shape, index = (3, 4, 5), (1, 2, 3)
    x = torch.randn(shape, generator=make_generator(seed), dtype=torch.float64)
    samples, channels, length = shape
    per_token = LayerNorm(channels)
    modules = {
        "BatchNorm1d(4)": (BatchNorm1d(channels), samples * length),
        "InstanceNorm1d(4)": (InstanceNorm1d(channels), length),
        "GroupNorm(2, 4)": (GroupNorm(2, channels), channels // 2 * length),
        "LayerNorm((4, 5))": (LayerNorm((channels, length)), channels * length),
        "LayerNorm(4), channels last": (
            lambda x: per_token(x.transpose(1, 2)).transpose(1, 2),
            channels,
        ),
        "BatchNorm1d(4).eval()": (BatchNorm1d(channels).eval(), 1),
    }
    maps, right = {}, 0
    for name, (module, expected) in modules.items():
        if isinstance(module, nn.Module):
            module.double()
        per_token.double()
        maps[name] = connected(module, x, index)
        count = int(maps[name].sum())
        right += count == expected
        print(f"  {name:28s} y{list(index)} 取决于 {count:2d} 个输入（{x.numel()} 个之中）")
    check = Check("各种归一化：依赖的元素个数与公式相符（种）", 0.0, (len(maps), len(maps)))
    return Outcome(figures.axes_figure(maps, index), [(check, float(right))])


# ---------------------------------------------------------------- 数字图像上的小网络


def digits(split: str, limit: int) -> tuple[Tensor, Tensor]:
    """合成数字，2 × 2 平均成 14 × 14：``(N, 196)``，大致标准化；标签 ``(N,)``。"""
    images, labels, _ = load_images("synth-digits", split, limit=limit)
    pooled = nn.functional.avg_pool2d(images.float() / 255, 2)
    return (pooled.flatten(1) - 0.166) / 0.188, labels


class ParallelMLP(nn.Module):
    """``S`` 个同样结构、互不相干的 MLP 并排训练：小矩阵的开销几乎全在调用上，并排等于白送种子。

    ``(S, B, in) -> (S, B, out)``。归一化层把激活看成 ``(B, S·C)``：BatchNorm 逐通道，
    ``S·G`` 组的 GroupNorm 逐组，所以谁也看不见别人。

    参数:
        sizes: 各层宽度。
        members: ``S``。
        norm: ``BatchNorm``、``GroupNorm``（8 组）、``LayerNorm`` 或 ``none``，放在激活之前。
        generator: 初始化用的生成器。
    """

    def __init__(
        self, sizes: Sequence[int], members: int, norm: str, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
            draws = [
                kaiming_normal_(torch.empty(fan_out, fan_in), "relu", generator)
                for _ in range(members)
            ]
            self.weights.append(nn.Parameter(torch.stack(draws)))
            self.biases.append(nn.Parameter(torch.zeros(members, 1, fan_out)))
        with torch.no_grad():
            self.weights[-1].mul_(0.1)  # 初始损失接近 ln 10
        make = {
            "BatchNorm": lambda width: BatchNorm1d(members * width),
            "GroupNorm": lambda width: GroupNorm(members * 8, members * width),
            "LayerNorm": lambda width: GroupNorm(members, members * width),
            "none": lambda width: nn.Identity(),
        }[norm]
        self.norms = nn.ModuleList(make(width) for width in sizes[1:-1])

    def forward(self, x: Tensor) -> Tensor:
        members, batch, _ = x.shape
        for weight, bias, norm in zip(self.weights, self.biases, [*self.norms, None], strict=True):
            x = x @ weight.transpose(1, 2) + bias
            if norm is not None:
                flat = norm(x.transpose(0, 1).reshape(batch, -1))  # (S, B, C) -> (B, S·C)
                x = flat.view(batch, members, -1).transpose(0, 1).relu()
        return x


def train_parallel(
    model: ParallelMLP,
    data: tuple[Tensor, Tensor],
    batch_size: int,
    lr: float,
    generator: torch.Generator,
) -> None:
    """一轮 SGD，学习率线性降到零；各成员的批次序不同，不满一批的尾巴丢掉。"""
    x, y = data
    members = len(model.weights[0])
    order = torch.stack([torch.randperm(len(x), generator=generator) for _ in range(members)])
    parameters, steps = list(model.parameters()), len(x) // batch_size
    model.train()
    for step, index in enumerate(order[:, : steps * batch_size].split(batch_size, dim=1)):
        logits = model(x[index]).flatten(0, 1)  # (S, B, 10) -> (S·B, 10)
        loss = cross_entropy(logits, y[index].flatten()) * members  # 各成员的损失之和
        grads = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            torch._foreach_sub_(parameters, grads, alpha=lr * (1 - step / steps))


@torch.no_grad()
def errors_of(model: ParallelMLP, data: tuple[Tensor, Tensor]) -> Tensor:
    """推理时各成员的错误率 ``(S,)``。"""
    x, y = data
    logits = model.eval()(x.expand(len(model.weights[0]), -1, -1))
    return (logits.argmax(dim=-1) != y).float().mean(dim=1)


@torch.no_grad()
def reestimate(model: ParallelMLP, x: Tensor) -> ParallelMLP:
    """权重不动，用一大批训练样本重新求 BatchNorm 的统计量；返回副本。"""
    model = copy.deepcopy(model).train()
    for norm in model.norms:
        norm.reset_running_stats()
        norm.momentum = None
    model(x.expand(len(model.weights[0]), -1, -1))
    return model


# ---------------------------------------------------------------- 批的大小

LR_256 = 2.0  # 批为 256 时的学习率；其余按批的大小成比例


def topic_bn_batch(seed: int, smoke: bool) -> Outcome:
    """看同样多的样本，批越小，BatchNorm 差多少？不依赖批的归一化呢？"""
    batches = [2, 64] if smoke else [2, 4, 8, 16, 64, 256]
    members, count = (2, 256) if smoke else (5, 4096)
    train, val = digits("train", count), digits("val", count // 2)
    errors: dict[str, list[Tensor]] = {}
    for norm in tqdm(("BatchNorm", "GroupNorm", "LayerNorm", "none"), desc="归一化", leave=False):
        for batch_size in batches:
            generator = make_generator(seed)
            model = ParallelMLP((196, 64, 64, 10), members, norm, generator)
            train_parallel(model, train, batch_size, LR_256 * batch_size / 256, generator)
            errors.setdefault(norm, []).append(errors_of(model, val))
            if norm == "BatchNorm":
                again = errors_of(reestimate(model, train[0]), val)
                errors.setdefault("BatchNorm, re-estimated", []).append(again)
    print(f"  验证错误率 %（{members} 个种子的平均 ± 标准差），看 {count} 个样本")
    print("  批的大小                 " + "".join(f"{b:>13d}" for b in batches))
    for name, row in errors.items():
        cells = [f"{100 * e.mean():.1f} ± {100 * e.std():.1f}" for e in row]
        print(f"  {name:25s}" + "".join(f"{cell:>13s}" for cell in cells))
    small, large = (errors["BatchNorm"][batches.index(b)].mean().item() for b in (2, 64))
    group = errors["GroupNorm"][0].mean() / errors["GroupNorm"][batches.index(64)].mean()
    results = [
        (Check("BatchNorm：批为 2 的错误率 ÷ 批为 64", 1.0, (2.0, 5.0)), small / large),
        (Check("GroupNorm：批为 2 的错误率 ÷ 批为 64", 3.0, (1.2, 0.6)), group.item()),
    ]
    return Outcome(figures.batch_figure(batches, errors), results)


# ---------------------------------------------------------------- 训练与推理


@torch.no_grad()
def error_without_eval(
    model: ParallelMLP, data: tuple[Tensor, Tensor], batch_size: int, order: Tensor
) -> float:
    """忘了 ``eval()``：按 ``order`` 的次序分批，每批用自己的统计量，返回错误率。"""
    model = copy.deepcopy(model).train()  # 前向会改滑动统计量，所以用副本
    x, y = (part[order[: len(order) // batch_size * batch_size]] for part in data)
    logits = torch.cat([model(part[None])[0] for part in x.split(batch_size)])
    return (logits.argmax(dim=-1) != y).float().mean().item()


@torch.no_grad()
def company_effect(
    model: ParallelMLP, data: tuple[Tensor, Tensor], batch_size: int, draws: int, g: torch.Generator
) -> Tensor:
    """训练模式下，同一个样本与不同的同伴做一批，它的真实类别得到的概率 ``(draws,)``。"""
    model = copy.deepcopy(model).train()
    x, y = data
    picks = torch.randint(1, len(x), (draws, batch_size), generator=g)
    picks[:, 0] = 0  # 第 0 个样本不变，其余是同伴
    return torch.stack([model(x[p][None])[0, 0].softmax(dim=-1)[y[0]] for p in picks])


def running_variance(
    batch_size: int, steps: int, generator: torch.Generator
) -> tuple[float, float]:
    """方差为 1 的数据：(BatchNorm 记下的方差, 不乘 n/(n − 1) 会记下的)，64 个通道的平均。"""
    layer, biased = BatchNorm1d(64, momentum=None), 0.0
    for _ in range(steps):
        x = torch.randn(batch_size, 64, generator=generator)
        layer(x)
        biased += batch_statistics(x)[1].mean().item() / steps
    return layer.running_var.mean().item(), biased


def running_mean_error(momentum: float | None, steps: int, g: torch.Generator) -> list[float]:
    """均值 3、方差 1 的数据，批为 64：每步之后滑动均值的相对误差，256 个通道的平均。"""
    layer, gaps = BatchNorm1d(256, momentum=momentum), []
    for _ in range(steps):
        layer(3 + torch.randn(64, 256, generator=g))
        gaps.append(((layer.running_mean - 3).abs() / 3).mean().item())
    return gaps


def topic_bn_modes(seed: int, smoke: bool) -> Outcome:
    """训练与推理的 BatchNorm 差在哪里：同伴、忘了 eval()、有偏的方差、没收敛的统计量？"""
    count, draws, steps = (256, 20, 30) if smoke else (4096, 200, 1000)
    generator = make_generator(seed)
    train, val = digits("train", count), digits("val", max(128, count // 4))
    model = ParallelMLP((196, 64, 64, 10), 1, "BatchNorm", generator)
    for _ in range(1 if smoke else 3):
        train_parallel(model, train, 64, 0.5, generator)
    right = errors_of(model, val).item()
    batches = [2, 4, 16, 64, 128]
    shuffled = torch.randperm(len(val[0]), generator=generator)
    by_class = val[1].argsort()
    wrong = {
        "random batches": [error_without_eval(model, val, b, shuffled) for b in batches],
        "batches sorted by class": [error_without_eval(model, val, b, by_class) for b in batches],
    }
    company = [company_effect(model, val, b, draws, generator) for b in batches]
    with torch.no_grad():
        alone = model.eval()(val[0][None, :1]).softmax(dim=-1)[0, 0, val[1][0]].item()
    variances = [running_variance(b, steps // b * 2 + 20, generator) for b in batches]
    warmup = {
        name: running_mean_error(momentum, 100, generator)
        for name, momentum in [("m = 0.1", 0.1), ("m = 0.01", 0.01), ("m = None", None)]
    }
    for b, c, (kept, biased), *e in zip(batches, company, variances, *wrong.values(), strict=True):
        print(
            f"  批 {b:3d}：同一张图的概率随同伴变化，标准差 {c.std():.3f}；不写 eval() 的错误率 "
            f"{100 * e[0]:.1f}%，按类排好 {100 * e[1]:.1f}%；方差 {kept:.3f}，有偏 {biased:.3f}"
        )
    print(f"  写了 eval()：那张图的概率 {alone:.3f}，错误率 {100 * right:.1f}%，与批无关")
    print("  100 步后滑动均值的相对误差：", {n: f"{g[-1]:.1e}" for n, g in warmup.items()})
    panels = figures.ModePanels(batches, company, alone, wrong, right, variances, warmup)
    results = [
        (Check("忘了 eval()、按类排好（批 64）：错误率之差", 0.0, (0.2, 0.9)),
         wrong["batches sorted by class"][3] - right),
        (Check("批为 2：有偏的滑动方差", 1.0, (0.55, 0.45)), variances[0][1]),
        (Check("批为 2：无偏的滑动方差", 0.5, (0.95, 1.05)), variances[0][0]),
        (Check("momentum=0.1，第 10 步的滑动均值误差 ÷ 0.9¹⁰", 0.0, (0.9, 1.1)),
         warmup["m = 0.1"][9] / 0.9**10),
    ]  # fmt: skip
    return Outcome(figures.modes_figure(panels), results)


# ---------------------------------------------------------------- 手推的反向


def frozen_batch_norm(x: Tensor) -> Tensor:
    """错误的 BatchNorm：反向时把 ``μ``、``σ²`` 当作常数。"""
    mean, var = batch_statistics(x)
    return batch_norm(x, mean.detach(), var.detach())


def whole_batch_norm(x: Tensor) -> Tensor:
    """正确的 BatchNorm，没有 ``γ, β``。"""
    return batch_norm(x, *batch_statistics(x))


def descend(
    norm: Callable[[Tensor], Tensor], steps: int, generator: torch.Generator
) -> tuple[list[float], list[float]]:
    """``z = u Wᵀ + b``，归一化之后做 softmax 分类；返回每步的 (损失, ``‖(W, b)‖``)。"""
    u = torch.randn(128, 8, generator=generator, dtype=torch.float64)
    label = torch.randint(3, (128,), generator=generator)  # 第 3 类从不出现，损失总想压低它
    weight = torch.randn(4, 8, generator=generator, dtype=torch.float64).requires_grad_()
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    losses, norms = [], []
    for _ in range(steps):
        loss = cross_entropy(norm(u @ weight.T + bias), label)
        grads = torch.autograd.grad(loss, [weight, bias])
        losses.append(loss.item())
        norms.append(torch.cat([weight.flatten(), bias]).detach().norm().item())
        with torch.no_grad():
            torch._foreach_sub_([weight, bias], grads, alpha=1.0)
    return losses, norms


def hand_errors(generator: torch.Generator) -> dict[str, float]:
    """手推的梯度与 autograd 的最大相对误差，按输入的形状；每项取对 x、γ、β 三者中最大的。"""
    errors = {}
    shapes = [(64, 8), (16, 8, 5), (4, 8, 6, 7)]
    for shape in shapes:
        x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        for name, size in [("BatchNorm", (shape[1],)), ("LayerNorm", shape[-1:])]:
            weight = torch.randn(size, generator=generator, dtype=torch.float64)
            leaves = [t.requires_grad_() for t in (x.clone(), weight, torch.zeros_like(weight))]
            if name == "BatchNorm":
                y = batch_norm(leaves[0], *batch_statistics(leaves[0]), *leaves[1:])
                hand = batch_norm_backward(grad, x, weight.detach())
            else:
                y = layer_norm(leaves[0], size, *leaves[1:])
                hand = layer_norm_backward(grad, x, weight.detach())
            truth = torch.autograd.grad(y, leaves, grad)
            errors[f"{name} {shape}"] = max(
                ((h - t).abs().max() / t.abs().max()).item()
                for h, t in zip(hand, truth, strict=True)
            )
    return errors


def topic_bn_backward(seed: int, smoke: bool) -> Outcome:
    """手推的反向与 autograd 一致吗？忘了 μ、σ² 也是 x 的函数会怎样？"""
    generator = make_generator(seed)
    errors = hand_errors(generator)
    for name, error in errors.items():
        print(f"  {name:24s} 最大相对误差 {error:.1e}")
    x = torch.randn(24, 1, generator=generator, dtype=torch.float64)
    logits = torch.cat([2 * x, torch.zeros_like(x)], dim=1)
    label = torch.randint(2, (24,), generator=generator)
    g_hat = 24 * cross_entropy_grad(logits, label)[:, :1]
    mean, var = moments(x, (0,))
    x_hat = normalize(x, mean, var, 1e-5)
    gx, _, _ = batch_norm_backward(g_hat, x, torch.ones(1, dtype=torch.float64))
    steps = 20 if smoke else 300
    runs = {
        name: descend(norm, steps, make_generator(seed))
        for name, norm in [("true gradient", whole_batch_norm), ("frozen", frozen_batch_norm)]
    }
    for name, (losses, norms) in runs.items():
        print(
            f"  {name:14s} {steps} 步：损失 {losses[0]:.4f} -> {losses[-1]:.4f}，"
            f"参数的范数 {norms[0]:.2f} -> {norms[-1]:.2f}"
        )
    growth = runs["frozen"][1][-1] / runs["true gradient"][1][-1]
    results = [
        (Check("手推的归一化反向：最大相对误差", 1.0, (1e-12, 0.0)), max(errors.values())),
        (Check("把 μ、σ² 当常数：参数的范数 ÷ 正确的", 1.0, (5.0, 100.0)), growth),
    ]
    pieces = (x_hat, g_hat, gx * (var + 1e-5).sqrt())
    return Outcome(figures.backward_figure([p.squeeze(1).numpy() for p in pieces], runs), results)


TOPICS: dict[str, Topic] = {
    "axes": topic_axes,
    "bn-modes": topic_bn_modes,
    "bn-batch": topic_bn_batch,
    "bn-backward": topic_bn_backward,
}
