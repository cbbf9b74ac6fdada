"""由算子组合出的函数：激活、损失、线性层、卷积；名字与参数同 ``torch.nn.functional``。

本文件教什么：引擎只认得几十个原语，其余都是组合，导数（任意阶）自动就有，不必再推。只有
``linear`` 与 ``cross_entropy`` 直接写了 VJP：合成一个算子，少建几个结点，也少存几个中间结果。
对应 README 的「算子与 VJP」一节。

维度约定：``B`` 批大小，``I``、``O`` 输入与输出宽度，``C`` 类别数；卷积里 ``B, C, H, W``。
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from chapter_01_tensor_autograd import ops_elementwise, ops_structure
from chapter_01_tensor_autograd.engine import Tensor
from chapter_01_tensor_autograd.graph import record

where, maximum = ops_elementwise.where, ops_elementwise.maximum
minimum = ops_elementwise.minimum
concat = ops_structure.concat


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """叠成新的一维。"""
    return concat([x.unsqueeze(dim) for x in tensors], dim)


def pad(x: Tensor, widths: Sequence[int]) -> Tensor:
    """补零；``widths`` 从最后一维数起，每维 (前, 后) 两个数，同 ``F.pad``。"""
    if len(widths) % 2 or len(widths) > 2 * x.ndim:
        raise ValueError(
            f"pad：{list(widths)} 应为成对的非负整数，至多 {x.ndim} 对：形状 {x.shape}"
        )
    pairs = [(widths[i], widths[i + 1]) for i in range(0, len(widths), 2)]
    return ops_structure.pad(x, [(0, 0)] * (x.ndim - len(pairs)) + pairs[::-1])


# ---------------------------------------------------------------- 激活


def relu(x: Tensor) -> Tensor:
    """``max(0, x)``。"""
    return x.relu()


def sigmoid(x: Tensor) -> Tensor:
    """``1/(1 + e⁻ˣ)``。"""
    return x.sigmoid()


def tanh(x: Tensor) -> Tensor:
    """双曲正切。"""
    return x.tanh()


def silu(x: Tensor) -> Tensor:
    """``x σ(x)``。"""
    return x * x.sigmoid()


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """``x Φ(x)``；``approximate="tanh"`` 时用 GPT-2 的 tanh 近似。

    参考: Hendrycks, Gimpel, 2016, arXiv:1606.08415。
    """
    if approximate == "none":
        return x * 0.5 * (1.0 + (x * math.sqrt(0.5)).erf())
    if approximate != "tanh":
        raise ValueError(f"gelu：approximate={approximate!r} 应为 none 或 tanh")
    return x * 0.5 * (1.0 + ((x + x**3 * 0.044715) * math.sqrt(2 / math.pi)).tanh())


def softmax(x: Tensor, dim: int) -> Tensor:
    """沿 ``dim`` 归一化成概率。"""
    return x.softmax(dim)


def log_softmax(x: Tensor, dim: int) -> Tensor:
    """softmax 的对数，不先算 softmax，因此不会下溢。"""
    return x.log_softmax(dim)


# ---------------------------------------------------------------- 损失与层


def cross_entropy(logits: Tensor, target: Any) -> Tensor:
    """平均交叉熵（nats）：``(1/B) Σ (logsumexp(z) − z_t)``，梯度是 ``(softmax(z) − e_t)/B``。

    参数:
        logits: ``(B, C)``。
        target: 类别编号，整数 ``(B,)``，取值 0 到 C − 1。
    """
    target = np.asarray(target)
    if logits.ndim != 2 or target.shape != logits.shape[:1] or target.dtype.kind not in "iu":
        raise ValueError(
            f"cross_entropy：logits 应为 (B, C)，target 应为整数 (B,)，"
            f"实为 {logits.shape} 与 {target.dtype} {target.shape}"
        )
    count, classes = logits.shape
    if count == 0 or target.min() < 0 or target.max() >= classes:
        raise ValueError(f"cross_entropy：target 应非空，且在 0 到 {classes - 1} 之间")
    rows = np.arange(count)
    shifted = logits.data - logits.data.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[rows, target]
    one_hot = np.zeros_like(logits.data)
    one_hot[rows, target] = 1

    def vjp(g: Tensor) -> Tensor:
        return (logits.softmax(1) - one_hot) * (g / count)

    return record("cross_entropy", losses.mean(), (logits, vjp))


def mse_loss(prediction: Tensor, target: Any) -> Tensor:
    """均方误差；形状必须相同，不许广播（``(N, 1)`` 对 ``(N,)`` 是常见的无声错误）。"""
    if prediction.shape != np.shape(target):
        raise ValueError(f"mse_loss：形状 {prediction.shape} 与 {np.shape(target)} 应相同")
    return ((prediction - target) ** 2).mean()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x Wᵀ + b``：``∂L/∂x = gW``，``∂L/∂W = gᵀx``，``∂L/∂b = Σ g``。

    参数:
        x: ``(B, I)``。
        weight: ``(O, I)``，同 ``nn.Linear``。
        bias: ``(O,)``。
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear：x 应为 (B, I)，weight 应为 (O, I)，实为 {x.shape} 与 {weight.shape}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear：bias 应为 {weight.shape[:1]}，实为 {bias.shape}")
    for parameter in (weight,) if bias is None else (weight, bias):
        ops_elementwise.operands("linear", x, parameter)  # dtype 须相同
    edges = [(x, lambda g: g @ weight), (weight, lambda g: g.T @ x)]
    y = x.data @ weight.data.T
    if bias is not None:
        y += bias.data
        edges.append((bias, ops_elementwise.same))  # 广播过，引擎会求和
    return record("linear", y, *edges)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Tensor:
    """二维卷积（互相关）：补零，取滑窗，一次矩阵乘法；全由原语组成，没有自己的 VJP。

    参数:
        x: ``(B, C, H, W)``。
        weight: ``(O, C, KH, KW)``。
        bias: ``(O,)``。

    返回:
        ``(B, O, OH, OW)``。第 4 章讲它的三种算法与代价。
    """
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"conv2d：x 应为 (B, C, H, W)，weight 应为 (O, C, KH, KW)，"
            f"实为 {x.shape} 与 {weight.shape}"
        )
    if padding:
        x = pad(x, (padding,) * 4)
    patches = ops_structure.windows(x, weight.shape[2:], stride, dilation)
    (batch, _, rows, columns), size = patches.shape[:4], math.prod(weight.shape[1:])
    # (B, C, OH, OW, KH, KW) -> (B·OH·OW, C·KH·KW)
    flat = patches.permute(0, 2, 3, 1, 4, 5).reshape(batch * rows * columns, size)
    y = linear(flat, weight.flatten(1), bias)
    return y.reshape(batch, rows, columns, weight.shape[0]).permute(0, 3, 1, 2)
