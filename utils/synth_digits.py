"""合成手写数字 synth-digits：不需下载的默认图像数据集（28×28 灰度，黑底白字，版式同 MNIST）。

本文件讲一件事：怎样把几笔「骨架」变成成千上万张互不相同的手写数字。每张图依次经过

1. 取骨架：每个数字有 2 至 3 种写法，每种写法是若干笔，每一笔是笔尖依次经过的点；
2. 变形：弹性形变（elastic warp）改笔势，仿射变换（affine）改大小、倾斜与位置；
3. 上墨：算每个像素到笔迹的距离，近者白、远者黑，中间是软边（抗锯齿）；
4. 扰动：墨色与底色随机，偶有一小截杂笔，再加高斯噪声。

难度：12000 张训练、2000 张测试，Adam（学习率 1e-3，批 128），不做增强，种子 0 / 1 / 2 的测试准确率
（机会线 10 %）：

    softmax 回归（20 轮）                86.2 / 85.3 / 85.1 %
    MLP 784-256-128-10（20 轮）          94.8 / 94.5 / 94.6 %
    LeNet 式卷积网络（15 轮）            98.8 / 98.7 / 98.8 %

生成 16000 张约 0.4 秒。随机数全部来自传入的 generator，始终单线程，故结果与线程数无关。
不处理：一图多字、彩色、真实的纸纹。

维度约定：N 图像数，K 一种写法的笔迹点数，H = W = 28 像素。
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

NUM_CLASSES = 10
IMAGE_SIZE = 28  # 像素，图像边长

# 笔迹的几何。骨架坐标的 1 个单位 = HALF_HEIGHT 像素。
HALF_HEIGHT = 8.5  # 像素，数字的平均半高
POINT_STEP = 0.09  # 骨架单位，相邻笔迹点的间距（约 0.8 像素，小于笔宽，故连成一线）
RADIUS = (0.8, 1.7)  # 像素，笔宽的一半
EDGE = (0.8, 1.4)  # 像素，墨迹边缘由白到黑的过渡宽度

# 变形的强度：(下限, 上限) 的均匀分布。
SCALE_X = (0.75, 1.2)  # 倍，横向缩放
SCALE_Y = (0.8, 1.15)  # 倍，纵向缩放
ROTATION = (-0.25, 0.25)  # 弧度，旋转
SHEAR = (-0.15, 0.35)  # 无量纲，横向错切；人手多向右倾，故不对称
SHIFT = (-1.5, 1.5)  # 像素，横、纵平移
WAVES = 3  # 个，弹性形变叠加的正弦波数
WAVE_NUMBER = (-0.5, 0.5)  # 周期 / 骨架单位，波矢的每个分量；低频才平滑
WAVE_AMPLITUDE = (-0.165, 0.165)  # 骨架单位，每个波的位移幅度

# 扰动的强度。灰度以 1 为纯白。
INK = (0.5, 1.0)  # 灰度，笔迹
PAPER = (0.0, 0.15)  # 灰度，底色
NOISE = (0.0, 0.15)  # 灰度，像素高斯噪声的标准差
DISTRACTOR_RATE = 0.4  # 概率，一张图带一截杂笔
DISTRACTOR_INK = (0.3, 0.7)  # 倍，杂笔相对笔迹的浓度
DISTRACTOR_LENGTH = (2.0, 5.0)  # 像素，杂笔长度
DISTRACTOR_DISTANCE = (10.0, 13.0)  # 像素，杂笔中心到图像中心的距离：落在外圈，不改字形

CHUNK = 128  # 张，一批同时上墨的图像数；一块 (28, 28, CHUNK) 的缓冲 0.4 MiB，能留在 CPU 缓存里

# 骨架：STROKES[数字] = 各种写法，一种写法 = 若干笔，一笔 = 笔尖依次经过的点 (x, y)。
# x 向右、y 向下，数字占 [-0.6, 0.6] × [-1, 1]。三点以上连成光滑曲线，两点是直线；
# 转角处另起一笔；首尾同点的一笔是封闭曲线。
STROKES = {
    0: (
        [[(0, -1), (-0.42, -0.75), (-0.6, 0), (-0.42, 0.75), (0, 1), (0.42, 0.75), (0.6, 0),
          (0.42, -0.75), (0, -1)]],
        [[(0.2, -0.9), (-0.3, -0.8), (-0.58, 0), (-0.35, 0.8), (0.1, 1), (0.5, 0.55), (0.55, -0.3),
          (0.25, -0.9), (-0.05, -1)]],
    ),
    1: (
        [[(0, -1), (0, 1)]],
        [[(-0.22, -0.5), (0.05, -1)], [(0.05, -1), (0.05, 1)]],
        [[(-0.2, -0.55), (0.05, -1)], [(0.05, -1), (0.05, 0.95)], [(-0.35, 0.95), (0.45, 0.95)]],
    ),
    2: (
        [[(-0.5, -0.55), (-0.3, -0.9), (0.1, -1), (0.48, -0.75), (0.45, -0.25), (0.05, 0.35),
          (-0.55, 0.95)], [(-0.55, 0.95), (0.6, 0.95)]],
        [[(-0.5, -0.6), (-0.2, -0.95), (0.3, -0.9), (0.45, -0.45), (0.15, 0.2), (-0.25, 0.8),
          (-0.55, 0.9), (-0.5, 0.6), (-0.15, 0.65), (0.2, 0.95), (0.6, 0.85)]],
    ),
    3: (
        [[(-0.5, -0.7), (-0.15, -1), (0.35, -0.85), (0.4, -0.4), (-0.1, -0.08)],
         [(-0.1, -0.08), (0.4, 0.12), (0.5, 0.6), (0.1, 0.98), (-0.3, 0.95), (-0.55, 0.7)]],
        [[(-0.5, -0.95), (0.45, -0.95)], [(0.45, -0.95), (-0.1, -0.2)],
         [(-0.1, -0.2), (0.4, 0.05), (0.5, 0.55), (0.1, 0.98), (-0.3, 0.95), (-0.55, 0.7)]],
    ),
    4: (
        [[(-0.4, -0.9), (-0.55, 0.15)], [(-0.55, 0.15), (0.6, 0.15)], [(0.3, -0.8), (0.25, 1)]],
        [[(0.25, -1), (-0.6, 0.3)], [(-0.6, 0.3), (0.6, 0.3)], [(0.25, -1), (0.25, 1)]],
    ),
    5: (
        [[(0.5, -0.95), (-0.35, -0.95)], [(-0.35, -0.95), (-0.45, -0.1)],
         [(-0.45, -0.1), (0, -0.28), (0.45, 0), (0.5, 0.5), (0.1, 0.95), (-0.5, 0.85)]],
        [[(0.55, -1), (-0.3, -0.85)], [(-0.3, -0.85), (-0.4, -0.2)],
         [(-0.4, -0.2), (0.15, -0.15), (0.45, 0.3), (0.2, 0.85), (-0.5, 0.95)]],
    ),
    6: (
        [[(0.4, -0.95), (-0.1, -0.7), (-0.48, -0.1), (-0.5, 0.55), (-0.1, 0.98), (0.38, 0.8),
          (0.48, 0.4), (0.15, 0.05), (-0.25, 0.15), (-0.48, 0.5)]],
        [[(0.15, -1), (-0.3, -0.3), (-0.48, 0.4), (-0.25, 0.9), (0.2, 0.95), (0.42, 0.55),
          (0.15, 0.2), (-0.25, 0.35), (-0.42, 0.7)]],
    ),
    7: (
        [[(-0.55, -0.9), (0.55, -0.9)], [(0.55, -0.9), (0.15, 0), (-0.1, 1)]],
        [[(-0.55, -0.9), (0.55, -0.95)], [(0.55, -0.95), (-0.2, 1)], [(-0.25, 0.05), (0.5, 0)]],
        [[(-0.55, -0.6), (-0.5, -0.95)], [(-0.5, -0.95), (0.5, -0.9)], [(0.5, -0.9), (-0.1, 1)]],
    ),
    8: (
        [[(0.38, -0.7), (0, -1), (-0.38, -0.7), (0, -0.1), (0.48, 0.5), (0, 1), (-0.48, 0.5),
          (0, -0.1), (0.38, -0.7)]],
        [[(0, -0.1), (-0.35, -0.3), (-0.35, -0.8), (0, -1), (0.35, -0.8), (0.35, -0.3), (0, -0.1)],
         [(0, -0.1), (-0.45, 0.2), (-0.45, 0.75), (0, 1), (0.45, 0.75), (0.45, 0.2), (0, -0.1)]],
    ),
    9: (
        [[(0.45, -0.5), (0.15, -0.95), (-0.35, -0.85), (-0.45, -0.4), (-0.1, -0.05), (0.3, -0.15),
          (0.45, -0.5)], [(0.48, -0.85), (0.35, 1)]],
        [[(0.45, -0.7), (0.1, -1), (-0.35, -0.8), (-0.4, -0.3), (0.05, -0.1), (0.4, -0.4),
          (0.45, -0.7)], [(0.45, -0.7), (0.48, 0.1), (0.25, 0.8), (-0.15, 1), (-0.45, 0.8)]],
    ),
}  # fmt: skip


def _stroke_points(knots: list[tuple[float, float]]) -> Tensor:
    """沿过各点的 Catmull-Rom 样条取密集的笔迹点，返回 (K, 2)。

    相邻四点 p0 p1 p2 p3 之间，p1 到 p2 这一段（0 ≤ t < 1）是

        p(t) = p1 + (p2 - p0) t/2 + (2p0 - 5p1 + 4p2 - p3) t²/2 + (3p1 - p0 - 3p2 + p3) t³/2
    """
    p = torch.tensor(knots, dtype=torch.float32)
    if knots[0] == knots[-1]:  # 封闭曲线：首尾相接
        before, after = p[-2:-1], p[1:2]
    else:  # 开放曲线：两端按直线外推一点
        before, after = 2 * p[:1] - p[1:2], 2 * p[-1:] - p[-2:-1]
    p = torch.cat([before, p, after])
    pieces = []
    for p0, p1, p2, p3 in zip(p[:-3], p[1:-2], p[2:-1], p[3:], strict=True):
        steps = math.ceil(float((p2 - p1).norm()) / POINT_STEP)
        t = (torch.arange(steps) / steps)[:, None]
        cubic = (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3
        pieces.append(p1 + ((p2 - p0) * t + cubic) / 2)
    return torch.cat([*pieces, p[-2:-1]])


def uniform(bounds: tuple[float, float], shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """``bounds`` 之间均匀分布的随机数。"""
    low, high = bounds
    return torch.rand(shape, generator=rng) * (high - low) + low


def _deform(points: Tensor, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """把一副骨架 (K, 2) 写成 count 份不同的笔迹，返回像素坐标 x、y，形状都是 (K, N)。

    弹性形变 u(p) = Σ_j a_j sin(2π k_j·p + φ_j) 只随位置变，故相接的笔画变形后仍相接；
    仿射变换 p' = h R(θ) [[s_x, -m s_y], [0, s_y]] (p + u(p)) + 平移，h 是平均半高，m 是错切
    （y 向下，故取负号时 m > 0 为右倾）。
    """
    wave = (WAVES, 1, count)
    base_x, base_y = points[:, 0, None], points[:, 1, None]  # (K, 1)
    phase = uniform(WAVE_NUMBER, wave, rng) * base_x + uniform(WAVE_NUMBER, wave, rng) * base_y
    phase = 2 * math.pi * (phase + torch.rand(wave, generator=rng))
    ripple = torch.sin(phase)  # (WAVES, K, N)
    x = base_x + (uniform(WAVE_AMPLITUDE, wave, rng) * ripple).sum(0)
    y = base_y + (uniform(WAVE_AMPLITUDE, wave, rng) * ripple).sum(0)

    y = y * uniform(SCALE_Y, (count,), rng) * HALF_HEIGHT
    x = x * uniform(SCALE_X, (count,), rng) * HALF_HEIGHT - y * uniform(SHEAR, (count,), rng)
    angle = uniform(ROTATION, (count,), rng)
    cos, sin = angle.cos(), angle.sin()
    shift_x, shift_y = uniform(SHIFT, (2, count), rng)
    centre = (IMAGE_SIZE - 1) / 2
    return centre + cos * x - sin * y + shift_x, centre + sin * x + cos * y + shift_y


def _distractors(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """外圈的短直杂笔，返回笔迹点的像素坐标 x、y，形状都是 (K, N)。"""
    place = uniform((0, 2 * math.pi), (count,), rng)
    distance = uniform(DISTRACTOR_DISTANCE, (count,), rng)
    heading = uniform((0, math.pi), (count,), rng)
    along = torch.linspace(-0.5, 0.5, 6)[:, None] * uniform(DISTRACTOR_LENGTH, (count,), rng)
    centre = (IMAGE_SIZE - 1) / 2
    x = centre + distance * place.cos() + along * heading.cos()
    return x, centre + distance * place.sin() + along * heading.sin()


def _ink(x: Tensor, y: Tensor, radius: Tensor, edge: Tensor) -> Tensor:
    """由笔迹点 (K, N) 画出墨迹，返回 (H, W, N)，值域 [0, 1]。

    像素 (i, j) 到最近笔迹点的距离平方  D²(i, j) = min_k [ (i - y_k)² + (j - x_k)² ]；
    两项各只依赖行或列，先各算一张 (K, 28, N) 的表，于是每个点只剩一次加法、一次取小。
    墨 = clip((半径 - D) / 软边宽 + 1/2, 0, 1)。图像放在最后一维，内层循环便连续。
    朴素写法是 `torch.cdist(像素, 笔迹点).amin(-1)`，多一个 (N, 784, K) 的中间量。
    """
    pixels = torch.arange(IMAGE_SIZE, dtype=torch.float32)[:, None]
    rows = (pixels - y[:, None, :]).square_()[:, :, None, :]  # (K, H, 1, N)
    columns = (pixels - x[:, None, :]).square_()[:, None, :, :]  # (K, 1, W, N)
    nearest = rows[0] + columns[0]  # (H, W, N)
    candidate = torch.empty_like(nearest)
    for row, column in zip(rows[1:], columns[1:], strict=True):
        torch.add(row, column, out=candidate)
        torch.minimum(nearest, candidate, out=nearest)
    return nearest.sqrt_().sub_(radius).div_(-edge).add_(0.5).clamp_(0, 1)


def _render(points: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """一副骨架 (K, 2) 的 count 张随机图像，返回 uint8 (N, H, W)。"""
    radius, edge = uniform(RADIUS, (count,), rng), uniform(EDGE, (count,), rng)
    image = _ink(*_deform(points, count, rng), radius, edge)  # (H, W, N)

    strength = uniform(DISTRACTOR_INK, (count,), rng)
    strength *= torch.rand(count, generator=rng) < DISTRACTOR_RATE
    distractor = _ink(*_distractors(count, rng), radius, edge).mul_(strength)
    torch.maximum(image, distractor, out=image)

    ink, paper = uniform(INK, (count,), rng), uniform(PAPER, (count,), rng)
    image.mul_(ink - paper).add_(paper)
    noise = torch.randn(image.shape, generator=rng).mul_(uniform(NOISE, (count,), rng))
    image.add_(noise).clamp_(0, 1).mul_(255).round_()
    return image.to(torch.uint8).permute(2, 0, 1).contiguous()  # (H, W, N) -> (N, H, W)


@contextmanager
def one_thread() -> Iterator[None]:
    """其间 PyTorch 只用一个线程：每步运算只有几十微秒，别的进程占着 CPU 时，等线程到齐反慢十倍。"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def make_synth_digits(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """生成合成手写数字。

    参数
        count: 图像数，至少 1。
        generator: CPU 上的随机数发生器；种子相同则逐字节相同。训练、验证、测试集依次取自同一个
            发生器，便互不重叠。
    返回
        images: uint8 (N, 1, 28, 28)，0 为黑、255 为白。
        labels: int64 (N,)，0 至 9；各类张数至多差 1，次序已打乱。
    异常
        ValueError: count < 1。
    """
    if count < 1:
        raise ValueError(f"count = {count}，图像数至少为 1")
    labels = (torch.arange(count) % NUM_CLASSES)[torch.randperm(count, generator=generator)]
    style = torch.rand(count, generator=generator)  # 决定用哪一种写法
    images = torch.empty(count, 1, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    for digit, variants in STROKES.items():
        choice = (style * len(variants)).long()
        for v, strokes in enumerate(variants):
            points = torch.cat([_stroke_points(knots) for knots in strokes])
            members = ((labels == digit) & (choice == v)).nonzero().flatten()
            for chunk in members.split(CHUNK):
                images[chunk, 0] = _render(points, len(chunk), generator)
    return images, labels
