"""demo.py 的专题：权重平均抵消噪声，过分自信的网络怎样校准。

对应 regularization.md 的「权重平均」与「校准与不确定性」两节。
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from chapter_02_nn_basics_mlp.losses import cross_entropy
from chapter_03_optimization_regularization import figures_regularization as figures
from chapter_03_optimization_regularization.averaging import EMA, SWA, update_bn
from chapter_03_optimization_regularization.calibration import (
    ReliabilityBins,
    expected_calibration_error,
    fit_temperature,
    mc_dropout,
    mutual_information,
    negative_log_likelihood,
    predictive_entropy,
    reliability_bins,
)
from chapter_03_optimization_regularization.normalization import BatchNorm1d
from chapter_03_optimization_regularization.optimizers import SGD
from chapter_03_optimization_regularization.optimizers_adam import Adam
from chapter_03_optimization_regularization.regularization import (
    Dropout,
    label_smoothing_cross_entropy,
)
from utils import make_generator, set_seed
from utils.datasets import TensorBatches
from utils.model_summary import display_width
from utils.synth_points import moon_bayes, two_moons
from utils.topics import Check, Outcome, Topic

NOISE = 0.4  # 双月的噪声：两类大片重叠，谁也不该处处自信

# ---------------------------------------------------------------- 权重平均


def sgd_variance(rate: float) -> float:
    """``w ← (1−a) w − lr ξ`` 的平稳方差 ÷ ``lr² Var ξ``：``1/(a(2−a))``，``a = lr λ``。"""
    return 1 / (rate * (2 - rate))


def ema_reduction(rate: float, decay: float) -> float:
    """平稳时 ``Var(EMA) / Var(w) = (1−β)/(1+β) · (1+βρ)/(1−βρ)``，``ρ = 1 − a``。"""
    rho = 1 - rate
    return (1 - decay) / (1 + decay) * (1 + decay * rho) / (1 - decay * rho)


def swa_reduction(rate: float, count: int) -> float:
    """``n`` 个相继的平稳值等权平均，``Var(w̄)/Var(w) = [n + 2 Σ_k (n−k) ρ^k] / n²``。"""
    rho = 1 - rate
    return (count + 2 * sum((count - k) * rho**k for k in range(1, count))) / count**2


def quadratic_averages(
    rate: float, decays: Sequence[float], steps: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """``½ w²`` 上 SGD 的 2000 条轨迹，梯度噪声标准正态；返回各种平均每步的方差 ``(steps,)``。"""
    w = nn.Linear(2000, 1, bias=False)  # 2000 个坐标各走各的，就是 2000 条轨迹
    nn.init.zeros_(w.weight)
    optimizer = SGD(w.parameters(), lr=rate)
    averages = {"SGD": w} | {f"EMA β={b:g}": EMA(w, b) for b in decays} | {"SWA": SWA(w)}
    variances: dict[str, list[Tensor]] = {name: [] for name in averages}
    for _ in range(steps):
        noise = torch.randn(w.weight.shape, generator=generator)
        w.weight.grad = w.weight.detach() + noise
        optimizer.step()
        for name, average in averages.items():
            if average is not w:
                average.update_parameters(w)
            variances[name].append(next(average.parameters()).detach().square().mean())
    return {name: torch.stack(values) for name, values in variances.items()}


def train_with_averages(seed: int, epochs: int) -> tuple[dict[str, list[float]], float, float]:
    """学习率恒定的小批 SGD 分双月，每轮的验证 NLL：原样、EMA、SWA（后一半）。

    返回 (曲线, SWA 重算统计量之前的 NLL, 贝叶斯分类器的 NLL)。
    """
    generator = make_generator(seed)
    x, y = two_moons(1000, generator, NOISE)
    x_val, y_val = two_moons(2000, generator, NOISE)
    set_seed(seed)
    model = nn.Sequential(
        nn.Linear(2, 64), BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
    )
    batches = TensorBatches(x, y, 20, generator=generator)
    optimizer = SGD(model.parameters(), lr=0.3)
    ema, swa = EMA(model, 0.99), SWA(model)
    curves: dict[str, list[float]] = {"SGD": [], "EMA": [], "SWA": []}

    @torch.no_grad()
    def validate(net: nn.Module) -> float:
        loss = cross_entropy(net.eval()(x_val), y_val).item()
        net.train()
        return loss

    stale = float("nan")
    for epoch in range(epochs):
        for x_batch, y_batch in batches:
            optimizer.zero_grad()
            cross_entropy(model(x_batch), y_batch).backward()
            optimizer.step()
            ema.update_parameters(model)
        curves["SGD"].append(validate(model))
        curves["EMA"].append(validate(ema))
        if epoch >= epochs // 2:
            swa.update_parameters(model)
            stale = validate(swa)  # 统计量是从最后一个模型抄来的
            update_bn([x], swa)
        curves["SWA"].append(validate(swa) if epoch >= epochs // 2 else float("nan"))
    posterior = moon_bayes(x_val.double(), NOISE)
    bayes = negative_log_likelihood(torch.stack([1 - posterior, posterior], dim=1), y_val)
    return curves, stale, bayes


def topic_averaging(seed: int, smoke: bool) -> Outcome:
    """学习率恒定的 SGD 停不下来；EMA 与 SWA 把方差降到理论所说的多少？"""
    rate, decays, steps = 0.3, (0.9, 0.99), 60 if smoke else 1000
    variances = quadratic_averages(rate, decays, steps, make_generator(seed))
    base = rate**2 * sgd_variance(rate)
    reductions = [1.0, *(ema_reduction(rate, b) for b in decays)]
    # variances 的最后一个是 SWA：它没有平稳值，理论随步数变
    levels = {name: base * r for name, r in zip(variances, reductions, strict=False)}
    counts = [30, 100, 300, 1000]  # 更早的时候轨迹还没有平稳
    swa_theory = [base * swa_reduction(rate, n) for n in counts]
    ratios = []
    for name, level in levels.items():
        measured = variances[name][steps // 2 :].mean().item()
        ratios.append(measured / level)
        print(f"  {name:16s} 平稳方差 实测 {measured:.5f}，理论 {level:.5f}")
    print(f"  SWA，{steps} 步         方差 实测 {variances['SWA'][-1]:.5f}，", end="")
    print(f"理论 {base * swa_reduction(rate, steps):.5f}（设从平稳出发）")
    curves, stale, bayes = train_with_averages(seed, 4 if smoke else 40)
    half = len(curves["SGD"]) // 2
    late = {name: torch.tensor(values[half:]) for name, values in curves.items()}
    for name, values in late.items():
        print(f"  {name:4s} 后一半各轮的验证 NLL：{values.mean():.4f} ± {values.std():.4f}")
    print(f"  SWA 不重算批归一化 {stale:.4f}，重算 {curves['SWA'][-1]:.4f}；贝叶斯 {bayes:.4f}")
    figure = figures.averaging_figure(variances, levels, counts, swa_theory, curves, bayes)
    worst = max(ratios, key=lambda r: abs(r - 1))
    excess = (late["EMA"].mean() - bayes) / (late["SGD"].mean() - bayes)
    results = [
        (Check("二次函数：平稳方差 实测 ÷ 理论（偏离最大者）", 3.0, (1.1, 0.9)), worst),
        (Check("小网络：EMA ÷ SGD，高出贝叶斯的 NLL", 1.0, (0.9, 0.0)), excess.item()),
    ]
    return Outcome(figure, results)


# ---------------------------------------------------------------- 校准


def train_net(
    seed: int, x: Tensor, y: Tensor, steps: int, smoothing: float = 0.0, p: float = 0.0
) -> nn.Sequential:
    """故意过拟合：整批 Adam，参数远多于样本；同一个种子，初始化相同。"""
    set_seed(seed)
    generator = make_generator(seed)
    layers: list[nn.Module] = []
    for fan_in in (2, 128):
        layers += [nn.Linear(fan_in, 128), nn.ReLU(), Dropout(p, generator)]
    model = nn.Sequential(*layers, nn.Linear(128, 2))
    optimizer = Adam(model.parameters(), lr=0.005)
    for _ in range(steps):
        optimizer.zero_grad()
        label_smoothing_cross_entropy(model(x), y, smoothing).backward()
        optimizer.step()
    return model.eval()


def measure(probabilities: Tensor, labels: Tensor) -> tuple[float, float, float, ReliabilityBins]:
    """(准确率, ECE, NLL, 各格)。"""
    accuracy = (probabilities.argmax(1) == labels).double().mean().item()
    error = expected_calibration_error(probabilities, labels)
    bins = reliability_bins(probabilities, labels, 10)
    return accuracy, error, negative_log_likelihood(probabilities, labels), bins


@torch.no_grad()
def calibration_maps(
    models: dict[str, nn.Sequential], temperature: float, samples: int
) -> tuple[dict[str, Tensor], tuple[float, float, float, float]]:
    """平面上各处的置信度、预测熵与互信息，以及画图的范围。"""
    extent = (-2.5, 3.5, -2.5, 3.0)
    axis_x, axis_y = torch.linspace(*extent[:2], 91), torch.linspace(*extent[2:], 83)
    grid = torch.cartesian_prod(axis_x, axis_y)
    draws = mc_dropout(models["dropout"].double(), grid.double(), samples)
    logits = models["plain"](grid)
    posterior = moon_bayes(grid.double(), NOISE)
    maps = {
        "Bayes: confidence": torch.maximum(posterior, 1 - posterior),
        "plain: confidence": logits.softmax(1).amax(1),
        "temperature: confidence": (logits / temperature).softmax(1).amax(1),
        "MC-dropout: entropy": predictive_entropy(draws),
        "MC-dropout: mutual information": mutual_information(draws),
    }
    return {name: m.view(91, 83).T for name, m in maps.items()}, extent


def topic_calibration(seed: int, smoke: bool) -> Outcome:
    """过拟合的网络有多自信？标签平滑、温度缩放、MC-dropout 各修好多少？"""
    steps, samples = (30, 5) if smoke else (400, 100)
    generator = make_generator(seed)
    (x, y), (x_val, y_val), (x_test, y_test) = (
        two_moons(count, generator, NOISE) for count in (200, 1000, 5000)
    )
    models = {
        "plain": train_net(seed, x, y, steps),
        "smoothed": train_net(seed, x, y, steps, smoothing=0.1),
        "dropout": train_net(seed, x, y, steps, p=0.5),
    }
    with torch.no_grad():
        # float32 的概率会下溢成 0，NLL 就成了 inf
        logits = {name: model(x_test).double() for name, model in models.items()}
        temperature = fit_temperature(models["plain"](x_val), y_val)
    posterior = moon_bayes(x_test.double(), NOISE)
    predictions = {
        "plain": logits["plain"].softmax(1),
        f"temperature T={temperature:.2f}": (logits["plain"] / temperature).softmax(1),
        "label smoothing 0.1": logits["smoothed"].softmax(1),
        "dropout, weight-scaled": logits["dropout"].softmax(1),
        "MC-dropout": mc_dropout(models["dropout"].double(), x_test.double(), samples).mean(0),
        "Bayes": torch.stack([1 - posterior, posterior], dim=1),
    }
    scores = {name: measure(p, y_test) for name, p in predictions.items()}
    for name, (accuracy, error, nll, _) in scores.items():
        pad = " " * (24 - display_width(name))
        print(f"  {name}{pad} 准确率 {100 * accuracy:.2f}%  ECE {error:.4f}  NLL {nll:.4f}")
    maps, extent = calibration_maps(models, temperature, samples)
    shown = [name for name in scores if name != "dropout, weight-scaled"]
    figure = figures.calibration_figure({k: scores[k] for k in shown}, maps, extent, x, y)
    (_, before, _, _), (_, after, _, _) = (scores[k] for k in shown[:2])
    results = [
        (Check("温度缩放：ECE 后 ÷ 前", 1.0, (0.5, 0.0)), after / before),
        (Check("MC-dropout：ECE ÷ 普通网络", 1.0, (0.6, 0.0)), scores["MC-dropout"][1] / before),
    ]
    return Outcome(figure, results)


TOPICS: dict[str, Topic] = {"averaging": topic_averaging, "calibration": topic_calibration}
