"""六条不变性：不看实现，只看输入与输出，就能查出这门课里最常见的无声错误。

数值对照能说明"与官方相同"，不变性能说明"性质成立"：因果掩码漏一格、填充位渗进结果、缓存错一位、
批内样本串味，训练照样收敛，损失甚至更低，只有这样的检查才看得见。

共同约定：

- 输入与输出用 float64（整数的词元编号除外），误差才不会淹没错误；模块先 ``.double().eval()``。
- ``B`` 批大小，``T`` 长度；批在第 0 维，时间在第 1 维，其余维任意。
- 每条检查都先确认它不是空洞地成立：对输入毫无反应的函数不算数。
- 不成立时抛出 ``AssertionError``，写明最大绝对误差与出错的位置。
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from utils.seed import make_generator

ATOL = 1e-9  # float64 下，重排求和次序的误差远小于它，真正的错误远大于它


# ---------------------------------------------------------------- 公共部分


def _difference(actual: Tensor, expected: Tensor) -> float:
    """最大绝对误差；空张量为 0，含 nan 时为 nan。"""
    assert actual.shape == expected.shape, f"形状 {tuple(actual.shape)} ≠ {tuple(expected.shape)}"
    for tensor in (actual, expected):
        assert not tensor.is_floating_point() or tensor.dtype == torch.float64, (
            f"不变性要在 float64 下检查，得到的是 {tensor.dtype}：请先 .double()"
        )
    return (actual - expected).abs().max().item() if actual.numel() else 0.0


def _assert_close(actual: Tensor, expected: Tensor, atol: float, claim: str) -> None:
    difference = _difference(actual, expected)
    limit = atol * max(1.0, expected.abs().max().item()) if expected.numel() else atol
    assert difference <= limit, f"{claim}：最大绝对误差 {difference:.3g}，允许 {limit:.3g}"


def _assert_reacts(before: Tensor, after: Tensor, atol: float, claim: str) -> None:
    difference = _difference(after, before)
    assert not difference <= atol, f"{claim}：输出对输入毫无反应，检查没有意义"


def _disturb(x: Tensor, generator: torch.Generator) -> Tensor:
    """换掉每一个元素：浮点数加上噪声，词元编号换成下一个（在 ``x`` 出现过的范围内循环）。"""
    if x.is_floating_point():
        return x + 3 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    assert x.max() > 0, "词元编号应至少有两种，否则无从扰动"
    return (x + 1) % (x.max() + 1)


# ---------------------------------------------------------------- 六条检查


@torch.no_grad()
def assert_causal(function: Callable[[Tensor], Tensor], x: Tensor, atol: float = ATOL) -> None:
    """因果：位置 t 及之后的输入怎样改，t 之前的输出都不变。

    第 6 章的单向 RNN、第 7 章的因果注意力、第 8 章的解码器与第 9、10 章的语言模型都应满足::

        assert_causal(lambda x: attention(x, causal=True), torch.randn(2, 7, 8).double())
        assert_causal(model, torch.randint(0, 11, (2, 7)))       # 词元编号 -> logits

    参数:
        function: ``(B, T, ...)`` -> ``(B, T, ...)``。
        x: 输入，``T ≥ 2``。
    """
    generator = make_generator(0)
    before = function(x)
    for t in range(1, x.shape[1]):
        changed = x.clone()
        changed[:, t:] = _disturb(x, generator)[:, t:]
        after = function(changed)
        _assert_close(after[:, :t], before[:, :t], atol, f"位置 {t} 之后的输入影响了之前的输出")
        _assert_reacts(before[:, t:], after[:, t:], atol, f"因果性（t={t}）")


@torch.no_grad()
def assert_padding_invariant(
    function: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    mask: Tensor,
    *,
    pooled: bool = False,
    atol: float = ATOL,
) -> None:
    """填充不变：填充位放什么都不影响有效位的输出，且与单独送入、不加填充的结果相同。

    第 6 章的变长序列、第 7 章的带掩码注意力、第 8 章的编码器都应满足::

        mask = torch.arange(6) < torch.tensor([[6], [4], [1]])   # True 为有效
        assert_padding_invariant(lambda x, mask: encoder(x, mask), x, mask)

    参数:
        function: ``(x, mask)`` -> ``(B, T, ...)``；``pooled`` 时 -> ``(B, ...)``。
        x: ``(B, T, ...)``。
        mask: 布尔 ``(B, T)``，True 为有效；有效位在左，每个样本至少一个，且至少一个样本有填充。
        pooled: 输出是否已沿时间汇总，每个样本一个。
    """
    lengths = mask.sum(1)
    assert torch.equal(mask, torch.arange(mask.shape[1]) < lengths[:, None]), "有效位应都在左边"
    assert lengths.min() >= 1 and not mask.all(), "每个样本至少一个有效位，且至少一个样本有填充"
    before = function(x, mask)
    disturbed = _disturb(x, make_generator(0))
    broadcast = mask.reshape(*mask.shape, *[1] * (x.ndim - 2))
    after = function(torch.where(broadcast, x, disturbed), mask)
    if pooled:
        _assert_close(after, before, atol, "填充位的内容影响了输出")
    else:
        _assert_close(after[mask], before[mask], atol, "填充位的内容影响了有效位的输出")
    _assert_reacts(before, function(disturbed, mask), atol, "填充不变性")
    for b, length in enumerate(lengths.tolist()):
        alone = function(x[b : b + 1, :length], mask[b : b + 1, :length])[0]
        batched = before[b] if pooled else before[b, :length]
        _assert_close(batched, alone, atol, f"样本 {b}（长 {length}）加填充与不加填充不同")


@torch.no_grad()
def assert_permutation_equivariant(
    function: Callable[[Tensor], Tensor], x: Tensor, atol: float = ATOL
) -> None:
    """置换等变：输入沿时间重排，输出以同样的方式重排。

    没有位置编码的自注意力（第 7、8 章）应满足；加上位置编码之后应当不满足，两者都值得测::

        assert_permutation_equivariant(attention, x)
        with pytest.raises(AssertionError):
            assert_permutation_equivariant(lambda x: attention(x + positions), x)

    参数:
        function: ``(B, T, ...)`` -> ``(B, T, ...)``。
        x: 输入，``T ≥ 2``，各位置不同。
    """
    length = x.shape[1]
    before = function(x)
    for shift in range(1, length):
        # 先翻转再循环移位：连同移位本身，足以排除只对其中一种重排等变的函数
        for order in (torch.arange(length).roll(shift), torch.arange(length).flip(0).roll(shift)):
            after = function(x[:, order])
            claim = f"输入按 {order.tolist()} 重排，输出没有同样重排"
            _assert_close(after, before[:, order], atol, claim)
    _assert_reacts(before, function(x.roll(1, 1)), atol, "置换等变性")


@torch.no_grad()
def assert_cached_equals_full(
    full: Callable[[Tensor], Tensor],
    step: Callable[[Tensor, Any], tuple[Tensor, Any]],
    x: Tensor,
    *,
    splits: Sequence[Sequence[int]] | None = None,
    atol: float = ATOL,
) -> None:
    """缓存等价：带着缓存一段一段地算，与一次算完整个序列相同。

    第 6 章的 RNN 状态、第 8 至 10 章的 KV 缓存与生成都应满足::

        assert_cached_equals_full(model, lambda x, cache: model.step(x, cache), tokens)

    参数:
        full: ``(B, T, ...)`` -> ``(B, T, ...)``。
        step: ``(x 的一段, 缓存)`` -> ``(这一段的输出, 新缓存)``；开始时缓存为 ``None``。
        x: 输入，``T ≥ 3``。
        splits: 各种切法，每种是各段的长度；缺省时逐个送入，以及先送一半（预填充）再逐个送入。
    """
    length = x.shape[1]
    expected = full(x)
    half = length // 2
    for sizes in splits or ([1] * length, [half] + [1] * (length - half)):
        assert sum(sizes) == length, f"切法 {list(sizes)} 之和应为序列长 {length}"
        cache, start = None, 0
        for size in sizes:
            y, cache = step(x[:, start : start + size], cache)
            claim = f"切法 {list(sizes)}：位置 {start} 起的一段与整段计算不同"
            _assert_close(y, expected[:, start : start + size], atol, claim)
            start += size
    _assert_reacts(expected, full(_disturb(x, make_generator(0))), atol, "缓存等价")


def assert_parallel_equals_recurrent(
    parallel: Callable[..., Tensor],
    recurrent: Callable[..., Tensor],
    *inputs: Tensor,
    atol: float = ATOL,
) -> None:
    """并行形式等于递推形式：输出相同，对每个输入的梯度也相同。

    第 6 章的向量化与逐步 RNN、第 9 章线性注意力的并行、分块与递推三种形式都应满足::

        assert_parallel_equals_recurrent(linear_attention, linear_attention_naive, q, k, v)

    参数:
        parallel, recurrent: 同样的输入 -> 同样形状的输出。
        inputs: 输入；浮点的几个参与梯度的比较。
    """
    results = []
    for function in (parallel, recurrent):
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        y = function(*leaves)
        # 随机加权求和，使输出的每个元素对梯度的贡献各不相同
        weight = torch.randn(y.shape, generator=make_generator(0), dtype=y.dtype)
        (y * weight).sum().backward()
        results.append((y.detach(), leaves))
    (y_parallel, x_parallel), (y_recurrent, x_recurrent) = results
    _assert_close(y_parallel, y_recurrent, atol, "并行形式与递推形式的输出不同")
    floating = [i for i, x in enumerate(inputs) if x.is_floating_point()]
    for i in floating:
        ours, reference = x_parallel[i].grad, x_recurrent[i].grad
        assert (ours is None) == (reference is None), f"只有一种形式对第 {i} 个输入有梯度"
        if ours is not None:
            _assert_close(ours, reference, atol, f"对第 {i} 个输入的梯度不同")
    assert any(x_recurrent[i].grad is not None and x_recurrent[i].grad.any() for i in floating), (
        "并行等于递推：输出对输入毫无反应，检查没有意义"
    )


@torch.no_grad()
def assert_batch_independent(
    function: Callable[[Tensor], Tensor], x: Tensor, atol: float = ATOL
) -> None:
    """批内独立：每个样本的输出只取决于它自己，与同批的其他样本无关。

    评估模式下的一切模型都应满足；训练模式的批归一化（第 3 章）不满足。展平时弄错维度、
    ``reshape`` 代替 ``transpose``，都会在这里现形::

        assert_batch_independent(model.double().eval(), torch.randn(3, 1, 28, 28).double())

    参数:
        function: ``(B, ...)`` -> ``(B, ...)``。
        x: 输入，``B ≥ 2``。
    """
    assert len(x) >= 2, "批大小应至少为 2"
    together = function(x)
    disturbed = _disturb(x, make_generator(0))
    for b in range(len(x)):
        alone = function(x[b : b + 1])[0]
        _assert_close(together[b], alone, atol, f"样本 {b} 在批里与单独送入的输出不同")
        others = disturbed.clone()
        others[b] = x[b]
        claim = f"改动其他样本，样本 {b} 的输出变了"
        _assert_close(function(others)[b], together[b], atol, claim)
    _assert_reacts(together, function(disturbed), atol, "批内独立性")
