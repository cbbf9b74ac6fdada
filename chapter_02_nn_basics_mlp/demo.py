"""本章的实验：每个专题回答一个问题，打印数字，画一张图。

    python demo.py                     # 全部专题
    python demo.py --topic width       # 只看一个

专题与 README 各节的对应：
``gradients`` 反向传播，``activations`` 激活函数，``losses`` 损失函数，``init`` 初始化，
``dead-relu`` 死 ReLU，``debug`` 排错阶梯，``construct`` 构造性证明，``width`` 宽度与误差，
``depth`` 深度与段数，``spectral`` 谱偏置，``polynomial`` 欠拟合与过拟合，``descent`` 双下降。
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_02_nn_basics_mlp import demo_figures
from chapter_02_nn_basics_mlp.activations import ACTIVATIONS, Softmax
from chapter_02_nn_basics_mlp.approximation import (
    FourierFeatures,
    build_relu_network,
    build_sawtooth_network,
    count_linear_pieces,
    max_error,
    pieces_for,
    spectral_bias,
)
from chapter_02_nn_basics_mlp.data import TARGETS
from chapter_02_nn_basics_mlp.diagnostics import (
    SCHEMES,
    dead_fraction,
    initial_loss,
    overfit_one_batch,
    signal_by_layer,
)
from chapter_02_nn_basics_mlp.generalization import (
    NOISE,
    double_descent,
    noisy_sine,
    polynomial_errors,
)
from chapter_02_nn_basics_mlp.layers import MLPManual
from chapter_02_nn_basics_mlp.losses import (
    cross_entropy,
    cross_entropy_grad,
    log_sum_exp,
    log_sum_exp_naive,
)
from chapter_02_nn_basics_mlp.mlp import MLP, fit_function, spread_kinks
from utils import make_generator, run_main
from utils.datasets import load_images
from utils.synth_points import two_spirals
from utils.topics import Check, Outcome, Topic, run_topics, topic_parser

HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------- 反向传播、激活、损失


def topic_gradients(seed: int, smoke: bool) -> Outcome:
    """手推的梯度与 autograd 差多少？每个梯度是什么形状？"""
    sizes, generator = (6, 5, 4, 3), make_generator(seed)
    x = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (7,), generator=generator)
    worst = 0.0
    for activation in ACTIVATIONS:
        net = MLPManual(sizes, activation, generator, dtype=torch.float64)
        grads, _ = net.backward(cross_entropy_grad(net.forward(x), y))
        for parameter in net.parameters:
            parameter.requires_grad_()
        truth = torch.autograd.grad(cross_entropy(net.forward(x), y), net.parameters)
        errors = [
            ((g - t).abs().max() / t.abs().max()).item() for g, t in zip(grads, truth, strict=True)
        ]
        worst = max(worst, *errors)
        print(f"  {activation:10s} 各参数梯度的最大相对误差 {max(errors):.1e}")
    print("  前向 h0 (7, 6) -> z1 (7, 5) -> h1 (7, 5) -> z2 (7, 4) -> h2 (7, 4) -> z3 (7, 3)")
    for index, grad in enumerate(grads):
        name = f"∂L/∂{'Wb'[index % 2]}{index // 2 + 1}"
        print(f"  {name} {tuple(grad.shape)}，范数 {grad.norm():.4f}")
    expectation = Check("手推梯度的最大相对误差（float64）", 1.0, (1e-12, 0.0), floor=0.0)
    return Outcome(None, [(expectation, worst)])


def topic_activations(seed: int, smoke: bool) -> Outcome:
    """各激活函数及其导数是什么样子？"""
    x = torch.linspace(-5, 5, 401, dtype=torch.float64)
    curves = {n: (a.value(x), a.prime(x)) for n, a in ACTIVATIONS.items() if n != "identity"}
    for name, (_, prime) in curves.items():
        print(f"  {name:10s} 导数的范围 [{prime.min():.3f}, {prime.max():.3f}]")
    return Outcome(demo_figures.activations_figure(x.numpy(), curves), [])


def topic_losses(seed: int, smoke: bool) -> Outcome:
    """各损失对误差、对间隔怎样反应？log-sum-exp 为什么不溢出？"""
    logits = torch.tensor([[100.0, 0.0, -100.0]])
    print(f"  float32 logits {logits.tolist()[0]}")
    print(f"  字面写法 log Σ e^x = {log_sum_exp_naive(logits).item()}（溢出）")
    print(f"  先减最大值         = {log_sum_exp(logits).item()}")
    return Outcome(demo_figures.losses_figure(), [])


# ---------------------------------------------------------------- 初始化与排错


def topic_init(seed: int, smoke: bool) -> Outcome:
    """初始化怎样决定信号与梯度能否穿过 12 层？"""
    signals = {
        activation: {
            scheme: signal_by_layer(scheme, activation, make_generator(seed)) for scheme in SCHEMES
        }
        for activation in ("relu", "tanh")
    }
    for activation, by_scheme in signals.items():
        for scheme, (forward, backward) in by_scheme.items():
            print(
                f"  {activation:5s}{scheme:12s} 激活：首层 {forward[0]:.2g}、"
                f"末层 {forward[-1]:.2g}；梯度：首层 {backward[0]:.2g}"
            )
    forward, _ = signals["relu"]["Kaiming"]
    expectation = Check("Kaiming + ReLU：第 12 层与第 1 层激活之比", 0.0, (0.5, 2.0))
    figure = demo_figures.init_figure(signals)
    return Outcome(figure, [(expectation, forward[-1] / forward[0])])


def topic_dead_relu(seed: int, smoke: bool) -> Outcome:
    """学习率多大会杀死 ReLU？LeakyReLU 幸免吗？"""
    rates = [1e-3, 1e-2, 1e-1, 1.0]
    points, labels = two_spirals(512, make_generator(seed))
    dead: dict[str, list[float]] = {}
    for activation in ("relu", "leaky_relu"):
        for lr in rates:
            model = MLP(2, (64, 64), 2, activation, make_generator(seed))
            optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
            for _ in range(5 if smoke else 200):
                optimizer.zero_grad()
                cross_entropy(model(points), labels).backward()
                optimizer.step()
            dead.setdefault(activation, []).append(dead_fraction(model, points))
        fresh = dead_fraction(MLP(2, (64, 64), 2, activation, make_generator(seed)), points)
        print(
            f"  {activation:10s} 未训练 {100 * fresh:.0f}%，"
            + "，".join(
                f"lr {lr:g}: {100 * share:.0f}%"
                for lr, share in zip(rates, dead[activation], strict=True)
            )
        )
    return Outcome(demo_figures.dead_relu_figure(rates, dead), [])


def topic_debug(seed: int, smoke: bool) -> Outcome:
    """排错阶梯：初始损失是 ln C 吗？一个批能背下来吗？"""
    images, labels, _ = load_images("synth-digits", "train", limit=64)
    x = images.float() / 255
    model = MLP(784, (64,), 10, "relu", make_generator(seed))
    start, ln_c = initial_loss(model, x, labels)
    steps = 20 if smoke else 200
    fresh = [MLP(784, (64,), 10, "relu", make_generator(seed)) for _ in range(2)]
    curves = {
        "healthy": overfit_one_batch(model, x, labels, steps),
        "bug: softmax before the loss": overfit_one_batch(
            nn.Sequential(fresh[0], Softmax()), x, labels, steps
        ),
        "bug: input is all zeros": overfit_one_batch(fresh[1], torch.zeros_like(x), labels, steps),
    }
    print(f"  初始损失 {start:.4f}，ln 10 = {ln_c:.4f}")
    for name, (losses, norms) in curves.items():
        print(f"  {name:30s} {steps} 步后损失 {losses[-1]:.2e}，梯度范数 {norms[-1]:.1e}")
    results = [
        (Check("初始损失与 ln C 之差", ln_c, (0.1, 0.0)), abs(start - ln_c)),
        (
            Check("背下一个批之后的损失", ln_c, (0.01, 0.0), floor=0.0),
            curves["healthy"][0][-1],
        ),
    ]
    return Outcome(demo_figures.debug_figure(curves, ln_c), results)


# ---------------------------------------------------------------- 万能逼近


def topic_construct(seed: int, smoke: bool) -> Outcome:
    """不训练，按给定的误差直接写出网络：真的做到了吗？"""
    lipschitz = 2 * math.pi  # sin(2πx) 的斜率至多 2π
    panels, ratio = [], 0.0
    for epsilon in (0.5, 0.1, 0.02):
        pieces = pieces_for(epsilon, lipschitz)
        network = build_relu_network(TARGETS["sine"], pieces)
        error = max_error(network, TARGETS["sine"])
        ratio = max(ratio, error / epsilon)
        panels.append((epsilon, pieces, network))
        print(f"  ε = {epsilon:<5g} 需要 {pieces:4d} 个神经元，实测最大误差 {error:.2e}")
    expectation = Check("构造的网络：最大误差 ÷ ε", 10.0, (1.0, 0.0), floor=0.0)
    return Outcome(demo_figures.construct_figure(panels, TARGETS["sine"]), [(expectation, ratio)])


def topic_width(seed: int, smoke: bool) -> Outcome:
    """误差随宽度怎样下降？构造的网络与训练出的网络相比如何？"""
    widths = [4, 8, 16] if smoke else [4, 8, 16, 32, 64, 128]
    function = TARGETS["sine"]
    built = [max_error(build_relu_network(function, w), function) for w in widths]
    x = torch.linspace(-1, 1, 257).unsqueeze(1)
    trained = []
    for width in tqdm(widths, desc="训练各宽度", leave=False):
        errors = []
        for repeat in range(1 if smoke else 3):
            generator = make_generator(seed + repeat)
            model = MLP(1, (width,), 1, "relu", generator)
            spread_kinks(model, generator)
            fit_function(model, x, function(x), steps=10 if smoke else 1000, lr=0.005)
            errors.append(max_error(model, function))
        trained.append(statistics.median(errors))
    # 对数坐标下的斜率：二阶可导的函数，折线插值的误差按 h² ∝ 1/n² 下降
    logs = torch.tensor(widths[1:]).double().log(), torch.tensor(built[1:]).log()
    slope = (logs[1][-1] - logs[1][0]).item() / (logs[0][-1] - logs[0][0]).item()
    for width, a, b in zip(widths, built, trained, strict=True):
        print(f"  宽 {width:4d}  构造 {a:.2e}  训练 {b:.2e}")
    print(f"  构造的网络：误差 ∝ 宽度^{slope:.2f}")
    expectation = Check("构造的网络：误差对宽度的对数斜率", 0.0, (-1.8, -2.2))
    figure = demo_figures.width_figure(widths, {"constructed": built, "trained (Adam)": trained})
    return Outcome(figure, [(expectation, slope)])


def topic_depth(seed: int, smoke: bool) -> Outcome:
    """同样多的神经元，深网络比浅网络多出多少段折线？"""
    depths = list(range(1, 6 if smoke else 11))
    networks = [build_sawtooth_network(depth) for depth in depths]
    deep = [count_linear_pieces(network) for network in networks]
    shallow = [2 * depth + 1 for depth in depths]  # n 个 ReLU 至多 n 个转折点，n + 1 段
    for depth, pieces, limit in zip(depths, deep, shallow, strict=True):
        print(f"  {2 * depth:2d} 个神经元：深 {depth} 层 {pieces:5d} 段，单隐藏层至多 {limit} 段")
    expectation = Check(
        f"{depths[-1]} 层（每层 2 个神经元）的段数",
        shallow[-1],
        (2 ** depths[-1],) * 2,
        floor=2 ** depths[-1],
    )
    figure = demo_figures.depth_figure(depths, deep, shallow, networks[:4])
    return Outcome(figure, [(expectation, float(deep[-1]))])


def topic_spectral(seed: int, smoke: bool) -> Outcome:
    """训练先学会低频还是高频？傅里叶特征能改变吗？"""
    frequencies, steps, every = (1, 3, 6, 10), 60 if smoke else 1500, 30
    generator = make_generator(seed)
    plain = MLP(1, (128, 128), 1, "relu", generator)
    spread_kinks(plain, generator)
    lifted = nn.Sequential(FourierFeatures(12), MLP(24, (128, 128), 1, "relu", generator))
    records = {
        "MLP on $x$": spectral_bias(plain, frequencies, steps, every),
        "MLP on Fourier features": spectral_bias(lifted, frequencies, steps, every),
    }
    for name, (marks, errors) in records.items():
        reached = [
            next((m for m, e in zip(marks, column, strict=True) if e < 0.1), None)
            for column in errors.T.tolist()
        ]
        listed = "，".join(
            f"k={k}: {'未达到' if r is None else r}"
            for k, r in zip(frequencies, reached, strict=True)
        )
        print(f"  {name:24s} 各频率误差首次低于 10% 的步数：{listed}")
    return Outcome(demo_figures.spectral_figure(records, frequencies), [])


# ---------------------------------------------------------------- 泛化


def topic_polynomial(seed: int, smoke: bool) -> Outcome:
    """次数太低欠拟合、太高过拟合；用验证集能选对吗？数据更多又怎样？"""
    generator = make_generator(seed)
    train, val, test = (noisy_sine(count, generator) for count in (30, 30, 2000))
    degrees = list(range(1, 19))
    on_val = [polynomial_errors(degree, train, val) for degree in degrees]
    on_test = [polynomial_errors(degree, train, test)[1] for degree in degrees]
    chosen = min(degrees, key=lambda degree: on_val[degree - 1][1])
    sizes = [20, 30, 50, 100, 200, 500]
    learning = [polynomial_errors(12, noisy_sine(size, generator), test) for size in sizes]
    print(f"  验证集选中 {chosen} 次：测试 MSE {on_test[chosen - 1]:.4f}，下限 {NOISE**2:.4f}")
    print(f"  最高的 {degrees[-1]} 次：训练 {on_val[-1][0]:.4f}，测试 {on_test[-1]:.3g}")
    figure = demo_figures.polynomial_figure(
        degrees, [a for a, _ in on_val], on_test, chosen, sizes, learning, NOISE**2
    )
    expectation = Check(
        "验证集选中的多项式：测试 MSE",
        0.5 + NOISE**2,
        (0.2, NOISE**2),
        floor=NOISE**2,
        tolerance=0.01,
    )
    return Outcome(figure, [(expectation, on_test[chosen - 1])])


def topic_descent(seed: int, smoke: bool) -> Outcome:
    """参数多于样本之后，测试误差为什么又降下来？"""
    widths = [5, 10, 20, 40, 60, 80, 90, 100, 110, 130, 170, 250, 500, 1000, 2000]
    repeats = 2 if smoke else 15
    runs = [double_descent(widths, make_generator(seed + r)) for r in range(repeats)]
    train = [statistics.median(run[i][0] for run in runs) for i in range(len(widths))]
    test = [statistics.median(run[i][1] for run in runs) for i in range(len(widths))]
    best_small = min(t for w, t in zip(widths, test, strict=True) if w < 100)
    print(
        f"  样本 100 个；宽度 < 100 时最好 {best_small:.2f}，宽度 100 时 "
        f"{test[widths.index(100)]:.1f}，宽度 {widths[-1]} 时 {test[-1]:.2f}（{repeats} 次中位数）"
    )
    expectation = Check("测试 MSE：最宽 ÷ 插值门槛之前最好的", 10.0, (0.8, 0.3))
    figure = demo_figures.descent_figure(widths, train, test, 100)
    return Outcome(figure, [(expectation, test[-1] / best_small)])


TOPICS: dict[str, Topic] = {
    "gradients": topic_gradients,
    "activations": topic_activations,
    "losses": topic_losses,
    "init": topic_init,
    "dead-relu": topic_dead_relu,
    "debug": topic_debug,
    "construct": topic_construct,
    "width": topic_width,
    "depth": topic_depth,
    "spectral": topic_spectral,
    "polynomial": topic_polynomial,
    "descent": topic_descent,
}


# ---------------------------------------------------------------- 入口


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return topic_parser(TOPICS, HERE / "outputs" / "demo").parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict:
    """依次运行所选的专题；返回写进 ``metrics.json`` 的内容。"""
    return run_topics(TOPICS, parse_args(argv))


if __name__ == "__main__":
    run_main(main)
