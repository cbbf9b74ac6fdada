"""``detection.py`` 的图：真实的框与检出的框、各类的查准率—查全率曲线、训练曲线。"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from chapter_04_cnn_classic.boxes import Curve, Detections
from chapter_04_cnn_classic.scenes import CLASS_NAMES, Scenes
from utils.plot import MUTED, PALETTE

SHOWN = 6  # 画多少个场景
SCORE = 0.4  # 画出的检出至少有这样的得分
COLORS = PALETTE[: len(CLASS_NAMES)]  # 各类的颜色，框与曲线一致


def draw_boxes(axes: Axes, boxes: Tensor, labels: Tensor, scores: Tensor | None = None) -> None:
    """在图上画框，颜色是类别；给出得分时写在框的上沿，得分高的画在上面。"""
    marks = ["" for _ in labels] if scores is None else [f"{v:.2f}" for v in scores.tolist()]
    drawn = list(zip(boxes.tolist(), labels.tolist(), marks, strict=True))
    for (x1, y1, x2, y2), label, text in reversed(drawn):
        # 像素 i 占 [i, i+1)，而 imshow 把它的中心放在 i
        corner = (x1 - 0.5, y1 - 0.5)
        for color, width in (("white", 3.2), (COLORS[label], 1.7)):
            axes.add_patch(
                Rectangle(corner, x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=width)
            )
        if text:
            axes.text(
                max(corner[0], 0.5),
                max(corner[1], 5.5),
                text,
                fontsize=6,
                va="bottom",
                color="white",
                bbox={"facecolor": COLORS[label], "edgecolor": "none", "pad": 1.0},
            )


def draw_scenes(figure: Figure, scenes: Scenes, found: Sequence[Detections]) -> None:
    """上排真值，下排检出。"""
    axes = figure.subplots(2, SHOWN, squeeze=False)
    for column in range(SHOWN):
        for row in range(2):
            cell = axes[row, column]
            cell.set(xticks=[], yticks=[])
            cell.grid(False)
            cell.spines[:].set_visible(False)
            if column < len(scenes.images):
                cell.imshow(scenes.images[column].permute(1, 2, 0).numpy())
        if column >= len(scenes.images):
            continue
        real = scenes.labels[column] >= 0
        draw_boxes(axes[0, column], scenes.boxes[column][real], scenes.labels[column][real])
        boxes, scores, labels = found[column]
        sure = scores >= SCORE
        draw_boxes(axes[1, column], boxes[sure], labels[sure], scores[sure])
    axes[0, 0].set_ylabel("truth", fontweight="bold")
    axes[1, 0].set_ylabel(f"predicted\nscore ≥ {SCORE}", fontweight="bold")


def draw_curves(axes: Axes, curves: Sequence[Curve]) -> None:
    """各类的查准率—查全率曲线。"""
    for name, color, curve in zip(CLASS_NAMES, COLORS, curves, strict=True):
        axes.plot(curve.recall, curve.precision, color=color, label=f"{name}, AP {curve.ap:.3f}")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.set_title("precision–recall at IoU 0.5 (test)")
    axes.legend(loc="lower left")


def draw_history(axes: Axes, history: Sequence[dict[str, float]]) -> None:
    """左轴：两项训练损失；右轴：验证 mAP。"""
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(epochs) == 1 else None
    for key, name, color in (
        ("class_loss", "focal loss", PALETTE[4]),
        ("box_loss", "GIoU loss", PALETTE[5]),
    ):
        axes.plot(epochs, [row[key] for row in history], color=color, label=name, marker=marker)
    axes.set(xlabel="epoch", ylabel="training loss", title="training", ylim=(0, None))
    right = axes.twinx()
    values = [row["val_map"] for row in history]
    right.plot(epochs, values, color=PALETTE[6], label="validation mAP@0.5", marker=marker)
    right.set(ylim=(0, 1), ylabel="mAP@0.5")
    right.grid(False)
    right.spines["right"].set_visible(True)
    lines = [*axes.get_lines(), *right.get_lines()]
    axes.legend(
        lines, [line.get_label() for line in lines], loc="center right", bbox_to_anchor=(1, 0.62)
    )


def detection_figure(
    scenes: Scenes,
    found: Sequence[Detections],
    curves: Sequence[Curve],
    history: Sequence[dict[str, float]],
) -> Figure:
    """全部合成一张：上面两排是场景，下面是曲线。"""
    figure = Figure(figsize=(9.6, 6.9), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.06, 1.0))
    draw_scenes(top, scenes, found)
    handles = [Rectangle((0, 0), 1, 1, facecolor=color, edgecolor=MUTED) for color in COLORS]
    top.legend(handles, CLASS_NAMES, ncols=len(CLASS_NAMES), loc="outside upper center")
    left, right = bottom.subplots(1, 2)
    draw_curves(left, curves)
    draw_history(right, history)
    return figure
