"""ResNet 家族：与 torchvision 逐位相同；孪生网络只差捷径；预激活与零 γ 的恒等式。"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_05_resnet_modern_cnn import resnet, resnet_cifar
from chapter_05_resnet_modern_cnn import resnet as resnet_module
from chapter_05_resnet_modern_cnn.models import DEPTHS, MODELS, build_model, twin
from chapter_05_resnet_modern_cnn.resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    projection,
    resnet10_cifar,
    resnet18_cifar,
    zero_last_gamma,
)
from chapter_05_resnet_modern_cnn.resnet_cifar import (
    CifarBlock,
    CifarResNet,
    PadShortcut,
    PreActBlock,
)
from tests.parity import assert_equal, normal
from utils import REPO_ROOT, UserError, count_parameters, make_generator, model_summary

needs_torchvision = pytest.mark.usefixtures("needs_torchvision")

# 1000 类的参数量，各论文与 torchvision 文档里的数
COUNTS = {
    "resnet18": 11689512,
    "resnet34": 21797672,
    "resnet50": 25557032,
    "resnet101": 44549160,
    "resnet152": 60192808,
    "resnext50_32x4d": 25028904,
    "wide_resnet50_2": 68883240,
}


def ours(name: str) -> Callable[..., ResNet]:
    return getattr(resnet_module, name)


def official(name: str) -> Callable[..., nn.Module]:
    import torchvision

    return getattr(torchvision.models, name)


def fill(model: nn.Module, seed: int = 0) -> None:
    """每层输出的方差与输入相当的随机权重；BatchNorm 的四个向量也都不是起始值。"""
    generator = make_generator(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            value.normal_(generator=generator)
            if value.ndim > 1:
                value *= (2 / value[0].numel()) ** 0.5
            elif name.endswith("bias") or "mean" in name:
                value *= 0.1
            else:  # weight 与 running_var：1 附近的正数
                value.clamp_(-3, 3).mul_(0.1).add_(1)


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]


# ---------------------------------------------------------------- 与 torchvision 对照


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
@needs_torchvision
def test_imagenet_forms_have_the_structure_of_torchvision(name: str, count: int) -> None:
    """键、次序、形状、dtype、步幅与分组；参数量也写在说明里。"""
    assert f"{count} 个参数" in ours(name).__doc__
    with torch.device("meta"):
        for options in ({}, {"num_classes": 7}):
            mine, theirs = ours(name)(**options), official(name)(**options)
            shapes = [
                [(key, value.shape, value.dtype) for key, value in model.state_dict().items()]
                for model in (mine, theirs)
            ]
            assert shapes[0] == shapes[1]
            assert [str(c) for c in convolutions(mine)] == [str(c) for c in convolutions(theirs)]
            if not options:
                assert count_parameters(mine) == count_parameters(theirs) == count


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
@needs_torchvision
def test_outputs_gradients_and_statistics_equal_torchvision(name: str) -> None:
    """同一份权重：推理、训练的输出，每个参数的梯度，训练之后的统计量，都逐位相同。"""
    mine, theirs = ours(name)(num_classes=10), official(name)(num_classes=10)
    fill(theirs)
    mine.load_state_dict(theirs.state_dict())
    x = normal(2, 3, 64, 64).float()
    with torch.no_grad():
        y = mine.eval()(x)
        assert torch.equal(y, theirs.eval()(x))
    assert y.isfinite().all() and (y[0] - y[1]).abs().max() > 1e-3
    outputs = [model.train()(x) for model in (mine, theirs)]
    assert torch.equal(*outputs) and not torch.equal(outputs[0], y)
    for output in outputs:
        (output * normal(2, 10, seed=1).float()).sum().backward()
    for (key, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert a.grad.any(), key
        assert torch.equal(a.grad, b.grad), key
    for (key, a), b in zip(mine.named_buffers(), theirs.buffers(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@needs_torchvision
def test_initialises_like_torchvision(name: str, zero: bool) -> None:
    """构造的次序不同，故逐层比较统计量；哪些 γ 是零则必须完全一致。"""
    mine = ours(name)(5, zero_init_residual=zero).state_dict()
    theirs = official(name)(num_classes=5, zero_init_residual=zero).state_dict()
    for key, a in mine.items():
        b = theirs[key]
        if a.ndim == 1 and not key.startswith("fc"):
            assert torch.equal(a, b), key
        elif a.numel() > 1000:  # 相对误差的标准差约 1/√(2n)
            tolerance = 5 / a.numel() ** 0.5
            assert a.std().item() == pytest.approx(b.std().item(), rel=tolerance), key
            assert abs(a.mean()) < 5 * a.std() / a.numel() ** 0.5, key
    gammas = [key for key, a in mine.items() if key.endswith("weight") and not a.any()]
    final = "bn2" if name == "resnet18" else "bn3"
    assert len(gammas) == (0 if not zero else sum(f".{final}.weight" in key for key in mine))


def test_convolutions_keep_the_variance_of_the_gradient() -> None:
    """方差 2/fan_out，不是 2/fan_in：64 -> 128 的那一个相差一倍。"""
    conv = resnet18_cifar().layer2[0].conv1
    assert conv.weight.shape == (128, 64, 3, 3)
    assert conv.weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    conv = CifarResNet(8, width=64).blocks[1].conv1
    assert conv.weight.shape == (128, 64, 3, 3)
    assert conv.weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


# ---------------------------------------------------------------- 块


@pytest.mark.parametrize(
    "block",
    [
        BasicBlock(8, 8),
        BasicBlock(6, 8, 2, projection(6, 8, 2)),
        Bottleneck(32, 8, inner=16, groups=4),
        CifarBlock(8, 8),
    ],
    ids=lambda block: type(block).__name__,
)
def test_zero_gamma_makes_each_block_its_shortcut(block: nn.Module) -> None:
    """起步时 y = ReLU(捷径)；而 γ 的梯度不为零，F 里其余参数的梯度全为零。"""
    zero_last_gamma(block.double())
    x = normal(4, next(block.parameters()).shape[1], 6, 6)
    shortcut = getattr(block, "downsample", None) or getattr(block, "shortcut", None)
    y = block(x)
    assert_equal(y, F.relu(x if shortcut is None else shortcut(x)), 0)
    (y * normal(*y.shape, seed=1)).sum().backward()
    final = getattr(block, block.final_norm)
    assert (final.weight.grad != 0).all()
    for name, parameter in block.named_parameters():
        if not name.startswith((block.final_norm, "downsample")):
            assert not parameter.grad.any(), name


def test_basic_block_by_the_formula() -> None:
    """y = ReLU(F(x) + x)，逐个算子写出；``x`` 不因 inplace 而改变。"""
    block = BasicBlock(4, 6, 2, projection(4, 6, 2)).double().eval()
    fill(block)
    x = normal(2, 4, 7, 7)
    before, state = x.clone(), block.state_dict()

    def norm(y: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{key}"].view(1, -1, 1, 1)
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (y - mean) / (var + 1e-5).sqrt() * weight + bias

    hidden = norm(F.conv2d(x, state["conv1.weight"], stride=2, padding=1), "bn1").clamp(min=0)
    residual = norm(F.conv2d(hidden, state["conv2.weight"], padding=1), "bn2")
    short = norm(F.conv2d(x, state["downsample.0.weight"], stride=2), "downsample.1")
    assert_equal(block.residual(x), residual)
    assert_equal(block(x), (residual + short).clamp(min=0))
    assert torch.equal(x, before)


def test_pad_shortcut_by_hand() -> None:
    x = torch.arange(1.0, 17).view(1, 1, 4, 4)
    y = PadShortcut(1, 4, 2)(x)
    assert y.shape == (1, 4, 2, 2)
    assert y[0, 1].tolist() == [[1, 3], [9, 11]]  # 隔点取样；前补 1 个通道，后补 2 个
    assert not y[0, [0, 2, 3]].any()
    assert (
        PadShortcut(2, 4, 2)(torch.ones(1, 2, 5, 5)).shape
        == CifarBlock(2, 4, 2)(torch.ones(1, 2, 5, 5)).shape
        == (1, 4, 3, 3)
    )  # 奇数边长也对得上


def test_preactivation_telescopes() -> None:
    """同一阶段里 x_L = x_l + Σ F(x_i)，而梯度里有一项原样传回：∂L/∂x_l = ∂L/∂x_L (I + …)。"""
    blocks = nn.Sequential(*[PreActBlock(5, 5) for _ in range(4)]).double().eval()
    fill(blocks)
    x = normal(2, 5, 6, 6)
    total, at = x.clone(), x
    for block in blocks:
        total += block.residual(at)
        at = block(at)
    assert_equal(blocks(x), total)
    assert (at < 0).any()  # 相加之后没有非线性
    for block in blocks:  # 令 F = 0：整段恰是恒等，梯度原样传回
        nn.init.zeros_(block.conv2.weight)
    leaf, grad = x.clone().requires_grad_(), normal(2, 5, 6, 6, seed=1)
    assert torch.equal(blocks(leaf), x)
    assert torch.equal(torch.autograd.grad(blocks(leaf), leaf, grad)[0], grad)


def test_preactivation_normalises_before_the_convolution() -> None:
    block = PreActBlock(3, 4, 2).double()
    fill(block)
    block.eval()
    x = normal(2, 3, 6, 6)
    hidden = block.conv1(F.relu(block.bn1(x)))
    assert_equal(block.residual(x), block.conv2(F.relu(block.bn2(hidden))))
    assert_equal(block(x), block.residual(x) + PadShortcut(3, 4, 2)(x))
    plain = PreActBlock(3, 4, 2, shortcut=False).double().eval()
    plain.load_state_dict(block.state_dict())
    assert_equal(plain(x), block.residual(x))


# ---------------------------------------------------------------- 小图网络


@pytest.mark.parametrize("depth", DEPTHS)
def test_depth_counts_the_layers_with_weights(depth: int) -> None:
    with torch.device("meta"):
        for options in ({}, {"shortcut": False}, {"block": PreActBlock}):
            model = CifarResNet(depth, **options)
            layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
            assert len(layers) == depth and len(model.blocks) == (depth - 2) // 2


@pytest.mark.parametrize(
    ("depth", "count"), [(20, 269722), (56, 853018), (110, 1727962)], ids=lambda v: str(v)
)
def test_twins_differ_only_in_the_shortcut(depth: int, count: int) -> None:
    """论文表 6 的 0.27M、0.85M、1.7M；孪生网络的键、形状、起始权重都相同。"""
    residual, plain = (getattr(resnet_cifar, f"{kind}{depth}") for kind in ("resnet", "plain"))
    assert f"{count} 个参数" in residual.__doc__ and f"resnet{depth}" in plain.__doc__
    models = []
    for make in (residual, plain):
        torch.manual_seed(0)
        models.append(make().eval())
    states = [model.state_dict() for model in models]
    assert [*states[0]] == [*states[1]]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert count_parameters(models[0]) == count_parameters(models[1]) == count
    if depth == 20:
        x = normal(2, 3, 32, 32).float()
        with torch.no_grad():
            assert not torch.allclose(models[0](x), models[1](x))


def test_plain_network_is_the_chain_of_residuals() -> None:
    model = CifarResNet(8, shortcut=False).double().eval()
    fill(model)
    x = normal(2, 3, 16, 16)
    with torch.no_grad():
        h = F.relu(model.bn1(model.conv1(x)))
        for block in model.blocks:
            h = F.relu(block.residual(h))
        assert_equal(model(x), model.fc(h.mean(dim=(2, 3))))
        model = CifarResNet(8, block=PreActBlock).double().eval()
        fill(model)
        h = model.blocks(model.conv1(x))
        h = F.relu(model.bn1(h))
        assert_equal(model(x), model.fc(h.mean(dim=(2, 3))))


def test_zero_gamma_leaves_no_channel_dead() -> None:
    """补零的捷径之后若 F 也是零，ReLU 在 0 处的导数为零，那些通道就永远学不到。"""
    model = CifarResNet(20, zero_init_residual=True).double()
    x = normal(4, 3, 32, 32)
    features = model.forward_features(x)
    assert (features.std(dim=0) > 0).all()
    (features * normal(4, 64, seed=1)).sum().backward()
    zeroed = [block for block in model.blocks if not block.bn2.weight.any()]
    assert len(zeroed) == 7  # 九个块，两个改变通道数
    for block in model.blocks:
        assert (block.bn2.weight.grad != 0).all()
    identities = zeroed[0]
    h = normal(2, 16, 8, 8).abs()
    assert torch.equal(identities(h), h)


def test_small_stems_keep_the_pixels() -> None:
    """各阶段的边长 32、16、8、4；``6n+2`` 层的是 32、16、8，步幅 2 时减半。"""
    x = torch.zeros(1, 3, 32, 32)

    def sides(model: nn.Module, layers: list[nn.Module]) -> list[tuple[int, int]]:
        found = []
        hooks = [
            m.register_forward_hook(lambda _m, _i, out: found.append((out.shape[1], out.shape[-1])))
            for m in layers
        ]
        with torch.no_grad():
            model.eval()(x)
        for hook in hooks:
            hook.remove()
        return found

    for model, width in ((resnet10_cifar(), 32), (resnet18_cifar(width=8), 8)):
        stages = [getattr(model, f"layer{i}") for i in range(1, 5)]
        assert sides(model, stages) == [(width * 2**i, 32 // 2**i) for i in range(4)]
        assert isinstance(model.maxpool, nn.Identity)
    for stride in (1, 2):
        model = CifarResNet(20, stem_stride=stride)
        ends = [model.blocks[i] for i in (2, 5, 8)]
        expected = [(16 * 2**i, 32 // stride // 2**i) for i in range(3)]
        assert sides(model, ends) == expected


# ---------------------------------------------------------------- 名册与用户的失误


def test_twins_and_depths_of_the_registry() -> None:
    assert twin("resnet32") == "plain32" and twin("resnet110") == "plain110"
    assert [twin(n) for n in ("plain32", "preact_resnet32", "resnet18", "resnet10")] == [None] * 4


@pytest.mark.parametrize("name", [n for n in MODELS if "110" not in n and "56" not in n])
def test_every_model_of_the_registry_learns_from_every_parameter(name: str) -> None:
    for channels, size in ((3, 32), (1, 28)):
        model = build_model(name, 7, (channels, size, size), stem_stride=2)
        assert model.training
        output = model(normal(4, channels, size, size).float())
        assert output.shape == (4, 7)
        (output * normal(4, 7, seed=1).float()).sum().backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad.isfinite().all() and parameter.grad.any(), key


def test_stem_stride_reaches_the_model() -> None:
    shape = (3, 32, 32)
    assert build_model("resnet20", 10, shape, 2).conv1.stride == (2, 2)
    assert build_model("plain20", 10, shape).conv1.stride == (1, 1)
    assert not build_model("plain20", 10, shape).blocks[0].shortcut
    for name in MODELS:  # 每个网络都认它：第一个卷积的步幅加倍
        with torch.device("meta"):
            strides = [first_stride(MODELS[name].make(10, 3, stem_stride=s)) for s in (1, 2)]
        assert strides[1] == 2 * strides[0], name


def first_stride(model: nn.Module) -> int:
    """第一个卷积的步幅。"""
    return next(m for m in model.modules() if isinstance(m, nn.Conv2d)).stride[0]


@pytest.mark.parametrize("depth", [2, 7, 9, 11, 21, 33, -4])
def test_depth_must_be_6n_plus_2(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth={depth} 应为 6n\+2"):
        CifarResNet(depth)


def test_constructor_errors() -> None:
    for options in ({"block": PreActBlock}, {"shortcut": False}):
        with pytest.raises(ValueError, match="只适用于有捷径、非预激活"):
            CifarResNet(8, zero_init_residual=True, **options)
    for options in ({"groups": 2}, {"inner_scale": 2}):
        with pytest.raises(ValueError, match="只用于 Bottleneck"):
            ResNet(BasicBlock, (1, 1, 1, 1), **options)
    for layers in ((1, 1, 1), (1, 1, 1, 0), (1, 1, 1, 1, 1)):
        with pytest.raises(ValueError, match="layers 应为四个正整数"):
            ResNet(BasicBlock, layers)
    with pytest.raises(ValueError, match="width 至少为 1"):
        ResNet(BasicBlock, (1, 1, 1, 1), width=0)


@pytest.mark.parametrize(
    ("make", "shape", "words"),
    [
        (resnet10_cifar, (2, 1, 32, 32), r"ResNet 的输入应为 \(B, 3, H, W\)"),
        (resnet10_cifar, (3, 32, 32), r"实为 \(3, 32, 32\)"),
        (lambda: ResNet(BasicBlock, (1, 1, 1, 1), width=4), (2, 3, 31, 40), "边长至少 32 像素"),
        (lambda: CifarResNet(8), (2, 3, 7, 32), "CifarResNet 的输入.*边长至少 8 像素"),
    ],
)
def test_wrong_images(make: Callable[[], nn.Module], shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()(torch.zeros(shape))


def test_build_model_explains_in_one_line() -> None:
    with pytest.raises(UserError, match="--model resnet20 与数据不相配：CifarResNet 的输入"):
        build_model("resnet20", 2, (3, 6, 6))


def test_costs_in_the_readme() -> None:
    """README 的表：每个 ImageNet 形式的参数与 224 像素的乘加。"""
    text = (REPO_ROOT / "chapter_05_resnet_modern_cnn" / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)\(\)` \|.*\| (\d+) \| (\d+) \|$", text, re.M)
    assert len(rows) == 7
    with torch.device("meta"):
        for name, params, macs in rows:
            summary = model_summary(getattr(resnet, name)(), torch.zeros(1, 3, 224, 224))
            assert (summary.total_params, summary.total_macs) == (int(params), int(macs)), name
