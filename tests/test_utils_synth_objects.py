"""合成物体：可复现、均衡、几何与解析的面积一致；除了轮廓，什么也不泄露类别。"""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

from utils import make_generator, set_seed, synth_objects
from utils.datasets import load_images
from utils.synth_objects import CLASS_NAMES, SHAPES, make_synth_objects


@pytest.fixture(scope="module")
def objects() -> tuple[Tensor, Tensor]:
    """两千张：够做统计检验，只生成一次。"""
    return make_synth_objects(2000, make_generator(11))


@pytest.fixture
def pose(monkeypatch: pytest.MonkeyPatch):
    """固定姿态：不转、不移、不压扁，一个单位 11 像素；可改其中几项。"""

    def fix(**changes: float) -> None:
        for name, value in {"SCALE": 11, "SQUASH": 1, "ROTATION": 0, "SHIFT": 0, **changes}.items():
            monkeypatch.setattr(synth_objects, name, (float(value), float(value)))

    fix()
    return fix


def masks() -> Tensor:
    """每类一张覆盖率，``(10, 32, 32)``。"""
    return synth_objects._mask(torch.arange(len(SHAPES)), make_generator(0))


# ---------------------------------------------------------------- 可复现、均衡


def test_bytes_depend_on_nothing_but_the_generator() -> None:
    first = make_synth_objects(260, make_generator(3))  # 多于 CHUNK：分两批绘制
    set_seed(99)
    torch.set_num_threads(2)
    before = torch.get_rng_state()
    again = make_synth_objects(260, make_generator(3))
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == 2
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    other = make_synth_objects(260, make_generator(4))
    assert (first[0] != other[0]).flatten(1).any(dim=1).all()


def test_layout_balance_and_order(objects: tuple[Tensor, Tensor]) -> None:
    images, labels = objects
    assert images.dtype == torch.uint8 and images.shape == (2000, 3, 32, 32)
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [200] * 10
    counts = make_synth_objects(23, make_generator(0))[1].bincount(minlength=10)
    assert counts.sum() == 23 and counts.max() - counts.min() == 1
    # 次序是打乱的：相邻两个标签相同的比例约为 1/10，且不以 10 为周期
    for lag in (1, 10, 250):
        same = (labels[lag:] == labels[:-lag]).float().mean().item()
        assert same == pytest.approx(0.1, abs=0.03), lag
    assert make_synth_objects(1, make_generator(0))[0].shape == (1, 3, 32, 32)


def test_drawing_uses_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """别的进程占着 CPU 时，多线程反而慢十倍。"""
    seen = []
    original = synth_objects._render

    def render(labels: Tensor, rng: torch.Generator) -> Tensor:
        seen.append(torch.get_num_threads())
        return original(labels, rng)

    monkeypatch.setattr(synth_objects, "_render", render)
    torch.set_num_threads(2)
    make_synth_objects(3, make_generator(0))
    assert seen == [1]


@pytest.mark.parametrize("count", [0, -5])
def test_count_must_be_positive(count: int) -> None:
    with pytest.raises(ValueError, match=f"count = {count}，图像数至少为 1"):
        make_synth_objects(count, make_generator(0))


def test_splits_are_fixed_and_disjoint() -> None:
    found = [load_images("synth-objects", split, limit=200) for split in ("train", "val", "test")]
    rows = [{image.numpy().tobytes() for image in data.images} for data in found]
    assert [len(r) for r in rows] == [200] * 3 and len(set.union(*rows)) == 600
    assert all(data.class_names == CLASS_NAMES == tuple(SHAPES) for data in found)
    set_seed(5)
    assert torch.equal(load_images("synth-objects", "val", limit=200).images, found[1].images)


# ---------------------------------------------------------------- 几何

LENS = (  # 两个圆（半径 0.95 与 0.75，圆心相距 0.45）的交
    0.95**2 * math.acos((0.45**2 + 0.95**2 - 0.75**2) / (2 * 0.45 * 0.95))
    + 0.75**2 * math.acos((0.45**2 + 0.75**2 - 0.95**2) / (2 * 0.45 * 0.75))
    - 0.5 * math.sqrt((2.15 - 0.9) * (0.45 + 0.2) * (0.45 - 0.2) * 2.15)
)
AREAS = {
    "disk": math.pi * 0.85**2,
    "ring": math.pi * (0.87**2 - 0.43**2),
    "square": 1.44**2,
    "cross": 2 * 0.56 * 1.9 - 0.56**2,
    "triangle": 3 * math.sqrt(3) * 0.5**2,
    "star": 5 * 0.45 * 1.1 * math.sin(math.pi / 5),
    "crescent": math.pi * 0.95**2 - LENS,
    "semicircle": math.pi / 2,
    "arrow": 0.8**2 + 1.1 * 0.44 - 0.05 * 0.44,
    "ell": 0.5 * 1.8 + 1.5 * 0.5 - 0.5**2,
}
STEP = 0.002


@pytest.fixture(scope="module")
def plane() -> tuple[Tensor, Tensor]:
    """物体平面上的细网格。"""
    along = torch.arange(-1.3 + STEP / 2, 1.3, STEP, dtype=torch.float64)
    y, x = torch.meshgrid(along, along, indexing="ij")
    return x, y


@pytest.mark.parametrize("name", SHAPES)
def test_area_of_the_outline(name: str, plane: tuple[Tensor, Tensor]) -> None:
    inside = SHAPES[name](*plane) < 0
    assert inside.sum().item() * STEP**2 == pytest.approx(AREAS[name], rel=2e-3)
    border = torch.cat([inside[0], inside[-1], inside[:, 0], inside[:, -1]])
    assert not border.any()


@pytest.mark.parametrize("name", SHAPES)
def test_distance_is_signed_and_true_beside_the_outline(
    name: str, plane: tuple[Tensor, Tensor]
) -> None:
    """轮廓两侧，每走一步距离恰变一步：梯度的长度处处为 1（尖角附近除外）。"""
    distance = SHAPES[name](*plane)
    gx = (distance[1:-1, 2:] - distance[1:-1, :-2]) / (2 * STEP)
    gy = (distance[2:, 1:-1] - distance[:-2, 1:-1]) / (2 * STEP)
    length = torch.hypot(gx, gy)[distance[1:-1, 1:-1].abs() < 0.03]
    assert (length.sub(1).abs() < 0.01).double().mean() > 0.97


def test_symmetries_and_corners() -> None:
    """几个手算的点：五角星的尖、凹处，三角形朝上的顶点，箭头的尖，L 的内角。"""

    def at(name: str, x: float, y: float) -> float:
        return SHAPES[name](*torch.tensor([[x], [y]], dtype=torch.float64)).item()

    for k in range(5):
        tip, notch = 2 * math.pi * k / 5, 2 * math.pi * (k + 0.5) / 5
        assert at("star", 1.1 * math.cos(tip), 1.1 * math.sin(tip)) == pytest.approx(0, abs=1e-12)
        assert at("star", 0.45 * math.cos(notch), 0.45 * math.sin(notch)) == pytest.approx(0)
    assert at("triangle", 0, 0) == -0.5 and at("triangle", 0.2, 0.5) == pytest.approx(0, abs=1e-12)
    assert at("triangle", 0, -1) == pytest.approx(0, abs=1e-12)
    assert at("arrow", 0.9, 0) == pytest.approx(0, abs=1e-12) and at("arrow", -0.5, -0.22) == 0
    assert at("ell", -0.2, 0.4) == pytest.approx(0, abs=1e-12) and at("ell", 0.1, 0) > 0
    assert at("crescent", 0.5, 0) > 0 > at("crescent", -0.6, 0)


def test_mask_covers_the_area_in_pixels(pose) -> None:
    """覆盖率之和就是面积（软边两侧对称），压扁按倍数缩小，旋转、平移不变。"""
    expected = 121 * torch.tensor(list(AREAS.values()))
    torch.testing.assert_close(masks().sum(dim=(1, 2)), expected, rtol=0.02, atol=0)
    for changes, factor in [
        ({"SQUASH": 0.7}, 0.7),
        ({"ROTATION": 0.4}, 1.0),
        ({"SHIFT": -1.3}, 1.0),
        ({"SCALE": 9.0}, 81 / 121),
    ]:
        pose(**changes)
        areas = masks().sum(dim=(1, 2))
        torch.testing.assert_close(areas, factor * expected, rtol=0.03, atol=0, msg=str(changes))


def test_pose_moves_and_turns(pose) -> None:
    x, y = synth_objects._grid()

    def centre() -> Tensor:
        cover = masks()
        weights = cover / cover.sum(dim=(1, 2), keepdim=True)
        return torch.stack([(weights * x).sum(dim=(1, 2)), (weights * y).sum(dim=(1, 2))], dim=1)

    still = centre()
    pose(SHIFT=2.0)
    torch.testing.assert_close(centre(), still + 2, rtol=0, atol=0.02)
    pose(ROTATION=0.5)
    turned = centre()
    k = CLASS_NAMES.index("crescent")  # 重心离原点最远
    before, after = (complex(*c[k]) for c in (still, turned))
    assert abs(cmath.phase(-before)) < 0.02  # 缺口在右，重心在左
    assert cmath.phase(after / before) == pytest.approx(0.5, abs=0.02)
    assert abs(after) == pytest.approx(abs(before), rel=0.02)


def test_soft_edge() -> None:
    cover = synth_objects._cover(torch.tensor([-5.0, -0.6, -0.3, 0.0, 0.3, 0.6, 5.0]))
    assert cover.tolist() == pytest.approx([1, 1, 0.75, 0.5, 0.25, 0, 0])


@pytest.mark.parametrize("scale", [6.0, 9.0, 13.0])
def test_the_edge_is_as_soft_at_every_scale(pose, scale: float) -> None:
    """正方形的覆盖率可以逐像素写出；过渡宽度总是 ``EDGE`` 像素，与物体的大小无关。"""
    pose(SCALE=scale)
    along = torch.arange(32) - 15.5
    outside = torch.maximum(along.abs()[:, None], along.abs()) - 0.72 * scale
    expected = (0.5 - outside / 1.2).clamp(0, 1)
    found = masks()[CLASS_NAMES.index("square")]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_outlines_differ(pose) -> None:
    """两两的交并比都远小于 1：没有哪两类画成了同一个轮廓。"""
    cover = masks()[:, None]
    smaller = torch.minimum(cover, cover.mT.transpose(0, 1).mT).sum(dim=(2, 3))
    larger = torch.maximum(cover, cover.mT.transpose(0, 1).mT).sum(dim=(2, 3))
    ratio = smaller / larger
    assert torch.equal(ratio.diag(), torch.ones(10))
    assert (ratio - torch.eye(10)).max() < 0.85


# ---------------------------------------------------------------- 什么也不泄露类别


def test_only_the_outline_depends_on_the_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """同一串随机数换一组标签：颜色、纹理、杂物、光照、噪声逐位相同，变的只有轮廓所及之处。"""
    covers: list[Tensor] = []
    original = synth_objects._mask

    def mask(labels: Tensor, rng: torch.Generator) -> Tensor:
        covers.append(original(labels, rng))
        return covers[-1]

    monkeypatch.setattr(synth_objects, "_mask", mask)
    labels = torch.arange(40) % 10
    a, b = (synth_objects._render(part, make_generator(8)) for part in (labels, (labels + 3) % 10))
    touched = ((covers[0] > 0) | (covers[1] > 0))[:, None].expand_as(a)
    assert torch.equal(a[~touched], b[~touched])
    same = ((covers[0] == 1) & (covers[1] == 1))[:, None].expand_as(a)
    assert torch.equal(a[same], b[same]) and same.sum() > 5_000
    assert (a != b).flatten(1).any(dim=1).all()


def test_mean_colour_tells_nothing(objects: tuple[Tensor, Tensor]) -> None:
    """以平均颜色（以及中央的颜色）作线性分类，测试准确率与机会线相差不到四个标准差。"""
    images, labels = objects
    x = images.float() / 255
    features = torch.cat([x.mean(dim=(2, 3)), x[:, :, 12:20, 12:20].mean(dim=(2, 3))], dim=1)
    features = torch.cat([features, torch.ones(len(x), 1)], dim=1)
    targets = torch.nn.functional.one_hot(labels, 10).float()
    weights = torch.linalg.lstsq(features[:1000], targets[:1000]).solution
    hits = ((features[1000:] @ weights).argmax(dim=1) == labels[1000:]).float().mean().item()
    assert abs(hits - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 1000)


def test_mean_colours_of_the_classes_agree(objects: tuple[Tensor, Tensor]) -> None:
    images, labels = objects
    colour = images.float().mean(dim=(2, 3))
    means = torch.stack([colour[labels == k].mean(dim=0) for k in range(10)])
    spread = colour.std(dim=0) / math.sqrt(200)
    assert ((means - colour.mean(dim=0)) / spread).abs().max() < 4
    assert colour.std(dim=0).min() > 10  # 颜色确实在变，上面的检查不空洞


# ---------------------------------------------------------------- 颜色、光照、噪声


def test_object_and_background_stand_apart() -> None:
    inside, outside = synth_objects._colours(3000, make_generator(0))
    gap = (inside - outside).norm(dim=1)
    assert gap.min() >= synth_objects.CONTRAST - 1e-5
    assert 0.05 < (gap < synth_objects.CONTRAST + 1e-5).float().mean() < 0.6  # 推开的是一部分
    torch.testing.assert_close(inside.mean(dim=0), outside.mean(dim=0), rtol=0, atol=0.03)


def test_texture_surrounds_the_colour() -> None:
    colour = torch.full((400, 3), 0.5)
    texture = synth_objects._texture(colour, make_generator(0))
    offset = (texture - 0.5).abs().amax(dim=(2, 3))
    bound = synth_objects.TEXTURE_STRENGTH[1]
    assert bound * 0.9 < offset.max() <= bound * math.sqrt(2)  # 渐变在四角略大于 1
    values = torch.tensor([image.unique().numel() for image in texture[:, 0]])
    share = (values > 10).float().mean().item()  # 四种之中，只有渐变多于两个值
    assert share == pytest.approx(1 / synth_objects.PATTERNS, abs=0.1)


def test_light_and_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """一张纯白的图：最亮处 1，最暗处约 ``LIGHT`` 的下限；噪声的标准差在 ``NOISE`` 之内。"""
    monkeypatch.setattr(synth_objects, "_blend", lambda image, *_: image)
    monkeypatch.setattr(
        synth_objects, "_texture", lambda colour, _: torch.ones(len(colour), 3, 32, 32)
    )
    labels = torch.zeros(200, dtype=torch.int64)
    monkeypatch.setattr(synth_objects, "NOISE", (0.0, 0.0))
    clean = synth_objects._render(labels, make_generator(0)).float() / 255
    low, high = clean.amin(dim=(1, 2, 3)), clean.amax(dim=(1, 2, 3))
    assert high.min() > 0.95 and 0.5 < low.min() < 0.65 and low.max() > 0.9
    monkeypatch.setattr(synth_objects, "LIGHT", (0.5, 0.5))
    monkeypatch.setattr(synth_objects, "NOISE", (0.05, 0.05))
    noisy = synth_objects._render(labels, make_generator(0)).float() / 255
    monkeypatch.setattr(synth_objects, "NOISE", (0.0, 0.0))
    difference = noisy - synth_objects._render(labels, make_generator(0)).float() / 255
    assert difference[:, :, 14:18, 14:18].std().item() == pytest.approx(0.05, rel=0.05)
