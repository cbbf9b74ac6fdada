"""``train.py`` 训练完之后的展示：从模型算出要画的数组，交给 ``figures.py``。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from chapter_02_nn_basics_mlp import figures
from chapter_02_nn_basics_mlp.activations import softmax
from chapter_02_nn_basics_mlp.mlp import MLP
from chapter_02_nn_basics_mlp.tasks import Task, correct
from utils.datasets import ImageBatches
from utils.synth_points import spiral_bayes

GALLERY = 24
REACH = 1.2  # 决策边界图的坐标范围


def draw(
    task: Task, models: Mapping[str, nn.Module], histories: Mapping[str, Sequence]
) -> dict[str, Figure]:
    """按任务画出全部的图，``文件名 -> Figure``。"""
    score = "accuracy" if task.score is correct else "MSE"
    chance = task.expectation.chance
    drawn = {"history.png": figures.history_figure(histories, score, chance)}
    test = task.batches("test", 1000)
    if isinstance(test, ImageBatches):
        return drawn | _draw_digits(task, models["mlp"], test)
    if task.score is correct:
        return drawn | _draw_spiral(models, test.inputs, test.labels)
    with torch.no_grad():
        panels = {
            name: (test.labels.cpu().numpy().ravel(), model(test.inputs).cpu().numpy().ravel())
            for name, model in models.items()
        }
    return drawn | {"predictions.png": figures.regression_figure(panels)}


@torch.no_grad()
def _draw_spiral(models: Mapping[str, MLP], points: Tensor, labels: Tensor) -> dict[str, Figure]:
    axis = torch.linspace(-REACH, REACH, 160)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack([x, y], dim=-1).view(-1, 2)  # (160 · 160, 2)
    panels = {
        name: softmax(model(grid.to(points.device)))[:, 1].view(160, 160).cpu().numpy()
        for name, model in models.items()
    }
    bayes = spiral_bayes(grid).view(160, 160).numpy()
    some, classes = points[:1000], labels[:1000].cpu().numpy()
    boundary = figures.boundary_figure(panels, some.cpu().numpy(), classes, REACH, bayes)
    hidden = figures.hidden_space_figure(hidden_frames(models["mlp"], some), classes)
    return {"boundary.png": boundary, "hidden_space.png": hidden}


def hidden_frames(model: MLP, x: Tensor) -> dict[str, np.ndarray]:
    """输入与各隐藏层的二维投影。

    中间层用主成分；最后一层的横轴取两类得分之差的方向（分类器真正用的那条），
    纵轴取与它垂直的第一主成分。
    """
    frames = {"input": x.cpu().numpy()}
    states = model.hidden_states(x)
    if not all(values.isfinite().all() for values in (*model.parameters(), *states)):
        return frames  # 训练已发散，没有可投影的
    for depth, state in enumerate(states, start=1):
        centered = (state - state.mean(dim=0)).cpu()
        _, _, components = torch.linalg.svd(centered, full_matrices=False)
        axes = components[:2]
        if depth == len(states):
            output = model.layers[-1].weight.cpu()
            direction = nn.functional.normalize(output[1] - output[0], dim=0)
            rest = centered - torch.outer(centered @ direction, direction)
            axes = torch.stack([direction, torch.linalg.svd(rest, full_matrices=False)[2][0]])
        frame = centered @ axes.T  # (N, min(宽度, 2))
        frame = nn.functional.pad(frame, (0, 2 - frame.shape[1]))  # 宽度为 1 的层补一列零
        frames[f"hidden layer {depth}"] = frame.numpy()
    return frames


@torch.no_grad()
def _draw_digits(task: Task, model: nn.Module, test: ImageBatches) -> dict[str, Figure]:
    probability = torch.cat([softmax(model(x)) for x, _ in test]).cpu()
    labels, images = test.labels.cpu(), test.inputs.cpu()
    predicted = probability.argmax(dim=1)
    classes = len(task.class_names)
    counts = torch.bincount(labels * classes + predicted, minlength=classes**2)
    confusion = figures.digits_figure(counts.view(classes, classes).numpy(), task.class_names)
    wrong = (predicted != labels).nonzero().squeeze(1)
    confidence = probability[wrong, predicted[wrong]]
    worst = wrong[confidence.argsort(descending=True)][:GALLERY]
    drawn = {"confusion.png": confusion}
    if len(worst):
        names = [name[:11] for name in task.class_names]
        gap = "\n" if max(map(len, names)) > 3 else " "
        titles = [
            f"{names[labels[i]]} → {names[predicted[i]]}{gap}({probability[i, predicted[i]]:.2f})"
            for i in worst.tolist()
        ]
        drawn["mistakes.png"] = figures.gallery_figure(images[worst].numpy(), titles)
    return drawn
