"""量化：格点对照官方的取整，整数卷积对照手算与另一种整数实现，模拟与整数逐位相同。"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_05_resnet_modern_cnn.quantization import (
    METHODS,
    Grid,
    Observer,
    affine_grid,
    dequantize_tensor,
    fake_quantize,
    fixed_point,
    quantize_tensor,
    requantize,
    symmetric_grid,
)
from chapter_05_resnet_modern_cnn.quantized_layers import (
    QuantConv2d,
    QuantLinear,
    calibrate,
    integer_conv2d,
    kernel_conv2d,
    quantize,
    simulated_conv2d,
)
from utils import make_generator


def scalar(value: float) -> Tensor:
    return torch.tensor(value)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=make_generator(seed))


def int8(*shape: int, seed: int = 0, low: int = -128) -> Tensor:
    return torch.randint(low, 128, shape, generator=make_generator(seed), dtype=torch.int8)


# ---------------------------------------------------------------- 格点


def test_affine_grid_by_hand() -> None:
    # [-1, 3]，2 位：四格，刻度 4/3，零点 round(-2 + 3/4) = -1，格点 -4/3, 0, 4/3, 8/3
    grid = affine_grid(scalar(-1.0), scalar(3.0), bits=2)
    assert grid.scale.item() == pytest.approx(4 / 3) and grid.zero_point.item() == -1
    x = torch.tensor([-9.0, -1.0, 0.0, 0.6, 0.7, 3.0])
    assert quantize_tensor(x, grid).tolist() == [-2, -2, -1, -1, 0, 1]
    assert fake_quantize(x, grid)[2] == 0


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("low", "high"), [(-1.3, 4.2), (0.0, 6.0), (-5.0, -1.0), (0.5, 2.0)])
def test_error_is_at_most_half_a_step_and_zero_is_exact(bits: int, low: float, high: float) -> None:
    grid = affine_grid(scalar(low), scalar(high), bits)
    x = torch.linspace(min(low, 0), max(high, 0), 4001)
    error = (fake_quantize(x, grid) - x).abs().max() / grid.scale
    assert 0.4 < error <= 0.5 + 1e-4
    assert fake_quantize(torch.zeros(1), grid).item() == 0
    assert quantize_tensor(x, grid).unique().numel() == 2**bits
    assert (grid.low, grid.high) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@pytest.mark.parametrize("bits", [8, 4])
def test_symmetric_grid(bits: int) -> None:
    weight = normal(5, 3, 2, 2) * torch.tensor([1.0, 10, 0.1, 0, 3])[:, None, None, None]
    high = 2 ** (bits - 1) - 1
    channel, tensor = (symmetric_grid(weight, bits, per) for per in (True, False))
    assert channel.scale.shape == (5, 1, 1, 1) and tensor.scale.shape == ()
    for grid, axis in ((channel, (1, 2, 3)), (tensor, None)):
        q = quantize_tensor(weight, grid)
        error = (dequantize_tensor(q, grid) - weight).abs() / grid.scale
        assert error.max() <= 0.5 + 1e-5
        assert q.min() >= -high and q.max() <= high
        if axis:  # 每个非零的通道都用满了自己的范围
            assert q.abs().amax(axis).tolist() == [high, high, high, 0, high]
    worst = (fake_quantize(weight, tensor) - weight)[2].abs().max()
    assert worst > 10 * (fake_quantize(weight, channel) - weight)[2].abs().max()


def test_rounding_matches_the_official_kernels() -> None:
    # 刻度是 2 的幂：除以刻度与乘以倒数没有区别，所以应当逐位相同，含正好一半的
    x = torch.arange(-70, 70) / 16.0
    grid = Grid(scalar(0.125), torch.tensor(3, dtype=torch.int32), -128, 127)
    official = torch.fake_quantize_per_tensor_affine(x, 0.125, 3, -128, 127)
    assert torch.equal(fake_quantize(x, grid), official)
    assert torch.equal(quantize_tensor(x, grid).float(), official / 0.125 + 3)


@pytest.mark.parametrize("bits", [8, 4])
def test_per_channel_matches_the_official_kernel(bits: int) -> None:
    weight = normal(6, 4, 3, 3)
    grid = symmetric_grid(weight, bits)
    official = torch.fake_quantize_per_channel_affine(
        weight, grid.scale.flatten(), torch.zeros(6, dtype=torch.int32), 0, grid.low, grid.high
    )
    torch.testing.assert_close(fake_quantize(weight, grid), official, rtol=0, atol=1e-6)


def test_bad_grids() -> None:
    for bits in (1, 9):
        with pytest.raises(ValueError, match=f"2 与 8 之间，实为 {bits}"):
            affine_grid(scalar(0.0), scalar(1.0), bits)
        with pytest.raises(ValueError, match="2 与 8 之间"):
            symmetric_grid(normal(2, 2), bits)
    for low, high in ((1.0, 0.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="范围应有限"):
            affine_grid(scalar(low), scalar(high))
    assert fake_quantize(torch.zeros(2), affine_grid(scalar(0.0), scalar(0.0))).tolist() == [0, 0]


# ---------------------------------------------------------------- 激活的范围


def observed(values: Tensor) -> Observer:
    observer = Observer(make_generator(0))
    for part in values.chunk(4):
        observer.update(part)
    return observer


def test_observers_and_an_outlier() -> None:
    values = normal(40_000)
    values[17] = 100.0
    observer = observed(values)
    minmax, percentile, mse = (observer.grid(m, bits=4) for m in METHODS)
    assert minmax.scale.item() == pytest.approx((100 - values.min().item()) / 15)
    assert 0.35 < percentile.scale.item() < 0.5  # ±3.09 之间的 15 格
    assert percentile.scale < mse.scale < 0.3 * minmax.scale
    rest = values[values < 50]
    error = {m: (fake_quantize(rest, observer.grid(m, 4)) - rest).square().mean() for m in METHODS}
    assert error["percentile"] < error["mse"] < error["minmax"]


def test_mse_clips_more_with_fewer_bits_and_is_optimal() -> None:
    observer = observed(normal(40_000))
    widths = [observer.grid("mse", b).scale.item() * (2**b - 1) for b in (2, 4, 8)]
    assert widths[0] < widths[1] < widths[2]
    kept = torch.cat(observer.kept)
    best = (fake_quantize(kept, observer.grid("mse", 4)) - kept).square().mean()
    for method in ("minmax", "percentile"):
        assert best <= (fake_quantize(kept, observer.grid(method, 4)) - kept).square().mean()


def test_observer_errors() -> None:
    with pytest.raises(ValueError, match="从未运行"):
        Observer().grid()
    with pytest.raises(ValueError, match="'max' 不认识：可选 minmax"):
        observed(normal(100)).grid("max")


# ---------------------------------------------------------------- 定点乘法


def test_fixed_point_by_hand() -> None:
    multiplier, shift = fixed_point(torch.tensor([0.75, 3.0, 1.0, 2**-20]).double())
    assert multiplier.tolist() == [3 * 2**29, 3 * 2**29, 2**30, 2**30]
    assert shift.tolist() == [31, 29, 30, 50]
    # 尾数四舍五入到 2^31：进一位
    multiplier, shift = fixed_point(torch.tensor(1 - 2**-40, dtype=torch.float64))
    assert (multiplier.item(), shift.item()) == (2**30, 30)
    for bad in (0.0, -1.0, 2.0**30, math.nan):
        with pytest.raises(ValueError, match="定点乘数"):
            fixed_point(torch.tensor([bad]))


def test_fixed_point_precision() -> None:
    factor = torch.rand(1000, generator=make_generator(0), dtype=torch.float64) * 0.01 + 1e-6
    multiplier, shift = fixed_point(factor)
    assert ((multiplier >= 2**30) & (multiplier < 2**31)).all()
    assert (multiplier.double() * 2.0 ** -shift.double() / factor - 1).abs().max() <= 2**-31


def test_requantize_by_hand_and_against_floats() -> None:
    grid = Grid(scalar(1.0), torch.tensor(-3, dtype=torch.int32), -128, 127)
    half = fixed_point(torch.tensor(0.5))
    acc = torch.tensor([-5, -4, 0, 4, 5, 10_000, -10_000], dtype=torch.int32)
    # 遇半进一：-2.5 -> -2，2.5 -> 3；两端截断
    assert requantize(acc, *half, grid).tolist() == [-5, -5, -3, -1, 0, 127, -128]
    whole = fixed_point(torch.tensor(2.0**30 * (1 - 2**-40), dtype=torch.float64))
    assert whole[1].item() == 0  # 尾数进了位，一位也不移：不能再加「半格」
    assert requantize(torch.tensor([0], dtype=torch.int32), *whole, grid).tolist() == [-3]
    acc = torch.randint(-(2**31), 2**31, (10_000,), generator=make_generator(0)).int()
    factor = torch.tensor(5e-8)
    exact = torch.floor(acc.double() * factor.double() + 0.5) - 3
    assert torch.equal(requantize(acc, *fixed_point(factor), grid).double(), exact.clamp(-128, 127))


# ---------------------------------------------------------------- 整数卷积


def test_integer_convolution_by_hand() -> None:
    # x ≈ 0.5 (q - 1), w ≈ 0.25 q：真值 x = [1, 2]，w = [1, -0.5]，b = 0.3
    x, w = torch.tensor([3, 5], dtype=torch.int8), torch.tensor([4, -2], dtype=torch.int8)
    acc = integer_conv2d(x.view(1, 2, 1, 1), w.view(1, 2, 1, 1))
    assert acc.item() == 3 * 4 - 5 * 2 and acc.dtype == torch.int32
    # 零点的修正 -z_x Σ q_w = -2；偏置 round(0.3 / 0.125) = 2；合计 2，还原 0.25
    linear = nn.Linear(2, 1)
    linear.weight = nn.Parameter(torch.tensor([[1.0, -0.5]]))
    linear.bias = nn.Parameter(torch.tensor([0.3]))
    grid = Grid(scalar(0.5), torch.tensor(1, dtype=torch.int32), -128, 127)
    layer = QuantLinear(linear, grid, bits=3)  # 3 位：最大的格是 3，刻度 1/3
    assert layer.weight.flatten().tolist() == [3, -2]  # -1.5 取偶
    assert layer.bias.item() == round(0.3 / (0.5 / 3)) - 1 * (3 - 2)
    out = layer(torch.tensor([[1.0, 2.0]]))
    assert out.item() == pytest.approx((3 * 3 - 2 * 5 + 1) * 0.5 / 3)


CASES = {
    "plain": ((2, 3, 9, 7), (4, 3, 3, 3), (1, 1), (1, 1), 1),
    "stride": ((1, 3, 8, 9), (4, 3, 3, 2), (2, 3), (1, 1), 1),
    "dilation": ((2, 2, 9, 9), (3, 2, 3, 3), (1, 2), (2, 1), 1),
    "groups": ((2, 6, 7, 5), (4, 3, 3, 3), (1, 1), (1, 1), 2),
    "depthwise": ((3, 5, 6, 6), (10, 1, 3, 3), (2, 2), (1, 1), 5),
    "pointwise": ((2, 8, 4, 4), (6, 8, 1, 1), (1, 1), (1, 1), 1),
    "long": ((1, 256, 5, 5), (2, 256, 3, 3), (1, 1), (1, 1), 1),  # 2304 项，超过 1024
}


@pytest.mark.parametrize("convolve", [integer_conv2d, kernel_conv2d, simulated_conv2d])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_algorithm_is_exact(convolve, case) -> None:
    x_shape, w_shape, stride, dilation, groups = case
    x, weight = int8(*x_shape), int8(*w_shape, seed=1, low=-127)
    expected = F.conv2d(x.double(), weight.double(), None, stride, 0, dilation, groups)
    actual = convolve(x, weight, stride, dilation, groups)
    assert actual.dtype == torch.int32 and torch.equal(actual.double(), expected)


@pytest.mark.parametrize("convolve", [integer_conv2d, kernel_conv2d, simulated_conv2d])
def test_long_sums_of_extreme_values_are_exact(convolve) -> None:
    # 奇数，绝对值超过 2^24：float32 表示不了
    total = -127 * 127 * 2049
    assert torch.tensor(total).float().int() != total
    x = torch.full((1, 2049, 3, 3), -127, dtype=torch.int8)
    weight = torch.full((8, 2049, 1, 1), 127, dtype=torch.int8)
    assert convolve(x, weight).unique().tolist() == [total]


# ---------------------------------------------------------------- 层


def conv_and_input(**options: object) -> tuple[nn.Conv2d, Tensor, Grid]:
    conv = nn.Conv2d(4, 6, 3, **options)
    x = normal(2, 4, 8, 8).abs() - 0.3  # 偏向正数：零点远离 0
    return conv, x, affine_grid(x.min(), x.max())


OPTIONS = [{"padding": 1}, {"padding": (0, 2), "stride": 2, "bias": False}, {"groups": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("per_channel", [True, False])
@torch.no_grad()
def test_layer_equals_the_float_simulation(options: dict, per_channel: bool) -> None:
    conv, x, grid = conv_and_input(**options)
    layer = QuantConv2d(conv, grid, per_channel=per_channel)
    weight = fake_quantize(conv.weight, symmetric_grid(conv.weight, 8, per_channel)).double()
    bias = None
    if conv.bias is not None:  # 偏置也在格点上
        bias = torch.round(conv.bias.double() / layer.scale) * layer.scale.double()
    simulated = F.conv2d(
        fake_quantize(x, grid).double(), weight, bias, conv.stride, conv.padding, 1, conv.groups
    )
    torch.testing.assert_close(layer(x).double(), simulated, rtol=0, atol=3e-6)
    assert 1e-4 < (layer(x) - conv(x)).abs().max() < 0.05


@torch.no_grad()
def test_powers_of_two_make_the_simulation_exact() -> None:
    # 刻度是 2 的幂时浮点的模拟没有舍入：与整数的结果逐位相同
    conv = nn.Conv2d(3, 4, 3, padding=1)
    conv.weight = nn.Parameter(int8(4, 3, 3, 3, low=-127).float() / 64)
    conv.weight[:, 0, 0, 0] = 127 / 64
    conv.bias = nn.Parameter(torch.tensor([1.0, -2.0, 0.25, 0.0]))
    grid = Grid(scalar(1 / 32), torch.tensor(-100, dtype=torch.int32), -128, 127)
    x = normal(2, 3, 6, 6).abs() * 2
    assert torch.equal(QuantConv2d(conv, grid)(x), conv(fake_quantize(x, grid)))


def test_padding_is_the_code_of_zero() -> None:
    # 常见的错：量化之后补编号 0，相当于补了 -scale·z_x
    conv, x, grid = conv_and_input(padding=1)
    assert grid.zero_point.item() < -50
    layer = QuantConv2d(conv, grid)
    q = quantize_tensor(x, grid)
    wrong = layer.accumulate(F.pad(q, [1] * 4)) * layer.scale[:, None, None]
    edge = (wrong - conv(x))[:, :, 0].abs().max()
    assert edge > 20 * (layer(x) - conv(x)).abs().max()
    torch.testing.assert_close(wrong[:, :, 1:-1, 1:-1], layer(x)[:, :, 1:-1, 1:-1])


@torch.no_grad()
def test_tiny_weights_with_a_bias_do_not_overflow_int32() -> None:
    # γ≈0 的 BatchNorm 折出来的通道：权重 1e-12，偏置 1
    conv, x, grid = conv_and_input()
    conv.weight[2] = 1e-12
    conv.bias[2] = 1.0
    assert abs(1.0 / (1e-12 / 127 * grid.scale.item())) > 2**31
    torch.testing.assert_close(QuantConv2d(conv, grid)(x)[:, 2], conv(x)[:, 2], rtol=1e-5, atol=0)


@torch.no_grad()
def test_an_integer_only_chain() -> None:
    # 两个卷积之间没有一个浮点数：ReLU 就是截断的下端
    first, x, grid = conv_and_input(padding=1)
    second = nn.Conv2d(6, 5, 3, padding=1)
    between = affine_grid(scalar(0.0), F.relu(first(x)).max())
    final = affine_grid(*second(F.relu(first(x))).aminmax())
    a, b = QuantConv2d(first, grid), QuantConv2d(second, between)
    q = b.forward_integer(a.forward_integer(quantize_tensor(x, grid), between), final)
    through_floats = quantize_tensor(b(F.relu(a(x))), final)
    assert q.dtype == torch.int8
    assert (q.int() - through_floats.int()).abs().max() <= 1
    assert (q == through_floats).double().mean() > 0.99
    assert (dequantize_tensor(q, final) - second(F.relu(first(x)))).abs().max() < 0.06


def test_unsupported_layers() -> None:
    grid = affine_grid(scalar(0.0), scalar(1.0))
    for options in ({"padding": 1, "padding_mode": "reflect"}, {"padding": "same"}):
        with pytest.raises(ValueError, match="只支持以数字给出的补零"):
            QuantConv2d(nn.Conv2d(2, 2, 3, **options), grid)
    with pytest.raises(ValueError, match="32768 项，int32 可能溢出"):
        QuantLinear(nn.Linear(32768, 1), grid)


# ---------------------------------------------------------------- 整个网络


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()


@torch.no_grad()
def test_quantized_network() -> None:
    model, x = network(), normal(4, 3, 8, 8)
    observers = calibrate(model, [x, 2 * x])
    assert list(observers) == ["0", "2", "6"]
    assert observers["0"].maximum == 2 * x.max()
    quantized = [
        quantize(model, observers, convolve=c)
        for c in (integer_conv2d, kernel_conv2d, simulated_conv2d)
    ]
    assert [type(m) for m in quantized[0]][::2][:2] == [QuantConv2d, QuantConv2d]
    assert type(model[0]) is nn.Conv2d and not model[0]._forward_pre_hooks
    outputs = [m(x) for m in quantized]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    errors = [
        (quantize(model, observers, weight_bits=b, activation_bits=b)(x) - model(x)).abs().max()
        for b in (8, 6, 4)
    ]
    assert errors[0] < 0.01 and errors[0] < errors[1] < errors[2]


@torch.no_grad()
def test_weights_take_a_quarter_of_the_bytes_and_reload() -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)),
        normal(2, 64, 6, 6),
    )
    observers = calibrate(model, [x])
    quantized, other = (quantize(model, observers) for _ in range(2))
    sizes = [sum(t.nbytes for t in m.state_dict().values()) for m in (model, quantized)]
    assert sizes[0] == 4 * (2 * 64 * 576 + 2 * 64)
    assert sizes[1] == 2 * (64 * 576 + 64 * (4 + 4) + 4 + 4)  # 每个通道另有偏置与刻度
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(other(x), quantized(x))


def test_missing_calibration_is_an_error() -> None:
    model = network()
    with pytest.raises(ValueError, match="0 没有校准过"):
        quantize(model, {})
    with pytest.raises(ValueError, match="从未运行"):
        quantize(model, calibrate(model, []))
    with pytest.raises(ValueError, match="2 与 8 之间"):
        quantize(model, calibrate(model, [normal(1, 3, 8, 8)]), weight_bits=16)
