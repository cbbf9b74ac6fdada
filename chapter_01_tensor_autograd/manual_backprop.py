"""手推一遍：线性、批归一化、tanh、线性、交叉熵，逐个中间量写出梯度。

本文件教什么：不借助任何引擎，沿着链式法则倒着写一遍，每个中间量的梯度是哪个式子、什么形状；然后与
本章的引擎、与 PyTorch 各比一遍。最容易错的一步是批归一化：均值与方差也是输入的函数，梯度有三条路。
对应 README 的「手推一遍」一节。

维度约定：``B`` 批大小，``I`` 输入宽度，``H`` 隐藏宽度，``C`` 类别数。
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from chapter_01_tensor_autograd import functional as F
from chapter_01_tensor_autograd.engine import Tensor
from utils.seed import make_generator

EPS = 1e-5  # 批归一化分母里的小数，同 nn.BatchNorm1d
PARAMETERS = ("weight1", "gamma", "beta", "weight2", "bias2")

Arrays = dict[str, np.ndarray]


def random_problem(batch: int, inputs: int, hidden: int, classes: int, seed: int) -> Arrays:
    """随机的输入 ``x``、标签 ``target`` 与全部参数。"""
    generator = make_generator(seed)

    def normal(*shape: int) -> np.ndarray:
        return torch.randn(shape, generator=generator, dtype=torch.float64).numpy()

    return {
        "x": normal(batch, inputs),
        "target": torch.randint(classes, (batch,), generator=generator).numpy(),
        "weight1": normal(hidden, inputs) / inputs**0.5,
        "gamma": 1 + 0.1 * normal(hidden),
        "beta": 0.1 * normal(hidden),
        "weight2": normal(classes, hidden) / hidden**0.5,
        "bias2": 0.1 * normal(classes),
    }


def forward_with(lib: Any, v: dict[str, Any]) -> dict[str, Any]:
    """前向的每一步；``lib`` 给出交叉熵，数组换成哪种张量，算的就是哪个引擎。"""
    out: dict[str, Any] = {}
    out["a"] = v["x"] @ v["weight1"].T  # (B, I) -> (B, H)
    out["mean"] = out["a"].mean(0)  # (H,)
    out["centered"] = out["a"] - out["mean"]
    out["var"] = (out["centered"] ** 2).mean(0)  # (H,)，有偏
    out["inv_std"] = (out["var"] + EPS) ** -0.5
    out["normed"] = out["centered"] * out["inv_std"]
    out["scaled"] = out["normed"] * v["gamma"] + v["beta"]
    out["h"] = out["scaled"].tanh()
    out["logits"] = out["h"] @ v["weight2"].T + v["bias2"]  # (B, H) -> (B, C)
    out["loss"] = lib.cross_entropy(out["logits"], v["target"])
    return out


def manual_gradients(v: Arrays) -> Arrays:
    """NumPy 前向一遍，再手推每个中间量与参数的梯度。"""
    a = v["x"] @ v["weight1"].T
    centered = a - a.mean(0)
    inv_std = ((centered**2).mean(0) + EPS) ** -0.5
    normed = centered * inv_std
    h = np.tanh(normed * v["gamma"] + v["beta"])
    logits = h @ v["weight2"].T + v["bias2"]

    count = len(a)
    g: Arrays = {}
    exponent = np.exp(logits - logits.max(1, keepdims=True))
    probability = exponent / exponent.sum(1, keepdims=True)
    g["logits"] = (probability - np.eye(logits.shape[1])[v["target"]]) / count  # (p − e_t)/B
    g["weight2"], g["bias2"] = g["logits"].T @ h, g["logits"].sum(0)
    g["h"] = g["logits"] @ v["weight2"]
    g["scaled"] = g["h"] * (1 - h * h)
    g["gamma"], g["beta"] = (g["scaled"] * normed).sum(0), g["scaled"].sum(0)
    g["normed"] = g["scaled"] * v["gamma"]
    # 批归一化：normed = centered · inv_std，而 inv_std 又由 centered 得到
    g["inv_std"] = (g["normed"] * centered).sum(0)
    g["var"] = g["inv_std"] * -0.5 * inv_std**3
    g["centered"] = g["normed"] * inv_std + g["var"] * 2 * centered / count
    # centered = a − mean，mean 又是 a 的平均
    g["mean"] = -g["centered"].sum(0)
    g["a"] = g["centered"] + g["mean"] / count
    g["weight1"] = g["a"].T @ v["x"]
    return g


def batchnorm_backward(grad: np.ndarray, normed: np.ndarray, inv_std: np.ndarray) -> np.ndarray:
    """批归一化对输入的梯度，三条路合并之后的一行：

    ``∂L/∂a = (σ⁻¹/B)(B·g − Σ g − x̂ ⊙ Σ(g ⊙ x̂))``，``g = ∂L/∂x̂``，求和沿批。
    """
    count = len(grad)
    total, along = grad.sum(0), (grad * normed).sum(0)
    return inv_std / count * (count * grad - total - normed * along)


def engine_gradients(v: Arrays) -> Arrays:
    """本章的引擎算出的同一组梯度，中间量的也留下。"""
    tensors = {name: Tensor(value, requires_grad=name in PARAMETERS) for name, value in v.items()}
    out = forward_with(F, tensors)
    return _collect(tensors, out)


def torch_gradients(v: Arrays) -> Arrays:
    """PyTorch 算出的同一组梯度。"""
    tensors = {
        name: torch.tensor(value, requires_grad=name in PARAMETERS) for name, value in v.items()
    }
    out = forward_with(torch.nn.functional, tensors)
    return _collect(tensors, out)


def _collect(tensors: dict[str, Any], out: dict[str, Any]) -> Arrays:
    loss = out.pop("loss")
    for x in out.values():
        x.retain_grad()
    loss.backward()
    leaves = {name: tensors[name] for name in PARAMETERS}
    return {name: np.asarray(x.grad) for name, x in (out | leaves).items()}
