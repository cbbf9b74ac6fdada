"""demo.py 的专题：测试函数上的轨迹、稳定极限、稳定边缘、偏差修正、切片。对应 landscapes.md。"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from chapter_02_nn_basics_mlp.losses import cross_entropy
from chapter_02_nn_basics_mlp.mlp import MLP
from chapter_03_optimization_regularization import figures_landscapes as figures
from chapter_03_optimization_regularization.landscapes import (
    LANDSCAPES,
    Landscape,
    filter_normalized_direction,
    loss_slice,
    quadratic,
    sharpness,
    trajectory,
)
from chapter_03_optimization_regularization.networks import BlockMLP
from chapter_03_optimization_regularization.optimizers import SGD, RMSprop
from chapter_03_optimization_regularization.optimizers_adam import Adam
from utils import make_generator
from utils.datasets import ImageBatches, load_images
from utils.topics import Check, Outcome, Topic

# ---------------------------------------------------------------- 轨迹

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": SGD,
    "momentum": partial(SGD, momentum=0.9),
    "Nesterov": partial(SGD, momentum=0.9, nesterov=True),
    "RMSprop": RMSprop,
    "Adam": Adam,
}
TOLERANCE = 1e-3  # 函数值离极小值这么近就算到了


def steps_to_minimum(values: Tensor, lowest: float) -> int | None:
    """轨迹的函数值第一次进入 ``TOLERANCE`` 之内、此后不再出来的步数；没有则为 ``None``。"""
    outside = (~((values - lowest).abs() < TOLERANCE)).nonzero()  # nan 也算在外面
    if len(outside) == 0:
        return 0
    last = outside[-1].item()
    return None if last == len(values) - 1 else last + 1


def tune_path(
    landscape: Landscape, make: Callable[..., torch.optim.Optimizer], rates: list[float], steps: int
) -> tuple[float, Tensor, int | None]:
    """在 ``rates`` 里选到达最快的（都到不了则选最后的函数值最低的）：(学习率, 轨迹, 步数)。"""
    best = None
    for lr in rates:
        path = trajectory(landscape.function, partial(make, lr=lr), landscape.start, steps)
        values = landscape.function(path)
        arrived = steps_to_minimum(values, landscape.lowest)
        final = values[-1].item()
        rank = (
            math.inf if arrived is None else arrived,
            final if math.isfinite(final) else math.inf,
        )
        if best is None or rank < best[0]:
            best = (rank, (lr, path, arrived))
    return best[1]


def topic_trajectories(seed: int, smoke: bool) -> Outcome:
    """四种地形上，谁怎么走，多少步走到？"""
    steps, count = (20, 3) if smoke else (500, 10)
    rates = [10 ** (-3.5 + 3 * i / (count - 1)) for i in range(count)]
    panels, arrivals = {}, {}
    print(f"  每种 {count} 个学习率里选到达最快的；误差 {TOLERANCE}，至多 {steps} 步")
    print("  " + " " * 12 + "".join(f"{name:>17s}" for name in OPTIMIZERS))
    for name, landscape in LANDSCAPES.items():
        paths, cells = {}, []
        for optimizer, make in OPTIMIZERS.items():
            lr, path, arrived = tune_path(landscape, make, rates, steps)
            paths[optimizer] = (path.numpy(), arrived)
            arrivals[name, optimizer] = arrived
            cells.append(f"{'—' if arrived is None else arrived} ({lr:.2g})")
        panels[name] = (landscape, paths)
        print(f"  {name:12s}" + "".join(f"{cell:>17s}" for cell in cells))
    reached = sum(arrived is not None for arrived in arrivals.values())
    return Outcome(
        figures.trajectories_figure(panels),
        [(Check(f"{len(arrivals)} 种组合中走到的", 0.0, (14.0, 20.0)), reached)],
    )


# ---------------------------------------------------------------- 稳定极限


def converges(make: Callable[..., torch.optim.Optimizer], lr: float, steps: int) -> bool:
    """在 ``½ λ w²`` （条件数 30 的二次函数）上，走 ``steps`` 步之后是不是离极小点更近了。"""
    path = trajectory(quadratic, partial(make, lr=lr), (1.0, 1.0), steps)
    return bool(path[-1].norm() < path[0].norm())


def stability_limit(make: Callable[..., torch.optim.Optimizer], steps: int) -> float:
    """二分法：收敛与发散之间的学习率，相对误差不到 5e-4。"""
    low, high = 1e-3, 1.0
    while high / low > 1.0005:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if converges(make, middle, steps) else (low, middle)
    return low


def contraction(make: Callable[..., torch.optim.Optimizer], lr: float, steps: int) -> float:
    """每步离极小点的距离缩小到几倍，由后半程的几何平均得出。"""
    path = trajectory(quadratic, partial(make, lr=lr), (1.0, 1.0), 2 * steps)
    return ((path[-1].norm() / path[steps].norm()) ** (1 / steps)).item()


def topic_stability(seed: int, smoke: bool) -> Outcome:
    """学习率超过多少就发散？动量把这个极限放宽多少？"""
    top, steps = 30.0, 50 if smoke else 500  # λ_min = 1，λ_max = 条件数 = 30
    betas = (0.0, 0.5, 0.9)
    measured: dict[str, list[float]] = {"heavy ball": [], "Nesterov": []}
    theory: dict[str, list[float]] = {"heavy ball": [], "Nesterov": []}
    for beta in betas:
        for name, nesterov in (("heavy ball", False), ("Nesterov", True)):
            make = partial(SGD, momentum=beta, nesterov=nesterov and beta > 0)
            measured[name].append(stability_limit(make, steps))
            factor = 2 * (1 + beta) / (1 + 2 * beta) if nesterov else 2 * (1 + beta)
            theory[name].append(factor / top)
            print(
                f"  {name:10s} β={beta:.1f}  实测极限 {measured[name][-1]:.5f}"
                f"  理论 {theory[name][-1]:.5f}"
            )
    ratios = [0.5, 0.95, 1.0, 1.02]
    curves = {}
    for ratio in ratios:
        path = trajectory(quadratic, partial(SGD, lr=ratio * 2 / top), (1.0, 1.0), 60)
        curves[f"{ratio:g}"] = quadratic(path).tolist()
    gaps = [
        abs(m / t - 1)
        for name in measured
        for m, t in zip(measured[name], theory[name], strict=True)
    ]
    root = math.sqrt(top)
    best_beta = ((root - 1) / (root + 1)) ** 2
    heavy_ball = partial(SGD, momentum=best_beta)
    rates = {
        "梯度下降": (contraction(SGD, 2 / (top + 1), 40), (top - 1) / (top + 1)),
        "重球动量": (contraction(heavy_ball, 4 / (root + 1) ** 2, 40), (root - 1) / (root + 1)),
    }
    for name, (rate, expected) in rates.items():
        print(f"  {name}在最优的参数下：每步缩小到 {rate:.4f} 倍，理论 {expected:.4f}")
    rate_gap = max(abs(rate / expected - 1) for rate, expected in rates.values())
    figure = figures.stability_figure(curves, betas, measured, theory)
    checks = [
        (Check("稳定极限：实测与理论的最大相对差", 1.0, (0.0, 0.01)), max(gaps)),
        (Check("最优的收敛率：实测与理论的最大相对差", 1.0, (0.0, 0.03)), rate_gap),
    ]
    return Outcome(figure, checks)


# ---------------------------------------------------------------- 稳定边缘


def _few_digits(count: int, classes: int = 10) -> tuple[Tensor, Tensor]:
    data = load_images("synth-digits", "train", limit=count)
    batches = ImageBatches(*data[:2], count)
    x, y = next(iter(batches))
    return nn.functional.avg_pool2d(x, 2).flatten(1), y % classes


def edge_run(
    x: Tensor, y: Tensor, lr: float, steps: int, every: int, seed: int
) -> dict[str, list[float]]:
    """全批量梯度下降；每步的损失，每 ``every`` 步的锐度。"""
    model = MLP(x.shape[1], (32, 32), 10, "tanh", make_generator(seed))
    optimizer = SGD(model.parameters(), lr=lr)
    parameters = list(model.parameters())
    target = nn.functional.one_hot(y, 10).to(x.dtype)
    record: dict[str, list[float]] = {"loss": [], "step": [], "sharpness": []}

    def loss_fn() -> Tensor:  # 均方误差：锐度不会因为概率趋于 0、1 而自己降下来
        return (model(x) - target).square().sum(dim=1).mean() / 2

    for step in range(steps):
        if step % every == 0:
            record["step"].append(step)
            record["sharpness"].append(sharpness(loss_fn, parameters, make_generator(seed), 12))
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        optimizer.step()
        record["loss"].append(loss.item())
    return record


def topic_edge(seed: int, smoke: bool) -> Outcome:
    """训练中的锐度会不会停在 2/η 附近？（稳定边缘）"""
    count, steps, every = (32, 20, 10) if smoke else (256, 2500, 25)
    x, y = _few_digits(count)
    runs = {lr: edge_run(x, y, lr, steps, every, seed) for lr in (0.15, 0.2, 0.3)}
    ratios = []
    for lr, run in runs.items():
        late = run["sharpness"][len(run["sharpness"]) * 3 // 4 :]
        rises = sum(b > a for a, b in zip(run["loss"], run["loss"][1:], strict=False))
        ratios.append(sum(late) / len(late) * lr / 2)
        print(
            f"  η={lr:<5g} 2/η={2 / lr:4.0f}  锐度 开头 {run['sharpness'][0]:6.2f}"
            f"  末四分之一平均 {sum(late) / len(late):6.2f}"
            f"  损失 {run['loss'][0]:.3f} -> {run['loss'][-1]:.5f}，其间上升 {rises} 步"
        )
    worst = max(ratios, key=lambda r: abs(r - 1))
    check = Check("末四分之一的平均锐度 ÷ (2/η)，离 1 最远的", 0.1, (0.8, 1.15))
    return Outcome(figures.edge_figure(runs), [(check, worst)])


# ---------------------------------------------------------------- 偏差修正


def adam_sizes(steps: int, beta1: float, beta2: float, corrected: bool) -> list[float]:
    """梯度恒为 1 时，Adam 各步的步长（以学习率为单位）；不修正就是 ``m/√v``。"""
    m = v = 0.0
    sizes = []
    for t in range(1, steps + 1):
        m = beta1 * m + (1 - beta1)
        v = beta2 * v + (1 - beta2)
        size = m / math.sqrt(v)
        if corrected:
            size *= math.sqrt(1 - beta2**t) / (1 - beta1**t)
        sizes.append(size)
    return sizes


def topic_bias_correction(seed: int, smoke: bool) -> Outcome:
    """Adam 不修正偏差，开头的步子会错多少？"""
    steps = 100 if smoke else 5000
    curves = {
        "corrected": adam_sizes(steps, 0.9, 0.999, True),
        r"$\beta_2=0.999$, not corrected": adam_sizes(steps, 0.9, 0.999, False),
        r"$\beta_2=0.99$, not corrected": adam_sizes(steps, 0.9, 0.99, False),
    }
    p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = Adam([p], lr=1.0, eps=0.0)
    moved = []
    for _ in range(50):
        before = p.item()
        p.grad = torch.ones_like(p)
        optimizer.step()
        moved.append(before - p.item())
    plain = curves[r"$\beta_2=0.999$, not corrected"]
    print(f"  修正：每一步恰为 η（与本章的 Adam 之差 {max(abs(s - 1) for s in moved):.1e}）")
    print(
        f"  不修正：第 1 步 {plain[0]:.3f}η，"
        f"最大 {max(plain):.2f}η（第 {plain.index(max(plain)) + 1} 步）"
    )
    return Outcome(
        figures.bias_figure(curves),
        [
            (
                Check("修正之后各步与 η 的最大相对差", 1.0, (0.0, 1e-12)),
                max(abs(s - 1) for s in moved),
            ),
            (Check("不修正：最大的步长 ÷ η", 1.0, (6.0, 7.0) if not smoke else (0, 9)), max(plain)),
        ],
    )


# ---------------------------------------------------------------- 切片


def train_net(x: Tensor, y: Tensor, residual: bool, steps: int, seed: int) -> BlockMLP:
    """20 层、宽 32 的网络，全批量训练。"""
    model = BlockMLP(
        x.shape[1], 32, 20, 10, norm="layer", residual=residual, generator=make_generator(seed)
    )
    optimizer = Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@torch.no_grad()
def rescale(model: MLP, factor: float) -> None:
    """第一层乘 ``factor``、第二层除以 ``factor``：ReLU 网络的函数不变。"""
    first, second = model.layers[:2]
    first.weight.mul_(factor)
    first.bias.mul_(factor)
    second.weight.div_(factor)


def rescaled_slices(x: Tensor, y: Tensor, grid: Tensor, steps: int, seed: int) -> dict[str, Tensor]:
    """同一个函数的两组权重，各沿普通的与过滤器归一化的方向切一条。"""
    model = MLP(x.shape[1], (32,), 10, "relu", make_generator(seed))
    optimizer = Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    curves = {}
    for factor in (1.0, 10.0):
        rescale(model, factor)
        loss_fn = partial(_loss, model, x, y)
        parameters = list(model.parameters())
        generator = make_generator(seed)
        plain = [torch.empty_like(p).normal_(generator=generator) for p in parameters]
        filtered = filter_normalized_direction(model, make_generator(seed))
        curves[f"plain, x{factor:g}"] = loss_slice(loss_fn, parameters, [plain], grid)
        curves[f"filter-normalized, x{factor:g}"] = loss_slice(
            loss_fn, parameters, [filtered], grid
        )
    return curves


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x), y)


def topic_slice(seed: int, smoke: bool) -> Outcome:
    """高维的损失怎样画成图？残差把地形变成什么样？"""
    count, steps, points = (32, 5, 5) if smoke else (256, 400, 25)
    x, y = _few_digits(count)
    grid = torch.linspace(-1, 1, points)
    surfaces, spans = {}, {}
    for name, residual in (("20 layers, plain", False), ("20 layers, residual", True)):
        model = train_net(x, y, residual, steps, seed)
        parameters = list(model.parameters())
        generator = make_generator(seed + 1)
        directions = [filter_normalized_direction(model, generator) for _ in range(2)]
        surface = loss_slice(partial(_loss, model, x, y), parameters, directions, grid)
        surfaces[name] = surface.numpy()
        middle = points // 2
        ring = surface[0].mean() + surface[-1].mean() + surface[:, 0].mean() + surface[:, -1].mean()
        spans[name] = ring.item() / 4 - surface[middle, middle].item()
        print(f"  {name:20s} 中心 {surface[middle, middle]:.4f}  四边的平均 {ring.item() / 4:.3f}")
    curves = rescaled_slices(x, y, torch.linspace(-1, 1, 41), 10 if smoke else 150, seed)
    same = curves["filter-normalized, x1"] - curves["filter-normalized, x10"]
    other = curves["plain, x1"] - curves["plain, x10"]
    print(
        "  同一个函数的两组权重（第一层乘 10、第二层除以 10）："
        f"普通切片最大差 {other.abs().max():.2f}，过滤器归一化之后 {same.abs().max():.1e}"
    )
    figure = figures.slice_figure(surfaces, {k: v.numpy() for k, v in curves.items()})
    return Outcome(
        figure,
        [
            (Check("重缩放前后，归一化切片的最大差", 1.0, (0.0, 1e-3)), same.abs().max().item()),
            (Check("重缩放前后，普通切片的最大差", 0.0, (0.5, 1e9)), other.abs().max().item()),
        ],
    )


TOPICS: dict[str, Topic] = {
    "trajectories": topic_trajectories,
    "stability": topic_stability,
    "edge": topic_edge,
    "bias-correction": topic_bias_correction,
    "slice": topic_slice,
}
