"""画图：文件是 PNG、至多 200 KB，风格一致，数据画对了地方，不碰 pyplot。"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from tests.conftest import run_python
from utils.file_io_util import REPO_ROOT
from utils.plot import (
    MAX_BYTES,
    PALETTE,
    confusion_matrix,
    heatmap,
    image_grid,
    new_figure,
    plot_curves,
    save_figure,
)

PNG = b"\x89PNG\r\n\x1a\n"


def test_new_figure_has_the_requested_grid() -> None:
    figure, axes = new_figure(2, 3)
    assert axes.shape == (2, 3) and figure.get_size_inches() == pytest.approx([12.6, 6.4])
    figure, axes = new_figure(size=(5, 2), subplot_kw={"xscale": "log"})
    assert axes.shape == (1, 1) and axes[0, 0].get_xscale() == "log"


def test_saved_file_is_png_and_small_figures_keep_full_resolution(tmp_path: Path) -> None:
    from PIL import Image

    figure, axes = new_figure(size=(4, 3))
    plot_curves(axes[0, 0], {"loss": [3, 2, 1]})
    path = save_figure(figure, tmp_path / "new" / "x.png")
    assert path == tmp_path / "new" / "x.png" and path.read_bytes()[:8] == PNG
    assert Image.open(path).size == (520, 390)  # 4 × 3 英寸，每英寸 130 点
    assert len(list(path.parent.iterdir())) == 1


def test_noise_image_is_still_under_the_limit(tmp_path: Path) -> None:
    from PIL import Image

    figure, axes = new_figure(size=(6, 5))
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    axes[0, 0].imshow(noise, interpolation="nearest")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.tell() > 3 * MAX_BYTES  # 不加处理就会超出很多
    path = save_figure(figure, tmp_path / "noise.png")
    assert path.read_bytes()[:8] == PNG and path.stat().st_size <= MAX_BYTES
    width, height = Image.open(path).size
    assert width / height == pytest.approx(6 / 5, rel=0.02)  # 只缩小，不变形


def test_failed_save_keeps_the_old_picture(tmp_path: Path, monkeypatch) -> None:
    figure, _ = new_figure()
    path = tmp_path / "x.png"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_figure(figure, path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_curves_and_reference_lines_are_where_the_numbers_say() -> None:
    _, axes = new_figure()
    plot_curves(
        axes[0, 0],
        {"train": [3, 2, 1], "val": [4, 3, 2.5]},
        references={"chance": 2.3},
        ylabel="loss",
        title="t",
        log_y=True,
    )
    train, val, chance = axes[0, 0].lines
    assert train.get_xdata().tolist() == [1, 2, 3] and train.get_ydata().tolist() == [3, 2, 1]
    assert val.get_ydata().tolist() == [4, 3, 2.5]
    assert list(chance.get_ydata()) == [2.3, 2.3]
    assert axes[0, 0].texts[0].get_text() == "chance"
    assert [text.get_text() for text in axes[0, 0].get_legend().texts] == ["train", "val"]
    assert (axes[0, 0].get_ylabel(), axes[0, 0].get_yscale()) == ("loss", "log")


def test_single_point_is_visible_and_single_curve_has_no_legend() -> None:
    _, axes = new_figure()
    plot_curves(axes[0, 0], {"loss": [3.0]}, x=[7])
    assert axes[0, 0].lines[0].get_marker() == "o"
    assert axes[0, 0].lines[0].get_xdata().tolist() == [7]
    assert axes[0, 0].get_legend() is None


def test_style_reaches_lines_titles_and_legends_and_does_not_leak() -> None:
    before = dict(matplotlib.rcParams)
    _, axes = new_figure()
    plot_curves(axes[0, 0], {"a": [1, 2], "b": [2, 1]}, title="t")
    line, legend, title = axes[0, 0].lines[0], axes[0, 0].get_legend(), axes[0, 0].title
    assert (line.get_linewidth(), line.get_color()) == (1.8, PALETTE[0])
    assert not legend.get_frame_on() and legend.texts[0].get_fontsize() == 9
    assert (title.get_fontsize(), title.get_fontweight()) == (11, "bold")
    assert not axes[0, 0].spines["top"].get_visible()
    assert dict(matplotlib.rcParams) == before  # 使用者自己的设置不变


def test_heatmap_writes_each_value_in_its_cell_in_a_readable_colour() -> None:
    _, axes = new_figure()
    values = np.array([[0.0, 0.5, 1.0], [0.25, 0.75, np.nan]])
    image = heatmap(axes[0, 0], values, text=".2f", x_labels="abc", y_labels="xy")
    shown = {text.get_position(): text for text in axes[0, 0].texts}
    assert {at: text.get_text() for at, text in shown.items()} == {
        (0, 0): "0.00",
        (1, 0): "0.50",
        (2, 0): "1.00",
        (0, 1): "0.25",
        (1, 1): "0.75",
        (2, 1): "nan",
    }
    assert image.get_clim() == (0, 1)  # nan 不影响色标
    assert shown[0, 0].get_color() == "white"  # viridis 的低端是暗的
    assert shown[2, 0].get_color() == "black"
    assert [label.get_text() for label in axes[0, 0].get_xticklabels()] == ["a", "b", "c"]


def test_confusion_matrix_colours_rows_and_omits_zeros() -> None:
    _, axes = new_figure()
    confusion_matrix(axes[0, 0], np.array([[3, 1, 0], [0, 8, 0], [0, 0, 0]]), ["a", "b", "c"])
    texts = {text.get_position(): text.get_text() for text in axes[0, 0].texts}
    assert texts == {(0, 0): "3", (1, 0): "1", (1, 1): "8"}  # (列 = 预测, 行 = 真实)
    expected = [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]]  # 没有样本的类不产生 nan
    assert axes[0, 0].images[0].get_array().tolist() == expected
    assert (axes[0, 0].get_xlabel(), axes[0, 0].get_ylabel()) == ("predicted", "true")


@pytest.mark.parametrize("shape", [(5, 4, 6), (5, 1, 4, 6), (5, 3, 4, 6)])
def test_image_grid_shows_every_picture_unchanged(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    figure = image_grid(images, titles=list("abcde"), columns=3, title="all")
    shown = [axes for axes in figure.axes if axes.images]
    assert len(figure.axes) == 6 and len(shown) == 5
    for axes, image, title in zip(shown, images, "abcde", strict=True):
        expected = image.transpose(1, 2, 0).squeeze() if image.ndim == 3 else image
        assert np.array_equal(np.asarray(axes.images[0].get_array()), expected)
        assert axes.get_title() == title
        if expected.ndim == 2:  # 灰度不按各图自己的最大最小值拉伸
            assert axes.images[0].get_clim() == (0, 255)


def test_pyplot_is_never_imported(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from utils.plot import *\n"
        "figure, axes = new_figure(1, 2)\n"
        "plot_curves(axes[0, 0], {'a': [1, 2]})\n"
        "heatmap(axes[0, 1], np.eye(2), text='.1f')\n"
        "save_figure(figure, Path(sys.argv[1]))\n"
        "save_figure(image_grid(np.zeros((2, 4, 4))), Path(sys.argv[1]))\n"
        "print('matplotlib.pyplot' in sys.modules)\n"
    )
    environment = {"DISPLAY": "", "MPLBACKEND": "TkAgg"}  # 没有显示器，后端还指向窗口
    done = run_python("-c", code, tmp_path / "x.png", cwd=REPO_ROOT, env=environment)
    assert (done.stdout, done.stderr, done.returncode) == ("False\n", "", 0)
