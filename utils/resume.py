"""可以续训的训练状态：每轮存一次，被杀掉之后读回，最终结果与没有中断时逐位相同。"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.cli import UserError
from utils.file_io_util import CheckpointManager
from utils.seed import capture_rng, restore_rng


class TrainingState:
    """继续训练所需的一切，连同逐轮记录与验证集上最好的权重。

    参数:
        folder: 检查点的文件夹。
        config: 决定这次训练的设置；续训时必须与检查点里的一致。
        generator: 打乱与增强所用的生成器。
        resume: 真则读回最新的完好检查点（没有就从头开始），假则先删去旧的检查点，
            否则中断之后会接上从前另一次训练的。
        writes: 多进程时只有 0 号为真，其余的只读检查点。
        parts: 有 ``state_dict`` 与 ``load_state_dict`` 的对象，须含 ``model``；
            如 ``model=..., optimizer=..., schedule=...``。

    属性:
        history: 逐轮记录，每轮一个字典。
        best: ``{"score": 最好的验证得分, "weights": 那一轮的权重}``。
        start: 从第几轮之后开始的；续训时是读回的轮数，否则为 0。

    异常:
        UserError: 检查点全部损坏，或设置与检查点不同。
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        generator: torch.Generator,
        *,
        resume: bool,
        writes: bool = True,
        **parts: Any,
    ) -> None:
        self.checkpoints = CheckpointManager(folder)
        self.config = {key: str(value) for key, value in config.items()}
        self.generator, self.parts, self.writes = generator, parts, writes
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {"score": None, "weights": {}}
        if not resume:
            if writes:
                self.checkpoints.clear()
        elif (saved := self.checkpoints.load_latest()) is not None:
            check_config(saved.get("config", {}), self.config)
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            generator.set_state(saved["generator"])
            restore_rng(saved["rng"])
            self.history, self.best = saved["history"], saved["best"]
        self.start = self.epoch

    @property
    def epoch(self) -> int:
        """已走完的轮数。"""
        return len(self.history)

    @property
    def best_weights(self) -> dict[str, Tensor]:
        """验证集上最好的一轮的权重。"""
        return self.best["weights"]

    def record(
        self,
        row: Mapping[str, float],
        score: float,
        *,
        higher_is_better: bool = True,
        scored: nn.Module | None = None,
    ) -> None:
        """一轮结束：记下 ``row``，``score`` 胜过以往就留下当前的权重，存检查点。

        参数:
            scored: ``score`` 属于哪个模型；缺省为 ``model``（用权重平均时是那份平均）。
        """
        self.history.append({"epoch": self.epoch + 1, **row})
        sign = 1 if higher_is_better else -1
        if self.best["score"] is None or sign * score > sign * self.best["score"]:
            model = self.parts["model"] if scored is None else scored
            weights = {k: v.clone() for k, v in model.state_dict().items()}
            self.best = {"score": score, "weights": weights}
        if not self.writes:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()} | {
            "config": self.config,
            "generator": self.generator.get_state(),
            "rng": capture_rng(),
            "history": self.history,
            "best": self.best,
        }
        self.checkpoints.save(self.epoch, state)


def check_config(saved: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """续训的设置必须与检查点一致。"""
    different = [key for key in wanted if saved.get(key) != wanted[key]]
    if different:
        listed = "、".join(f"{key} 原为 {saved.get(key)} 今为 {wanted[key]}" for key in different)
        raise UserError(
            f"--resume 的设置与检查点不同（{listed}）：改回原设置，或去掉 --resume 重训"
        )
