"""ImageNet 网络与 torchvision 逐位对照时共用的几步。torchvision 只在函数里导入。"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_03_optimization_regularization.regularization import DropPath
from tests.parity import normal
from utils import make_generator, model_summary
from utils.file_io_util import REPO_ROOT

PAGE = REPO_ROOT / "chapter_05_resnet_modern_cnn" / "efficient.md"


def page_costs() -> dict[str, tuple[int, ...]]:
    """efficient.md 的总表：构造函数 -> (输入边长, 参数, 乘加)。"""
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \|$", PAGE.read_text("utf-8"), re.M)
    return {name: tuple(map(int, numbers)) for name, *numbers in rows}


def shares(model: nn.Module, size: int) -> dict[str, tuple[float, float]]:
    """各类卷积的 (参数, 乘加) 占全网络的百分数：``full``、``depthwise``、``pointwise``、``se``。"""
    summary = model_summary(model, torch.empty(1, 3, size, size))
    rows, found = {row.path: row for row in summary.rows}, {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            small = "pointwise" if layer.kernel_size == (1, 1) else "full"
            kind = "se" if ".fc" in name else "depthwise" if layer.groups > 1 else small
            params, macs = found.get(kind, (0.0, 0.0))
            found[kind] = (
                params + 100 * rows[name].params / summary.total_params,
                macs + 100 * rows[name].macs / summary.total_macs,
            )
    return found


def official(name: str) -> Callable[..., nn.Module]:
    """torchvision 的构造函数。"""
    import torchvision

    return getattr(torchvision.models, name)


def constants(model: nn.Module) -> list[tuple]:
    """不在 state_dict 里的常数：卷积的步幅与填充，BatchNorm 的 eps 与 momentum，丢弃的概率。"""
    found = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            found.append(("conv", layer.stride, layer.padding, layer.groups))
        elif isinstance(layer, nn.BatchNorm2d):
            found.append(("norm", layer.eps, layer.momentum))
        elif isinstance(layer, nn.Dropout):
            found.append(("dropout", layer.p))
        elif isinstance(layer, DropPath) or type(layer).__name__ == "StochasticDepth":
            found.append(("path", layer.p))
    return found


def assert_same_structure(mine: nn.Module, theirs: nn.Module) -> None:
    """键、次序、形状、dtype 与各层的常数都相同；两者都可以在 meta 设备上。"""
    layouts = [
        [(key, value.shape, value.dtype) for key, value in model.state_dict().items()]
        for model in (mine, theirs)
    ]
    assert layouts[0] == layouts[1]
    assert constants(mine) == constants(theirs)


def randomize(model: nn.Module, seed: int = 0) -> None:
    """不平凡的权重与统计量，各层的输出大小相当：否则评估时图像之间的差别会逐层消失。"""
    generator = make_generator(seed)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            fan_in = layer.weight[0].numel()
            layer.weight.data.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
        elif isinstance(layer, nn.Linear):
            layer.weight.data.normal_(0, layer.in_features**-0.5, generator=generator)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.uniform_(0.5, 1.5, generator=generator)
            layer.bias.data.normal_(0, 0.2, generator=generator)
            layer.running_mean.normal_(0, 0.2, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)


def _outcome(model: nn.Module, x: Tensor, seed: int) -> list[Tensor]:
    """输出、输入的梯度、各参数的梯度、各缓冲区（跑过之后的）。"""
    torch.manual_seed(seed)  # 训练时的 Dropout 与随机深度
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    loss = F.cross_entropy(y, torch.arange(len(x)) % y.shape[1])
    gradients = torch.autograd.grad(loss, [leaf, *model.parameters()])
    return [y.detach(), *gradients, *(buffer.clone() for buffer in model.buffers())]


def assert_same_numbers(mine: nn.Module, theirs: nn.Module, size: int = 64) -> None:
    """装入同样的权重之后，评估与训练两种模式下，输出、全部梯度、滑动统计量逐位相等。"""
    randomize(theirs)
    mine.load_state_dict(theirs.state_dict())
    x = normal(2, 3, size, size).float()
    for training in (False, True):
        results = [_outcome(model.train(training), x, seed=3) for model in (mine, theirs)]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        output = results[0][0]
        assert output.isfinite().all() and (output[0] - output[1]).abs().max() > 1e-2


def assert_same_initialisation(mine: Callable[[], nn.Module], name: str) -> None:
    """同一颗种子造出逐位相同的权重：分布与抽样的次序都相同。"""
    states = []
    for make in (mine, official(name)):
        torch.manual_seed(7)
        states.append(make().state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def assert_trains(model: nn.Module, in_channels: int, lr: float = 0.01, steps: int = 10) -> None:
    """小图形式：8 张随机图记得住，每个参数都有梯度，评估时每张图与同批的其他图无关。"""
    x, y = normal(8, in_channels, 32, 32).float(), torch.arange(8) % 2
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model.train()(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert losses[-1] < 0.1 * losses[0]
    with torch.no_grad():
        whole, single = model.eval()(x), model(x[:1])
    torch.testing.assert_close(whole[:1], single, rtol=1e-4, atol=1e-4)
    assert not torch.equal(whole[0], whole[1])
