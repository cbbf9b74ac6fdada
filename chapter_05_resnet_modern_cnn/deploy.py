"""移动端部署：训练（或读入）小网络，折叠 BatchNorm，量化成 int8，导出，并在干净的进程里运行。

    python deploy.py                                       # resnet20 与 mobilenet_v2
    python deploy.py --models resnet20 --weights FILE      # train.py 存下的权重

逐项打印改动前后的准确率、得分之差、文件大小与一张图的用时；图画出准确率随权重位数的变化，
以及为什么逐通道的刻度更好。训练集用来训练与校准，测试集只用来报告，不据此挑选任何东西。
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if not __package__:  # 直接运行脚本时，把仓库根目录加入模块搜索路径
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chapter_04_cnn_classic.weights import load_torchvision_weights
from chapter_05_resnet_modern_cnn.data import DATASETS, Data, load_data
from chapter_05_resnet_modern_cnn.exporting import export_program, run_elsewhere
from chapter_05_resnet_modern_cnn.figures_deploy import (
    accuracy_figure,
    most_uneven_convolution,
    weights_figure,
)
from chapter_05_resnet_modern_cnn.folding import find_pairs, fold_batchnorm
from chapter_05_resnet_modern_cnn.models import MODELS, Recipe, build_model, usual_stem_stride
from chapter_05_resnet_modern_cnn.quantization import METHODS, Observer
from chapter_05_resnet_modern_cnn.quantized_layers import (
    calibrate,
    integer_conv2d,
    kernel_conv2d,
    quantize,
    simulated_conv2d,
)
from chapter_05_resnet_modern_cnn.recipe import train_epochs
from utils import (
    Expectation,
    Result,
    Timer,
    TorchDevice,
    add_common_args,
    conclude,
    get_device,
    make_generator,
    prepare_out_dir,
    run_main,
    set_seed,
)
from utils.cli import ArgumentParser, existing_file
from utils.file_io_util import save_checkpoint
from utils.timer import alternate, seconds_of

HERE = Path(__file__).resolve().parent
NETWORKS = ("resnet20", "resnet32", "mobilenet_v2")
SCHEMES = {"per-tensor": False, "per-channel": True}
BITS = (8, 6, 5, 4, 3, 2)
SHOWN_BITS = (8, 6, 4)  # 打印其中几种，图里全画
CALIBRATION = 4, 128  # 校准用的批数与每批张数，训练集不够时有多少用多少
REPEATS = 15
SIZES = (
    ("权重的净字节", "payload_bytes"),
    ("权重文件", "weights_bytes"),
    ("程序文件", "program_bytes"),
)

# ---------------------------------------------------------------- 得到一个训练好的网络


def obtain(name: str, data: Data, args: argparse.Namespace, device: TorchDevice) -> nn.Module:
    """训练一个网络，或从 ``--weights`` 读入；返回 CPU 上 eval 模式的（部署的目标没有 GPU）。"""
    set_seed(args.seed)
    model = build_model(name, len(data.class_names), data.shape, args.stem_stride)
    if args.weights:
        return load_torchvision_weights(model, args.weights).eval()
    model = model.to(device.device, memory_format=torch.channels_last)
    recipe = Recipe(MODELS[name].make, "sgd", args.lr)
    settings = (recipe, args.epochs, args.batch_size, args.seed, device, torch.channels_last)
    train_epochs(model, data, *settings)
    return model.cpu().to(memory_format=torch.contiguous_format).eval()


# ---------------------------------------------------------------- 比较


@torch.no_grad()
def logits_of(model: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """各批的得分，连成 ``(N, K)``。"""
    return torch.cat([model(x.contiguous(memory_format=torch.channels_last)) for x in images])


def compare(logits: Tensor, reference: Tensor, labels: Tensor) -> dict[str, float]:
    """准确率，与 ``reference`` 预测相同的比例，得分的最大差。"""
    guesses = logits.argmax(dim=1)
    return {
        "accuracy": (guesses == labels).double().mean().item(),
        "agreement": (guesses == reference.argmax(dim=1)).double().mean().item(),
        "max_difference": (logits - reference).abs().max().item(),
    }


def sweep(
    folded: nn.Module,
    observers: Mapping[str, Observer],
    images: list[Tensor],
    labels: Tensor,
    weight_bits: Sequence[int],
) -> dict[str, Any]:
    """各种位数、刻度与激活范围之下的结果。整数的结果借浮点的卷积算出，逐位相同而快得多。"""
    reference = logits_of(folded, images)

    def score(**options: Any) -> dict[str, float]:
        model = quantize(folded, observers, **options, convolve=simulated_conv2d)
        return compare(logits_of(model, images), reference, labels)

    weights = {
        scheme: {
            str(bits): score(weight_bits=bits, per_channel=per_channel) for bits in weight_bits
        }
        for scheme, per_channel in SCHEMES.items()
    }
    activations = {
        method: {str(bits): score(activation_bits=bits, method=method) for bits in (8, 4)}
        for method in METHODS
    }
    return {"weights": weights, "activations": activations}


def latency(
    models: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, repeats: int
) -> dict[str, float]:
    """一个线程、``x`` 一批的用时的中位数，毫秒；``bf16`` 开头的输入是 bfloat16。"""

    def runner(name: str, model: Callable[[Tensor], Tensor]) -> Callable[[], float]:
        layout = torch.channels_last if "channels_last" in name else torch.contiguous_format
        dtype = torch.bfloat16 if name.startswith("bf16") else torch.float32
        ready = x.to(dtype).contiguous(memory_format=layout)
        return lambda: seconds_of(lambda: model(ready))

    with torch.no_grad():
        seconds = alternate({n: runner(n, m) for n, m in models.items()}, repeats)
    return {name: 1e3 * torch.tensor(s).median().item() for name, s in seconds.items()}


# ---------------------------------------------------------------- 一个网络的全程


def export_and_check(
    name: str, models: Mapping[str, nn.Module], x: Tensor, out_dir: Path
) -> tuple[dict[str, Any], dict[str, Callable[[Tensor], Tensor]]]:
    """存下权重与程序，程序在干净的进程里运行 ``x``；返回 (大小与误差, 程序)。"""
    found, programs = {}, {}
    paths = {kind: out_dir / f"{name}_{kind}.pt2" for kind in models}
    for kind, model in models.items():
        weights = out_dir / f"{name}_{kind}.pt"
        save_checkpoint(weights, model.state_dict())
        programs[kind] = export_program(model, x.shape[1:], paths[kind]).module()
        found[kind] = {
            "payload_bytes": sum(t.nbytes for t in model.state_dict().values()),
            "weights_bytes": weights.stat().st_size,
            "program_bytes": paths[kind].stat().st_size,
        }
    outputs = run_elsewhere(list(paths.values()), x)
    for (kind, model), output in zip(models.items(), outputs, strict=True):
        with torch.no_grad():
            found[kind]["elsewhere_difference"] = (output - model(x)).abs().max().item()
    return found, programs


def deploy(
    name: str, model: nn.Module, data: Data, out_dir: Path, smoke: bool
) -> tuple[dict[str, Any], nn.Module]:
    """折叠、量化、导出、计时；返回 (结果, 折叠后的网络)。"""
    test = list(data.batches("test"))
    images, labels = [x for x, _ in test], torch.cat([y for _, y in test])
    size = min(CALIBRATION[1], len(data.splits["train"].labels))
    shuffled = data.batches("train", size, make_generator(0))
    calibration = [x for x, _ in itertools.islice(shuffled, 1 if smoke else CALIBRATION[0])]
    few = images[0][:8]

    folded = fold_batchnorm(model, few[:1])
    before = logits_of(model, images)
    observers = calibrate(folded, calibration)
    int8, kernel, simulated = (
        quantize(folded, observers, convolve=c)
        for c in (integer_conv2d, kernel_conv2d, simulated_conv2d)
    )
    exact = all(
        torch.equal(logits_of(int8, [few]), logits_of(m, [few])) for m in (kernel, simulated)
    )
    files, programs = export_and_check(name, {"fp32": folded, "int8": int8}, few, out_dir)
    contenders = {
        "fp32": model,
        "folded": folded,
        "folded, channels_last": copy.deepcopy(folded),
        "folded, exported": programs["fp32"],
        "bf16, channels_last": copy.deepcopy(folded).bfloat16(),
        "int8, integer matmul": int8,
        "int8, int8 kernel": kernel,
    }
    batches = {
        str(size): latency(contenders, images[0][:size], 2 if smoke else REPEATS)
        for size in ((1,) if smoke else (1, 16))
    }
    found = {
        "fp32": compare(before, before, labels),
        "folded": compare(logits_of(folded, images), before, labels),
        "pairs": len(find_pairs(model, few[:1])),
        "integer_equals_simulated": exact,
        "widest": most_uneven_convolution(folded)[::2],  # 名字与倍数
        "files": files,
        "milliseconds": batches,
    }
    bits = SHOWN_BITS if smoke else BITS
    return found | sweep(folded, observers, images, labels, bits), folded


def report(name: str, found: Mapping[str, Any]) -> str:
    """一个网络的结果，若干行。"""
    rows = [
        f"\n{name}：折叠 {found['pairs']} 个 BatchNorm",
        "  权重               准确率    与 fp32 一致  得分的最大差",
    ]

    def row(label: str, score: Mapping[str, float]) -> str:
        return (
            f"  {label:<17}{100 * score['accuracy']:7.2f}%{100 * score['agreement']:13.2f}%"
            f"{score['max_difference']:14.2g}"
        )

    rows += [row("fp32", found["fp32"]), row("fp32 folded", found["folded"])]
    for bits in SHOWN_BITS:
        rows += [row(f"int{bits} {s}", found["weights"][s][str(bits)]) for s in SCHEMES]
    rows.append(
        f"  三种整数卷积的得分逐位相同：{'是' if found['integer_equals_simulated'] else '否'}"
    )
    layer, ratio = found["widest"]
    rows.append(f"  折叠后通道最悬殊的一层 {layer}：最大的范围是中位数的 {ratio:.1f} 倍")
    for bits in ("8", "4"):
        scores = ((m, found["activations"][m][bits]["accuracy"]) for m in METHODS)
        shown = "，".join(f"{m} {100 * accuracy:.2f}%" for m, accuracy in scores)
        rows.append(f"  激活 {bits} 位（权重 8 位逐通道）：{shown}")
    for what, key in SIZES:
        full, small = (found["files"][kind][key] / 1024 for kind in ("fp32", "int8"))
        rows.append(f"  {what} {full:.0f} KiB -> {small:.0f} KiB，{small / full:.3f} 倍")
    for kind in ("fp32", "int8"):
        difference = found["files"][kind]["elsewhere_difference"]
        rows.append(f"  导出的 {kind} 在空文件夹的新进程里运行：最大差 {difference:.2g}")
    for size, times in found["milliseconds"].items():
        shown = "，".join(f"{label} {value:.2f}" for label, value in times.items())
        rows.append(f"  一批 {size} 张，毫秒：{shown}")
    return "\n".join(rows)


# ---------------------------------------------------------------- 入口


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="折叠、量化、导出小网络")
    add_common_args(
        parser, out_dir=HERE / "outputs", epochs=4, batch_size=128, lr=0.1, datasets=DATASETS
    )
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        choices=list(NETWORKS),
        default=["resnet20", "mobilenet_v2"],
        help="要部署的网络（默认 resnet20 与 mobilenet_v2）",
    )
    add("--weights", type=existing_file, metavar="FILE", help="不训练，读入 train.py 存下的权重")
    add(
        "--stem-stride",
        type=int,
        choices=[1, 2],
        help="起始卷积的步幅，须与训练时相同（默认 synth-objects 为 2，其余为 1）",
    )
    args = parser.parse_args(argv)
    args.models = list(dict.fromkeys(args.models))  # 重复的只部署一次
    if args.weights and len(args.models) != 1:
        parser.error("--weights 只属于一个网络：请以 --models 指明是哪一个")
    args.stem_stride = args.stem_stride or usual_stem_stride(args.dataset)
    if args.smoke:
        args.epochs, args.models = 1, args.models[-1:]
    if args.out_dir == HERE / "outputs":
        args.out_dir /= "deploy_smoke" if args.smoke else "deploy"
    return args


def expectations(names: Sequence[str], chance: float) -> list[Expectation]:
    """每个网络四项核对：折叠前后的得分，int8 逐通道的准确率与预测，权重的字节约为四分之一。"""
    found = []
    for name in names:
        same, ratio = f"{name} int8 与 fp32 的预测一致", f"{name} int8 与 fp32 的净字节之比"
        lost, folded = f"{name} int8 损失的准确率", f"{name} 折叠前后得分的最大差"
        options = {"percent": True, "learning": False}
        found.append(Expectation(folded, 1.0, (0.0, 1e-5), learning=False))
        found.append(Expectation(lost, 1 - chance, (-0.01, 0.01), **options))
        found.append(Expectation(same, chance, (0.97, 1.0), **options))
        found.append(Expectation(ratio, 1.0, (0.25, 0.3), learning=False))
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """训练、部署、画图、下结论；返回写进 ``metrics.json`` 的内容。"""
    args = parse_args(argv)
    out_dir = prepare_out_dir(args.out_dir)
    device = get_device(args.device)
    torch.set_num_threads(1)  # 与手机上的一个核相比；结果也不随核的多少而变
    print(f"设备  {device.describe()}")
    with Timer(device) as timer:
        limit = 128 if args.smoke else None
        data = load_data(args.dataset, args.data_dir, download=args.download, limit=limit)
        expected = expectations(args.models, data.chance)
        print("\n".join(e.announce() for e in expected))
        timer.lap("数据")
        runs, networks = {}, {}
        for name in args.models:
            model = obtain(name, data, args, device)
            timer.lap("训练")
            runs[name], networks[name] = deploy(name, model, data, out_dir, args.smoke)
            print(report(name, runs[name]))
            timer.lap("部署")
    values = [
        value
        for run in runs.values()
        for value in (
            run["folded"]["max_difference"],
            run["fp32"]["accuracy"] - run["weights"]["per-channel"]["8"]["accuracy"],
            run["weights"]["per-channel"]["8"]["agreement"],
            run["files"]["int8"]["payload_bytes"] / run["files"]["fp32"]["payload_bytes"],
        )
    ]
    return conclude(
        out_dir,
        [Result(e, v) for e, v in zip(expected, values, strict=True)],
        timer,
        smoke=args.smoke,
        figures={
            "deploy_bits.png": accuracy_figure(runs, data.chance),
            "deploy_weights.png": weights_figure(networks),
        },
        runs=runs,
        laps=timer.laps,
    )


if __name__ == "__main__":
    run_main(main)
