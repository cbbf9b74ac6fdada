"""退化问题：同样的数据、配方与初始化，加深之后连训练误差都变大；加上捷径就不再如此。

    python degradation.py                 # plain20、plain56、resnet20、resnet56，各一个种子
    python degradation.py --seeds 3       # 三个种子，图上画出平均与范围

训练集很小、不增强，因此每个网络都应当能把它背下来：背不下来的，只能怪优化。另量三件事：每层的
梯度与邻近输入的梯度（``gradient_flow.py``），以及训练之后拆掉几个块的误差（``lesions.py``）。
只看训练集与验证集；没有挑选任何东西，取的都是最后一轮。两个两个地并行，各用一个线程。被杀掉之后
加 ``--resume``，已经走完的轮次不重来，结果逐位相同（CPU 上）。

维度约定：``B, C, H, W``。

参考: He et al., 2015, arXiv:1512.03385，图 1 与第 4.2 节。degradation.md。
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_05_resnet_modern_cnn import figures_degradation as figures
from chapter_05_resnet_modern_cnn.data import Data, load_data
from chapter_05_resnet_modern_cnn.gradient_flow import (
    gradient_similarity,
    open_path,
    relative_gradients,
)
from chapter_05_resnet_modern_cnn.lesions import random_lesions, removable, without_blocks
from chapter_05_resnet_modern_cnn.models import build_model
from chapter_05_resnet_modern_cnn.recipe import evaluate, make_optimizer, train_one_epoch
from utils import (
    Expectation,
    Result,
    Timer,
    TorchDevice,
    add_common_args,
    conclude,
    get_device,
    make_generator,
    model_summary,
    prepare_out_dir,
    run_main,
    set_seed,
)
from utils.cli import ArgumentParser, positive_int
from utils.distributed import run_parallel
from utils.resume import TrainingState

HERE = Path(__file__).resolve().parent
NETWORKS = ("plain20", "plain56", "resnet20", "resnet56")
IMAGES = 1000  # 张，每个划分取多少
WEIGHT_DECAY = 1e-4  # 论文的值
EVERY = 3  # 轮，隔多少轮测量一次
PROBE = 128  # 张，量梯度用的固定的一批
NOISES = (0.003, 0.01, 0.03, 0.1, 0.3)  # 相对于图像的标准差
LESIONED = ("plain20", "resnet20", "resnet56")  # plain56 本来就没有学会，拆了也看不出
LESION_COUNTS, DRAWS = (1, 2, 4, 7, 12, 18), 4

# ---------------------------------------------------------------- 训练


class Run(NamedTuple):
    """一次训练：停在最后一轮的网络与逐次的测量。"""

    model: nn.Module
    start: list[float]  # 初始化时各卷积的相对梯度
    growth: list[float]  # 训练使各卷积的长度变为几倍
    history: list[dict[str, Any]]


def lengths(model: nn.Module) -> Tensor:
    """各卷积的 ``‖W‖``。"""
    convs = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    return torch.stack([conv.weight.detach().norm() for conv in convs])


def probe(data: Data, device: TorchDevice) -> tuple[Tensor, Tensor]:
    """训练集的头 ``PROBE`` 张：量梯度总用这一批。"""
    return next(iter(data.batches("train", PROBE, device=device.device)))


def train_network(
    name: str, seed: int, data: Data, args: argparse.Namespace, device: TorchDevice, folder: Path
) -> Run:
    """训练一个网络；训练误差是每隔 ``EVERY`` 轮以推理模式在整个训练集上量的，不是滑动的平均。"""
    set_seed(seed)
    classes = len(data.class_names)
    model = build_model(name, classes, data.shape, stem_stride=2).to(device.device)
    x, y = probe(data, device)
    start, length = relative_gradients(model, x, y), lengths(model)
    generator = make_generator(seed)  # 四个网络看到的数据次序逐批相同
    batches = data.batches("train", args.batch_size, generator, device=device.device)
    steps = args.epochs * len(batches)
    optimizer, schedule = make_optimizer(model, "sgd", args.lr, WEIGHT_DECAY, steps)
    config = {key: getattr(args, key) for key in CONFIG_KEYS} | {"model": name, "seed": seed}
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    state = TrainingState(folder, config, generator, resume=args.resume, **parts)
    while state.epoch < args.epochs // EVERY:
        for _ in range(EVERY):
            train_one_epoch(model, model, batches, optimizer, schedule, device)
        scores = {
            split: evaluate(model, data.batches(split, device=device.device), classes, device)
            for split in ("train", "val")
        }
        row = {"epoch": EVERY * (state.epoch + 1), "gradients": relative_gradients(model, x, y)}
        for split, score in scores.items():
            row |= {f"{split}_loss": score.loss, f"{split}_error": 1 - score.accuracy}
        state.record(row, row["train_error"], higher_is_better=False)
    return Run(model, start, (lengths(model) / length).tolist(), state.history)


# 这些参数不同，就不是同一次训练，不能续
CONFIG_KEYS = ("smoke", "epochs", "batch_size", "lr")


# ---------------------------------------------------------------- 训练之外的测量


def similarities(data: Data, seed: int, device: TorchDevice) -> dict[str, list[float]]:
    """初始化时，各网络在邻近的输入上梯度的余弦，每个噪声一个。"""
    x = probe(data, device)[0]
    found = {}
    for name in NETWORKS:
        set_seed(seed)
        model = build_model(name, len(data.class_names), data.shape, stem_stride=2)
        model = model.to(device.device)
        found[name] = [gradient_similarity(model, x, e, make_generator(seed)) for e in NOISES]
    return found


def open_shares(data: Data, seed: int, device: TorchDevice) -> list[float]:
    """初始化时，resnet56 的每个阶段里，直路上各个 ReLU 都放行的位置占多少。

    每个阶段从形状改变的一块之后算起。
    """
    x = probe(data, device)[0]
    set_seed(seed)
    model = build_model("resnet56", len(data.class_names), data.shape, stem_stride=2)
    model = model.to(device.device)
    shares, safe = [], removable(model)
    with torch.no_grad():
        x = F.relu(model.bn1(model.conv1(x)))
        for keeps, indices in itertools.groupby(range(len(model.blocks)), key=safe.__contains__):
            stage = model.blocks[(indices := list(indices))[0] : indices[-1] + 1]
            if keeps:
                shares.append(open_path(stage, x).float().mean().item())
            x = stage(x)
    return shares


def lesions(models: Mapping[str, nn.Module], data: Data, device: TorchDevice) -> dict[str, dict]:
    """逐块拆除、随机拆掉若干块之后的训练错误率。

    用训练集的头 500 张（``data.EVAL_BATCH``，恰好一批）：完好的网络在它上面几乎不出错，错误都
    来自拆除。
    """
    classes = len(data.class_names)

    def error(model: nn.Module) -> float:
        batches = itertools.islice(data.batches("train", device=device.device), 1)
        return 1 - evaluate(model, batches, classes, device).accuracy

    found = {}
    for name, model in models.items():
        generator, safe = make_generator(0), removable(model)
        counts = [count for count in LESION_COUNTS if count <= len(safe)]
        found[name] = {
            "intact": error(model),
            "single": [error(without_blocks(model, [i])) for i in range(len(model.blocks))],
            "changing": sorted(set(range(len(model.blocks))) - set(safe)),
            "counts": counts,
            "several": [
                [error(random_lesions(model, count, generator)) for count in counts]
                for _ in range(DRAWS)
            ],
        }
    return found


# ---------------------------------------------------------------- 入口


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="退化问题：有无捷径、深浅四个网络的训练误差")
    add_common_args(
        parser, out_dir=HERE / "outputs", epochs=27, batch_size=32, lr=0.03, resume=True
    )
    parser.add_argument("--seeds", type=positive_int, default=1, metavar="N", help="种子的个数")
    add = parser.add_argument
    add("--jobs", type=positive_int, default=2, metavar="N", help="同时训练几个，各用一个线程")
    args = parser.parse_args(argv)
    if args.epochs % EVERY:
        parser.error(f"--epochs {args.epochs} 应为 {EVERY} 的倍数：每 {EVERY} 轮测量一次")
    if args.batch_size > IMAGES:
        parser.error(f"--batch-size {args.batch_size} 超过训练集的 {IMAGES} 张：请减小")
    if args.smoke:
        args.epochs, args.seeds, args.jobs = EVERY, 1, 1
    if args.out_dir == HERE / "outputs":  # 各次运行各放一处，互不冲掉
        args.out_dir /= "degradation_smoke" if args.smoke else "degradation"
    return args


# 实测过的区间，三个种子
EXPECTED = Expectation("resnet56 训练错误率", 0.9, (0.02, 0.0), percent=True)
DEEPER_PLAIN = Expectation(
    "plain56 − plain20 训练错误率", 0.0, (0.4, 0.9), percent=True, learning=False
)
DEEPER_RESNET = Expectation(
    "resnet56 − resnet20 训练错误率", 0.0, (-0.02, 0.01), percent=True, learning=False
)


def conclusions(errors: Mapping[str, Sequence[float]]) -> list[Result]:
    """由最后的训练错误率得出的三项；差取各种子里最不利的一个。"""
    final = {name: np.array(values) for name, values in errors.items()}
    deep = final["resnet56"]
    std = deep.std(ddof=1).item() if len(deep) > 1 else None
    plain, residual = final["plain56"] - final["plain20"], deep - final["resnet20"]
    return [
        Result(EXPECTED, deep.mean().item(), std, final["plain56"].mean().item()),
        Result(DEEPER_PLAIN, plain.min().item()),
        Result(DEEPER_RESNET, residual.max().item()),
    ]


def table(runs: Mapping[str, Sequence[Run]]) -> str:
    """最后一轮的得分，与长得最多的卷积变为几倍；都是各种子的平均。"""
    keys = ("train_loss", "train_error", "val_loss", "val_error")
    lines = ["网络        训练损失  训练错误率  验证损失  验证错误率  卷积最多长到（各种子的平均）"]
    for name, group in runs.items():
        a, b, c, d = (np.mean([run.history[-1][key] for run in group]) for key in keys)
        longest = np.mean([max(run.growth) for run in group])
        lines.append(
            f"{name:10s}  {a:8.4f}  {100 * b:9.2f}%  {c:8.4f}  {100 * d:9.2f}%  {longest:9.1f} 倍"
        )
    return "\n".join(lines)


def draw(
    runs: Mapping[str, Sequence[Run]],
    similarity: Mapping[str, Sequence[float]],
    cut: Mapping[str, Any],
    chance: float,
) -> dict[str, Any]:
    """三张图；梯度与拆块的取自第一个种子。"""
    history = runs[NETWORKS[0]][0].history
    curves = {
        key: {
            name: np.array([[row[key] for row in run.history] for run in group])
            for name, group in runs.items()
        }
        for key in ("train_error", "val_error")
    }
    first = {name: group[0] for name, group in runs.items()}
    return {
        "degradation.png": figures.training_figure(
            [row["epoch"] for row in history], curves["train_error"], curves["val_error"], chance
        ),
        "gradients.png": figures.gradient_figure(
            {name: run.start for name, run in first.items()},
            {name: run.history[0]["gradients"] for name, run in first.items()},
            NOISES,
            similarity,
            EVERY,
        ),
        "lesions.png": figures.lesion_figure(cut, chance),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """训练、测量、画图、下结论；返回写进 ``metrics.json`` 的内容。"""
    args = parse_args(argv)
    out_dir = prepare_out_dir(args.out_dir)
    device = get_device(args.device)
    torch.set_num_threads(1)  # 结果与核的多少无关
    print(f"设备  {device.describe()}")
    with Timer(device) as timer:
        data = load_data("synth-objects", limit=64 if args.smoke else IMAGES)
        timer.lap("数据")
        classes = len(data.class_names)
        deepest = build_model("resnet56", classes, data.shape, stem_stride=2)
        print(model_summary(deepest, torch.zeros(1, *data.shape)).collapsed(1))
        print("\n".join(e.announce() for e in (EXPECTED, DEEPER_PLAIN, DEEPER_RESNET)))
        runs: dict[str, list[Run]] = {name: [] for name in NETWORKS}
        seeds = range(args.seed, args.seed + args.seeds)
        tasks = [
            (name, seed, data, args, device, out_dir / f"checkpoints_{name}_{seed}")
            for seed in seeds
            for name in reversed(NETWORKS)  # 最慢的先开始
        ]
        trainings = tqdm(run_parallel(train_network, tasks, args.jobs), total=len(tasks))
        for (name, seed, *_), run in zip(tasks, trainings, strict=True):
            runs[name].append(run)
            error = 100 * run.history[-1]["train_error"]
            tqdm.write(f"{name} 种子 {seed}：训练错误率 {error:.1f}%")
        timer.lap("训练")
        similarity = similarities(data, args.seed, device)
        shares = open_shares(data, args.seed, device)
        chosen = LESIONED[:2] if args.smoke else LESIONED  # 56 层要拆几十次
        cut = lesions({name: runs[name][0].model for name in chosen}, data, device)
        timer.lap("测量")
    print(table(runs))
    listed = "、".join(f"{100 * share:.1f}%" for share in shares)
    print(f"直路  resnet56 初始化时，三个阶段里各个 ReLU 都放行的位置：{listed}")
    errors = {name: [r.history[-1]["train_error"] for r in group] for name, group in runs.items()}
    return conclude(
        out_dir,
        conclusions(errors),
        timer,
        smoke=args.smoke,
        figures=draw(runs, similarity, cut, 1 - 1 / classes),
        errors=errors,
        runs={
            name: [run._asdict() | {"model": name} for run in group] for name, group in runs.items()
        },
        similarity=similarity,
        open_shares=shares,
        lesions=cut,
        laps=timer.laps,
    )


if __name__ == "__main__":
    run_main(main)
