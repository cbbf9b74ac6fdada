"""生成的场景：每张图里有若干物体与杂乱的背景，同时给出分割掩码与检测框。

物体有四类：圆盘、正方形、三角形、十字，大小、方向、颜色、明暗任意，后画的遮住先画的（每个物体
至少留下一半）。背景是两色渐变加低频起伏，再画上不属于任何一类的粗线与圆环，最后加像素噪声。颜色与
类别无关，只提示哪里有东西；类别与边界要靠形状。

维度约定：``N`` 场景数，``S`` 边长，``M`` 一个场景至多的物体数。

用在 segmentation.md 与 detection.md。
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils import make_generator
from utils.datasets import SPLITS

CLASS_NAMES = ("disc", "square", "triangle", "cross")
MAX_OBJECTS = 4
SIZES = {"train": 3000, "val": 500, "test": 500}
SCENE_SEED = 20_240_504  # 场景本身的种子，与训练的种子无关
RADII = (0.11, 0.22)  # 物体外接圆的半径，以边长为单位
MIN_VISIBLE = 0.5  # 每个物体至少露出这么大的比例
CHUNK = 250  # 一次画多少张，限制内存


class Scenes(NamedTuple):
    """``N`` 个场景。"""

    images: Tensor  # uint8 (N, 3, S, S)
    masks: Tensor  # int64 (N, S, S)：0 是背景，k + 1 是 CLASS_NAMES[k]
    boxes: Tensor  # float32 (N, M, 4)：(x1, y1, x2, y2)，像素，紧贴看得见的部分；不足处为零
    labels: Tensor  # int64 (N, M)：CLASS_NAMES 的下标，不足处为 -1


class _Random:
    """从一个生成器里取数的简写。"""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def integers(self, *shape: int, high: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


def make_scenes(count: int, generator: torch.Generator, size: int = 64) -> Scenes:
    """生成 ``count`` 个 ``size × size`` 的场景。"""
    if count < 1 or size < 32:
        raise ValueError(f"场景数 {count} 应为正，边长 {size} 至少 32 像素")
    chunks = [
        _make_chunk(min(CHUNK, count - start), size, _Random(generator))
        for start in range(0, count, CHUNK)
    ]
    return Scenes(*map(torch.cat, zip(*chunks, strict=True)))


def load_scenes(
    split: str, generator: torch.Generator | None = None, limit: int | None = None
) -> Scenes:
    """一个划分的场景；三个划分各用自己的种子，因此互相独立。

    参数:
        split: ``train``、``val`` 或 ``test``。
        generator: 缺省时用固定的种子，人人得到同一份。
        limit: 至多生成多少个。
    """
    if split not in SPLITS:
        raise ValueError(f"划分 {split!r} 不认识：可选 {'、'.join(SPLITS)}")
    generator = generator or make_generator(SCENE_SEED + SPLITS.index(split))
    return make_scenes(min(SIZES[split], limit or SIZES[split]), generator)


# ---------------------------------------------------------------- 画一批


def _make_chunk(count: int, size: int, random: _Random) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """一批场景：先画背景，再逐个画物体；每一步对整批同时进行。"""
    canvas = _background(count, size, random)
    base = canvas.mean(dim=(2, 3))  # (N, 3)
    wanted = 1 + random.integers(count, high=MAX_OBJECTS)  # 每个场景 1 到 M 个物体
    owner = torch.full((count, size, size), -1)  # 每个像素属于第几个物体
    areas = torch.zeros(count, MAX_OBJECTS)
    labels = torch.full((count, MAX_OBJECTS), -1)
    for index in range(MAX_OBJECTS):
        kinds = random.integers(count, high=len(CLASS_NAMES))
        inside, shading = _draw_shapes(kinds, size, random)
        color = _contrasting_color(base, random)
        # 会把先前某个物体遮得太多的，这一个就不画
        left = [((owner == k) & ~inside).sum(dim=(1, 2)) for k in range(index)]
        fits = torch.ones(count, dtype=torch.bool)
        for k, visible in enumerate(left):
            fits &= visible >= MIN_VISIBLE * areas[:, k]
        accepted = fits & (index < wanted)
        inside &= accepted.view(-1, 1, 1)
        owner[inside] = index
        areas[:, index] = inside.sum(dim=(1, 2))
        labels[accepted, index] = kinds[accepted]
        paint = color.view(count, 3, 1, 1) + shading.unsqueeze(1)
        canvas = torch.where(inside.unsqueeze(1), paint, canvas)
    canvas += 0.04 * random.normal(*canvas.shape)
    images = (255 * canvas.clamp(0, 1)).round().to(torch.uint8)
    classes = torch.cat([labels + 1, torch.zeros(count, 1, dtype=torch.int64)], dim=1)
    masks = classes.gather(1, owner.flatten(1) % (MAX_OBJECTS + 1)).view_as(owner)  # -1 -> 末列
    boxes, labels = _boxes(owner, labels)
    return images, masks, boxes, labels


def _background(count: int, size: int, random: _Random) -> Tensor:
    """两色渐变、低频起伏、三条粗线与两个圆环，``(N, 3, S, S)``，大致在 [0, 1]。"""
    corners = random.uniform(count, 3, 2, 2, low=0.15, high=0.85)
    canvas = F.interpolate(corners, size, mode="bilinear", align_corners=True)
    waves = 0.08 * random.normal(count, 3, 6, 6)
    canvas = canvas + F.interpolate(waves, size, mode="bicubic", align_corners=True)
    u, v = _grid(size)
    for _ in range(3):  # 粗线：到一条随机直线的距离小于半宽
        angle = random.uniform(count, 1, 1, high=math.pi)
        offset = random.uniform(count, 1, 1, low=-0.4, high=0.4)
        width = random.uniform(count, 1, 1, low=0.008, high=0.025)
        line = (u * angle.cos() + v * angle.sin() - offset).abs() < width
        canvas = torch.where(line.unsqueeze(1), random.uniform(count, 3, 1, 1), canvas)
    for _ in range(2):  # 圆环：像圆盘的边，但不是物体
        x, y = (random.uniform(count, 1, 1, low=-0.5, high=0.5) for _ in range(2))
        radius = random.uniform(count, 1, 1, low=0.05, high=0.2)
        width = random.uniform(count, 1, 1, low=0.01, high=0.025)
        ring = (((u - x) ** 2 + (v - y) ** 2).sqrt() - radius).abs() < width
        canvas = torch.where(ring.unsqueeze(1), random.uniform(count, 3, 1, 1), canvas)
    return canvas


def _grid(size: int) -> tuple[Tensor, Tensor]:
    """像素中心的坐标 ``(u, v)``，以图的中心为原点、边长为单位；形状 ``(1, S)`` 与 ``(S, 1)``。"""
    axis = (torch.arange(size) + 0.5) / size - 0.5
    return axis.view(1, -1), axis.view(-1, 1)


def _draw_shapes(kinds: Tensor, size: int, random: _Random) -> tuple[Tensor, Tensor]:
    """每个场景一个物体：占据的像素 bool ``(N, S, S)``，与明暗的渐变 ``(N, S, S)``。"""
    count = len(kinds)
    u, v = _grid(size)
    radius = random.uniform(count, 1, 1, low=RADII[0], high=RADII[1])
    x, y = (random.uniform(count, 1, 1, low=-0.5, high=0.5) * (1 - 2 * radius) for _ in range(2))
    angle = random.uniform(count, 1, 1, high=2 * math.pi)
    # 转到物体自己的坐标系，外接圆的半径为 1
    a = ((u - x) * angle.cos() + (v - y) * angle.sin()) / radius
    b = ((v - y) * angle.cos() - (u - x) * angle.sin()) / radius
    disc = a**2 + b**2 <= 0.8  # 面积与其他几类相近
    square = torch.maximum(a.abs(), b.abs()) <= math.sqrt(0.5)
    below = math.sqrt(3) * a.abs() + b <= 1  # 正三角形的两条斜边
    triangle = below & (b >= -0.5)
    cross = (torch.minimum(a.abs(), b.abs()) <= 0.28) & (torch.maximum(a.abs(), b.abs()) <= 0.95)
    shapes = torch.stack([disc, square, triangle, cross])
    tilt = random.uniform(count, 1, 1, low=-0.15, high=0.15)
    return shapes[kinds, torch.arange(count)], tilt * a


def _contrasting_color(base: Tensor, random: _Random) -> Tensor:
    """每个场景一个颜色：随机取四个，用离背景平均色最远的一个，``(N, 3)``。"""
    candidates = random.uniform(len(base), 4, 3)
    distance = (candidates - base.unsqueeze(1)).square().sum(dim=-1)
    return candidates[torch.arange(len(base)), distance.argmax(dim=1)]


def _boxes(owner: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """每个物体看得见的部分的紧框；有物体的排在前面。"""
    size = owner.shape[-1]
    boxes = []
    for index in range(MAX_OBJECTS):
        mine = owner == index
        sides = []
        for along in (mine.any(dim=1), mine.any(dim=2)):  # 每列、每行有没有它的像素
            first = along.int().argmax(dim=1)
            last = size - along.flip(1).int().argmax(dim=1)
            sides.append((first, last))
        (x1, x2), (y1, y2) = sides
        boxes.append(torch.stack([x1, y1, x2, y2], dim=1))
    present = labels >= 0
    order = present.int().argsort(dim=1, descending=True, stable=True)
    stacked = torch.stack(boxes, dim=1).float() * present.unsqueeze(-1)
    return stacked.gather(1, order.unsqueeze(-1).expand(-1, -1, 4)), labels.gather(1, order)
