"""SE（Squeeze-and-Excitation）：按整张图的内容给每个通道一个系数；以及移动端的分段线性激活。

    压缩:  z_c = (1/HW) Σ_{ij} x_cij          激励:  s = σ(W₂ δ(W₁ z))          缩放:  y_c = s_c x_c

``W₁`` 把 C 个数压到 C/r 个，``W₂`` 再展开，因此参数约 2C²/r，与图的大小无关；乘加相比卷积可以忽略。

维度约定：``B, C, H, W``。

参考: Hu et al., 2017, Squeeze-and-Excitation Networks, arXiv:1709.01507，式 2-4；
Howard et al., 2019, Searching for MobileNetV3, arXiv:1905.02244，第 5.2 节（h-swish）。
与论文不同之处: 两个全连接写成 1×1 卷积（同一件事，参数名与 torchvision 相同）；激活与门可换。
页面 efficient.md「SE」。
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

# ---------------------------------------------------------------- 激活的公式


def relu6(x: Tensor) -> Tensor:
    """``min(max(x, 0), 6)``，任意形状。上界使低精度的定点数够用。"""
    return x.clamp(0, 6)


def hard_sigmoid(x: Tensor) -> Tensor:
    """``ReLU6(x + 3) / 6``：sigmoid 的折线近似，在 ±3 处到达 0 与 1，不用指数。"""
    return relu6(x + 3) / 6


def hard_swish(x: Tensor) -> Tensor:
    """``x · ReLU6(x + 3) / 6``：swish ``x σ(x)`` 的近似；x ≤ −3 时为 0，x ≥ 3 时就是 x。"""
    return x * hard_sigmoid(x)


# ---------------------------------------------------------------- SE


class SqueezeExcitation(nn.Module):
    """逐通道的门控，``(B, C, H, W) -> (B, C, H, W)``。

    参数:
        channels: C。
        squeezed: 中间的宽度 C/r，r 是压缩比。
        activation: δ 的构造函数，无参数。
        gate: 门 σ 的构造函数，值域应为 0 到 1。
    """

    def __init__(
        self,
        channels: int,
        squeezed: int,
        activation: Callable[[], nn.Module] = nn.ReLU,
        gate: Callable[[], nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        if channels < 1 or squeezed < 1:
            raise ValueError(f"SE 的通道数与中间宽度至少为 1，实为 {channels} 与 {squeezed}")
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = activation()
        self.scale_activation = gate()

    def scale(self, x: Tensor) -> Tensor:
        """每个通道的系数 s，``(B, C, H, W) -> (B, C, 1, 1)``。"""
        z = self.avgpool(x)  # (B, C, H, W) -> (B, C, 1, 1)
        return self.scale_activation(self.fc2(self.activation(self.fc1(z))))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(x) * x
