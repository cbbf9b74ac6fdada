"""部署：导出的程序离开仓库照样运行，入口脚本的比较与失误。"""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from chapter_05_resnet_modern_cnn import deploy
from chapter_05_resnet_modern_cnn.exporting import export_program, run_elsewhere
from chapter_05_resnet_modern_cnn.folding import find_pairs, fold_batchnorm
from chapter_05_resnet_modern_cnn.models import build_model
from chapter_05_resnet_modern_cnn.quantized_layers import calibrate, quantize
from tests.test_ch05_folding import count, randomize
from utils import make_generator
from utils.cli import run_main
from utils.file_io_util import REPO_ROOT, save_checkpoint


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=make_generator(0))


class Small(nn.Module):
    """带残差、分组卷积与 Dropout 的小网络；定义它的文件在别处读不到。"""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Sequential(nn.Dropout(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise ValueError("通道数不对")
        x = torch.relu(self.bn(self.stem(x)))
        return self.head((x + self.depthwise(x)).mean(dim=(2, 3)))


def small() -> nn.Module:
    return randomize(Small())


# ---------------------------------------------------------------- 导出


@torch.no_grad()
def test_programs_run_in_a_clean_process(tmp_path: Path) -> None:
    x = normal(7, 3, 8, 8)
    folded = fold_batchnorm(small(), x)
    models = [folded, quantize(folded, calibrate(folded, [x]))]
    paths = [tmp_path / "a.pt2", tmp_path / "b.pt2"]
    for model, path in zip(models, paths, strict=True):
        program = export_program(model, (3, 8, 8), path).module()
        for size in (1, 2, 7):  # 批大小可变
            torch.testing.assert_close(program(x[:size]), model(x[:size]), rtol=0, atol=1e-6)
    for model, output in zip(models, run_elsewhere(paths, x), strict=True):
        torch.testing.assert_close(output, model(x), rtol=0, atol=1e-6)


def test_the_clean_process_really_lacks_the_repository(tmp_path: Path) -> None:
    # 在那里导入仓库里的包应当失败，即使环境里有 PYTHONPATH；失败要说出原因
    from chapter_05_resnet_modern_cnn import exporting

    code = exporting.RUNNER.replace("import torch\n", "import torch\nimport tests\n", 1)
    assert code != exporting.RUNNER
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "RUNNER", code)
        patch.setenv("PYTHONPATH", str(REPO_ROOT))
        with pytest.raises(RuntimeError, match="别处运行失败：ModuleNotFoundError.*tests"):
            run_elsewhere([], normal(1))


def test_the_file_holds_no_image_and_no_path(tmp_path: Path) -> None:
    export_program(small(), (3, 64, 64), tmp_path / "a.pt2")
    with zipfile.ZipFile(tmp_path / "a.pt2") as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    assert str(REPO_ROOT).encode() not in content
    assert len(content) < 300_000
    assert list(tmp_path.iterdir()) == [tmp_path / "a.pt2"]


def test_export_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="先 model.eval"):
        export_program(small().train(), (3, 8, 8), tmp_path / "a.pt2")
    with pytest.raises(ValueError, match="以 .pt2 结尾，实为 a.pt"):
        export_program(small(), (3, 8, 8), tmp_path / "a.pt")


# ---------------------------------------------------------------- 本章的网络


@pytest.mark.parametrize(("name", "pairs"), [("resnet20", 19), ("mobilenet_v2", 19)])
@torch.no_grad()
def test_networks_fold_completely(name: str, pairs: int) -> None:
    model = randomize(build_model(name, 10, (3, 32, 32), 2)).double()
    x = normal(2, 3, 32, 32).double()
    assert len(find_pairs(model, x)) == count(model) == pairs
    folded = fold_batchnorm(model, x)
    assert count(folded) == 0
    scale = model(x).abs().max()
    assert (folded(x) - model(x)).abs().max() < 1e-12 * scale


@torch.no_grad()
def test_preactivation_folds_only_inside_the_blocks() -> None:
    from chapter_05_resnet_modern_cnn.resnet_cifar import CifarResNet, PreActBlock

    model = randomize(CifarResNet(8, block=PreActBlock)).double()
    x = normal(2, 3, 32, 32).double()
    names = {module: name for name, module in model.named_modules()}
    pairs = [(names[a], names[b]) for a, b in find_pairs(model, x)]
    assert pairs == [(f"blocks.{i}.conv1", f"blocks.{i}.bn2") for i in range(3)]
    difference = (fold_batchnorm(model, x)(x) - model(x)).abs().max()
    assert difference < 1e-12 * model(x).abs().max()


# ---------------------------------------------------------------- 入口脚本的各步


def test_compare_by_hand() -> None:
    reference = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    logits = torch.tensor([[1.0, 0], [0, 0.5], [0, 1], [0, 1]])
    scores = deploy.compare(logits, reference, torch.tensor([0, 1, 1, 0]))
    assert scores == {"accuracy": 0.75, "agreement": 0.75, "max_difference": 1.0}


def test_widest_layer_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Linear(1, 3))
    for layer, values in zip(model, ([1.0, -2, 8], [1.0, 1, 1]), strict=True):
        layer.weight = nn.Parameter(torch.tensor(values).view_as(layer.weight))
    assert deploy.most_uneven_convolution(model) == ("0", model[0], 4.0)


def test_arguments() -> None:
    args = deploy.parse_args([])
    assert args.models == ["resnet20", "mobilenet_v2"] and args.stem_stride == 2
    assert deploy.parse_args(["--dataset", "cifar10"]).stem_stride == 1
    twice = deploy.parse_args(["--models", "resnet32", "resnet20", "resnet32"])
    assert twice.models == ["resnet32", "resnet20"]  # 否则两次训练之后，结果与预期对不上


def test_user_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "w.pt"
    save_checkpoint(weights, build_model("resnet20", 10, (3, 32, 32), 2).state_dict())
    cases = {
        "只属于一个网络": ["--weights", str(weights)],
        "找不到文件": ["--weights", str(tmp_path / "none.pt")],
        "不属于 MobileNetV2": ["--weights", str(weights), "--models", "mobilenet_v2"],
        "没有 'vgg' 这个选项": ["--models", "vgg"],
    }
    for words, argv in cases.items():
        with pytest.raises(SystemExit) as caught:
            out = ["--smoke", "--out-dir", str(tmp_path / "out")]
            run_main(lambda argv=argv, out=out: deploy.main([*argv, *out]))
        err = capsys.readouterr().err
        assert caught.value.code == 2 and words in err and len(err.splitlines()) == 1
