"""第 1 章的算子：每一个都在随机形状上与 torch.autograd 比较取值、一阶与二阶导数（float64）。"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as TF

from chapter_01_tensor_autograd import functional as F
from chapter_01_tensor_autograd.engine import Tensor, grad

TOLERANCE = 1e-10
ROUNDS = 6  # 每个算子试几组随机的形状与数

Arrays = list[np.ndarray]


class Case(NamedTuple):
    """一个算子：我们的、官方的、怎样造输入。"""

    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    make: Callable[[np.random.Generator], Arrays]


# ---------------------------------------------------------------- 输入


def shape_of(rng: np.random.Generator, low: int = 0, high: int = 4) -> tuple[int, ...]:
    return tuple(rng.integers(1, 5, rng.integers(low, high + 1)).tolist())


def anything(rng: np.random.Generator) -> Arrays:
    return [rng.normal(size=shape_of(rng))]


def positive(rng: np.random.Generator) -> Arrays:
    return [rng.uniform(0.2, 3, shape_of(rng))]


def broadcasting(rng: np.random.Generator, sample: Callable[..., Any] | None = None) -> Arrays:
    """两个可以广播的形状：各自随机地缩短、把若干维换成 1。"""
    full, arrays = shape_of(rng), []
    for _ in range(2):
        shape = [1 if rng.random() < 0.3 else n for n in full[rng.integers(0, len(full) + 1) :]]
        arrays.append((sample or rng.normal)(size=shape))
    return arrays


def nonzero_denominator(rng: np.random.Generator) -> Arrays:
    a, b = broadcasting(rng)
    return [a, np.sign(b) * (np.abs(b) + 0.3)]


def positive_pair(rng: np.random.Generator) -> Arrays:
    return broadcasting(rng, lambda size: rng.uniform(0.2, 2, size))


def three_dimensional(rng: np.random.Generator) -> Arrays:
    return [rng.normal(size=shape_of(rng, 3, 3))]


def with_ties(rng: np.random.Generator) -> Arrays:
    return [rng.integers(0, 3, shape_of(rng, 3, 3)).astype(float)]


def matrices(rng: np.random.Generator) -> Arrays:
    n, k, m = rng.integers(1, 5, 3).tolist()
    batch = [x.shape for x in broadcasting(rng)]
    return [rng.normal(size=(*batch[0], n, k)), rng.normal(size=(*batch[1], k, m))]


def vectors(rng: np.random.Generator) -> Arrays:
    k, m = rng.integers(1, 5, 2).tolist()
    pairs = [((k,), (k,)), ((k,), (k, m)), ((m, k), (k,)), ((k,), (2, k, m)), ((2, m, k), (k,))]
    return [rng.normal(size=shape) for shape in pairs[rng.integers(len(pairs))]]


def triple(rng: np.random.Generator) -> Arrays:
    shape = shape_of(rng, 2, 2)
    return [rng.normal(size=shape) for _ in range(3)]


def images(rng: np.random.Generator) -> Arrays:
    batch, inputs, outputs = rng.integers(1, 4, 3).tolist()
    height, width = rng.integers(5, 8, 2).tolist()
    kernel = rng.integers(1, 4, 2).tolist()
    return [
        rng.normal(size=(batch, inputs, height, width)),
        rng.normal(size=(outputs, inputs, *kernel)),
        rng.normal(size=outputs),
    ]


def layer(rng: np.random.Generator) -> Arrays:
    rows, inputs, outputs = rng.integers(1, 6, 3).tolist()
    return [rng.normal(size=s) for s in ((rows, inputs), (outputs, inputs), (outputs,))]


# ---------------------------------------------------------------- 算子表

MASK = np.array([True, False, True])
ROWS = np.array([2, 0, 2, 1])  # 同一行取两次


def rows_of_three(rng: np.random.Generator) -> Arrays:
    return [rng.normal(size=(3, *shape_of(rng, 1, 2)))]


def four_by_three(rng: np.random.Generator) -> Arrays:
    return [rng.normal(size=(4, 3))]


INDEX = np.array([[0, 1, 0], [2, 2, 1]])


def with_source(rng: np.random.Generator) -> Arrays:
    return [rng.normal(size=(4, 3)), rng.normal(size=(2, 3))]


def on_both(function: Callable[..., Any], make: Callable[..., Arrays]) -> Case:
    """我们与官方的写法逐字相同。"""
    return Case(function, function, make)


LABELS = np.array([2, 0, 1, 1])
T_INDEX, T_LABELS = torch.from_numpy(INDEX), torch.from_numpy(LABELS)

CASES: dict[str, Case] = {
    "add": on_both(lambda a, b: a + b, broadcasting),
    "radd": on_both(lambda a: 2.5 + a, anything),
    "sub": on_both(lambda a, b: a - b, broadcasting),
    "rsub": on_both(lambda a: 1.0 - a, anything),
    "mul": on_both(lambda a, b: a * b, broadcasting),
    "div": on_both(lambda a, b: a / b, nonzero_denominator),
    "rdiv": on_both(lambda a: 2.0 / a, positive),
    "pow": on_both(lambda a, b: a**b, positive_pair),
    "rpow": on_both(lambda a: 1.7**a, anything),
    "square": on_both(lambda a: a**2, anything),
    "cube": on_both(lambda a: a**3, anything),
    "pow zero": on_both(lambda a: a**0 + a, anything),
    "pow negative": on_both(lambda a: a**-1.5, positive),
    "neg": on_both(lambda a: -a, anything),
    "exp": on_both(lambda a: a.exp(), anything),
    "log": on_both(lambda a: a.log(), positive),
    "sqrt": on_both(lambda a: a.sqrt(), positive),
    "sin": on_both(lambda a: a.sin(), anything),
    "cos": on_both(lambda a: a.cos(), anything),
    "tanh": on_both(lambda a: a.tanh(), anything),
    "sigmoid": on_both(lambda a: (a * 20).sigmoid(), anything),
    "erf": on_both(lambda a: a.erf(), anything),
    "relu": on_both(lambda a: a.relu() * a, anything),
    "abs": on_both(lambda a: a.abs() * a, anything),
    "clip": on_both(lambda a: a.clip(-0.5, 0.8) * a, anything),
    "clip low": on_both(lambda a: a.clip(0.1) * a, anything),
    "maximum": on_both(lambda a, b: a.maximum(b) * a, broadcasting),
    "minimum": on_both(lambda a, b: a.minimum(b) * b, broadcasting),
    "where": Case(
        lambda a: F.where(a > 0, a**2, a.exp()),
        lambda a: torch.where(a > 0, a**2, a.exp()),
        anything,
    ),
    "silu": Case(F.silu, TF.silu, anything),
    "gelu": Case(F.gelu, TF.gelu, anything),
    "gelu tanh": Case(
        lambda a: F.gelu(a, "tanh"), lambda a: TF.gelu(a, approximate="tanh"), anything
    ),
    "sum": on_both(lambda a: a.sum() ** 2, anything),
    "sum dim": on_both(lambda a: a.sum(1) ** 2, three_dimensional),
    "sum dims keepdim": Case(
        lambda a: a.sum((0, -1), keepdim=True) ** 2,
        lambda a: a.sum((0, -1), keepdim=True) ** 2,
        three_dimensional,
    ),
    "mean": on_both(lambda a: a.mean() * a, anything),
    "mean dim": on_both(lambda a: a.mean((1, 2)) ** 3, three_dimensional),
    "var": on_both(lambda a: a.var((0, 1, 2), correction=0), three_dimensional),
    "var unbiased": Case(
        lambda a: F.concat([a, a * 2 + 1]).var(0, keepdim=True),
        lambda a: torch.cat([a, a * 2 + 1]).var(0, keepdim=True),
        three_dimensional,
    ),
    "max": Case(lambda a: a.max() * a, lambda a: a.amax() * a, with_ties),
    "max dim": Case(lambda a: a.max(1) ** 2, lambda a: a.amax(1) ** 2, with_ties),
    "min dim": Case(
        lambda a: a.min((0, 2), True) * a, lambda a: a.amin((0, 2), True) * a, with_ties
    ),
    "logsumexp": on_both(lambda a: a.logsumexp((0, 1)), three_dimensional),
    "logsumexp keepdim": on_both(lambda a: (a * 300).logsumexp(2, True) / 300, three_dimensional),
    "softmax": on_both(lambda a: a.softmax(1), three_dimensional),
    "log_softmax": on_both(lambda a: a.log_softmax(-1) ** 2, three_dimensional),
    "cumsum": on_both(lambda a: a.cumsum(1) ** 2, three_dimensional),
    "reshape": on_both(lambda a: a.reshape(-1) ** 2, three_dimensional),
    "flatten": on_both(lambda a: a.flatten(1) ** 2, three_dimensional),
    "transpose": on_both(lambda a: a.transpose(0, -1) ** 2, three_dimensional),
    "permute": on_both(lambda a: a.permute(2, 0, 1) ** 2, three_dimensional),
    "mT": on_both(lambda a: a.mT**2, three_dimensional),
    "unsqueeze": on_both(lambda a: a.unsqueeze(-1).unsqueeze(0) ** 2, anything),
    "squeeze": on_both(lambda a: a.unsqueeze(1).squeeze(1) ** 2, three_dimensional),
    "expand": Case(
        lambda a: a.sum(1, True).expand(2, *a.shape) ** 2,
        lambda a: a.sum(1, True).expand(2, *a.shape) ** 2,
        three_dimensional,
    ),
    "flip": Case(
        lambda a: a.flip(1) * a.exp(), lambda a: a.flip(1) * a.exp(), three_dimensional
    ),
    "getitem slice": on_both(lambda a: a[::2, None, ..., -1] ** 2, three_dimensional),
    "getitem rows": Case(lambda a: a[ROWS] ** 3, lambda a: a[torch.from_numpy(ROWS)] ** 3,
                         rows_of_three),
    "getitem mask": Case(lambda a: a[MASK] ** 2, lambda a: a[torch.from_numpy(MASK)] ** 2,
                         rows_of_three),
    "getitem mixed": Case(
        lambda a: a[ROWS, 1:] ** 2, lambda a: a[torch.from_numpy(ROWS), 1:] ** 2, four_by_three
    ),
    "gather": Case(lambda a: a.gather(0, INDEX) ** 3, lambda a: a.gather(0, T_INDEX) ** 3,
                   four_by_three),
    "scatter_add": Case(
        lambda a, b: a.scatter_add(0, INDEX, b) ** 3,
        lambda a, b: a.scatter_add(0, T_INDEX, b) ** 3,
        with_source,
    ),
    "concat": Case(
        lambda a, b, c: F.concat([a, b, a * c], 1) ** 2,
        lambda a, b, c: torch.cat([a, b, a * c], 1) ** 2,
        triple,
    ),
    "stack": Case(
        lambda a, b, c: F.stack([a, b * c], -1) ** 2,
        lambda a, b, c: torch.stack([a, b * c], -1) ** 2,
        triple,
    ),
    "pad": Case(
        lambda a: F.pad(a, (1, 2, 0, 1)) ** 2, lambda a: TF.pad(a, (1, 2, 0, 1)) ** 2,
        three_dimensional,
    ),
    "matmul": on_both(lambda a, b: a @ b, matrices),
    "matmul vectors": on_both(lambda a, b: a @ b, vectors),
    "linear": Case(F.linear, TF.linear, layer),
    "mse_loss": Case(F.mse_loss, TF.mse_loss, lambda rng: triple(rng)[:2]),
    "cross_entropy": Case(
        lambda a: F.cross_entropy(a, LABELS), lambda a: TF.cross_entropy(a, T_LABELS),
        four_by_three,
    ),
    "conv2d": Case(F.conv2d, TF.conv2d, images),
    "conv2d stride padding": Case(
        lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1),
        lambda x, w, b: TF.conv2d(x, w, b, stride=2, padding=1),
        images,
    ),
    "conv2d dilation": Case(
        lambda x, w, b: F.conv2d(x, w, padding=2, dilation=2),
        lambda x, w, b: TF.conv2d(x, w, padding=2, dilation=2),
        images,
    ),
}  # fmt: skip


# ---------------------------------------------------------------- 对照


def assert_close(actual: np.ndarray, expected: torch.Tensor, what: str) -> None:
    expected = expected.detach().numpy()
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    scale = max(np.abs(expected).max(initial=0), 1.0)
    assert np.abs(actual - expected).max(initial=0) <= TOLERANCE * scale, what


def derivatives(case: Case, arrays: Arrays, rng: np.random.Generator) -> None:
    """取值、对每个输入的一阶导数、再对每个输入的二阶导数，逐一比较。"""
    ours = [Tensor(a, requires_grad=True) for a in arrays]
    theirs = [torch.tensor(a, requires_grad=True) for a in arrays]
    y, t = case.ours(*ours), case.theirs(*theirs)
    assert_close(y.numpy(), t, "取值")

    # 输出的随机加权和：每个元素的贡献各不相同；平方使二阶导数不恒为零
    weight = rng.normal(size=y.shape)
    y, t = (y * weight + y * y).sum(), (t * torch.tensor(weight) + t * t).sum()
    first = grad(y, ours, create_graph=True, allow_unused=True)
    reference = torch.autograd.grad(t, theirs, create_graph=True, allow_unused=True)
    used = [r is not None for r in reference]
    assert [g is not None for g in first] == used
    for g, r in zip(first, reference, strict=True):
        if r is not None:
            assert_close(g.numpy(), r, "一阶导数")

    weights = [rng.normal(size=a.shape) for a in arrays]
    chosen = [i for i, ok in enumerate(used) if ok]
    z = sum(((first[i] * weights[i]).sum() for i in chosen), Tensor(0.0))
    s = sum((reference[i] * torch.tensor(weights[i])).sum() for i in chosen)
    leaves = [ours[i] for i in chosen], [theirs[i] for i in chosen]
    second = grad(z, leaves[0], allow_unused=True)
    truth = torch.autograd.grad(s, leaves[1], allow_unused=True)
    for g, r in zip(second, truth, strict=True):
        expected = torch.zeros(1, dtype=torch.float64) if r is None else r
        actual = np.zeros(expected.shape) if g is None else g.numpy()
        if r is None:
            actual = np.abs(actual).max(keepdims=True).reshape(-1)[:1]
        assert_close(actual, expected, "二阶导数")


@pytest.mark.parametrize("name", CASES)
def test_operator_and_both_derivatives(name: str) -> None:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for _ in range(ROUNDS):
        derivatives(CASES[name], CASES[name].make(rng), rng)


def test_there_are_at_least_35_operators() -> None:
    assert len({name.split()[0] for name in CASES}) >= 35
