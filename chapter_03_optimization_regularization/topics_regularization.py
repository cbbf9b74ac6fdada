"""demo.py 的专题：L1 与 L2、衰减放在哪里、Dropout、梯度裁剪。对应 regularization.md。"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from chapter_02_nn_basics_mlp.losses import cross_entropy
from chapter_03_optimization_regularization import figures_regularization as figures
from chapter_03_optimization_regularization.normalization import BatchNorm1d
from chapter_03_optimization_regularization.optimizers import SGD
from chapter_03_optimization_regularization.optimizers_adam import Adam, AdamW
from chapter_03_optimization_regularization.regularization import (
    Dropout,
    clip_grad_norm_,
    clip_grad_value_,
    dropout,
    l1_penalty,
    prox_elastic_net_,
    prox_l1_,
)
from utils import make_generator
from utils.synth_points import two_moons
from utils.topics import Check, Outcome, Topic

# ---------------------------------------------------------------- L1、L2 与弹性网

FEATURES, SUPPORT = 40, 6  # 老师只用前 6 个特征；其中特征 0 与 1 几乎相同
NOISE = 0.5  # 目标里的噪声，标准差


def sparse_regression(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``y = Σ_{j<6} ±x_j + 噪声``，``(N, 40)`` 与 ``(N,)``；特征 0 与 1 的相关系数约 0.98。"""
    x = torch.randn(count, FEATURES, generator=generator)
    x[:, 1] = 0.98 * x[:, 0] + 0.2 * x[:, 1]
    teacher = torch.zeros(FEATURES)
    teacher[:SUPPORT] = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    return x, x @ teacher + NOISE * torch.randn(count, generator=generator)


def fit_linear(
    x: Tensor,
    y: Tensor,
    steps: int,
    penalty: Callable[[Tensor], Tensor] | None = None,
    proximal: Callable[[Tensor, float], None] | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """最小化 ``½ mean((xw − y)²)`` 加正则：``penalty`` 写进损失，``proximal(w, lr)`` 每步之后。"""
    w = torch.zeros(x.shape[1]) if start is None else start.clone()
    w.requires_grad_()
    lr = len(x) / torch.linalg.matrix_norm(x, 2).item() ** 2  # 1/λ_max：不超过它，ISTA 必收敛
    optimizer = SGD([w], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (x @ w - y).square().mean() / 2
        (loss if penalty is None else loss + penalty(w)).backward()
        optimizer.step()
        if proximal is not None:
            proximal(w, lr)
    return w.detach()


def regularization_path(x: Tensor, y: Tensor, strengths: Sequence[float], steps: int) -> dict:
    """三种正则在各强度下的权重，各为 ``(强度个数, 40)``；由强到弱，上一个解作下一个的起点。"""
    paths: dict[str, list[Tensor]] = {"L1": [], "elastic net": [], "L2": []}
    lasso = elastic = None
    identity = torch.eye(x.shape[1])
    for s in strengths:
        lasso = fit_linear(x, y, steps, None, lambda w, lr, s=s: prox_l1_([w], lr * s), lasso)
        elastic = fit_linear(
            x, y, steps, None, lambda w, lr, s=s: prox_elastic_net_([w], lr, s / 2, s / 2), elastic
        )
        ridge = torch.linalg.solve(x.T @ x / len(x) + s * identity, x.T @ y / len(x))
        for name, w in zip(paths, (lasso, elastic, ridge), strict=True):
            paths[name].append(w)
    return {name: torch.stack(ws) for name, ws in paths.items()}


def topic_sparsity(seed: int, smoke: bool) -> Outcome:
    """L1 怎样得到精确的零？直接对 |w| 求次梯度为什么得不到？"""
    generator = make_generator(seed)
    x, y = sparse_regression(100, generator)
    x_val, y_val = sparse_regression(1000, generator)
    steps = 20 if smoke else 400
    top = (x.T @ y).abs().max().item() / len(x)  # 再强，L1 的解就全是零
    strengths = [top * 10 ** (-2.5 * k / 24) for k in range(25)]
    paths = regularization_path(x, y, strengths, steps)
    for name, path in paths.items():
        errors = (x_val @ path.T - y_val.unsqueeze(1)).square().mean(0)
        best = errors.argmin().item()
        w = path[best]
        print(
            f"  {name:11s} 验证集选中的强度 {strengths[best]:.3f}：验证 MSE {errors[best]:.3f}，"
            f"精确为零 {(w == 0).sum()} 个，w₀ = {w[0]:.2f}，w₁ = {w[1]:.2f}"
        )
    strength = 0.15
    exact = fit_linear(x, y, steps, None, lambda w, lr: prox_l1_([w], lr * strength))
    naive = fit_linear(x, y, steps, lambda w: strength * l1_penalty([w]))
    truth = torch.arange(FEATURES) < SUPPORT
    wrong = ((exact != 0) != truth).sum().item()
    print(
        f"  强度 {strength}，{FEATURES - SUPPORT} 个无关特征：近端精确为零 "
        f"{(exact[SUPPORT:] == 0).sum()} 个；次梯度 {(naive[SUPPORT:] == 0).sum()} 个，"
        f"它们的 |w| 平均 {naive[SUPPORT:].abs().mean():.1e}"
    )
    figure = figures.sparsity_figure(
        strengths, {k: v.numpy() for k, v in paths.items()}, SUPPORT, exact, naive
    )
    results = [
        (Check("近端 L1：选错的特征数（共 40 个）", 34.0, (3.0, 0.0)), float(wrong)),
        (Check("次梯度 L1：精确为零的权重数", 34.0, (0.0, 0.0)), float((naive == 0).sum())),
    ]
    return Outcome(figure, results)


# ---------------------------------------------------------------- L2 与解耦的衰减


def measure_decay(
    optimizer_class: type[torch.optim.Optimizer],
    scales: Tensor,
    steps: int,
    decay: float,
    generator: torch.Generator,
) -> Tensor:
    """梯度是纯噪声时，权重每步的平均值 ``(steps + 1, 尺度个数)``，从 1 出发。

    每个尺度 200 个权重，梯度成对地取 ±ξ：噪声造成的游走两两抵消，剩下的就是衰减。
    """
    w = torch.ones(200, len(scales), dtype=torch.float64, requires_grad=True)
    optimizer = optimizer_class([w], lr=1e-3, weight_decay=decay)
    means = [w.detach().mean(0)]
    for _ in range(steps):
        noise = torch.randn(100, len(scales), generator=generator, dtype=torch.float64)
        w.grad = scales * torch.cat([noise, -noise])
        optimizer.step()
        means.append(w.detach().mean(0))
    return torch.stack(means)


def topic_decay(seed: int, smoke: bool) -> Outcome:
    """同一个 weight_decay，写进梯度与解耦，在 Adam 里各把权重缩小多少？"""
    decay, steps = 0.1, 50 if smoke else 1000
    scales = torch.logspace(-1, 2, 13, dtype=torch.float64)
    curves, rates = {}, {}
    for name, kind in (("SGD + L2", SGD), ("Adam + L2", Adam), ("AdamW", AdamW)):
        means = measure_decay(kind, scales, steps, decay, make_generator(seed))
        curves[name] = means
        # w_T = w_0 exp(−r · lr · λ · T)，解耦的衰减 r = 1
        rates[name] = -means[-1].log() / (1e-3 * decay * steps)
    print("  梯度的标准差        " + "".join(f"{scales[i]:8.1f}" for i in (0, 4, 8, 12)))
    for name, rate in rates.items():
        shown = "".join(f"{rate[i].item():8.3f}" for i in (0, 4, 8, 12))
        print(f"  {name:10s} 相对衰减率{shown}")
    figure = figures.decay_figure(scales, rates, curves, (2, 4, 8), decay)
    ratio = (rates["Adam + L2"][8] / rates["Adam + L2"][4]).item()
    results = [
        (Check("Adam + L2：梯度大 10 倍，衰减率之比", 1.0, (0.11, 0.09)), ratio),
        (
            Check("AdamW：各尺度的衰减率之比（最小 ÷ 最大）", 0.001, (0.99, 1.0)),
            (rates["AdamW"].min() / rates["AdamW"].max()).item(),
        ),
    ]
    return Outcome(figure, results)


# ---------------------------------------------------------------- Dropout


def variance_shift(rates: Sequence[float], generator: torch.Generator) -> list[float]:
    """Dropout 之后接批归一化：评估时实际的方差 ÷ 批归一化记住的方差。"""
    x = torch.randn(20_000, 8, generator=generator).relu()
    ratios = []
    for p in rates:
        norm = BatchNorm1d(8, momentum=None)
        norm(dropout(x, p, True, generator))  # 训练时看到的是丢弃之后的
        ratios.append((x.var(0) / norm.running_var).mean().item())
    return ratios


def train_dropout_net(seed: int, steps: int) -> tuple[nn.Sequential, Tensor]:
    """隐藏层之后有 Dropout 的两层网络，分双月；返回 (网络, 测试点)。"""
    generator = make_generator(seed)
    x, y = two_moons(200, generator)
    net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), Dropout(0.5, generator), nn.Linear(64, 2))
    optimizer = Adam(net.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
    return net, two_moons(200, generator)[0]


@torch.no_grad()
def ensemble_gaps(
    net: nn.Sequential, x: Tensor, counts: Sequence[int], repeats: int
) -> dict[str, list[float]]:
    """k 个掩码的平均与"权重缩放"的网络相差多少（概率之差的平均），几何与算术两种平均。"""
    scaled = net.eval()(x).softmax(-1)
    net.train()
    gaps: dict[str, list[float]] = {"geometric mean": [], "arithmetic mean": []}
    for k in counts:
        found: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            # 后面只有一层线性与 softmax，隐藏层不必重算
            hidden = net[1](net[0](x)).expand(k, *(-1, -1))
            logs = net[3](net[2](hidden)).log_softmax(-1)  # (k, N, 2)
            averages = logs.mean(0).softmax(-1), logs.exp().mean(0)
            for average, values in zip(averages, found, strict=True):
                values.append((average - scaled).abs().mean().item())
        for name, values in zip(gaps, found, strict=True):
            gaps[name].append(statistics.fmean(values))
    return gaps


def topic_dropout(seed: int, smoke: bool) -> Outcome:
    """不除以 1−p 会怎样？评估时的网络等于哪一个集成？和批归一化一起用呢？"""
    generator = make_generator(seed)
    rates = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    x = torch.rand(20_000, generator=generator)  # 均值 ½ 的激活
    kept = {p: dropout(x, p, True, generator) for p in rates}  # 再乘 1−p，就是没有缩放的
    inverted = [(x.mean() / kept[p].mean()).item() for p in rates]
    plain = [(x.mean() / (kept[p] * (1 - p)).mean()).item() for p in rates]
    shift = variance_shift(rates, generator)
    for p in (0.2, 0.5, 0.8):
        i = rates.index(p)
        print(
            f"  p = {p}：评估 ÷ 训练的平均激活，倒置 {inverted[i]:.3f}，"
            f"不缩放 {plain[i]:.3f}；批归一化的方差差 {shift[i]:.3f} 倍"
        )
    net, points = train_dropout_net(seed, 20 if smoke else 500)
    counts = [1, 4, 16, 64] if smoke else [1, 4, 16, 64, 256, 1024]
    gaps = ensemble_gaps(net, points, counts, 2 if smoke else 10)
    for name, values in gaps.items():
        print(
            f"  {name:15s}"
            + "".join(f"  k={k}: {v:.4f}" for k, v in zip(counts, values, strict=True))
        )
    few, many = gaps["geometric mean"][1], gaps["geometric mean"][-1]  # k = 1 还不在渐近区
    slope = math.log(many / few) / math.log(counts[-1] / counts[1])
    figure = figures.dropout_figure(rates, inverted, plain, shift, counts, gaps)
    results = [
        (Check("p = 0.5：倒置的 Dropout，评估 ÷ 训练的平均激活", 2.0, (1.03, 0.97)), inverted[5]),
        (Check("k 个掩码的几何平均趋于缩放的网络：对数斜率", 0.0, (-0.4, -0.6)), slope),
    ]
    return Outcome(figure, results)


# ---------------------------------------------------------------- 梯度裁剪

TEACHER, LENGTH = (0.9, 1.0), 20


def recurrence(w: Tensor | float, u: Tensor | float, x: Tensor) -> Tensor:
    """``h_t = w h_{t−1} + u x_t`` 走完 20 步的末态；``w`` 被连乘 20 次，``|w| > 1`` 处就是悬崖。"""
    h = torch.zeros_like(x[..., 0])
    for t in range(x.shape[-1]):
        h = w * h + u * x[..., t]
    return h


def train_recurrence(seed: int, steps: int, clip: str) -> dict[str, list]:
    """从悬崖上的 (1.4, −1) 出发学 ``TEACHER``；``clip`` 为 none、norm 或 value，上限都是 1。"""
    generator = make_generator(seed)
    p = torch.tensor([1.4, -1.0], requires_grad=True)
    optimizer = SGD([p], lr=0.01)
    record: dict[str, list] = {"path": [p.tolist()], "loss": [], "norm": [], "cosine": []}
    for _ in range(steps):
        x = torch.randn(32, LENGTH, generator=generator)
        optimizer.zero_grad()
        loss = (recurrence(p[0], p[1], x) - recurrence(*TEACHER, x)).square().mean()
        loss.backward()
        raw = p.grad.clone()
        if clip == "norm":
            clip_grad_norm_([p], 1.0)
        elif clip == "value":
            clip_grad_value_([p], 1.0)
        optimizer.step()
        cosine = torch.cosine_similarity(raw.double(), p.grad.double(), dim=0).item()
        for key, value in (("loss", loss.item()), ("norm", raw.norm().item()), ("cosine", cosine)):
            record[key].append(value)
        record["path"].append(p.tolist())
    return record


def topic_clipping(seed: int, smoke: bool) -> Outcome:
    """梯度悬崖上的一步会飞到哪里？按范数与按值裁剪，方向各变了多少？"""
    runs = {
        name: train_recurrence(seed, 30 if smoke else 400, clip)
        for name, clip in (("no clipping", "none"), ("by norm", "norm"), ("by value", "value"))
    }
    for name, run in runs.items():
        w, u = run["path"][-1]
        second = "，".join(f"{v:.3g}" for v in run["path"][1])
        print(
            f"  {name:11s} 第一步到 ({second})，最后 ({w:.3f}, {u:.3f})，"
            f"损失 {run['loss'][-1]:.3g}，与原梯度夹角余弦最小 {min(run['cosine']):.4f}"
        )
    generator = make_generator(seed)
    x = torch.randn(256, LENGTH, generator=generator)
    w, u = torch.linspace(0.0, 1.5, 91), torch.linspace(-1.5, 1.5, 61)
    grid_w, grid_u = torch.meshgrid(w, u, indexing="xy")
    # 参数 (61, 91, 1) 与样本 (256,) 广播
    h = recurrence(grid_w[..., None], grid_u[..., None], x.expand(1, 1, *x.shape))
    surface = (h - recurrence(*TEACHER, x)).square().mean(-1)
    figure = figures.clipping_figure(w, u, surface, runs, TEACHER)
    w, u = runs["by norm"]["path"][-1]
    results = [
        (
            Check("按范数裁剪：学到的参数与老师的距离", 2.06, (0.05, 0.0)),
            math.hypot(w - TEACHER[0], u - TEACHER[1]),
        ),
        (
            Check("按值裁剪：与原梯度夹角的余弦，最小", 1.0, (0.95, 0.7)),
            min(runs["by value"]["cosine"]),
        ),
        (
            Check("按范数裁剪：与原梯度夹角的余弦，最小", 0.7, (0.999999, 1.000001)),
            min(runs["by norm"]["cosine"]),
        ),
    ]
    return Outcome(figure, results)


TOPICS: dict[str, Topic] = {
    "sparsity": topic_sparsity,
    "decay": topic_decay,
    "dropout": topic_dropout,
    "clipping": topic_clipping,
}
