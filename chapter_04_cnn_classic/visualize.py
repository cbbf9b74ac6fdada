"""看一个卷积网络：卷积核、特征图、它看了哪里、怎样被骗。

    python visualize.py                                    # 自己训练一个小 LeNet，几秒钟
    python visualize.py --weights outputs/lenet_synth-digits/best.pt  # 用 train.py 存下的权重
    python visualize.py --model vgg11_bn

画出 filters.png、feature_maps.png、occlusion.png、adversarial.png；讲解见 visualization.md。
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_04_cnn_classic import figures_visualize as figures
from chapter_04_cnn_classic.fitting import Images, accuracy, fit, normalized
from chapter_04_cnn_classic.interpret import (
    best_window,
    deletion_drop,
    feature_maps,
    fgsm,
    grad_cam,
    occlusion,
    random_window,
    rank_correlation,
    saliency,
)
from chapter_04_cnn_classic.lenet import lenet5
from chapter_04_cnn_classic.vgg import vgg_small
from chapter_04_cnn_classic.weights import load_torchvision_weights, read_state_dict
from utils import (
    Expectation,
    Result,
    Timer,
    conclude,
    get_device,
    make_generator,
    prepare_out_dir,
    run_main,
    set_seed,
)
from utils.cli import ArgumentParser, add_common_args, existing_file
from utils.datasets import IMAGE_DATASETS
from utils.topics import Check

HERE = Path(__file__).resolve().parent
WINDOW = 7  # 像素，遮挡的窗口
EPSILONS = tuple(k / 255 for k in (0, 4, 8, 12, 16, 24, 32))
STATED = 16 / 255  # 结论所用的 ε


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_common_args(parser, out_dir=HERE / "outputs" / "visualize", datasets=IMAGE_DATASETS)
    parser.add_argument("--model", choices=("lenet", "vgg11_bn"), default="lenet", help="网络")
    parser.add_argument(
        "--weights",
        type=existing_file,
        metavar="FILE",
        help="train.py 为同一 --model 存下的 state_dict；不给就当场训练一个小的",
    )
    return parser.parse_args(argv)


# ---------------------------------------------------------------- 网络


def build(name: str, data: Images, classes: int, width: int = 16) -> nn.Module:
    """按数据的通道数与大小建网络；``width`` 只用于 VGG。"""
    channels, size = data.x.shape[1], data.x.shape[2]
    if name == "lenet":
        return lenet5(classes, channels, size)
    return vgg_small(11, classes, channels, width)


def load_weights(name: str, path: Path, data: Images, classes: int) -> nn.Module:
    """按权重建网络并装入；VGG 的宽度由第一个卷积得出。

    异常:
        UserError: 文件读不出来，或属于另一个网络。
    """
    first = read_state_dict(path).get("features.0.weight", torch.empty(1))
    return load_torchvision_weights(build(name, data, classes, width=len(first)), path)


def prepare(args: argparse.Namespace, device: Any) -> tuple[nn.Module, Images, int]:
    """数据与网络：读入权重，或当场训练。返回 (评估模式的网络, 测试集, 类别数)。"""
    place = {"data_dir": args.data_dir, "download": args.download}
    limit = 200 if args.smoke else 4000
    train = normalized(args.dataset, "train", limit, **place)
    test = normalized(args.dataset, "test", limit // 4, (train.mean, train.std), **place)
    classes = int(max(train.y.max(), test.y.max())) + 1
    if args.weights is not None:
        model = load_weights(args.model, args.weights, train, classes).to(device)
    else:
        epochs = 1 if args.smoke else {"lenet": 8, "vgg11_bn": 3}[args.model]
        model = build(args.model, train, classes).to(device)
        data = (train.x.to(device), train.y.to(device))
        fit(model, data, epochs, make_generator(args.seed))
    test = test._replace(x=test.x.to(device), y=test.y.to(device))
    return model.eval(), test, classes


@torch.no_grad()
def correct_ones(model: nn.Module, test: Images, count: int) -> Images:
    """前 ``count`` 张认对的图；一张也没有时取开头的几张，图照画。"""
    right = (model(test.x).argmax(dim=1) == test.y).nonzero().flatten()
    chosen = right[:count] if len(right) else torch.arange(min(count, len(test.x)))
    return test._replace(x=test.x[chosen], y=test.y[chosen])


def convolutions(model: nn.Module) -> list[nn.Module]:
    """卷积部分的各个卷积，由浅到深。"""
    return [layer for layer in model.features if isinstance(layer, nn.Conv2d)]


def activations(model: nn.Module) -> list[nn.Module]:
    """卷积部分的各个 ReLU，由浅到深。"""
    return [layer for layer in model.features if isinstance(layer, nn.ReLU)]


# ---------------------------------------------------------------- 看了哪里


def cam_layer(model: nn.Module, x: Tensor) -> nn.Module:
    """Grad-CAM 用的层：边长还有输入四分之一的最深一层激活。

    越深语义越强，格子也越粗：28 像素的小图过 VGG，最后几层只剩 1×1，热图处处相等，什么也没说。
    """
    layers = activations(model)
    maps = feature_maps(model, x[:1], layers)
    return [n for n, m in zip(layers, maps, strict=True) if 4 * m.shape[2] >= x.shape[2]][-1]


def background(x: Tensor) -> Tensor:
    """每张图每个通道的中位数，当作底色，``(B, C, 1, 1)``。"""
    return x.flatten(2).median(dim=2).values[..., None, None]


def explain(model: nn.Module, x: Tensor, target: Tensor, stride: int) -> dict[str, Tensor]:
    """三种热图，各 ``(B, H, W)``。"""
    fill = background(x)
    return {
        "saliency": saliency(model, x, target),
        "occlusion": occlusion(model, x, target, WINDOW, stride, fill, probability=True),
        "Grad-CAM": grad_cam(model, x, target, cam_layer(model, x)),
    }


def mean_drop(model: nn.Module, images: Images, corners: Tensor) -> float:
    """盖住各图的这个窗口（填底色），正确类的概率平均降多少。"""
    fill = background(images.x)
    return deletion_drop(model, images.x, images.y, corners, WINDOW, fill).mean().item()


def faithfulness(
    model: nn.Module, images: Images, heats: dict[str, Tensor], generator: torch.Generator
) -> dict[str, float]:
    """各法认为最重要的窗口盖住之后的下降；``random`` 是随机的窗口（机会线），取五次的平均。"""
    drops = {n: mean_drop(model, images, best_window(h, WINDOW)) for n, h in heats.items()}
    size, count = tuple(images.x.shape[2:]), len(images.x)
    chance = [random_window(count, size, WINDOW, generator) for _ in range(5)]
    drops["random"] = sum(mean_drop(model, images, corners) for corners in chance) / 5
    for name, drop in drops.items():
        print(f"  盖住 {WINDOW}×{WINDOW} 的窗口（{name}）：正确类的概率平均降 {drop:.3f}")
    return drops


def cam_by_layer(model: nn.Module, images: Images) -> dict[str, float]:
    """Grad-CAM 取各个激活层时的下降，看它随格子变粗怎样变。"""
    layers, found = activations(model), {}
    for index, layer in enumerate(layers):
        heat = grad_cam(model, images.x, images.y, layer)
        side = feature_maps(model, images.x[:1], [layer])[0].shape[2]
        found[f"ReLU {index + 1}（{side}×{side}）"] = mean_drop(
            model, images, best_window(heat, WINDOW)
        )
    print("  Grad-CAM 取各层：" + "，".join(f"{name} {drop:.3f}" for name, drop in found.items()))
    return found


def sanity(
    model: nn.Module, other: nn.Module, x: Tensor, y: Tensor, heats: dict[str, Tensor], stride: int
) -> dict[str, float]:
    """权重换成随机的，热图还剩多少相像（秩相关的平均）。"""
    found = {}
    for name, heat in explain(other, x, y, stride).items():
        found[name] = rank_correlation(heats[name], heat).mean().item()
    print(
        "  权重换成随机的，热图的秩相关："
        + "，".join(f"{name} {value:.2f}" for name, value in found.items())
    )
    return found


# ---------------------------------------------------------------- 怎样被骗


def random_signs(test: Images, epsilon: float, generator: torch.Generator) -> Tensor:
    """同样大小、方向随机的扰动，作对照。"""
    mean, std = (v.view(-1, 1, 1).to(test.x) for v in (test.mean, test.std))
    signs = torch.randint(2, test.x.shape, generator=generator).to(test.x) * 2 - 1
    return (test.x + epsilon / std * signs).clamp((0 - mean) / std, (1 - mean) / std)


def attack(model: nn.Module, test: Images, generator: torch.Generator) -> dict[str, list[float]]:
    """各 ε 下的准确率：FGSM 与随机的扰动。"""
    curves: dict[str, list[float]] = {"FGSM": [], "random signs": []}
    for epsilon in EPSILONS:
        moved = fgsm(model, test.x, test.y, epsilon, test.mean, test.std)
        curves["FGSM"].append(accuracy(model, moved, test.y))
        noisy = random_signs(test, epsilon, generator)
        curves["random signs"].append(accuracy(model, noisy, test.y))
        print(
            f"  ε = {255 * epsilon:2.0f}/255  准确率  FGSM {100 * curves['FGSM'][-1]:5.1f}%"
            f"  随机的扰动 {100 * curves['random signs'][-1]:5.1f}%"
        )
    return curves


@torch.no_grad()
def predictions(model: nn.Module, x: Tensor) -> list[tuple[int, float]]:
    """每张图的 (预测的类, 它的概率)。"""
    best = model(x).softmax(dim=1).max(dim=1)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def adversarial_examples(model: nn.Module, test: Images, count: int) -> list[tuple]:
    """若干个原来认对、在 ``STATED`` 之下认错的例子：(原图, 改后, 两次的预测)。"""
    moved = fgsm(model, test.x, test.y, STATED, test.mean, test.std)
    before, after = predictions(model, test.x), predictions(model, moved)
    rows: dict[int, tuple] = {}  # 每类一个，免得都是同一个数字
    for i, truth in enumerate(test.y.tolist()):
        if before[i][0] == truth != after[i][0] and truth not in rows:
            pictures = figures.to_pixels(torch.stack([test.x[i], moved[i]]), test.mean, test.std)
            rows[truth] = (*pictures, before[i], after[i])
    return list(rows.values())[:count]


# ---------------------------------------------------------------- 画出来


def draw(model: nn.Module, test: Images, chosen: Tensor, heats: dict[str, Tensor]) -> dict:
    """除对抗样本之外的三张图；``chosen`` 是要画的图在 ``heats`` 里的下标。"""
    sample = test.x[:1]
    convs, relus = convolutions(model), activations(model)
    first, *_ = feature_maps(model, sample, [relus[0]])
    layers = relus if len(relus) <= 4 else [relus[i] for i in (0, 1, 3, 5)]
    maps = {
        f"ReLU {relus.index(layer) + 1}": value[0].cpu().numpy()
        for layer, value in zip(layers, feature_maps(model, sample, layers), strict=True)
    }
    picture = figures.to_pixels(sample, test.mean, test.std)[0]
    weights = [conv.weight.detach().cpu().numpy() for conv in convs[:2]]
    pictures = figures.to_pixels(test.x[chosen], test.mean, test.std)
    shown = {name: heat[chosen].cpu().numpy() for name, heat in heats.items()}
    captions = [f"{c} ({p:.2f})" for c, p in predictions(model, test.x[chosen])]
    return {
        "filters.png": figures.filters_figure(picture, weights, first[0].cpu().numpy()),
        "feature_maps.png": figures.feature_maps_figure(picture, maps),
        "occlusion.png": figures.explanations_figure(pictures, captions, shown),
    }


def expectations(dataset: str, model: str, trained_here: bool) -> dict[str, Expectation]:
    """各项指标的预期；准确率与 Grad-CAM 只对缺省的任务作要求，其余的换了数据与网络也成立。

    小图上的 VGG 到深处只剩几格，那里的 Grad-CAM 未必胜过随机的窗口；``--weights`` 读入的网络
    （训练得更久，把握更大）也未必，所以只对当场训练的 LeNet 作要求。
    """
    found = {
        "attack": Check(
            f"ε = {255 * STATED:.0f}/255：随机扰动与 FGSM 的准确率之差", 0.0, (0.03, 1.0)
        )
    }
    bands = {"saliency": (0.05, 1.0), "occlusion": (0.2, 1.0)}
    if dataset == "synth-digits":
        found["accuracy"] = Expectation("测试准确率", 0.1, (0.93, 1.0), percent=True)
        if model == "lenet" and trained_here:
            bands["Grad-CAM"] = (0.03, 1.0)
    for name, band in bands.items():
        found[name] = Check(f"盖住 {name} 最高处的概率下降，减去随机处的", 0.0, band)
    return found


def summarize(
    expected: dict[str, Expectation],
    clean: float,
    drops: dict[str, float],
    curves: dict[str, list[float]],
) -> list[Result]:
    """把实测的数与预期放在一起。"""
    at = EPSILONS.index(STATED)
    values = {"attack": curves["random signs"][at] - curves["FGSM"][at], "accuracy": clean}
    values |= {name: drop - drops["random"] for name, drop in drops.items()}
    return [Result(expectation, values[key]) for key, expectation in expected.items()]


def main(argv: Sequence[str] | None = None) -> dict:
    """训练（或读入）一个网络，画四张图；返回写进 ``metrics.json`` 的内容。"""
    args = parse_args(argv)
    device = get_device(args.device).device
    out_dir = prepare_out_dir(args.out_dir)
    set_seed(args.seed)
    torch.set_num_threads(1 if args.model == "lenet" else torch.get_num_threads())
    generator, stride = make_generator(args.seed), 7 if args.smoke else 3
    expected = expectations(args.dataset, args.model, args.weights is None)
    for expectation in expected.values():
        print(expectation.announce())
    with Timer() as timer:
        model, test, classes = prepare(args, device)
        clean = accuracy(model, test.x, test.y)
        print(f"{args.model}：{len(test.x)} 张测试图，准确率 {100 * clean:.2f}%")
        subset = correct_ones(model, test, 20 if args.smoke else 200)
        heats = explain(model, subset.x, subset.y, stride)
        drops = faithfulness(model, subset, heats, generator)
        layers = cam_by_layer(model, subset)
        set_seed(args.seed + 1)
        other = build(args.model, test, classes).to(device).eval()
        similarity = sanity(model, other, subset.x, subset.y, heats, stride)
        curves = attack(model, test, generator)
        picks = torch.stack([(subset.y == c).nonzero().flatten()[0] for c in subset.y.unique()[:5]])
        pictures = draw(model, subset, picks, heats)
        examples = adversarial_examples(model, test, 5)
        pictures["adversarial.png"] = figures.adversarial_figure(EPSILONS, curves, examples)
    return conclude(
        out_dir,
        summarize(expected, clean, drops, curves),
        timer,
        smoke=args.smoke,
        figures=pictures,
        deletion=drops,
        grad_cam_by_layer=layers,
        rank_correlation=similarity,
        attack={"epsilon": EPSILONS, **curves},
    )


if __name__ == "__main__":
    run_main(main)
