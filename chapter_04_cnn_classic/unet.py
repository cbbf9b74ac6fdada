"""U-Net 的小图形式，与分割的损失（Dice）、指标（混淆矩阵、mIoU）。

U-Net 先一边卷积一边池化，看清画面里有什么；再用转置卷积逐级放大，定出每个像素属于什么。每一级放大
之后，都与下行时同样大小的特征图在通道上拼接，这就是跳跃连接：位置由它带过来。``skips=False``
去掉拼接，其余不变，是说明这一点的对照。

与论文的差别：

- 论文的卷积不填充，572×572 的输入只得到 388×388 的输出，拼接之前要裁边；这里填充成等大。
- 每个卷积之后有 BatchNorm，论文没有（它在 BatchNorm 发表之后三个月，作者未用）。
- 宽度 16 起、下采样 3 次；论文 64 起、4 次。没有最深处的 Dropout。
- 论文的损失给贴近的细胞之间的缝隙更大的权重，增强用弹性形变；这里都没有。

维度约定：``B, C, H, W``，类别数 ``K``（含背景）。

参考: Ronneberger, Fischer, Brox, 2015, U-Net: Convolutional Networks for Biomedical Image
Segmentation, arXiv:1505.04597。``segmentation.md``。
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------- 网络


def double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """两个「3×3 卷积 -> BatchNorm -> ReLU」，``(B, in, H, W) -> (B, out, H, W)``。"""
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        # BatchNorm 会减去均值，卷积的偏置没有用处
        layers += [
            nn.Conv2d(channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net：逐像素的分类器。

    参数:
        num_classes: 类别数 ``K``，含背景。
        in_channels: 输入通道数。
        widths: 由浅到深各级的通道数；下采样 ``depth = len(widths) − 1`` 次。
        skips: 是否有跳跃连接。

    形状: ``(B, in_channels, H, W) -> (B, K, H, W)``，未归一化的得分；``H, W`` 须被
    ``2**depth`` 整除，此外任意。

    异常:
        ValueError: ``widths`` 不足两级；输入的通道数或边长不对。
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        widths: Sequence[int] = (16, 32, 64, 128),
        skips: bool = True,
    ) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1 or num_classes < 2:
            raise ValueError(
                f"widths={tuple(widths)} 至少两级且为正，num_classes={num_classes} 至少为 2"
            )
        self.in_channels, self.depth, self.skips = in_channels, len(widths) - 1, skips
        self.encoder, channels = nn.ModuleList(), in_channels
        for width in widths[:-1]:
            self.encoder.append(double_conv(channels, width))
            channels = width
        self.bottom = double_conv(channels, widths[-1])
        self.ups, self.decoder = nn.ModuleList(), nn.ModuleList()
        for width, below in zip(widths[-2::-1], widths[:0:-1], strict=True):
            self.ups.append(nn.ConvTranspose2d(below, width, kernel_size=2, stride=2))
            self.decoder.append(double_conv(2 * width if skips else width, width))
        self.head = nn.Conv2d(widths[0], num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        kept = []
        for stage in self.encoder:
            kept.append(stage(x))
            x = F.max_pool2d(kept[-1], kernel_size=2)  # (B, C, H, W) -> (B, C, H/2, W/2)
        x = self.bottom(x)
        for up, stage, skip in zip(self.ups, self.decoder, reversed(kept), strict=True):
            x = up(x)  # (B, 2C, H/2, W/2) -> (B, C, H, W)
            x = stage(torch.cat([skip, x], dim=1) if self.skips else x)
        return self.head(x)

    def _check(self, x: Tensor) -> None:
        factor = 2**self.depth
        wrong = x.ndim != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) < factor
        if wrong or any(side % factor for side in x.shape[2:]):
            raise ValueError(
                f"U-Net 的输入应为 (B, {self.in_channels}, H, W)，H 与 W 是 {factor} 的正整数倍"
                f"（下采样 {self.depth} 次），实为 {tuple(x.shape)}：请先填充或裁剪"
            )


# ---------------------------------------------------------------- 损失


def dice_loss(logits: Tensor, labels: Tensor, eps: float = 1.0) -> Tensor:
    """多类的软 Dice 损失，``1 − mean_k D_k``，标量，在 0 与 1 之间。

    每一类 ``D = (2 Σ p g + ε) / (Σ p² + Σ g² + ε)``，求和取遍整批的像素；``p`` 是 softmax 概率，
    ``g`` 是 0/1 的真值。``∂D/∂p_j = 2 (g_j − D p_j) / (Σ p² + Σ g² + ε)``：分母是这一类自己的
    大小，所以小的类别与大的类别说话一样响。

    参数:
        logits: ``(B, K, ...)``。
        labels: int64 ``(B, ...)``，取值 ``0 … K−1``。
        eps: 使整批里没有的类别不产生 0/0；论文没有（``eps=0``），论文只有前景一类。

    参考: Milletari, Navab, Ahmadi, 2016, V-Net, arXiv:1606.04797，第 3 节。
    """
    _check_labels(labels, logits.shape[1])
    if logits.shape[:1] + logits.shape[2:] != labels.shape:
        raise ValueError(f"得分 {tuple(logits.shape)} 与标签 {tuple(labels.shape)} 的形状不相配")
    p = logits.softmax(dim=1)
    g = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(p.dtype)
    dims = (0, *range(2, p.ndim))
    overlap = (p * g).sum(dims)
    size = p.square().sum(dims) + g.sum(dims)  # g 非 0 即 1，平方就是自己
    return 1 - ((2 * overlap + eps) / (size + eps)).mean()


# ---------------------------------------------------------------- 指标


def confusion_counts(guesses: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """混淆矩阵 int64 ``(K, K)``：第 ``t`` 行第 ``p`` 列是真值 ``t`` 而预测 ``p`` 的像素数。

    各批的矩阵可以相加，因此整个数据集的指标等于一次算完的，与怎样分批无关。
    """
    if guesses.shape != labels.shape:
        raise ValueError(f"预测 {tuple(guesses.shape)} 与标签 {tuple(labels.shape)} 的形状应相同")
    _check_labels(labels, num_classes)
    _check_labels(guesses, num_classes)
    pairs = labels.flatten() * num_classes + guesses.flatten()
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def class_iou(counts: Tensor) -> Tensor:
    """各类的交并比 float64 ``(K,)``：``对角线 / (行和 + 列和 − 对角线)``；两边都没有的类为 nan。"""
    hit = counts.diagonal().double()
    union = counts.sum(dim=0) + counts.sum(dim=1) - hit
    return hit / union  # 0/0 是 nan，正是「没有定义」


def mean_iou(counts: Tensor) -> float:
    """mIoU：各类交并比的平均，在 0 与 1 之间。

    ``counts`` 须是整个数据集的混淆矩阵之和：各批 mIoU 的平均取决于怎样分批。预测与真值里都没有
    出现的类别不计。
    """
    return class_iou(counts).nanmean().item()


def _check_labels(labels: Tensor, num_classes: int) -> None:
    low, high = labels.aminmax()
    if low < 0 or high >= num_classes:
        raise ValueError(f"标签应在 0 与 {num_classes - 1} 之间，实有 {low} 到 {high}")
