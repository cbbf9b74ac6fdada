"""对输入图像的检查：通道数不对、图太小，都是一行写明形状与规则的错误。"""

from __future__ import annotations

from torch import Tensor


def check_image(x: Tensor, channels: int, at_least: int, name: str, exact: bool = False) -> None:
    """``x`` 须为 ``(B, channels, H, W)``，``H, W`` 不小于 ``at_least``（``exact`` 时恰好等于）。

    异常:
        ValueError: 写明实有的形状与应有的。
    """
    sizes = tuple(x.shape[2:])
    wrong = x.ndim != 4 or x.shape[1] != channels or min(sizes) < at_least
    if wrong or (exact and sizes != (at_least, at_least)):
        rule = f"{at_least}×{at_least}" if exact else f"边长至少 {at_least} 像素"
        raise ValueError(f"{name} 的输入应为 (B, {channels}, H, W)，{rule}，实为 {tuple(x.shape)}")
