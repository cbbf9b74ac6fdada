"""模型摘要：参数量与乘加次数逐个手算核对，并确认看一眼模型不留任何痕迹。"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.model_summary import (
    LayerRow,
    count_parameters,
    display_width,
    format_table,
    model_summary,
    trace_shapes,
)


class ManualLinear(nn.Module):
    """手写的全连接层 y = x Wᵀ + b。"""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class SelfAttention(nn.Module):
    """官方的多头注意力作自注意力用。"""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class ScaledDotProduct(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def row(model: nn.Module, path: str, *inputs: Tensor) -> LayerRow:
    return next(r for r in model_summary(model, *inputs).rows if r.path == path)


# ---------------------------------------------------------------- 参数量与乘加次数


def test_mlp_by_hand() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3, bias=False))
    summary = model_summary(model, torch.zeros(4, 6))
    assert [(r.path, r.type, r.depth, r.shape, r.params, r.macs) for r in summary.rows] == [
        ("", "Sequential", 0, "(4, 3)", 0, 4 * 6 * 5 + 4 * 5 * 3),
        ("0", "Linear", 1, "(4, 5)", 6 * 5 + 5, 4 * 6 * 5),
        ("1", "ReLU", 1, "(4, 5)", 0, 0),
        ("2", "Linear", 1, "(4, 3)", 5 * 3, 4 * 5 * 3),
    ]
    assert (summary.total_params, summary.total_macs) == (50, 180)
    assert summary.activation_mib == (20 + 20 + 12) * 4 / 2**20  # 只算叶模块的输出
    assert summary.input_shapes == ["(4, 6)"]


@pytest.mark.parametrize(
    ("model", "inputs", "macs"),
    [
        # 输出 9 个位置 × 每个 3·3·3 次 × 4 通道
        (nn.Conv2d(3, 4, 3), [(1, 3, 5, 5)], 9 * 27 * 4),
        (nn.Conv2d(4, 4, 3, padding=1, groups=2), [(2, 4, 5, 5)], 2 * 25 * (2 * 9) * 4),
        (nn.ConvTranspose2d(3, 4, 3), [(1, 3, 5, 5)], 25 * 3 * 4 * 9),
        # 四个门，各乘输入与状态
        (nn.LSTM(8, 16, batch_first=True), [(2, 5, 8)], 2 * 5 * 4 * 16 * (8 + 16)),
        (nn.GRU(8, 16, batch_first=True), [(2, 5, 8)], 2 * 5 * 3 * 16 * (8 + 16)),
        # q、k、v、输出四个投影，加上 QKᵀ 与 PV
        (SelfAttention(), [(2, 5, 8)], 2 * 5 * 8 * 8 * 4 + 2 * 5 * 5 * 8 * 2),
        (ScaledDotProduct(), [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)], 6 * 5 * 7 * (8 + 6)),
        (
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            [(2, 5, 8)],
            2 * 5 * 8 * 8 * 4 + 2 * 5 * 5 * 8 * 2 + 2 * 5 * 8 * 16 * 2,
        ),
        (nn.LayerNorm(8), [(2, 5, 8)], 0),  # 逐元素运算不计
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_macs_of_official_layers_by_hand(model: nn.Module, inputs: list, macs: int) -> None:
    # 融合的核（oneDNN 的 LSTM、注意力的快速路径）也要数得到
    assert model_summary(model, *map(torch.zeros, inputs)).total_macs == macs


def test_counting_leaves_fused_kernels_as_they_were() -> None:
    backends = torch.backends
    before = backends.mkldnn.enabled, backends.cudnn.enabled, backends.mha.get_fastpath_enabled()
    assert before == (True, True, True)  # 否则下面什么也没检查
    model_summary(nn.LSTM(2, 3), torch.zeros(4, 1, 2))
    with pytest.raises(RuntimeError):
        model_summary(nn.LSTM(2, 3), torch.zeros(4, 1, 5))
    after = backends.mkldnn.enabled, backends.cudnn.enabled, backends.mha.get_fastpath_enabled()
    assert after == before


def test_handwritten_matmul_counts_like_linear() -> None:
    x = torch.zeros(2, 7, 6)
    manual, official = row(ManualLinear(6, 5), "", x), row(nn.Linear(6, 5), "", x)
    assert (manual.macs, manual.params) == (official.macs, official.params) == (2 * 7 * 30, 35)


def test_shared_weight_is_counted_once() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    summary = model_summary(model, torch.zeros(2, 3, dtype=torch.long))
    assert count_parameters(model) == summary.total_params == 40
    assert [r.params for r in summary.rows] == [0, 40, 0]


def test_module_used_twice_is_one_row_with_both_calls() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    summary = model_summary(model, torch.zeros(1, 4))
    assert [(r.type, r.calls, r.macs, r.params) for r in summary.rows] == [
        ("Sequential", 1, 32, 0),
        ("Linear", 2, 32, 20),
        ("ReLU", 1, 0, 0),
    ]
    assert "Linear ×2" in str(summary)


def test_uncalled_module_says_so() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(2, 2), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    spare = row(Skips(), "spare", torch.zeros(1, 2))
    assert (spare.shape, spare.params, spare.macs, spare.calls) == ("未调用", 9, 0, 0)


def test_identity_holds_no_activation_of_its_own() -> None:
    """恒等交出的就是输入，训练时不另存一份；同样大小的 ReLU 则要。"""
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.ReLU())
    summary = model_summary(model, torch.zeros(3, 4))
    assert [r.activation_bytes for r in summary.rows] == [0, 48, 0, 48]
    assert summary.activation_mib == 96 / 2**20
    assert summary.rows[2].shape == "(3, 4)" and summary.rows[2].calls == 1


def nested() -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU()))

    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(block(), block()), nn.Linear(4, 2))


def test_collapsed_folds_deep_rows_into_their_ancestor() -> None:
    whole = model_summary(nested(), torch.zeros(1, 4))
    before = [(r.path, r.params, r.activation_bytes) for r in whole.rows]
    folded = whole.collapsed(2)
    assert [(r.path, r.params, r.macs, r.activation_bytes) for r in folded.rows] == [
        ("", 0, 16 + 4 * 16 + 8, 0),
        ("0", 20, 16, 16),
        ("1", 0, 64, 0),
        ("1.0", 20 + 16, 32, 48),  # 三个叶模块的输出，各 16 字节
        ("1.1", 20 + 16, 32, 48),
        ("2", 10, 8, 8),
    ]
    assert str(folded).splitlines()[-2] == str(whole).splitlines()[-2]  # 合计一行不变
    assert [(r.path, r.params, r.activation_bytes) for r in whole.rows] == before  # 原表不变
    (root,) = whole.collapsed(0).rows
    assert root.params == whole.total_params and root.macs == whole.total_macs
    assert [r.params for r in whole.collapsed(9).rows] == [r.params for r in whole.rows]


def test_frozen_parameters_are_reported() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    assert (count_parameters(model), count_parameters(model, trainable_only=True)) == (11, 3)
    assert "参数 11（冻结 8）" in str(model_summary(model, torch.zeros(1, 3)))


def test_several_inputs_and_tuple_outputs() -> None:
    summary = model_summary(nn.LSTM(2, 3), torch.zeros(4, 1, 2))
    assert summary.rows[0].shape == "(4, 1, 3), (1, 1, 3), (1, 1, 3)"
    summary = model_summary(nn.Bilinear(2, 3, 4), torch.zeros(5, 2), torch.zeros(5, 3))
    assert summary.input_shapes == ["(5, 2)", "(5, 3)"]


# ---------------------------------------------------------------- 不留痕迹


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("inspect", [model_summary, trace_shapes])
def test_inspection_leaves_no_trace(inspect) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[0].eval()  # 混合的模式也要原样恢复
    before, rng = snapshot(model), torch.get_rng_state()
    inspect(model, torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    assert [m.training for m in model.modules()] == [True, False, True, True]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("inspect", [model_summary, trace_shapes])
def test_inspection_restores_everything_when_forward_raises(inspect) -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.rand(3)
            raise RuntimeError("坏了")

    model = nn.Sequential(nn.BatchNorm1d(4), Breaks()).train()
    before, rng = snapshot(model), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="坏了"):
        inspect(model, torch.zeros(2, 4))
    assert all(m.training for m in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_inspection_keeps_the_users_own_hooks() -> None:
    model, calls = nn.Linear(2, 2), []
    model.register_forward_hook(lambda *_: calls.append(1))
    model_summary(model, torch.zeros(1, 2))
    assert len(calls) == 1 and len(model._forward_hooks) == 1


# ---------------------------------------------------------------- 形状追踪


def test_trace_lists_functional_and_operator_steps() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = ManualLinear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            q = F.relu(self.project(x)).view(2, 3, 2, 3).transpose(1, 2)
            return (q @ q.mT / math.sqrt(3)).softmax(-1)

    steps = [(s.module, s.op, s.shape) for s in trace_shapes(Scores(), torch.zeros(2, 3, 4))]
    expected = [
        ("project", "T", "(4, 6)"),
        ("project", "matmul", "(2, 3, 6)"),
        ("project", "add", "(2, 3, 6)"),
        ("", "relu", "(2, 3, 6)"),
        ("", "view", "(2, 3, 2, 3)"),
        ("", "transpose", "(2, 2, 3, 3)"),
        ("", "mT", "(2, 2, 3, 3)"),
        ("", "matmul", "(2, 2, 3, 3)"),
        ("", "div", "(2, 2, 3, 3)"),
        ("", "softmax", "(2, 2, 3, 3)"),
    ]
    assert [(module, shape) for module, _, shape in steps] == [(m, s) for m, _, s in expected]
    for (_, op, _), (_, name, _) in zip(steps, expected, strict=True):
        assert name in op, f"{op} 应是 {name}"


def test_trace_step_reads_well() -> None:
    steps = trace_shapes(nn.Sequential(nn.Linear(2, 3)), torch.zeros(1, 2))
    assert [str(step) for step in steps] == ["0: nn.functional.linear -> (1, 3)"]


# ---------------------------------------------------------------- 表格


def test_table_aligns_chinese_and_ascii_columns() -> None:
    table = format_table(["模块", "n"], [["fc", "1"], ["嵌入", "1,234"]], right=(1,))
    assert table.splitlines() == ["模块      n", "fc        1", "嵌入  1,234"]
    assert len({display_width(line) for line in table.splitlines()}) == 1
    assert display_width("a（中）") == 7
