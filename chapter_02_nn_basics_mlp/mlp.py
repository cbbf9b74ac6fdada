"""多层感知机 ``MLP``，以及它最直观的用处：拟合任意函数。

直接运行本文件，会用不同宽度、不同激活函数的 MLP 去拟合几个一维函数，并画出拟合曲线对比图::

    python mlp.py                                   # 四个目标 × 三种宽度 × 三种激活
    python mlp.py --target sine --width 8 --activation relu
    python mlp.py --surface                         # 二维曲面 z = f(x, y)
    python mlp.py --extrapolate                     # 离开训练区间会怎样

对应 README 的「多层感知机」与「万能逼近」两节。

维度约定：``B`` 批大小；输入 ``(B, in_features)``，图像等多维输入会先展平。
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_02_nn_basics_mlp import figures
from chapter_02_nn_basics_mlp.activations import MODULES
from chapter_02_nn_basics_mlp.data import TARGETS, surface, uniform
from chapter_02_nn_basics_mlp.initialization import kaiming_normal_
from chapter_02_nn_basics_mlp.layers import Linear
from chapter_02_nn_basics_mlp.losses import mse
from utils import (
    Expectation,
    Result,
    Timer,
    add_common_args,
    conclude,
    get_device,
    make_generator,
    model_summary,
    prepare_out_dir,
    run_main,
    set_seed,
)
from utils.cli import ArgumentParser, non_negative_float, positive_int

HERE = Path(__file__).resolve().parent


class MLP(nn.Module):
    """多层感知机：``h_l = φ(W_l h_{l−1} + b_l)``，最后一层没有激活。

    参数:
        in_features: 输入宽度（展平之后）。
        hidden: 各隐藏层的宽度；空序列就是线性（softmax）回归。
        out_features: 输出宽度。
        activation: ``activations.MODULES`` 中的名字。
        generator: 初始化用的生成器；缺省用全局的。

    权重用 Kaiming 正态初始化，偏置为零；输出层的权重再缩小到十分之一，使分类任务的初始损失
    接近 ``ln C``。

    异常:
        ValueError: 宽度不是正数，或激活函数的名字不认识。
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        activation: str = "relu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = [in_features, *hidden, out_features]
        if min(sizes) < 1:
            raise ValueError(f"各层宽度应为正整数，实为 {sizes}")
        if activation not in MODULES:
            raise ValueError(f"activation={activation!r} 不认识：可选 {'、'.join(MODULES)}")
        self.layers = nn.ModuleList(
            Linear(fan_in, fan_out, generator=generator)
            for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True)
        )
        self.activation = MODULES[activation]()
        for layer in self.layers:
            kaiming_normal_(layer.weight, activation, generator)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.layers[-1].weight.mul_(0.1)

    def hidden_states(self, x: Tensor) -> list[Tensor]:
        """各隐藏层激活之后的输出，从浅到深，各为 ``(B, hidden_l)``。"""
        x = x.flatten(1)  # (B, ...) -> (B, in_features)
        states = []
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
            states.append(x)
        return states

    def forward(self, x: Tensor) -> Tensor:
        """``(B, ...) -> (B, out_features)``。"""
        states = self.hidden_states(x)
        return self.layers[-1](states[-1] if states else x.flatten(1))


# ---------------------------------------------------------------- 函数拟合


def fit_function(
    model: nn.Module, x: Tensor, y: Tensor, *, steps: int, lr: float, bar: tqdm | None = None
) -> list[float]:
    """全批量训练：每步用全部样本，Adam，学习率按余弦降到零。返回每步的 MSE。"""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = mse(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if bar is not None:
            bar.update()
    return torch.stack(losses).tolist()


def r_squared(prediction: Tensor, truth: Tensor) -> float:
    """决定系数 ``1 − Σ(p − t)² / Σ(t − t̄)²``：1 为完美，0 等于总报均值。"""
    residual = (prediction - truth).square().sum()
    return 1 - (residual / (truth - truth.mean()).square().sum()).item()


def compare_fits(args: argparse.Namespace, device: torch.device, reach: float = 1.0) -> list[dict]:
    """每个 (目标, 宽度, 激活) 在 ``[-1, 1]`` 上训练，在 ``[-reach, reach]`` 上与真函数比较。"""
    grid = torch.linspace(-reach, reach, 600, device=device).unsqueeze(1)
    inside = grid.flatten().abs() <= 1
    combos = [(t, w, a) for t in args.target for w in args.width for a in args.activation]
    fits = []
    with tqdm(total=len(combos) * args.epochs, desc="拟合", unit="步") as bar:
        for target, width, activation in combos:
            generator = make_generator(args.seed)
            function = TARGETS[target]
            x = uniform(args.samples, 1, generator)
            y = function(x) + args.noise * torch.randn(x.shape, generator=generator)
            model = MLP(1, [width] * args.depth, 1, activation, generator).to(device)
            spread_kinks(model, generator)
            bar.set_postfix_str(f"{target} 宽 {width} {activation}")
            fit_function(model, x.to(device), y.to(device), steps=args.epochs, lr=args.lr, bar=bar)
            with torch.no_grad():
                prediction, truth = model(grid), function(grid)
            fit = {
                "target": target,
                "width": width,
                "activation": activation,
                "r2": r_squared(prediction[inside], truth[inside]),
                "x": grid.flatten().tolist(),
                "truth": truth.flatten().tolist(),
                "prediction": prediction.flatten().tolist(),
                "samples": torch.cat([x, y], dim=1).tolist(),
            }
            if reach > 1:
                fit["r2_outside"] = r_squared(prediction[~inside], truth[~inside])
            fits.append(fit)
    return fits


@torch.no_grad()
def spread_kinks(model: MLP, generator: torch.Generator) -> None:
    """把第一层的偏置取为 ``−w · c``，``c`` 在训练区间均匀分布：每个神经元的转折点落在数据里。

    偏置全为零时，所有 ReLU 的折点都挤在原点，一维拟合会因此慢得多。
    """
    first = model.layers[0]
    centers = uniform(first.out_features, first.in_features, generator).to(first.weight)
    first.bias.copy_(-(first.weight * centers).sum(dim=1))


def fit_surface(args: argparse.Namespace, device: torch.device) -> dict:
    """拟合二维曲面，返回网格上的真值与预测。"""
    generator = make_generator(args.seed)
    points = uniform(16 * args.samples, 2, generator)
    values = surface(points) + args.noise * torch.randn(len(points), 1, generator=generator)
    width, activation = max(args.width), args.activation[0]
    model = MLP(2, [width] * args.depth, 1, activation, generator).to(device)
    spread_kinks(model, generator)
    with tqdm(total=args.epochs, desc="拟合曲面", unit="步") as bar:
        data = points.to(device), values.to(device)
        fit_function(model, *data, steps=args.epochs, lr=args.lr, bar=bar)
    axis = torch.linspace(-1, 1, 81)
    grid = torch.cartesian_prod(axis, axis)
    truth = surface(grid)
    with torch.no_grad():
        prediction = model(grid.to(device)).cpu()
    shape = (81, 81)
    return {
        "target": "surface",
        "width": width,
        "activation": activation,
        "r2": r_squared(prediction, truth),
        "truth": truth.view(shape).tolist(),
        "prediction": prediction.view(shape).tolist(),
    }


# ---------------------------------------------------------------- 入口


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="用 MLP 拟合函数，画出拟合曲线对比图")
    add_common_args(parser, out_dir=HERE / "outputs" / "mlp", epochs=600, lr=0.02)
    add, names = parser.add_argument, list(TARGETS)
    add("--target", nargs="+", choices=names, default=names, help="目标函数，可写多个")
    add("--width", nargs="+", type=positive_int, default=[4, 16, 64], help="隐藏层宽度，可写多个")
    add("--depth", type=positive_int, default=2, metavar="N", help="隐藏层数")
    activations = ["relu", "tanh", "gelu_tanh"]
    add("--activation", nargs="+", choices=list(MODULES), default=activations, help="激活函数")
    add("--samples", type=positive_int, default=256, metavar="N", help="训练样本数")
    add("--noise", type=non_negative_float, default=0.05, metavar="X", help="噪声的标准差")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--surface", action="store_true", help="改为拟合二维曲面")
    mode.add_argument("--extrapolate", action="store_true", help="画到训练区间之外")
    args = parser.parse_args(argv)
    if args.smoke:
        args.epochs, args.width = min(args.epochs, 5), args.width[:1]
    return args


def main(argv: Sequence[str] | None = None) -> dict:
    """拟合、画图、下结论；返回并写出 ``metrics.json`` 的内容。"""
    args = parse_args(argv)
    out_dir = prepare_out_dir(args.out_dir)
    set_seed(args.seed)
    device = get_device(args.device)
    torch.set_num_threads(1)  # 这么小的矩阵，多线程的同步比运算还贵
    widest = max(args.width)
    expectation = Expectation(
        f"训练区间内的 R²（宽 {widest}，最好的激活，各目标中最差者）", 0.0, (0.92, 1.0), floor=1.0
    )
    print(f"设备  {device.describe()}")
    print(model_summary(MLP(1, [widest] * args.depth, 1, args.activation[0]), torch.zeros(1, 1)))
    print(expectation.announce())

    with Timer(device) as timer:
        if args.surface:
            fits = [fit_surface(args, device.device)]
            drawing = {"surface.png": figures.surface_figure(fits[0])}
        elif args.extrapolate:
            fits = compare_fits(args, device.device, reach=3.0)
            drawing = {"extrapolation.png": figures.fits_figure(fits)}
        else:
            fits = compare_fits(args, device.device)
            drawing = {"fits.png": figures.fits_figure(fits)}

    best: dict[str, float] = {}
    for fit in fits:
        if fit["width"] == widest:
            best[fit["target"]] = max(best.get(fit["target"], -math.inf), fit["r2"])
    for target, value in best.items():
        print(f"      {target:10s} R² {value:.4f}")
    keys = ("target", "width", "activation", "r2", "r2_outside")
    return conclude(
        out_dir,
        [Result(expectation, min(best.values()))],
        timer,
        smoke=args.smoke,
        figures=drawing,
        fits=[{key: fit[key] for key in keys if key in fit} for fit in fits],
    )


if __name__ == "__main__":
    run_main(main)
