"""续训的状态：读回之后走同一条轨迹；设置不同、检查点损坏都说清楚；只留最好一轮的权重。"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.resuming import flatten
from utils import UserError, make_generator, set_seed
from utils.resume import TrainingState, check_config

CONFIG = {"lr": 0.1, "epochs": 4}


def start(folder: Path, *, resume: bool, **config: object) -> tuple[TrainingState, nn.Module]:
    set_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    parts = {"model": model, "optimizer": optimizer}
    generator = make_generator(5)
    return TrainingState(folder, CONFIG | config, generator, resume=resume, **parts), model


def train(state: TrainingState, model: nn.Module, until: int) -> None:
    """每轮一步：数据来自生成器，dropout 来自全局随机状态。"""
    while state.epoch < until:
        x = torch.randn(8, 3, generator=state.generator)
        optimizer = state.parts["optimizer"]
        optimizer.zero_grad()
        loss = (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        state.record({"loss": loss.item()}, loss.item(), higher_is_better=False)


def test_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    whole, model = start(tmp_path / "whole", resume=False)
    train(whole, model, 4)
    for stop in (1, 2, 3):
        folder = tmp_path / str(stop)
        train(*start(folder, resume=False), stop)
        state, resumed = start(folder, resume=True)
        assert state.epoch == stop and [row["epoch"] for row in state.history] == list(
            range(1, stop + 1)
        )
        train(state, resumed, 4)
        assert flatten(resumed.state_dict()) == flatten(model.state_dict())
        assert state.history == whole.history and flatten(state.best) == flatten(whole.best)


@pytest.mark.parametrize(("higher", "best"), [(True, 5.0), (False, 1.0)])
def test_best_weights_are_a_copy_of_the_best_epoch(
    tmp_path: Path, higher: bool, best: float
) -> None:
    state, model = start(tmp_path, resume=False)
    for score in (3.0, 5.0, 1.0, 5.0, 1.0):  # 并列时留先到的
        with torch.no_grad():
            model[0].weight.fill_(score + 0.1 * state.epoch)
        state.record({}, score, higher_is_better=higher)
    first = (3.0, 5.0, 1.0).index(best)
    assert state.best["score"] == best
    assert state.best_weights["0.weight"].eq(torch.tensor(best + 0.1 * first)).all()


def test_starting_anew_forgets_the_old_run(tmp_path: Path) -> None:
    train(*start(tmp_path, resume=False), 2)
    state, _ = start(tmp_path, resume=False)
    assert state.epoch == 0 and not list(tmp_path.glob("*.pt"))
    state, _ = start(tmp_path, resume=True)  # 没有检查点：从头开始
    assert state.epoch == 0 and state.best_weights == {}


def test_other_settings_are_refused(tmp_path: Path) -> None:
    train(*start(tmp_path, resume=False), 1)
    with pytest.raises(UserError, match="lr 原为 0.1 今为 0.2") as caught:
        start(tmp_path, resume=True, lr=0.2)
    assert "epochs" not in str(caught.value)
    with pytest.raises(UserError, match="model 原为 None 今为 a"):
        check_config({}, {"model": "a"})
