"""六个实验：谁参加比较，用什么数据，预期什么。

各方怎样造出来在 ``arms.py`` 与 ``arms_regularization.py``；怎样训练、怎样比较由 ``train.py`` 与
``recipes.py`` 负责，六个实验完全相同。
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from chapter_03_optimization_regularization.arms import (
    BATCH_ARMS,
    INITIALIZATIONS,
    NORMALIZATIONS,
    OPTIMIZERS,
    SCHEDULES,
)
from chapter_03_optimization_regularization.arms_regularization import (
    IMAGE_REGULARIZERS,
    REGULARIZERS,
)
from chapter_03_optimization_regularization.data import Task
from chapter_03_optimization_regularization.recipes import Arm, Run
from utils import Expectation

DIGITS, POINTS = "synth-digits", "noisy-moons"


@dataclass(frozen=True)
class Experiment:
    """一个实验。

    参数:
        question: 它要回答的问题。
        arms: 参加比较的各方。
        baseline: 对照是哪一方：表里的差、结果里的对照都相对于它。
        dataset: 缺省的数据集。
        epochs, batch_size, train_size: 缺省的轮数、批大小、训练样本数（``None`` 为全部）。
        flip: 训练标签改错的概率（带噪双月自带，不在此列）。
        seeds: 至少几个种子。
        tune_seeds: 挑旋钮时用几个种子。
        knob: 旋钮叫什么。
        key: 挑选所看的验证指标，越小越好。
        winner: 最后报告哪一方的测试错误率。
        bands: 数据集 -> 测试错误率的预期区间（较差端, 较好端），由实测得出；没有测过的数据集只按
            机会线给出宽松的上限。
    """

    question: str
    arms: tuple[Arm, ...]
    baseline: str
    winner: str
    bands: dict[str, tuple[float, float]]
    dataset: str = DIGITS
    epochs: int = 3
    batch_size: int = 128
    train_size: int | None = None
    flip: float = 0.0
    seeds: int = 3
    tune_seeds: int = 1
    knob: str = "learning rate"
    key: Callable[[Run], float] = lambda run: run.val_loss

    def expectation(self, task: Task, dataset: str) -> Expectation:
        """训练之前宣布的预期：机会线、极限（已知时）与区间。"""
        loose = (max(1 - 3 * (1 - task.chance), task.chance / 2), 0.0)
        band = self.bands.get(dataset, loose)
        metric = f"测试错误率（{self.winner}）"
        return Expectation(metric, task.chance, band, task.floor, tolerance=0.004, percent=True)


def _error(run: Run) -> float:
    return run.val_error


EXPERIMENTS = {
    "optimizers": Experiment(
        "学习率的预算相同，哪个优化器走得最低、最快？",
        OPTIMIZERS,
        baseline="SGD",
        winner="最好的优化器",
        bands={DIGITS: (0.06, 0.04), "mnist": (0.025, 0.015)},
    ),
    "schedules": Experiment(
        "学习率怎样随步数变化最好？峰值各自调过。",
        SCHEDULES,
        baseline="constant",
        winner="最好的调度",
        bands={DIGITS: (0.07, 0.045)},
    ),
    "normalization": Experiment(
        "归一化使十层的网络能用多大的学习率？",
        NORMALIZATIONS,
        baseline="plain|none",
        winner="最好的归一化",
        bands={DIGITS: (0.14, 0.08)},
        train_size=6_000,
    ),
    "regularization": Experiment(
        "200 个样本、一成标签有错，哪种正则化使测试错误率下降，降多少？",
        REGULARIZERS,
        baseline="none",
        dataset=POINTS,
        epochs=60,
        batch_size=50,
        winner="最好的正则化",
        bands={POINTS: (0.24, 0.20)},
        train_size=200,
        seeds=8,
        tune_seeds=8,
        knob="strength",
        key=_error,
    ),
    "generalization": Experiment(
        "批大小与学习率怎样一起变？大批量的解更尖吗？",
        BATCH_ARMS,
        baseline="batch 512",
        epochs=10,
        winner="最好的批大小",
        bands={DIGITS: (0.15, 0.11)},
        train_size=2_000,
        tune_seeds=3,
    ),
    "initialization": Experiment(
        "初始化、归一化、深度，哪些组合训得动？",
        INITIALIZATIONS,
        baseline="kaiming|none|16",
        epochs=2,
        winner="最好的组合",
        bands={DIGITS: (0.13, 0.08)},
        train_size=6_000,
    ),
}
# 换成图像时，正则化的强度、样本数、轮数都不同
IMAGE_REGULARIZATION = Experiment(
    "1000 张图像、两成标签有错，哪种正则化使测试错误率下降，降多少？",
    IMAGE_REGULARIZERS,
    baseline="none",
    epochs=30,
    batch_size=50,
    winner="最好的正则化",
    bands={DIGITS: (0.34, 0.26)},
    train_size=1_000,
    flip=0.2,
    seeds=5,
    tune_seeds=5,
    knob="strength",
    key=_error,
)
