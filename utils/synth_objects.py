"""合成彩色物体 synth-objects：不需下载的彩色图像数据集（32×32 RGB，十类，版式同 CIFAR-10）。

类别只由轮廓（shape）决定，颜色、纹理、姿态、杂物都是随机的，因此网络必须学会形状，记住颜色没有用。
每张图依次经过

1. 姿态：物体平面上的仿射变换（旋转至多约 29°、缩放、压扁、平移）；
2. 轮廓：每个像素到轮廓的有符号距离（signed distance），内负外正，``EDGE`` 像素宽的软边抗锯齿；
3. 纹理：物体与背景各取两种颜色，按条纹、棋盘、圆点或渐变混合；
4. 杂物：背景上的小色块在物体之后，一条细棍压在物体之前，遮去一部分；
5. 光照与噪声：一个方向由暗到亮，再加高斯噪声。

生成一万张约一秒。随机数全部来自传入的 generator，始终单线程，故结果与线程数无关。
不处理：三维物体、多个物体、真实的照片。

维度约定：N 图像数，H = W = 32 像素；坐标 x 向右、y 向下。
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from utils.synth_digits import one_thread, uniform

IMAGE_SIZE = 32  # 像素，图像边长
EDGE = 1.2  # 像素，轮廓由里到外的过渡宽度

# 姿态：(下限, 上限) 的均匀分布
SCALE = (9.0, 13.0)  # 像素，物体平面的 1 个单位
SQUASH = (0.7, 1.0)  # 倍，沿一个随机方向的压扁
ROTATION = (-0.5, 0.5)  # 弧度
SHIFT = (-3.0, 3.0)  # 像素，横、纵平移

# 颜色与纹理
CONTRAST = 0.5  # 物体与背景平均颜色的最小距离（RGB 各在 0 与 1 之间）
TEXTURE_STRENGTH = (0.0, 0.2)  # RGB，同一纹理里两种颜色之差的一半，每通道
PERIOD = (3.0, 9.0)  # 像素，条纹、棋盘、圆点的周期
PATTERNS = 4  # 种：条纹、棋盘、圆点、渐变

# 杂物、光照、噪声
BLOBS = 3  # 个，物体之后的小色块
BLOB_RADIUS = (1.5, 4.0)  # 像素
STICKS = 1  # 条，物体之前的细棍
STICK_WIDTH = (0.5, 1.2)  # 像素，宽度的一半
STICK_LENGTH = (4.0, 12.0)  # 像素，长度的一半
LIGHT = (0.6, 1.0)  # 倍，最暗处的亮度；最亮处为 1
NOISE = (0.02, 0.08)  # RGB，高斯噪声的标准差

CHUNK = 250  # 张，一批同时绘制的图像数


# ---------------------------------------------------------------- 轮廓
# 有符号距离：物体平面上的点 (x, y) 到轮廓的距离，里面为负。两个区域的并取小，交取大，补取反。


def _disk(x: Tensor, y: Tensor, radius: float = 0.85) -> Tensor:
    return torch.hypot(x, y) - radius


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.65).abs() - 0.22


def _box(x: Tensor, y: Tensor, half_x: float, half_y: float) -> Tensor:
    return torch.maximum(x.abs() - half_x, y.abs() - half_y)


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.72, 0.72)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 0.28, 0.95), _box(x, y, 0.95, 0.28))


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    """三条边各是一个半平面；内切圆的半径 0.5。"""
    sides = [
        x * math.cos(a) + y * math.sin(a) for a in (math.pi / 2, -math.pi / 6, 7 * math.pi / 6)
    ]
    return torch.stack(sides).amax(dim=0) - 0.5


def _star(x: Tensor, y: Tensor) -> Tensor:
    """五角星：折叠到一个角的半边（36°），剩下的边是一条直线，由凸顶点连到凹顶点。"""
    radius, wedge = torch.hypot(x, y), math.pi / 5
    angle = (torch.atan2(y, x).remainder(2 * wedge) - wedge).abs()  # 0：凹顶点，36°：凸顶点
    outer, inner = 1.1, 0.45
    # 过凹顶点 (inner, 0) 与凸顶点 outer·(cos 36°, sin 36°) 的直线，法向朝外
    dx, dy = outer * math.cos(wedge) - inner, outer * math.sin(wedge)
    length = math.hypot(dx, dy)
    px, py = radius * angle.cos(), radius * angle.sin()
    return ((px - inner) * dy - py * dx) / length


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(_disk(x, y, 0.95), -_disk(x - 0.45, y, 0.75))


def _semicircle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(_disk(x, y + 0.4, 1.0), -(y + 0.4))


def _arrow(x: Tensor, y: Tensor) -> Tensor:
    head = torch.maximum((x + y.abs() - 0.9) / math.sqrt(2), 0.1 - x)
    return torch.minimum(head, _box(x + 0.4, y, 0.55, 0.22))


def _ell(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x + 0.45, y, 0.25, 0.9), _box(x - 0.05, y - 0.65, 0.75, 0.25))


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disk": _disk,
    "ring": _ring,
    "square": _square,
    "cross": _cross,
    "triangle": _triangle,
    "star": _star,
    "crescent": _crescent,
    "semicircle": _semicircle,
    "arrow": _arrow,
    "ell": _ell,
}
CLASS_NAMES = tuple(SHAPES)


# ---------------------------------------------------------------- 绘制


def _grid() -> tuple[Tensor, Tensor]:
    """像素中心相对图像中心的坐标 x、y，像素；各为 ``(H, W)``。"""
    along = torch.arange(IMAGE_SIZE) - (IMAGE_SIZE - 1) / 2
    y, x = torch.meshgrid(along, along, indexing="ij")
    return x, y


def _turn(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """坐标系转过 ``angle`` 之后的坐标。"""
    cos, sin = angle.cos(), angle.sin()
    return cos * x + sin * y, cos * y - sin * x


def _cover(distance: Tensor) -> Tensor:
    """到轮廓的有符号距离（像素）-> 覆盖率，里面 1、外面 0。"""
    return (0.5 - distance / EDGE).clamp(0, 1)


def _draw(count: int, rng: torch.Generator, low: float, high: float) -> Tensor:
    """每张图一个均匀分布的数，``(count, 1, 1)``，可与 ``(count, H, W)`` 广播。"""
    return uniform((low, high), (count, 1, 1), rng)


def _mask(labels: Tensor, rng: torch.Generator) -> Tensor:
    """物体的覆盖率 ``(N, H, W)``：随机的姿态，由 ``labels`` 决定的轮廓。"""
    n = len(labels)
    x, y = _grid()
    x, y = x - _draw(n, rng, *SHIFT), y - _draw(n, rng, *SHIFT)
    x, y = _turn(x, y, _draw(n, rng, *ROTATION))
    axis = _draw(n, rng, 0, math.pi)  # 转到压扁的方向，压扁，再转回来
    x, y = _turn(x, y, axis)
    x, y = _turn(x / _draw(n, rng, *SQUASH), y, -axis)
    scale = _draw(n, rng, *SCALE)
    x, y = x / scale, y / scale
    distance = torch.empty_like(x)
    for label, shape in enumerate(SHAPES.values()):
        chosen = labels == label
        distance[chosen] = shape(x[chosen], y[chosen])
    return _cover(distance * scale)


def _texture(colour: Tensor, rng: torch.Generator) -> Tensor:
    """围绕平均颜色 ``(N, 3)`` 的随机纹理，``(N, 3, H, W)``。"""
    n = len(colour)
    x, y = _grid()
    x, y = _turn(x, y, _draw(n, rng, 0, 2 * math.pi))
    period = _draw(n, rng, *PERIOD)
    u = torch.sin(2 * math.pi * x / period + _draw(n, rng, 0, 2 * math.pi))
    v = torch.sin(2 * math.pi * y / period + _draw(n, rng, 0, 2 * math.pi))
    patterns = torch.stack(
        [u.sign(), (u * v).sign(), (u + v - 0.7).sign(), x / (IMAGE_SIZE / 2)]
    )  # (PATTERNS, N, H, W)，值约在 -1 与 1 之间
    chosen = torch.randint(PATTERNS, (n,), generator=rng)
    pattern = patterns[chosen, torch.arange(n)]
    amplitude = uniform(TEXTURE_STRENGTH, (n, 3), rng)
    amplitude *= torch.randint(0, 2, (n, 3), generator=rng) * 2 - 1
    return colour[:, :, None, None] + amplitude[:, :, None, None] * pattern[:, None]


def _colours(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """物体与背景的平均颜色，各 ``(N, 3)``；太接近的沿两者之差推开到 ``CONTRAST``。"""
    first, second = uniform((0.1, 0.9), (2, count, 3), rng)
    gap = first - second
    distance = gap.norm(dim=1, keepdim=True).clamp(min=1e-6)
    push = gap / distance * (CONTRAST - distance).clamp(min=0) / 2
    return first + push, second - push


def _blend(image: Tensor, cover: Tensor, colour: Tensor) -> Tensor:
    """把 ``colour`` 按覆盖率 ``(N, H, W)`` 盖在图像上。"""
    return torch.lerp(image, colour, cover[:, None])


def _flat(count: int, rng: torch.Generator) -> Tensor:
    return uniform((0.0, 1.0), (count, 3, 1, 1), rng)


def _render(labels: Tensor, rng: torch.Generator) -> Tensor:
    """一批图像，uint8 ``(N, 3, H, W)``。"""
    n, half = len(labels), IMAGE_SIZE / 2
    x, y = _grid()
    inside, outside = _colours(n, rng)
    image = _texture(outside, rng)
    for _ in range(BLOBS):
        centre_x, centre_y = _draw(n, rng, -half, half), _draw(n, rng, -half, half)
        blob = torch.hypot(x - centre_x, y - centre_y) - _draw(n, rng, *BLOB_RADIUS)
        image = _blend(image, _cover(blob), _flat(n, rng))
    image = _blend(image, _mask(labels, rng), _texture(inside, rng))
    for _ in range(STICKS):
        across, along = _turn(
            x - _draw(n, rng, -half, half),
            y - _draw(n, rng, -half, half),
            _draw(n, rng, 0, math.pi),
        )
        width, length = _draw(n, rng, *STICK_WIDTH), _draw(n, rng, *STICK_LENGTH)
        stick = torch.maximum(across.abs() - width, along.abs() - length)
        image = _blend(image, _cover(stick), _flat(n, rng))
    ramp, _ = _turn(x, y, _draw(n, rng, 0, 2 * math.pi))
    dark = _draw(n, rng, *LIGHT)
    light = dark + (1 - dark) * (ramp / (2 * half) + 0.5)
    image = image.clamp(0, 1) * light[:, None]
    image += torch.randn(image.shape, generator=rng) * uniform(NOISE, (n, 1, 1, 1), rng)
    return image.clamp(0, 1).mul(255).round().to(torch.uint8)


@one_thread()
def make_synth_objects(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """生成合成彩色物体。

    参数:
        count: 图像数，至少 1。
        generator: CPU 上的随机数发生器；种子相同则逐字节相同。

    返回:
        images: uint8 ``(N, 3, 32, 32)``。
        labels: int64 ``(N,)``，``CLASS_NAMES`` 的下标；各类张数至多差 1，次序已打乱。

    异常:
        ValueError: ``count < 1``。
    """
    if count < 1:
        raise ValueError(f"count = {count}，图像数至少为 1")
    labels = (torch.arange(count) % len(SHAPES))[torch.randperm(count, generator=generator)]
    return torch.cat([_render(part, generator) for part in labels.split(CHUNK)]), labels
