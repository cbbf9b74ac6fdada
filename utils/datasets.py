"""图像数据集：一律读进内存，成为 uint8 张量；归一化与增强按批、向量化地进行。

逐张解码、逐张变换的 DataLoader 在这样的小图上，花的时间是网络本身运算的好几倍
（见第 2 章的 benchmark.py）。

``synth-digits`` 与 ``synth-objects`` 由程序生成，不需要下载；其余为真实数据，经 torchvision 读取，
而 torchvision 只在用到时才导入。
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.cli import UserError
from utils.seed import make_generator
from utils.synth_digits import make_synth_digits
from utils.synth_objects import CLASS_NAMES, make_synth_objects

IMAGE_DATASETS = ("synth-digits", "synth-objects", "mnist", "fashion-mnist", "cifar10", "folder")
SPLITS = ("train", "val", "test")
SYNTH_SIZES = {"train": 12_000, "val": 2_000, "test": 2_000}
VAL_FRACTION = 1 / 12  # 从官方训练集中固定划出的验证集：MNIST 的 5000 张
SPLIT_SEED = 20_240_501  # 划分与合成数据的缺省种子，与训练的种子无关，人人得到同一份数据


class ImageSet(NamedTuple):
    """一个划分的全部图像。"""

    images: Tensor  # uint8 (N, C, H, W)
    labels: Tensor  # int64 (N,)
    class_names: tuple[str, ...]


def load_images(
    name: str,
    split: str,
    data_dir: Path = Path("data"),
    generator: torch.Generator | None = None,
    download: bool = False,
    *,
    limit: int | None = None,
    image_size: int = 32,
) -> ImageSet:
    """读入（或生成）一个数据集的一个划分。

    参数:
        name: ``IMAGE_DATASETS`` 之一。``folder`` 指 ``data_dir`` 下每类一个文件夹的图片；
            其下若有 ``train``、``val``（可缺）、``test`` 三个文件夹，按它们划分，
            否则按 8:1:1 随机划分。
        split: ``train``、``val`` 或 ``test``；三者互不重叠。
        data_dir: 真实数据所在的文件夹（torchvision 的布局）。
        generator: 生成合成数据或随机划分所用的生成器；缺省时用固定的种子，
            因此同一个划分每次都相同。自己传入时，三个划分要用状态相同的生成器。
        download: 数据缺失时是否下载。
        limit: 至多取多少张（``--smoke`` 用）。
        image_size: ``folder`` 的图片缩放并居中裁剪到的边长，像素。

    返回:
        ``ImageSet``。

    异常:
        ValueError: ``name`` 或 ``split`` 不认识。
        UserError: 文件缺失或损坏，torchvision 不可用。
    """
    if name not in IMAGE_DATASETS:
        raise ValueError(f"数据集 {name!r} 不认识：可选 {'、'.join(IMAGE_DATASETS)}")
    if split not in SPLITS:
        raise ValueError(f"划分 {split!r} 不认识：可选 {'、'.join(SPLITS)}")
    if name in SYNTHETIC:
        return _load_synthetic(name, split, generator, limit)
    generator = generator or make_generator(SPLIT_SEED)
    if name == "folder":
        return _load_folder(split, Path(data_dir), generator, limit, image_size)
    images, labels, class_names = _load_official(name, split != "test", Path(data_dir), download)
    if split != "test":
        chosen = _carve(len(images), split, generator)
        images, labels = images[chosen], labels[chosen]
    return ImageSet(images[:limit], labels[:limit], class_names)


def load_splits(
    name: str, data_dir: Path, *, download: bool, limit: int | None, image_size: int
) -> dict[str, ImageSet]:
    """训练、验证、测试三个划分；参数同 ``load_images``，数据集至少要有两个类别。

    异常:
        UserError: 文件缺失或损坏，或只有一个类别。
    """
    options = {"download": download, "limit": limit, "image_size": image_size}
    splits = {split: load_images(name, split, data_dir, **options) for split in SPLITS}
    names = splits["train"].class_names
    if len(names) < 2:
        raise UserError(f"--data-dir {data_dir} 只有 {names} 一个类别：分类至少要两个类别的文件夹")
    return splits


def _carve(count: int, split: str, generator: torch.Generator) -> Tensor:
    """把官方训练集的下标随机分成训练与验证两部分，返回其中一份。"""
    order = torch.randperm(count, generator=generator)
    validation = round(count * VAL_FRACTION)
    return order[:validation] if split == "val" else order[validation:]


# 名字 -> (生成函数, 类别的名字)
SYNTHETIC = {
    "synth-digits": (make_synth_digits, tuple("0123456789")),
    "synth-objects": (make_synth_objects, CLASS_NAMES),
}


def _load_synthetic(
    name: str, split: str, generator: torch.Generator | None, limit: int | None
) -> ImageSet:
    seeds = [SPLIT_SEED + index for index in range(len(SPLITS))]
    if generator is not None:  # 状态相同的生成器，三个划分仍须互不相同
        seeds = torch.randint(2**62, (len(SPLITS),), generator=generator).tolist()
    generator = make_generator(seeds[SPLITS.index(split)])
    count = min(SYNTH_SIZES[split], limit or SYNTH_SIZES[split])
    make, class_names = SYNTHETIC[name]
    return ImageSet(*make(count, generator), class_names)


# ---------------------------------------------------------------- 真实数据


def import_torchvision() -> ModuleType:
    """导入 torchvision；它的二进制与 torch 不匹配时说清怎样修好。"""
    try:
        import torchvision
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"torchvision 不可用（{reason}）：它须与 torch {torch.__version__} 配对，"
            "请在同一条命令里重装：pip install --force-reinstall torch torchvision；"
            "内置数据集 synth-digits 与 synth-objects 不受影响"
        ) from error
    return torchvision


def _check_idx(path: Path) -> None:
    """核对 IDX 文件的大小是否与文件头一致（格式：2 字节零、类型、维数、各维大端 int32）。"""
    head = path.open("rb").read(16)
    dims = head[3] if len(head) >= 4 else 0
    if head[:3] != b"\0\0\x08" or not 1 <= dims <= 3 or len(head) < 4 + 4 * dims:
        raise UserError(f"{path} 不是 IDX 文件：请删除后加 --download 重新下载")
    expected = 4 + 4 * dims + math.prod(struct.unpack(f">{dims}i", head[4 : 4 + 4 * dims]))
    actual = path.stat().st_size
    if actual != expected:
        raise UserError(
            f"{path} 已损坏：应有 {expected} 字节，实有 {actual}；请删除后加 --download 重新下载"
        )


def _load_official(
    name: str, train: bool, data_dir: Path, download: bool
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    datasets = import_torchvision().datasets
    kind = {
        "mnist": datasets.MNIST,
        "fashion-mnist": datasets.FashionMNIST,
        "cifar10": datasets.CIFAR10,
    }[name]
    if name != "cifar10":
        raw = data_dir / kind.__name__ / "raw"
        for path in sorted(raw.glob("*-ubyte")):
            _check_idx(path)
    where = data_dir.resolve() / ("cifar-10-batches-py" if name == "cifar10" else kind.__name__)
    try:
        data = kind(root=str(data_dir), train=train, download=download)
    except (RuntimeError, OSError, EOFError, ValueError, TypeError) as error:
        # ValueError 与 TypeError：IDX 的维数或类型不对，例如图像与标签两个文件放反了
        reason = "下载失败：" + str(error).splitlines()[0] if download else "缺失或不完整"
        raise UserError(
            f"数据集 {name}（应在 {where}）{reason}；"
            f"可用 --data-dir 指向已有的文件夹，或联网时加 --download"
        ) from error
    images, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets)
    if len(images) != len(labels):
        raise UserError(
            f"数据集 {name}（{where}）的图像有 {len(images)} 张而标签有 {len(labels)} 个："
            "文件来自不同的划分或版本，请删除后加 --download 重新下载"
        )
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    # MNIST 的类名是「0 - zero」这样的，只留数字
    return images, labels, tuple(name.split(" - ")[0] for name in data.classes)


def _load_folder(
    split: str, data_dir: Path, generator: torch.Generator, limit: int | None, size: int
) -> ImageSet:
    folders = import_torchvision().datasets.folder
    presplit = (data_dir / "train").is_dir() and (data_dir / "test").is_dir()
    root = data_dir / ("test" if split == "test" else "train") if presplit else data_dir
    has_val = presplit and (data_dir / "val").is_dir()
    if has_val and split == "val":
        root = data_dir / "val"
    try:
        class_names, class_to_index = folders.find_classes(root)
        files = folders.make_dataset(str(root), class_to_index, folders.IMG_EXTENSIONS)
        expected = folders.find_classes(data_dir / "train")[0] if presplit else class_names
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"--data-dir {data_dir} 不存在，或里面没有可用的图片："
            "应为每类一个文件夹，各含至少一张图片"
        ) from error
    if class_names != expected:  # 类别编号按文件夹名的次序，不一致时标签会悄悄错位
        raise UserError(
            f"{root} 的类别 {class_names} 与 train 的 {expected} 不同：各划分的类别须完全一致"
        )
    if not presplit and set(class_names) <= set(SPLITS):
        raise UserError(f"--data-dir {data_dir} 里只有 {class_names}：须同时有 train 与 test")
    if presplit and (has_val or split == "test"):
        order = torch.randperm(len(files), generator=generator)
    elif presplit:
        order = _carve(len(files), split, generator)
    else:
        order = torch.randperm(len(files), generator=generator)
        tenth = len(files) // 10
        bounds = {"test": (0, tenth), "val": (tenth, 2 * tenth), "train": (2 * tenth, len(files))}
        order = order[slice(*bounds[split])]
    chosen = [files[i] for i in order[:limit].tolist()]
    if not chosen:
        raise UserError(f"{root} 的图片太少（{len(files)} 张），分不出 {split} 划分：至少要 12 张")
    with ThreadPoolExecutor() as pool:  # 解码时 Pillow 会放开 GIL
        images = list(pool.map(lambda item: _read_image(Path(item[0]), size), chosen))
    labels = torch.tensor([label for _, label in chosen])
    return ImageSet(torch.stack(images), labels, tuple(class_names))


def _read_image(path: Path, size: int) -> Tensor:
    """读一张图片，短边缩放到 ``size`` 后居中裁剪，uint8 ``(3, size, size)``。"""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"图片 {path} 无法解码（{error}）：请修复或移走它") from error
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


# ---------------------------------------------------------------- 批迭代器


class TensorBatches:
    """驻留内存（或显存）的批迭代器，产出 ``(x, y)``；最后一批可能不足 ``batch_size``。

    参数:
        inputs: ``(N, ...)``。
        labels: ``(N, ...)``。
        batch_size: 每批样本数。
        generator: 给出时每轮重新打乱；``None`` 表示按原顺序（评估用）。它的状态就是数据顺序，
            续训时须随检查点保存与恢复。
        device: 数据驻留的设备。
        drop_last: 是否丢掉最后不足一批的样本。
    """

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        drop_last: bool = False,
    ) -> None:
        if len(inputs) != len(labels) or len(inputs) == 0:
            raise ValueError(f"inputs 与 labels 应非空且等长，实为 {len(inputs)} 与 {len(labels)}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} 应至少为 1")
        self.inputs, self.labels = inputs.to(device), labels.to(device)
        self.batch_size, self.generator, self.drop_last = batch_size, generator, drop_last

    def __len__(self) -> int:
        full, rest = divmod(len(self.inputs), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    @property
    def num_samples(self) -> int:
        """一轮产出的样本数。"""
        return min(len(self.inputs), len(self) * self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = None
        if self.generator is not None:
            where = self.generator.device
            order = torch.randperm(len(self.inputs), generator=self.generator, device=where)
            order = order.to(self.inputs.device)
        for start in range(0, self.num_samples, self.batch_size):
            window = slice(start, start + self.batch_size)
            chosen = window if order is None else order[window]
            yield self.prepare(self.inputs[chosen]), self.labels[chosen]

    def prepare(self, x: Tensor) -> Tensor:
        """取出的一批在交出之前的处理；子类改写它。"""
        return x


class ImageBatches(TensorBatches):
    """图像的批迭代器：按批取出 uint8，换成浮点数，归一化，可选增强。

    每次迭代产出 ``(x, y)``：``x`` 为 float32 ``(B, C, H, W)``，``y`` 为 int64 ``(B,)``。

    参数（其余同 ``TensorBatches``）:
        images: uint8 ``(N, C, H, W)``。
        labels: int64 ``(N,)``。
        mean, std: 归一化的每通道均值与标准差（像素值已除以 255）；缺省时由 ``images`` 算出，
            验证与测试集应传入训练集的数值。
        transform: 作用于整批浮点图像的增强，``transform(x, generator) -> x``。
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        transform: Callable[[Tensor, torch.Generator | None], Tensor] | None = None,
        **options: Any,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"images 应为 uint8 (N, C, H, W)，实为 {images.dtype} {tuple(images.shape)}"
            )
        super().__init__(images, labels, batch_size, **options)
        if mean is None or std is None:
            mean, std = channel_stats(images)
        self.mean, self.std, self.transform = mean, std, transform
        # (v / 255 - mean) / std = v · scale + shift：两次逐元素运算合为一次
        self._scale = (1 / (255 * std)).view(1, -1, 1, 1).to(self.inputs.device)
        self._shift = (-mean / std).view(1, -1, 1, 1).to(self.inputs.device)

    def prepare(self, x: Tensor) -> Tensor:
        """uint8 -> 归一化（并增强）的 float32。"""
        x = torch.addcmul(self._shift, x.float(), self._scale)
        return x if self.transform is None else self.transform(x, self.generator)


def channel_stats(images: Tensor) -> tuple[Tensor, Tensor]:
    """每通道的均值与标准差（像素值除以 255 之后），各为 ``(C,)``；由直方图精确算出。"""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten().int(), minlength=256).double()
        share = counts / counts.sum()
        mean = (share * levels).sum()
        means.append(mean)
        stds.append((share * (levels - mean).square()).sum().sqrt())
    # 全黑的通道标准差为零，取 1 以免除以零
    std = torch.stack(stds)
    return torch.stack(means).float(), torch.where(std > 0, std, 1.0).float()
