"""modern.md 的数字：参数与乘加的表、文中由算术得出的数；专题里的几个小函数。"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from chapter_05_resnet_modern_cnn import convnext, densenet, repvgg, topics_modern
from chapter_05_resnet_modern_cnn.densenet import stored_features
from chapter_05_resnet_modern_cnn.repvgg import RepVGGBlock, repvgg_cifar
from tests.parity import assert_equal, normal
from utils import model_summary
from utils.file_io_util import REPO_ROOT

PAGE = (REPO_ROOT / "chapter_05_resnet_modern_cnn" / "modern.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+)`(?:，(训练|折叠))? \| (\d+) \| (\d+) \| (\d+) \|$", re.MULTILINE)


def constructor(name: str) -> Callable[[], nn.Module]:
    modules = (densenet, convnext, repvgg)
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def test_the_table_of_costs() -> None:
    rows = ROW.findall(PAGE)
    assert len(rows) == 10 and len({row[:2] for row in rows}) == 10
    for name, form, size, parameters, macs in rows:
        with torch.device("meta"):
            model = constructor(name)()
            model = model.fuse() if form == "折叠" else model
            summary = model_summary(model, torch.empty(1, 3, int(size), int(size)))
        assert (summary.total_params, summary.total_macs) == (int(parameters), int(macs)), name
        if size == "32":
            assert 32e6 < summary.total_macs < 40e6


def test_numbers_in_the_text() -> None:
    with torch.device("meta"):
        blocks = [
            [layer.conv1.in_channels for layer in block.children()]
            for block in densenet.densenet121().features
            if isinstance(block, densenet.DenseBlock)
        ]
        summary = model_summary(convnext.convnext_tiny(), torch.empty(1, 3, 224, 224))
    assert [(min(b), max(b)) for b in blocks] == [(64, 224), (128, 480), (256, 992), (512, 992)]
    assert sum(map(len, blocks)) == 58
    # 每张 224 像素的图，DenseNet-121 四个稠密块留着的特征
    sizes = [(b[0], len(b), side) for b, side in zip(blocks, (56, 28, 14, 7), strict=True)]
    for efficient, mib in [(False, 102.3), (True, 36.5)]:
        total = sum(4 * stored_features(n, c, 32, efficient) * s * s for c, n, s in sizes)
        assert round(total / 2**20, 1) == mib and f"{mib} MiB" in PAGE
    # ConvNeXt 的乘加：深度卷积 2.4%，1×1 卷积 93.4%
    for endings, percent in [((".block.0",), 2.4), ((".block.3", ".block.5"), 93.4)]:
        share = sum(row.macs for row in summary.rows if row.path.endswith(endings))
        assert round(100 * share / summary.total_macs, 1) == percent and f"{percent}%" in PAGE


@pytest.mark.parametrize("k", [8, 32])
def test_when_the_bottleneck_pays(k: int) -> None:
    """4kC + 36k² < 9kC 当且仅当 C > 7.2k：用真的层数乘加。"""
    for channels in (7 * k, 8 * k):
        with torch.device("meta"):
            layer = densenet.DenseLayer(channels, k, memory_efficient=False)
            direct = nn.Conv2d(channels, k, 3, padding=1)
            image = torch.empty(1, channels, 4, 4)
            block = nn.Sequential(layer.norm1, layer.conv1, layer.norm2, layer.conv2)
            costs = [model_summary(m, image).total_macs for m in (block, direct)]
        assert (costs[0] < costs[1]) == (channels > 7.2 * k)


def test_step_timeline_rises_and_falls() -> None:
    """2L 段；前向的峰值不减，反向的末段回落；最高处就是整步的峰值，检查点的较低。"""
    tops = []
    for efficient in (False, True):
        line = topics_modern.step_timeline(6, efficient)
        assert len(line) == 12 and line[:6] == sorted(line[:6]) and line[-1] < 0.6 * max(line)
        assert max(line) == topics_modern.stored_bytes(6, efficient)[1]
        tops.append(max(line))
    assert tops[1] < tops[0]


def test_branches_of_a_folded_block() -> None:
    """去掉一支就是另两支之和；份额之和为 1，没有恒等分支的块那一份是 0。"""
    torch.manual_seed(0)
    block = RepVGGBlock(4, 4).double().train()
    block(normal(8, 4, 5, 5))  # 滑动统计量不再是缺省值
    block.eval()
    x = normal(2, 4, 5, 5, seed=1)
    expected = torch.relu(block.norm1(block.conv1(x)) + block.norm0(x))
    with torch.no_grad():
        assert_equal(topics_modern.without(block, "3x3")(x), expected.detach())
        model = repvgg_cifar().eval()
        x = normal(4, 3, 16, 16).float()
        inputs = [x, *topics_modern.block_outputs(model, x)[:-1]]
        shares = topics_modern.branch_shares(model, inputs)
    assert list(shares) == ["3x3", "1x1", "identity"]
    torch.testing.assert_close(torch.from_numpy(sum(shares.values())), torch.ones(9).double())
    assert (shares["identity"] == 0).tolist() == [b.norm0 is None for b in model.features]
