"""本章的数据：一维目标函数、二维曲面、Friedman 回归、用户的表格，以及图像的平移增强。
双螺旋由 ``utils.synth_points`` 生成，图像由 ``utils.datasets`` 读入。

合成数据都由显式的生成器得到，三个划分各自独立抽取，因此没有重叠。

维度约定：``N`` 样本数；输入 ``(N, F)``，回归目标 ``(N, 1)``。
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from utils import UserError

# ---------------------------------------------------------------- 一维目标与二维曲面


def _bumps(x: Tensor) -> Tensor:
    centers, widths = (-0.7, -0.2, 0.25, 0.7), (0.08, 0.12, 0.05, 0.15)
    heights = (0.9, -0.7, 1.0, 0.6)
    waves = (
        h * torch.exp(-(((x - c) / w) ** 2))
        for c, w, h in zip(centers, widths, heights, strict=True)
    )
    return sum(waves, torch.zeros_like(x))


# 名字 -> 定义在 [-1, 1] 上、取值约在 [-1, 1] 的函数
TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "sine": lambda x: torch.sin(2 * math.pi * x),
    "step": lambda x: torch.where(x < 0, -0.8, 0.8).to(x.dtype),
    "sawtooth": lambda x: 2 * (1.25 * x - torch.floor(1.25 * x + 0.5)),
    "bumps": _bumps,
}


def surface(points: Tensor) -> Tensor:
    """二维曲面 ``z = sin(πx) cos(πy) + ½ e^{−4(x² + y²)}``，``(N, 2) -> (N, 1)``。"""
    x, y = points[:, :1], points[:, 1:]
    return torch.sin(math.pi * x) * torch.cos(math.pi * y) + 0.5 * torch.exp(-4 * (x**2 + y**2))


def uniform(
    count: int, features: int, generator: torch.Generator, low: float = -1.0, high: float = 1.0
) -> Tensor:
    """``[low, high]`` 上的均匀样本，``(count, features)``。"""
    return low + (high - low) * torch.rand(count, features, generator=generator)


# ---------------------------------------------------------------- 回归

FRIEDMAN_NOISE = 1.0


def friedman(
    count: int, generator: torch.Generator, noise: float = FRIEDMAN_NOISE
) -> tuple[Tensor, Tensor]:
    """Friedman #1：``y = 10 sin(πx₁x₂) + 20(x₃ − ½)² + 10x₄ + 5x₅ + ε``，``x ∈ [0, 1]¹⁰``。

    后五个输入与 ``y`` 无关。``ε ~ N(0, noise²)``，因此任何模型的 MSE 都不低于 ``noise²``。

    参考: Friedman, 1991, The Annals of Statistics 19(1)。
    """
    x = uniform(count, 10, generator, 0.0, 1.0)
    y = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2
    y = y + 10 * x[:, 3] + 5 * x[:, 4]
    return x, (y + noise * torch.randn(count, generator=generator)).unsqueeze(1)


def read_csv(path: Path, column: str) -> tuple[Tensor, Tensor]:
    """读一个带表头的数值 CSV：``column`` 是要预测的列，其余各列为输入。

    异常:
        UserError: 没有这一列、某一格不是有限的数、行宽不一、行数太少。
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            header, *lines = csv.reader(stream)
    except (ValueError, OSError, csv.Error) as error:
        raise UserError(
            f"{path} 不是 UTF-8 编码的带表头的 CSV（{error}）；Excel 请另存为 CSV UTF-8"
        ) from error
    if column not in header or len(header) < 2:
        raise UserError(f"{path} 没有 --column {column!r} 这一列：有 {'、'.join(header)}")
    rows = [(number, row) for number, row in enumerate(lines, start=2) if row]  # 略过空行
    if len(rows) < 20:
        raise UserError(f"{path} 只有 {len(rows)} 行数据：至少要 20 行才分得出三个划分")
    cells = []
    for number, row in rows:
        try:
            cells.append([float(cell) for cell, _ in zip(row, header, strict=True)])
        except ValueError as error:
            raise UserError(f"{path} 第 {number} 行应为 {len(header)} 个数：{row}") from error
    values = torch.tensor(cells)
    if not values.isfinite().all():
        raise UserError(f"{path} 里有 nan 或 inf：请先补全或删去这些行")
    target = header.index(column)
    inputs = values[:, [i for i in range(len(header)) if i != target]]
    return inputs, values[:, target : target + 1]


# ---------------------------------------------------------------- 图像


def random_shift(x: Tensor, generator: torch.Generator | None, pixels: int = 1) -> Tensor:
    """把整批图像一起平移至多 ``pixels`` 个像素，空出的边缘用最近的像素补上。

    一批共用一个平移量，所以只是一次切片；不同的批平移不同，效果与逐张平移相近。
    """
    top, left = torch.randint(0, 2 * pixels + 1, (2,), generator=generator).tolist()
    height, width = x.shape[-2:]
    padded = torch.nn.functional.pad(x, (pixels,) * 4, mode="replicate")
    return padded[..., top : top + height, left : left + width]
