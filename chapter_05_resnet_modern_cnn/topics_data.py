"""``demo.py`` 的数据专题：合成物体长什么样，颜色与像素能泄露多少类别。"""

from __future__ import annotations

import torch
from torch import Tensor

from chapter_05_resnet_modern_cnn.figures import gallery_figure
from utils.datasets import load_images
from utils.topics import Check, Outcome, Topic


def linear_accuracy(train: Tensor, y: Tensor, test: Tensor, labels: Tensor) -> float:
    """线性分类器（最小二乘，目标为 one-hot，带一点岭）在测试集上的准确率；输入 ``(N, D)``。"""
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-6
    x, z = ((v - mean) / std for v in (train, test))
    target = torch.nn.functional.one_hot(y).float() - 0.1
    gram = x.T @ x + 1e-2 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, x.T @ target)
    return (z @ weight).argmax(dim=1).eq(labels).float().mean().item()


def objects(seed: int, smoke: bool) -> Outcome:
    """不看形状，只凭颜色或逐个像素，猜得出是哪一类吗？"""
    limit = 500 if smoke else None
    train, test = (load_images("synth-objects", split, limit=limit) for split in ("train", "test"))
    flat = [s.images.float().flatten(1) / 255 for s in (train, test)]
    colour = [s.images.float().flatten(2).mean(dim=2) / 255 for s in (train, test)]
    found = {
        "平均颜色": linear_accuracy(colour[0], train.labels, colour[1], test.labels),
        "全部像素": linear_accuracy(flat[0], train.labels, flat[1], test.labels),
    }
    for name, value in found.items():
        print(f"线性分类器，输入为{name}：测试准确率 {100 * value:.1f}%（机会线 10%）")
    chosen = torch.cat([(train.labels == k).nonzero().flatten()[:10] for k in range(10)])
    figure = gallery_figure(train.images[chosen].numpy(), train.class_names)
    return Outcome(
        figure,
        [
            (Check("只凭平均颜色的准确率", 1.0, (0.06, 0.14), percent=True), found["平均颜色"]),
            (
                Check("像素上的线性分类器的准确率", 1.0, (0.1, 0.35), percent=True),
                found["全部像素"],
            ),
        ],
    )


TOPICS: dict[str, Topic] = {"objects": objects}
