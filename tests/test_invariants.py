"""不变性检查本身：对守规矩的模块通过，对犯规的模块必须报错。"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.invariants import (
    assert_batch_independent,
    assert_cached_equals_full,
    assert_causal,
    assert_padding_invariant,
    assert_parallel_equals_recurrent,
    assert_permutation_equivariant,
)


@pytest.fixture
def x() -> Tensor:
    """(B, T, C) = (3, 5, 4)。"""
    return torch.randn(3, 5, 4, dtype=torch.float64)


def self_attention(x: Tensor, allowed: Tensor | None = None) -> Tensor:
    """单头自注意力，``allowed`` 里 True 表示可以看。"""
    scores = x @ x.mT / math.sqrt(x.shape[-1])
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    return scores.softmax(-1) @ x


def causal_attention(x: Tensor, diagonal: int = 0) -> Tensor:
    T = x.shape[1]
    return self_attention(x, torch.ones(T, T, dtype=torch.bool).tril(diagonal))


# ---------------------------------------------------------------- 因果


def test_causal_accepts_causal_attention_and_rejects_a_mask_off_by_one(x: Tensor) -> None:
    assert_causal(causal_attention, x)
    with pytest.raises(AssertionError, match=r"位置 1 之后的输入影响了之前的输出：最大绝对误差"):
        assert_causal(lambda x: causal_attention(x, diagonal=1), x)


def test_causal_works_on_token_ids_and_reports_the_first_leak() -> None:
    table = torch.randn(7, 4, dtype=torch.float64)
    tokens = torch.arange(10).view(2, 5) % 7
    assert_causal(lambda t: table[t].cumsum(1), tokens)
    with pytest.raises(AssertionError, match="位置 4 "):  # 只有位置 3 偷看了位置 4
        assert_causal(lambda t: table[t].cumsum(1) + F.pad(table[t][:, 4:], (0, 0, 3, 1)), tokens)


def test_causal_rejects_a_function_that_ignores_its_input(x: Tensor) -> None:
    with pytest.raises(AssertionError, match="毫无反应"):
        assert_causal(torch.zeros_like, x)


def test_causal_rejects_nan(x: Tensor) -> None:
    with pytest.raises(AssertionError, match="nan"):
        assert_causal(lambda x: x * math.nan, x)


def test_float32_is_refused(x: Tensor) -> None:
    with pytest.raises(AssertionError, match="float64"):
        assert_causal(causal_attention, x.float())


# ---------------------------------------------------------------- 填充

MASK = torch.arange(5) < torch.tensor([[5], [3], [1]])


def test_padding_accepts_masked_attention_and_rejects_unmasked(x: Tensor) -> None:
    assert_padding_invariant(lambda x, mask: self_attention(x, mask[:, None, :]), x, MASK)
    with pytest.raises(AssertionError, match="填充位的内容影响了有效位"):
        assert_padding_invariant(lambda x, mask: self_attention(x), x, MASK)


def test_padding_accepts_masked_mean_and_rejects_mean_over_the_padded_length(x: Tensor) -> None:
    def total(x: Tensor, mask: Tensor) -> Tensor:
        return (x * mask[..., None]).sum(1)

    def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
        return total(x, mask) / mask.sum(1, keepdim=True)

    assert_padding_invariant(masked_mean, x, MASK, pooled=True)
    # 填充位已清零，内容无关，但除以了填充后的长度：只有"单独送入"才查得出
    with pytest.raises(AssertionError, match=r"样本 1（长 3）加填充与不加填充不同"):
        assert_padding_invariant(lambda x, m: total(x, m) / x.shape[1], x, MASK, pooled=True)


@pytest.mark.parametrize(
    "mask",
    [torch.ones(3, 5, dtype=torch.bool), MASK.flip(1), MASK & (torch.arange(3) < 2)[:, None]],
)
def test_padding_refuses_a_mask_that_tests_nothing(x: Tensor, mask: Tensor) -> None:
    with pytest.raises(AssertionError, match="有效位"):
        assert_padding_invariant(lambda x, mask: x, x, mask)


# ---------------------------------------------------------------- 置换


def test_permutation_accepts_attention_and_rejects_positions(x: Tensor) -> None:
    assert_permutation_equivariant(self_attention, x)
    with pytest.raises(AssertionError, match="输出没有同样重排"):
        assert_permutation_equivariant(lambda x: self_attention(x + torch.arange(5.0)[:, None]), x)


@pytest.mark.parametrize("function", [lambda x: x.flip(1), lambda x: x.roll(1, 1) + x])
def test_permutation_rejects_functions_equivariant_to_some_orders_only(function, x: Tensor) -> None:
    # 翻转与循环移位各与一部分重排可交换，不能蒙混过关
    with pytest.raises(AssertionError, match="重排"):
        assert_permutation_equivariant(function, x)


# ---------------------------------------------------------------- 缓存


def cumulative_step(x: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
    """前缀和的增量形式，缓存是到目前为止的和。"""
    y = x.cumsum(1) + (0 if cache is None else cache)
    return y, y[:, -1:]


def test_cached_accepts_running_sum(x: Tensor) -> None:
    assert_cached_equals_full(lambda x: x.cumsum(1), cumulative_step, x)
    assert_cached_equals_full(lambda x: x.cumsum(1), cumulative_step, x, splits=[[2, 3], [5]])


def test_cached_rejects_a_step_that_forgets_and_one_wrong_only_after_prefill(x: Tensor) -> None:
    with pytest.raises(AssertionError, match=r"切法 \[1, 1, 1, 1, 1\]：位置 1 起"):
        assert_cached_equals_full(lambda x: x.cumsum(1), lambda x, _: (x.cumsum(1), None), x)

    def forgets_prefill(x: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        y, _ = cumulative_step(x, cache)
        return y, y[:, :1]  # 缓存了这一段的第一个而不是最后一个：逐个送入时恰好没错

    with pytest.raises(AssertionError, match=r"切法 \[2, 1, 1, 1\]：位置 2 起"):
        assert_cached_equals_full(lambda x: x.cumsum(1), forgets_prefill, x)


def test_cached_refuses_splits_that_do_not_cover_the_sequence(x: Tensor) -> None:
    with pytest.raises(AssertionError, match="之和应为序列长 5"):
        assert_cached_equals_full(lambda x: x.cumsum(1), cumulative_step, x, splits=[[2, 2]])


# ---------------------------------------------------------------- 并行与递推


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


def linear_attention_recurrent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, rows = q.new_zeros(len(q), k.shape[-1], v.shape[-1]), []
    for t in range(q.shape[1]):
        state = state + k[:, t, :, None] * v[:, t, None, :]
        rows.append((q[:, t, None, :] @ state)[:, 0])
    return torch.stack(rows, 1)


def test_parallel_accepts_linear_attention(x: Tensor) -> None:
    q, k, v = x, x.roll(1, 0), x.roll(1, 1)
    assert_parallel_equals_recurrent(linear_attention, linear_attention_recurrent, q, k, v)


def test_parallel_rejects_wrong_output_and_wrong_gradient(x: Tensor) -> None:
    q, k, v = x, x.roll(1, 0), x.roll(1, 1)
    with pytest.raises(AssertionError, match="输出不同"):
        assert_parallel_equals_recurrent(
            lambda q, k, v: (q @ k.mT).tril(-1) @ v, linear_attention_recurrent, q, k, v
        )
    with pytest.raises(AssertionError, match="对第 2 个输入的梯度不同"):  # 前向相同，梯度减半
        assert_parallel_equals_recurrent(
            lambda q, k, v: linear_attention(q, k, (v + v.detach()) / 2),
            linear_attention_recurrent,
            *(q, k, v),
        )
    with pytest.raises(AssertionError, match="只有一种形式对第 1 个输入有梯度"):
        assert_parallel_equals_recurrent(
            lambda q, k, v: linear_attention(q, k.detach(), v), linear_attention_recurrent, q, k, v
        )


# ---------------------------------------------------------------- 批


def test_batch_accepts_eval_batch_norm_and_rejects_training_mode(x: Tensor) -> None:
    norm = nn.BatchNorm1d(5).double().eval()
    assert_batch_independent(norm, x)
    with pytest.raises(AssertionError, match=r"样本 0 在批里与单独送入的输出不同：最大绝对误差"):
        assert_batch_independent(norm.train(), x)


def test_batch_rejects_reshape_instead_of_transpose(x: Tensor) -> None:
    with pytest.raises(AssertionError, match="样本 0"):
        assert_batch_independent(lambda x: x.reshape(5, len(x), 4).transpose(0, 1), x)


def test_batch_rejects_a_leak_from_neighbour_that_vanishes_when_alone(x: Tensor) -> None:
    with pytest.raises(AssertionError, match="样本 0"):
        assert_batch_independent(lambda x: x + x.roll(1, 0) * (len(x) > 1), x)
