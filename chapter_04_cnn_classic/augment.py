"""整批的图像增强：每张图各用自己的随机量，而运算对整批一次完成。

给定参数的变换（``shift``、``rotate``……）是纯函数，与 ``torchvision.transforms.functional`` 里
对应的函数逐张比较相等；``Augment`` 只负责从生成器里抽参数。

全部作用于归一化之后的浮点图像，空出的像素填 ``fill``：归一化之后黑色不是 0，而是
``−mean/std``。

维度约定：``B, C, H, W``；每张图一个的参数是 ``(B,)``。

参考: Simard et al., 2003, Best Practices for Convolutional Neural Networks（平移与旋转）；
Krizhevsky et al., 2012（裁剪与翻转）；DeVries 与 Taylor, 2017, arXiv:1708.04552（Cutout）。
README「数据增强」。
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------- 给定参数的变换


def flip(x: Tensor, chosen: Tensor) -> Tensor:
    """``chosen`` 为真的图左右翻转；``chosen`` 为 bool ``(B,)``。"""
    return torch.where(chosen.view(-1, 1, 1, 1), x.flip(-1), x)


def _level(fill: Tensor) -> Tensor:
    """每通道一个 ``(C,)`` 的填充值 -> 可广播；每张图一个 ``(B, 1, 1, 1)`` 的原样返回。"""
    return fill.view(1, -1, 1, 1) if fill.ndim == 1 else fill


def _pad(x: Tensor, pixels: int, fill: Tensor | float) -> Tensor:
    """四周各填 ``pixels`` 个像素。"""
    if not isinstance(fill, Tensor):
        return F.pad(x, (pixels,) * 4, value=fill)
    level = _level(fill)  # 减去填充值后补零，再加回来
    return F.pad(x - level, (pixels,) * 4) + level


def crop(x: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """每张图从自己的 ``(top, left)`` 起裁下 ``height × width``；``top``、``left`` 为 ``(B,)``。

    ``Tensor.unfold`` 给出全部窗口的视图，高级下标再从中各取一个：只搬运取中的像素。
    """
    windows = x.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, H-h+1, W-w+1, h, w)
    return windows[torch.arange(len(x), device=x.device), :, top, left]


def shift(x: Tensor, down: Tensor | int, right: Tensor | int, fill: Tensor | float = 0.0) -> Tensor:
    """整数平移：下移 ``down``、右移 ``right`` 个像素（可为负）；整批相同，或每张图一个 ``(B,)``。

    「四周填充后随机裁回原大小」就是随机平移，因此只此一个函数。
    """
    down, right = (torch.as_tensor(v, device=x.device).expand(len(x)) for v in (down, right))
    pixels = int(torch.stack([down, right]).abs().max())
    padded = _pad(x, pixels, fill)
    return crop(padded, pixels - down, pixels - right, *x.shape[2:])


def rotate(x: Tensor, degrees: Tensor, fill: Tensor | float = 0.0) -> Tensor:
    """绕图的中心逆时针旋转，双线性插值；``degrees`` 为 ``(B,)``，度。

    逐个输出像素问它来自哪里（反向映射），否则会留下空洞：输出像素相对中心的坐标 ``(u, v)``
    转回 ``−θ``，落在四个输入像素之间，按距离加权。图外视为 ``fill``。
    """
    batch, channels, height, width = x.shape
    angle = degrees.to(x.dtype).mul(math.pi / 180).view(-1, 1, 1)
    cos, sin = angle.cos(), angle.sin()
    v = torch.arange(height, dtype=x.dtype, device=x.device).view(-1, 1) - (height - 1) / 2
    u = torch.arange(width, dtype=x.dtype, device=x.device) - (width - 1) / 2
    column = cos * u - sin * v + (width - 1) / 2 + 1  # +1：下面在四周各垫一圈
    row = sin * u + cos * v + (height - 1) / 2 + 1  # (B, H, W)
    padded = _pad(x, 1, fill).flatten(2)  # 垫的一圈就是 fill，离图一格之外也钳制到它上面
    column, row = column.clamp(0, width + 1), row.clamp(0, height + 1)
    left, top = column.floor().clamp(max=width), row.floor().clamp(max=height)
    right_share, bottom_share = column - left, row - top
    corner = (top * (width + 2) + left).long()  # 左上角像素的一维下标
    result = torch.zeros_like(x)
    for down, down_share in ((0, 1 - bottom_share), (1, bottom_share)):
        for right, share in ((0, 1 - right_share), (1, right_share)):
            index = (corner + down * (width + 2) + right).view(batch, 1, -1)
            pixels = padded.gather(2, index.expand(-1, channels, -1)).view_as(x)
            result += pixels * (down_share * share).unsqueeze(1)
    return result


def erase(x: Tensor, top: Tensor, left: Tensor, size: int, fill: Tensor | float = 0.0) -> Tensor:
    """每张图抹去一个 ``size × size`` 的方块（Cutout），左上角在 ``(top, left)``，可以伸出图外。"""
    rows = torch.arange(x.shape[2], device=x.device).view(1, -1, 1) - top.view(-1, 1, 1)
    columns = torch.arange(x.shape[3], device=x.device) - left.view(-1, 1, 1)
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)  # (B, H, W)
    level = _level(fill) if isinstance(fill, Tensor) else fill
    return torch.where(inside.unsqueeze(1), level, x)


def turn(x: Tensor, mirrored: Tensor, flipped: Tensor, transposed: Tensor) -> Tensor:
    """正方形的八种对称：每张图依次左右翻、上下翻、转置，三个标记为 bool ``(B,)``。

    参数:
        x: ``(B, C, S, S)``，图像或掩码；两者用同一组标记，就仍然对齐。
    """
    for chosen, move in (
        (mirrored, lambda v: v.flip(3)),
        (flipped, lambda v: v.flip(2)),
        (transposed, lambda v: v.transpose(2, 3)),
    ):
        x = torch.where(chosen.view(-1, 1, 1, 1), move(x), x)
    return x


# ---------------------------------------------------------------- 随机参数


def draw_symmetry(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """``count`` 张图的 (左右翻, 上下翻, 转置) 标记，各一半的机会，bool ``(3, count)``。"""
    return (torch.rand(3, count, generator=generator) < 0.5).to(device)


@dataclass(frozen=True)
class Augment:
    """一批图像的随机增强，可作 ``ImageBatches`` 的 ``transform``。

    参数:
        hflip: 左右翻转的概率；数字与文字不可翻转。
        shift: 两个方向各至多平移几个像素。
        degrees: 至多旋转多少度；0 表示不转。
        cutout: 抹去的方块边长，像素；0 表示不抹。
        fill: 空出的像素填的值，标量或每通道一个 ``(C,)``。
    """

    hflip: float = 0.0
    shift: int = 0
    degrees: float = 0.0
    cutout: int = 0
    fill: Tensor | float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.hflip <= 1 or min(self.shift, self.degrees, self.cutout) < 0:
            raise ValueError(f"hflip 应在 0 与 1 之间，其余不为负，实为 {self}")

    def __call__(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """对 ``(B, C, H, W)`` 作随机增强，返回新的张量。"""
        count, where = len(x), x.device

        def integers(low: int, high: int) -> Tensor:  # 含两端
            return torch.randint(low, high + 1, (count,), generator=generator).to(where)

        fill = self.fill.to(x) if isinstance(self.fill, Tensor) else self.fill
        if self.degrees:
            angle = self.degrees * (2 * torch.rand(count, generator=generator) - 1)
            x = rotate(x, angle.to(where), fill)
        if self.shift:
            down, right = integers(-self.shift, self.shift), integers(-self.shift, self.shift)
            x = shift(x, down, right, fill)
        if self.hflip:
            x = flip(x, (torch.rand(count, generator=generator) < self.hflip).to(where))
        if self.cutout:
            half = self.cutout // 2  # 方块的中心均匀落在图内，方块可以伸出图外
            top, left = integers(0, x.shape[2] - 1) - half, integers(0, x.shape[3] - 1) - half
            x = erase(x, top, left, self.cutout, fill)
        return x
