"""装入 torchvision 的官方权重：键、形状逐项核对，不相配时一行说清是哪一项。"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from utils import UserError


def read_state_dict(path: Path | str) -> dict[str, Tensor]:
    """安全地读一个只含张量的权重文件。

    异常:
        UserError: 文件缺失或损坏，或者内容不是 state_dict。
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"找不到权重文件 {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"权重文件 {path} 已损坏或不可信（{reason[:80]}）") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"权重文件 {path} 的内容不是 state_dict（名字到张量的字典）")
    return state


def load_torchvision_weights(
    model: nn.Module,
    path: Path | str,
    rename: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
) -> nn.Module:
    """把 ``.pth`` 文件里的 state_dict 装进 ``model`` 并返回它；任何一项不相配都不改动 ``model``。

    PyTorch 0.4.1 之前的 BatchNorm 没有 ``num_batches_tracked``，早年发布的文件里也就没有；它在缺省
    的设置下不参与计算，缺了沿用 ``model`` 的。

    参数:
        model: 与文件相配的网络，如 ``vgg16()``。
        path: torchvision 发布的权重文件，如 ``vgg16-397923af.pth``；``train.py`` 存下的也行。
        rename: 先把文件里的旧名字换成新的，如第 5 章 DenseNet 的 ``rename_old_keys``。

    异常:
        UserError: 读不出来，或者属于另一个模型。
    """
    state, wanted, name = read_state_dict(path), model.state_dict(), type(model).__name__
    state = dict(state if rename is None else rename(state))
    for key in wanted:
        if key.endswith(".num_batches_tracked"):
            state.setdefault(key, wanted[key])
    for key in (*wanted, *state):
        if key not in state:
            raise UserError(f"权重文件 {path} 不属于 {name}：缺少 {key}")
        if key not in wanted:
            raise UserError(f"权重文件 {path} 不属于 {name}：多出 {key}")
        if state[key].shape != wanted[key].shape:
            raise UserError(
                f"权重文件 {path} 不属于这个 {name}：{key} 应为 {tuple(wanted[key].shape)}，"
                f"文件里是 {tuple(state[key].shape)}"
            )
    model.load_state_dict(state)
    return model
