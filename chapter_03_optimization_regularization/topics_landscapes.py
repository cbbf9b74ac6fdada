"""demo.py 的专题：测试函数上的轨迹、稳定极限、稳定边缘、偏差修正、切片。对应 landscapes.md。"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from chapter_02_nn_basics_mlp.losses import cross_entropy
from chapter_02_nn_basics_mlp.mlp import MLP
from chapter_03_optimization_regularization import figures_landscapes as figures
from chapter_03_optimization_regularization.data import small_digits
from chapter_03_optimization_regularization.landscapes import (
    LANDSCAPES,
    Landscape,
    filter_normalized_direction,
    loss_slice,
    quadratic,
    saddle,
    sharpness,
    trajectory,
)
from chapter_03_optimization_regularization.networks import BlockMLP
from chapter_03_optimization_regularization.optimizers import SGD, RMSprop
from chapter_03_optimization_regularization.optimizers_adam import Adam, adam_naive
from utils import make_generator
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


def escape_steps(make: Callable[..., torch.optim.Optimizer], lr: float, near: float) -> int | None:
    """从 ``(−1.6, near)`` 出发，多少步之后 ``|y| > ½``，离开了鞍点；400 步内没有则 ``None``。"""
    path = trajectory(saddle, partial(make, lr=lr), (-1.6, near), 400)
    away = (path[:, 1].abs() > 0.5).nonzero()
    return away[0].item() if len(away) else None


def topic_trajectories(seed: int, smoke: bool) -> Outcome:
    """四种地形上，谁怎么走，多少步走到？"""
    steps, count = (20, 3) if smoke else (500, 8)
    rates = [10 ** (-3.3 + 2.8 * i / (count - 1)) for i in range(count)]
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
    lr, near = 0.1, 1e-3
    escapes = {name: escape_steps(make, lr, near) for name, make in OPTIMIZERS.items()}
    theory = math.log(0.5 / near) / math.log(1 + lr)
    print(f"  离开鞍点（η 都取 {lr}，|y| 从 {near} 到 0.5）：{escapes}；SGD 的理论值 {theory:.1f}")
    nearer = escape_steps(SGD, lr, near**2)
    print(f"  起点再近 {1 / near:.0f} 倍，SGD 要 {nearer} 步")
    results = [
        (Check(f"{len(arrivals)} 种组合中走到的", 0.0, (14.0, 20.0)), float(reached)),
        (Check("SGD 离开鞍点的步数 ÷ 理论", 5.0, (1.0, 1.1)), escapes["SGD"] / theory),
    ]
    return Outcome(figures.trajectories_figure(panels), results)


# ---------------------------------------------------------------- 稳定极限


def converges(make: Callable[..., torch.optim.Optimizer], lr: float, steps: int) -> bool:
    """在条件数 30 的二次函数上，后半程是否离极小点越来越近；前半程留给暂态（动量先会冲高）。"""
    path = trajectory(quadratic, partial(make, lr=lr), (1.0, 1.0), steps)
    return bool(path[-1].norm() < path[steps // 2].norm())


def stability_limit(make: Callable[..., torch.optim.Optimizer], steps: int) -> float:
    """二分法：收敛与发散之间的学习率，相对误差不到 5e-4。"""
    low, high = 1e-3, 1.0
    while high / low > 1.0005:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if converges(make, middle, steps) else (low, middle)
    return math.sqrt(low * high)


def contraction(make: Callable[..., torch.optim.Optimizer], lr: float, steps: int) -> float:
    """每步离极小点的距离缩小到几倍，由后半程的几何平均得出。"""
    path = trajectory(quadratic, partial(make, lr=lr), (1.0, 1.0), 2 * steps)
    return ((path[-1].norm() / path[steps].norm()) ** (1 / steps)).item()


def measure_limits(betas: Sequence[float], top: float, steps: int) -> dict[str, list]:
    """各 β 下实测与理论的极限：名字 -> [(实测, 理论), ...]；β = 0 时两者都是梯度下降。"""
    limits: dict[str, list] = {"heavy ball": [], "Nesterov": []}
    for beta in betas:
        for name, found in limits.items():
            nesterov = name == "Nesterov" and beta > 0
            if name == "Nesterov" and not nesterov:  # 与重球是同一个算法，不必再量
                found.append(limits["heavy ball"][-1])
                continue
            factor = 2 * (1 + beta) / (1 + 2 * beta if nesterov else 1)
            make = partial(SGD, momentum=beta, nesterov=nesterov)
            found.append((stability_limit(make, steps), factor / top))
            measured, theory = found[-1]
            print(f"  {name:10s} β={beta:.1f}  实测极限 {measured:.5f}  理论 {theory:.5f}")
    return limits


def topic_stability(seed: int, smoke: bool) -> Outcome:
    """学习率超过多少就发散？动量把这个极限放宽多少？"""
    top, steps = 30.0, 40 if smoke else 300  # λ_min = 1，λ_max = 条件数 = 30
    betas = (0.0, 0.5, 0.9)
    limits = measure_limits(betas, top, steps)
    curves = {}
    for ratio in (0.5, 0.95, 1.0, 1.02):
        path = trajectory(quadratic, partial(SGD, lr=ratio * 2 / top), (1.0, 1.0), 60)
        curves[f"{ratio:g}"] = quadratic(path).tolist()
    root = math.sqrt(top)
    heavy_ball = partial(SGD, momentum=((root - 1) / (root + 1)) ** 2)
    rates = {
        "梯度下降": (contraction(SGD, 2 / (top + 1), 40), (top - 1) / (top + 1)),
        "重球动量": (contraction(heavy_ball, 4 / (root + 1) ** 2, 40), (root - 1) / (root + 1)),
    }
    for name, (rate, expected) in rates.items():
        print(f"  {name}在最优的参数下：每步缩小到 {rate:.4f} 倍，理论 {expected:.4f}")
    gap = max(abs(m / t - 1) for pairs in limits.values() for m, t in pairs)
    rate_gap = max(abs(rate / expected - 1) for rate, expected in rates.values())
    checks = [
        (Check("稳定极限：实测与理论的最大相对差", 1.0, (0.0, 0.002)), gap),
        (Check("最优的收敛率：实测与理论的最大相对差", 1.0, (0.0, 0.03)), rate_gap),
    ]
    return Outcome(figures.stability_figure(curves, betas, limits), checks)


# ---------------------------------------------------------------- 稳定边缘


def edge_run(
    x: Tensor, y: Tensor, lr: float, steps: int, every: int, seed: int
) -> dict[str, list[float]]:
    """全批量梯度下降；每步的损失，每 ``every`` 步的锐度。

    过了稳定极限，参数沿最陡的方向一步一反号，锐度跟着逐步一高一低。只隔固定的步数取一次，
    看到的是奇偶造成的假象；这里取相邻两步的平均。
    """
    model = MLP(x.shape[1], (32, 32), 10, "tanh", make_generator(seed))
    optimizer = SGD(model.parameters(), lr=lr)
    parameters = list(model.parameters())
    target = nn.functional.one_hot(y, 10).to(x.dtype)
    record: dict[str, list[float]] = {"loss": [], "step": [], "sharpness": []}
    pair: list[float] = []

    def loss_fn() -> Tensor:  # 均方误差：锐度不会因为概率趋于 0、1 而自己降下来
        return (model(x) - target).square().sum(dim=1).mean() / 2

    for step in range(steps):
        if step % every < 2:
            pair.append(sharpness(loss_fn, parameters, make_generator(seed), 12))
        if len(pair) == 2:
            record["step"].append(step)
            record["sharpness"].append(sum(pair) / 2)
            pair.clear()
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        optimizer.step()
        record["loss"].append(loss.item())
    return record


def topic_edge(seed: int, smoke: bool) -> Outcome:
    """训练中的锐度会不会停在 2/η 附近？（稳定边缘）"""
    count, steps, every = (32, 20, 10) if smoke else (256, 1600, 40)
    x, y = small_digits(count)
    runs = {lr: edge_run(x, y, lr, steps, every, seed) for lr in (0.15, 0.2, 0.3)}
    ratios, rises = [], []
    for lr, run in runs.items():
        late = run["sharpness"][len(run["sharpness"]) * 3 // 4 :]
        rises.append(sum(b > a for a, b in pairwise(run["loss"])))
        ratios.append(sum(late) / len(late) * lr / 2)
        print(
            f"  η={lr:<5g} 2/η={2 / lr:4.0f}  锐度 开头 {run['sharpness'][0]:6.2f}"
            f"  末四分之一平均 {sum(late) / len(late):6.2f}"
            f"  损失 {run['loss'][0]:.3f} -> {run['loss'][-1]:.5f}，其间上升 {rises[-1]} 步"
        )
    worst = max(ratios, key=lambda r: abs(r - 1))
    fall = max(run["loss"][-1] / run["loss"][0] for run in runs.values())
    checks = [
        (Check("末四分之一的平均锐度 ÷ (2/η)，离 1 最远的", 0.1, (0.9, 1.1)), worst),
        (Check("损失的末尾 ÷ 开头，最大的", 1.0, (0.0, 0.05)), fall),
        (Check("损失上升的步数，最少的一个", 0.0, (50.0, float(steps))), float(min(rises))),
    ]
    return Outcome(figures.edge_figure(runs), checks)


# ---------------------------------------------------------------- 偏差修正


def adam_steps(gradients: Tensor, beta2: float, corrected: bool) -> Tensor:
    """``adam_naive`` 各步的更新量 ``(T,)``，以学习率为单位。

    不修正的，就令 ``step = ∞``：``β^∞ = 0``，两个分母都是 1。
    """
    zero = torch.zeros((), dtype=gradients.dtype)
    m = v = zero
    moves = []
    for t, g in enumerate(gradients, start=1):
        step = t if corrected else math.inf
        p, m, v = adam_naive(zero, g, m, v, step, lr=1.0, betas=(0.9, beta2), eps=0.0)
        moves.append(-p)
    return torch.stack(moves)


def topic_bias_correction(seed: int, smoke: bool) -> Outcome:
    """Adam 不修正偏差，开头的步子会错多少？"""
    steps = 50 if smoke else 3000
    noise = torch.randn(steps, generator=make_generator(seed), dtype=torch.float64)
    gradients = 1 + 0.3 * noise  # 一个有噪声的梯度；修正的倍数与梯度无关
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    moves, factors, gaps = {}, {}, []
    for beta2 in (0.999, 0.99):
        fixed, plain = (adam_steps(gradients, beta2, corrected) for corrected in (True, False))
        formula = (1 - 0.9**t) / (1 - beta2**t).sqrt()
        moves[beta2] = (fixed.numpy(), plain.numpy())
        factors[beta2] = ((plain / fixed).numpy(), formula.numpy())
        gaps.append((plain / fixed / formula - 1).abs().max().item())
        print(
            f"  β₂={beta2:<5g} 不修正 ÷ 修正：第 1 步 {formula[0]:.3f}，最大 {formula.max():.3f}"
            f"（第 {formula.argmax() + 1} 步），第 50 步 {formula[49]:.3f}，第 {steps} 步"
            f" {formula[-1]:.3f}；实测与公式之差 {gaps[-1]:.0e}"
        )
    fixed, plain = (path[:50].sum().item() for path in moves[0.999])
    print(f"  前 50 步共走：修正 {fixed:.1f}η，不修正 {plain:.1f}η")
    p = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = Adam([p], lr=1.0, eps=0.0)
    for g in gradients[:50]:
        p.grad = g.clone()
        optimizer.step()
    checks = [
        (Check("修正的倍数：实测与公式的最大相对差", 1.0, (0.0, 1e-10)), max(gaps)),
        (Check("前 50 步的路程：不修正 ÷ 修正", 1.0, (4.5, 6.5)), plain / fixed),
        (Check("前 50 步：adam_naive 与 Adam 的差", 1.0, (0.0, 1e-10)), abs(p.item() + fixed)),
    ]
    return Outcome(figures.bias_figure(moves[0.999], factors), checks)


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


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x), y)


FACTOR, REACH = 4.0, 0.15  # 第一层乘的倍数；普通方向上最远走多远（过滤器归一化的走到 1）


def rescaled_slices(
    x: Tensor, y: Tensor, grid: Tensor, steps: int, seed: int
) -> tuple[dict[str, Tensor], list[float]]:
    """同一个函数的两组权重，各沿普通的与过滤器归一化的方向切一条；另有两者的锐度。"""
    model = MLP(x.shape[1], (32,), 10, "relu", make_generator(seed))
    optimizer = Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        _loss(model, x, y).backward()
        optimizer.step()
    loss_fn, parameters = partial(_loss, model, x, y), list(model.parameters())
    curves, peaks = {}, []
    for name, factor in (("trained", 1.0), ("rescaled", FACTOR)):
        rescale(model, factor)
        generator = make_generator(seed)
        plain = [torch.empty_like(p).normal_(generator=generator) for p in parameters]
        filtered = filter_normalized_direction(model, make_generator(seed))
        curves[f"plain, {name}"] = loss_slice(loss_fn, parameters, [plain], REACH * grid)
        curves[f"filter-normalized, {name}"] = loss_slice(loss_fn, parameters, [filtered], grid)
        peaks.append(sharpness(loss_fn, parameters, make_generator(seed)))
    return curves, peaks


def topic_slice(seed: int, smoke: bool) -> Outcome:
    """高维的损失怎样画成图？残差把地形变成什么样？"""
    count, steps, points = (32, 5, 5) if smoke else (256, 300, 25)
    x, y = small_digits(count)
    even = torch.linspace(-1, 1, points)
    side = even * even.abs().sqrt()  # 中间密、两头疏：针孔也看得清
    width = torch.gradient(side)[0]
    cells = torch.outer(width, width) / width.sum() ** 2  # 每个格点代表的面积
    surfaces, areas = {}, []
    for name, residual in (("20 layers, plain", False), ("20 layers, residual", True)):
        model = train_net(x, y, residual, steps, seed)
        generator = make_generator(seed + 1)
        directions = [filter_normalized_direction(model, generator) for _ in range(2)]
        surface = loss_slice(
            partial(_loss, model, x, y), list(model.parameters()), directions, side
        )
        surfaces[name] = surface.numpy()
        areas.append(cells[surface < 1].sum().item())
        middle = surface[points // 2, points // 2]
        print(f"  {name:20s} 中心的损失 {middle:.4f}，损失小于 1 的面积 {areas[-1]:.1%}")
    curves, peaks = rescaled_slices(x, y, torch.linspace(-1, 1, 41), 10 if smoke else 150, seed)
    print(f"  同一个函数，第一层乘 {FACTOR:g}、第二层除以 {FACTOR:g}：")
    gaps = {}
    for kind in ("plain", "filter-normalized"):
        trained, rescaled = curves[f"{kind}, trained"], curves[f"{kind}, rescaled"]
        gaps[kind] = ((trained - rescaled).abs().max() / trained.max()).item()
        print(f"    {kind:18s} 方向的切片最大相差 {gaps[kind]:.1e}倍（以前者的最高点为 1）")
    print(f"    锐度 {peaks[0]:.3f} -> {peaks[1]:.3f}")
    figure = figures.slice_figure(side, surfaces, curves, peaks, REACH)
    results = [
        (Check("损失小于 1 的面积：残差 − 普通", 0.0, (0.1, 0.6)), areas[1] - areas[0]),
        (Check("重缩放前后，归一化切片的最大相对差", 1.0, (0.0, 1e-4)), gaps["filter-normalized"]),
        (Check("重缩放前后，普通切片的最大相对差", 0.0, (0.5, 100.0)), gaps["plain"]),
        (Check("同一个函数，重缩放后的锐度 ÷ 之前", 1.0, (5.0, 30.0)), peaks[1] / peaks[0]),
    ]
    return Outcome(figure, results)


TOPICS: dict[str, Topic] = {
    "trajectories": topic_trajectories,
    "stability": topic_stability,
    "edge": topic_edge,
    "bias-correction": topic_bias_correction,
    "slice": topic_slice,
}
