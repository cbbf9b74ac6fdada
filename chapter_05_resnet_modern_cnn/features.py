"""高效特征提取：在合成物体上训练一次，拿它的特征去认只有几个标签的数字。

    python features.py                                      # 预训练，再比较各种做法
    python features.py --weights outputs/resnet32_synth-objects/resnet32.pt --model resnet32
    python features.py --backbone resnet18 --weights resnet18-f37072fd.pth \\
        --dataset folder --data-dir DIR --no-finetune       # torchvision 的官方权重，自己的图片

各做法只看每类几个标签：kNN、线性探针、只训练头、整体微调；对照是从头训练、随机的主干、像素本身。
画出 transfer.png、features.png、grad_cam.png；讲解见 transfer.md。
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_04_cnn_classic.interpret import best_window, deletion_drop, grad_cam, random_window
from chapter_05_resnet_modern_cnn import figures_features as figures
from chapter_05_resnet_modern_cnn.data import DATASETS, Data, load_data
from chapter_05_resnet_modern_cnn.few_shot import (
    Tables,
    Task,
    backbone_features,
    best_knn,
    best_probe,
    fine_tune,
    fit_head,
    frozen_in_the_wrong_mode,
    measured_accuracy,
    pixel_features,
    tabulate,
)
from chapter_05_resnet_modern_cnn.models import MODELS, OFFICIAL, usual_stem_stride
from chapter_05_resnet_modern_cnn.sources import DATASETS as SOURCES
from chapter_05_resnet_modern_cnn.sources import (
    Source,
    imagenet_source,
    small_source,
)
from chapter_05_resnet_modern_cnn.transfer import extract, pca
from utils import (
    Expectation,
    Result,
    Timer,
    TorchDevice,
    conclude,
    count_parameters,
    get_device,
    make_generator,
    prepare_out_dir,
    run_main,
    set_seed,
)
from utils.cli import ArgumentParser, add_common_args, existing_file, int_list, positive_int
from utils.topics import Check

HERE = Path(__file__).resolve().parent
TARGETS = ("synth-digits", *(name for name in DATASETS if name != "synth-digits"))
LABELS = (2, 5, 20, 60, 200)  # 每类几个标签
STATED = 20  # 结论所用的标签数
TEST_LIMIT = 2000  # 张
WINDOW = 9  # 像素，删除检验的窗口


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_common_args(parser, out_dir=HERE / "outputs" / "features", datasets=TARGETS)
    add = parser.add_argument
    add("--source", choices=SOURCES, default=SOURCES[0], help="预训练用的数据集")
    add("--model", choices=list(MODELS), default="resnet20", help="小图的主干")
    add(
        "--backbone",
        choices=list(OFFICIAL),
        help="ImageNet 形式的主干，须同时给出 --weights；此时不用 --source 与 --model",
    )
    add(
        "--weights",
        type=existing_file,
        metavar="FILE",
        help="train.py 为同一 --model 存下的权重，或 torchvision 为 --backbone 发布的；"
        "不给就当场预训练",
    )
    add(
        "--stem-stride",
        type=int,
        choices=[1, 2],
        help="小图主干起始卷积的步幅，须与训练时相同（默认 --source synth-objects 为 2，其余为 1）",
    )
    add("--image-size", type=positive_int, metavar="N", help="--backbone 的边长（默认 64），像素")
    add("--labels", type=int_list, default=LABELS, metavar="N,N", help="每类几个标签")
    add("--draws", type=positive_int, default=3, metavar="N", help="冻结的做法抽几次标签")
    add("--tuned-draws", type=positive_int, default=1, metavar="N", help="微调的做法抽几次")
    add("--steps", type=positive_int, default=150, metavar="N", help="梯度下降的步数")
    add("--no-finetune", action="store_true", help="只比较冻结的做法")
    args = parser.parse_args(argv)
    if args.backbone and not args.weights:
        parser.error(f"--backbone {args.backbone} 须同时给出 --weights FILE")
    if args.image_size and not args.backbone:
        parser.error("--image-size 只用于 --backbone：小图的网络一律 32 像素")
    if args.stem_stride and args.backbone:
        parser.error("--stem-stride 只用于小图的网络：--backbone 的结构是固定的")
    if not args.backbone and args.dataset == args.source:
        parser.error(f"--dataset 与 --source 都是 {args.source}：迁移要换一个任务")
    args.labels = tuple(sorted(set(args.labels)))
    args.stem_stride = args.stem_stride or usual_stem_stride(args.source)
    args.image_size = args.image_size or (64 if args.backbone else 32)
    if args.smoke:
        args.labels, args.draws, args.steps = (2, 4), 2, 3
    args.tuned_draws = min(args.tuned_draws, args.draws)
    return args


# ---------------------------------------------------------------- 各种做法


class Method(NamedTuple):
    """一种做法：``run(第几次抽样, 每类几个标签) -> 测试准确率``，与它要学的参数个数。"""

    run: Callable[[int, int], float]
    parameters: int
    draws: int


def tuned(source: Source, task: Task, steps: int, pretrained: bool) -> Callable[[int, int], float]:
    """整体微调，或从头训练。"""
    backbone = source.backbone if pretrained else source.random

    def run(index: int, count: int) -> float:
        model = fine_tune(
            backbone, source.channels, task, source.inputs, index, count, steps, pretrained
        )
        return measured_accuracy(model, task, source.inputs)

    return run


def methods(
    source: Source, task: Task, tables: dict[str, Tables], args: argparse.Namespace
) -> dict[str, Method]:
    """名字 -> 做法；名字就是图例。"""
    trained, random, pixels = (tables[name] for name in ("pretrained", "random", "pixels"))
    head = task.classes * (source.channels + 1)
    pixel_head = task.classes * (pixels.test.shape[1] + 1)
    whole = count_parameters(source.backbone) + head
    n = args.draws
    found = {
        "kNN": Method(lambda i, c: best_knn(task, trained, i, c), 0, n),
        "linear probe": Method(lambda i, c: best_probe(task, trained, i, c), head, n),
        "head by SGD": Method(lambda i, c: fit_head(task, trained, i, c, args.steps), head, n),
        "random backbone": Method(lambda i, c: best_probe(task, random, i, c), head, n),
        "pixels": Method(lambda i, c: best_probe(task, pixels, i, c), pixel_head, n),
    }
    if not args.no_finetune:
        n = args.tuned_draws
        found["fine-tuning"] = Method(tuned(source, task, args.steps, True), whole, n)
        found["from scratch"] = Method(tuned(source, task, args.steps, False), whole, n)
    return found


def compare(
    methods: dict[str, Method], budgets: Sequence[int], device: TorchDevice
) -> dict[str, dict]:
    """每种做法、每种标签数：准确率的平均、样本标准差，与一次的秒数。"""
    total = len(budgets) * sum(method.draws for method in methods.values())
    table: dict[str, dict] = {}
    with tqdm(total=total, desc="目标域", unit="次") as bar:
        for name, method in methods.items():
            row = {"mean": [], "std": [], "seconds": [], "parameters": method.parameters}
            for count in budgets:
                with Timer(device) as timer:
                    scores = []
                    for index in range(method.draws):
                        scores.append(method.run(index, count))
                        bar.update()
                scores = torch.tensor(scores, dtype=torch.float64)
                row["mean"].append(scores.mean().item())
                row["std"].append(scores.std().item() if len(scores) > 1 else None)
                row["seconds"].append(timer.elapsed / method.draws)
            table[name] = row
    return table


def print_table(table: dict[str, dict], budgets: Sequence[int]) -> None:
    """准确率（±标准差）与代价。"""
    heads = "".join(f"{f'{n}/class':>15}" for n in budgets)
    print(f"{'':16}{heads}{'parameters':>12}{'seconds':>9}")
    for name, row in table.items():
        cells = ""
        for mean, std in zip(row["mean"], row["std"], strict=True):
            spread = "" if std is None else f" ± {100 * std:.1f}"
            cells += f"{f'{100 * mean:.1f}{spread}%':>15}"
        print(f"{name:16}{cells}{row['parameters']:>12}{row['seconds'][-1]:>9.2f}")


# ---------------------------------------------------------------- 看了哪里


def last_layer_of_each_size(model: nn.Module, x: Tensor) -> dict[int, nn.Module]:
    """特征图边长 -> 输出这种边长的最后一个模块；只要 2 与输入的一半之间的。"""
    found: dict[int, nn.Module] = {}

    def note(module: nn.Module, args: tuple, output: Tensor) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            found[output.shape[2]] = module

    handles = [m.register_forward_hook(note) for m in model.modules() if m is not model]
    with torch.no_grad():
        model(x[:1])
    for handle in handles:
        handle.remove()
    return {side: layer for side, layer in found.items() if 2 <= side <= x.shape[2] // 2}


def look(source: Source, count: int, seed: int) -> tuple[dict[str, float], tuple]:
    """Grad-CAM 与删除检验；返回 (各层的概率下降, 画图用的 图、标题、热图)。"""
    model, device = source.model, source.inputs.device
    x, y = next(iter(source.data.batches("test", count, device=device)))
    right = (model(x).argmax(dim=1) == y).nonzero().flatten()
    right = right if len(right) else torch.arange(len(x), device=x.device)
    x, y = x[right], y[right]
    fill = x.flatten(2).median(dim=2).values[..., None, None]  # 每张图自己的底色
    heats = {
        f"{side}x{side}": grad_cam(model, x, y, layer)
        for side, layer in last_layer_of_each_size(model, x).items()
    }

    def drop(corners: Tensor) -> float:
        return deletion_drop(model, x, y, corners, WINDOW, fill).mean().item()

    drops = {name: drop(best_window(heat, WINDOW)) for name, heat in heats.items()}
    generator, size = make_generator(seed), tuple(x.shape[2:])
    chance = [drop(random_window(len(x), size, WINDOW, generator)) for _ in range(5)]
    drops["random"] = sum(chance) / 5
    for name, value in drops.items():
        chosen = "随机的" if name == "random" else f"Grad-CAM 取 {name} 的一层"
        print(f"  盖住 {WINDOW}×{WINDOW} 的窗口（{chosen}）：正确类的概率平均降 {value:.3f}")
    picks = torch.stack([(y == c).nonzero().flatten()[0] for c in y.unique()])
    mean, std = (v.view(-1, 1, 1) for v in (source.data.mean, source.data.std))
    pictures = (x[picks].cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    names = [source.data.class_names[c] for c in y[picks].tolist()]
    return drops, (pictures, names, {n: h[picks].cpu().numpy() for n, h in heats.items()})


# ---------------------------------------------------------------- 入口


def stated_budget(budgets: Sequence[int]) -> int:
    """结论用哪一个标签数：``STATED``，没有它就用最大的。"""
    return STATED if STATED in budgets else budgets[-1]


def expectations(args: argparse.Namespace, chance: float) -> dict[str, Expectation]:
    """各项指标的预期；实测过的区间只用于缺省的任务，其余只按机会线给一个宽松的下限。"""
    standard = (
        args.dataset == "synth-digits"
        and not args.weights
        and (args.source, args.stem_stride) == ("synth-objects", 2)
        and (args.model, args.labels) == ("resnet20", LABELS)
    )
    stated = stated_budget(args.labels)
    loose = (min(1.5 * chance, (1 + chance) / 2), 1.0)
    band = (0.6, 0.85) if standard else loose
    name = f"每类 {stated} 个标签，线性探针的测试准确率"
    found = {"probe": Expectation(name, chance, band, percent=True)}
    if not standard:
        return found
    found["control"] = Check("线性探针领先随机的主干", 0.0, (0.25, 0.6), percent=True)
    found["cam"] = Check("盖住 Grad-CAM 最高处的概率下降，减去随机处的", 0.0, (0.05, 0.8))
    if not args.no_finetune:
        name = f"每类 {args.labels[1]} 个标签，微调领先从头训练"
        found["finetuning"] = Check(name, 0.0, (0.15, 0.7), percent=True)
    return found


def measured(table: dict[str, dict], drops: dict[str, float], stated: int) -> dict[str, float]:
    """``expectations`` 的各项。"""
    means = {name: row["mean"] for name, row in table.items()}
    values = {
        "probe": means["linear probe"][stated],
        "control": means["linear probe"][stated] - means["random backbone"][stated],
    }
    if drops:
        values["cam"] = max(v for k, v in drops.items() if k != "random") - drops["random"]
    if "fine-tuning" in means and len(means["kNN"]) > 1:
        values["finetuning"] = means["fine-tuning"][1] - means["from scratch"][1]
    return values


def projections(source: Source, task: Task, args: argparse.Namespace) -> dict[str, Tensor]:
    """测试集开头几百张的特征，随机的、预训练的、微调之后的，各投影到平面。"""
    images = task.test.images[:600]
    networks = {"random weights": source.random, f"trained on {args.source}": source.backbone}
    if args.backbone:
        networks = {"random weights": source.random, "official weights": source.backbone}
    if not args.no_finetune:
        count = args.labels[-1]
        networks[f"fine-tuned, {count} labels per class"] = fine_tune(
            source.backbone, source.channels, task, source.inputs, 0, count, args.steps
        ).backbone
    found = {}
    for name, network in networks.items():
        points, share = pca(extract(network, source.inputs.batches(images)))
        found[f"{name}\n{100 * share.sum():.0f}% of the variance"] = points
    return found


def load_task(args: argparse.Namespace) -> tuple[Task, Data]:
    """目标域的三个划分，与抽好的标签。"""
    size = args.image_size if args.backbone else 32
    data = load_data(
        args.dataset,
        args.data_dir,
        download=args.download,
        limit=200 if args.smoke else None,
        image_size=size,
    )
    test = data.splits["test"]
    limited = test._replace(images=test.images[:TEST_LIMIT], labels=test.labels[:TEST_LIMIT])
    splits = data.splits | {"test": limited}
    return Task.draw(splits, args.labels, args.draws, args.seed), data


def main(argv: Sequence[str] | None = None) -> dict:
    """预训练（或读入权重）、提取特征、比较各种做法、画图；返回写进 ``metrics.json`` 的内容。"""
    args = parse_args(argv)
    out_dir = prepare_out_dir(args.out_dir)
    set_seed(args.seed)
    device = get_device(args.device)
    torch.set_num_threads(1)  # 小图小网络：一个线程的结果不随核的多少而变
    print(f"设备  {device.describe()}")
    with Timer(device) as timer:
        task, target = load_task(args)
        stated = stated_budget(args.labels)
        expected = expectations(args, target.chance)
        for expectation in expected.values():
            print(expectation.announce())
        source = (imagenet_source if args.backbone else small_source)(args, device)
        timer.lap("预训练")
        tables = {
            "pretrained": tabulate(task, backbone_features(source.backbone, source.inputs)),
            "random": tabulate(task, backbone_features(source.random, source.inputs)),
            "pixels": tabulate(task, pixel_features),
        }
        timer.lap("提取特征")
        table = compare(methods(source, task, tables, args), args.labels, device)
        print_table(table, args.labels)
        timer.lap("比较")
        drift = frozen_in_the_wrong_mode(
            source.backbone, source.channels, task, source.inputs, stated, max(args.steps // 4, 2)
        )
        print(
            f"冻结的主干忘了 eval()：参数不变，特征相对变化 {100 * drift.moved:.1f}%；"
            f"测试准确率 {100 * drift.wrong:.2f}%，没有忘的 {100 * drift.right:.2f}%"
        )
        drops, shown = ({}, None)
        if source.model is not None:
            drops, shown = look(source, 50 if args.smoke else 500, args.seed)
        pictures = {
            "transfer.png": figures.accuracy_figure(args.labels, table, target.chance),
            "features.png": figures.projection_figure(
                projections(source, task, args), task.test.labels[:600], target.class_names
            ),
        }
        if shown is not None:
            pictures["grad_cam.png"] = figures.cam_figure(*shown)
    values = measured(table, drops, args.labels.index(stated))
    return conclude(
        out_dir,
        [Result(expectation, values[key]) for key, expectation in expected.items()],
        timer,
        smoke=args.smoke,
        figures=pictures,
        labels=args.labels,
        methods=table,
        drift=drift._asdict(),
        deletion=drops,
        laps=timer.laps,
    )


if __name__ == "__main__":
    run_main(main)
