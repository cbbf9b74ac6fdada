"""第 5 章的迁移：主干与头、最近邻、线性探针、冻结、少量标签的抽样，与 features.py 的错误。"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_03_optimization_regularization.schedulers import WarmupCosineLR
from chapter_05_resnet_modern_cnn import features, sources
from chapter_05_resnet_modern_cnn.few_shot import (
    Inputs,
    Tables,
    Task,
    best_knn,
    best_probe,
    descend,
    fine_tune,
    fit_head,
    frozen_in_the_wrong_mode,
    nested_order,
    pixel_features,
    tabulate,
)
from chapter_05_resnet_modern_cnn.figures_features import (
    accuracy_figure,
    cam_figure,
    projection_figure,
)
from chapter_05_resnet_modern_cnn.models import MODELS, OFFICIAL, build_model
from chapter_05_resnet_modern_cnn.resnet_cifar import CifarResNet
from chapter_05_resnet_modern_cnn.transfer import (
    attach_head,
    extract,
    fit_probe,
    freeze,
    head_of,
    knn_predict,
    knn_votes,
    parameter_groups,
    pca,
    probe_gradient,
    probe_hessian,
    probe_loss,
    split_head,
    train_mode,
    with_ones,
)
from tests.parity import assert_equal, normal
from utils import UserError, make_generator
from utils.cli import run_main
from utils.datasets import ImageSet


def tiny() -> CifarResNet:
    """最小的 8 层网络，统计量不平凡。"""
    model = CifarResNet(8, width=4)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.2)
            layer.running_var.uniform_(0.5, 2)
    return model


def labels_of(count: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, (count,), generator=make_generator(seed))


# ---------------------------------------------------------------- 主干与头


@pytest.mark.parametrize("name", ["resnet20", "densenet", "mobilenet_v3", "repvgg", "convnext"])
def test_head_on_backbone_is_the_whole_network(name: str) -> None:
    model = build_model(name, 5, (3, 32, 32)).eval()
    x = torch.randn(2, 3, 32, 32)
    backbone, channels = split_head(model)
    found = backbone.eval()(x)
    assert found.shape == (2, channels)
    _, head = head_of(model)  # 原来的网络没有被改动
    torch.testing.assert_close(head(found), model(x))
    if name == "resnet20":
        assert torch.equal(found, model.forward_features(x))


def test_every_small_network_has_a_head() -> None:
    for name in MODELS:
        with torch.device("meta"):
            _, head = head_of(MODELS[name].make(7, 3))
        assert head.out_features == 7
    with pytest.raises(ValueError, match="没有全连接层"):
        head_of(nn.Sequential(nn.Conv2d(3, 4, 1)))


def test_every_official_form_is_reachable() -> None:
    for name, make in OFFICIAL.items():
        with torch.device("meta"):
            head = head_of(make())[1]
        assert head.out_features == 1000, name


def test_new_head_starts_at_the_uniform_guess() -> None:
    backbone, channels = split_head(tiny())
    model = attach_head(backbone, channels, 7).train()
    loss = F.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.tensor([0, 1, 2, 6]))
    assert loss.item() == pytest.approx(math.log(7))
    assert next(model.backbone.parameters()) is not next(backbone.parameters())


def test_extraction_is_in_evaluation_mode_and_leaves_no_trace() -> None:
    model = tiny().train()
    model.bn1.eval()  # 各个模块的模式不一，都要照旧
    backbone, _ = split_head(model)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    x = torch.randn(7, 3, 16, 16)
    found = extract(backbone, x.split(3))
    assert backbone.training and not backbone.bn1.training and not found.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    torch.testing.assert_close(found, model.eval().forward_features(x).detach())


# ---------------------------------------------------------------- 最近邻


def knn_naive(features, labels, queries, k, classes, temperature):
    """照定义逐个算。"""
    votes = torch.zeros(len(queries), classes, dtype=queries.dtype)
    for q, query in enumerate(queries):
        cosines = [float(query @ f / (query.norm() * f.norm())) for f in features]
        for i in sorted(range(len(features)), key=lambda i: -cosines[i])[:k]:
            votes[q, labels[i]] += math.exp((cosines[i] - 1) / temperature)
    return votes


@pytest.mark.parametrize("k", [1, 4, 30])
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_votes_equal_the_definition(k: int, chunk: int) -> None:
    known, queries, labels = normal(20, 6), normal(11, 6, seed=1), labels_of(20, 3)
    votes = knn_votes(known, labels, queries, k, 3, temperature=0.3, chunk=chunk)
    assert_equal(votes, knn_naive(known, labels, queries, k, 3, 0.3))


def test_neighbours_by_hand() -> None:
    known = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 5.0]])
    labels = torch.tensor([2, 0, 0])
    query = torch.tensor([[3.0, 3.1]])  # 离第二类稍近，长短无关
    options = {"k": 3, "num_classes": 3}
    assert knn_predict(known, labels, query, **options).tolist() == [0]
    near = torch.tensor([[3.0, 2.0]])
    assert knn_predict(known, labels, near, temperature=0.01, **options).tolist() == [2]
    assert knn_predict(known, labels, near, temperature=100.0, **options).tolist() == [0]
    votes = knn_votes(known, labels, near, temperature=1e-4, **options)
    assert torch.isfinite(votes).all()  # 没有减 1 时，exp(10⁴) 会溢出


@pytest.mark.parametrize(
    "options", [{"k": 0}, {"k": 1, "temperature": 0.0}, {"k": 1, "chunk": 0}], ids=str
)
def test_bad_neighbours(options: dict) -> None:
    with pytest.raises(ValueError, match="都应为正数"):
        knn_predict(normal(4, 2), labels_of(4, 2), normal(1, 2), num_classes=2, **options)
    with pytest.raises(ValueError, match="标签应为"):
        knn_predict(normal(4, 2), labels_of(3, 2), normal(1, 2), k=1, num_classes=2)


# ---------------------------------------------------------------- 线性探针


def test_gradient_and_hessian_are_the_derivatives() -> None:
    weight, f, labels = normal(3, 5), with_ones(normal(9, 4, seed=1)), labels_of(9, 3)

    def loss(w: Tensor) -> Tensor:
        return probe_loss(w, f, labels, 0.3)

    gradient = torch.autograd.functional.jacobian(loss, weight)
    assert_equal(probe_gradient(weight, f, labels, 0.3), gradient)
    hessian = torch.autograd.functional.hessian(loss, weight).reshape(15, 15)
    ours = probe_hessian(weight, f, 0.3)
    assert_equal(ours, hessian)
    assert torch.linalg.eigvalsh(ours).min() > -1e-12  # 凸


def test_loss_is_the_formula() -> None:
    weight, f = torch.zeros(2, 3, dtype=torch.float64), with_ones(normal(4, 2))
    weight[:, -1] = torch.tensor([0.0, math.log(3.0)])  # 概率 1/4 与 3/4；偏置不受惩罚
    labels = torch.tensor([0, 1, 1, 1])
    expected = (math.log(4) + 3 * math.log(4 / 3)) / 4
    assert probe_loss(weight, f, labels, 10.0).item() == pytest.approx(expected)
    weight[0, 0] = 2.0
    base = probe_loss(weight, f, labels, 0.0)
    assert (probe_loss(weight, f, labels, 0.5) - base).item() == pytest.approx(0.5 / 2 * 4)


@pytest.mark.parametrize("l2", [1.0, 0.01])
def test_probe_is_where_newton_ends(l2: float) -> None:
    """牛顿法从零出发，与 L-BFGS 到同一个解；换一个起点也是。"""
    raw, labels = 3 * normal(40, 4) + 5, labels_of(40, 3)
    probe = fit_probe(raw, labels, 3, l2)
    f = with_ones((raw - raw.mean(dim=0)) / raw.std(dim=0, correction=0))
    weight = torch.zeros(3, 5, dtype=torch.float64)
    for _ in range(12):
        hessian = probe_hessian(weight, f, l2)
        # 各类的偏置一同加减，概率不变：海森矩阵缺一秩，用伪逆
        step = torch.linalg.pinv(hessian) @ probe_gradient(weight, f, labels, l2).flatten()
        weight = weight - step.view_as(weight)
    torch.testing.assert_close(probe(raw), f @ weight.T, rtol=0, atol=1e-3)
    assert probe_gradient(probe.weight, f, labels, l2).abs().max() < 1e-5
    elsewhere = probe._replace(weight=normal(3, 5, seed=3))
    again = fit_probe(raw, labels, 3, l2, start=elsewhere)
    torch.testing.assert_close(again.weight[:, :-1], probe.weight[:, :-1], rtol=0, atol=1e-3)


def test_probe_ignores_the_scale_of_each_feature() -> None:
    raw, labels = normal(30, 4), labels_of(30, 3)
    scaled = raw * torch.tensor([1.0, 100.0, 0.01, -3.0]) + 7
    a, b = fit_probe(raw, labels, 3, 0.1), fit_probe(scaled, labels, 3, 0.1)
    torch.testing.assert_close(a(raw), b(scaled), rtol=0, atol=1e-4)
    dead = torch.cat([raw, torch.full((30, 1), 4.0)], dim=1)  # 从不变化的一维
    assert torch.isfinite(fit_probe(dead, labels, 3, 0.1).weight).all()


def test_separable_classes_need_a_penalty() -> None:
    raw, labels = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="趋于无穷"):
        fit_probe(raw, labels, 2, 0.0)
    sizes = [fit_probe(raw, labels, 2, l2).weight.norm().item() for l2 in (1e-1, 1e-3, 1e-5)]
    assert sizes[0] < sizes[1] < sizes[2]


# ---------------------------------------------------------------- 冻结与微调


def test_frozen_backbone_in_training_mode_drifts() -> None:
    """缺陷本身：参数一个没动，统计量与特征却变了；``train_mode`` 之后不变。"""
    backbone, channels = split_head(tiny())
    x = 2 + torch.randn(8, 3, 16, 16)
    for mode, drifts in ((nn.Module.train, True), (train_mode, False)):
        model = attach_head(backbone, channels, 3)
        freeze(model.backbone)
        before = extract(model.backbone, [x])
        parameters = [p.clone() for p in model.backbone.parameters()]
        mode(model)
        assert model.backbone.bn1.training == drifts and model.head.training
        F.cross_entropy(model(x), labels_of(8, 3)).backward()
        assert all(p.grad is None for p in model.backbone.parameters())
        after = extract(model.backbone, [x])
        assert torch.equal(before, after) != drifts
        assert all(map(torch.equal, model.backbone.parameters(), parameters))


def test_dropout_of_a_frozen_part_is_off_too() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.Linear(2, 2))
    freeze(model[0])
    train_mode(model)
    assert not model[0][1].training and model[1].training and model.training


def test_parameter_groups_cover_each_parameter_once() -> None:
    backbone, channels = split_head(tiny())
    model = attach_head(backbone, channels, 3)
    head, body = parameter_groups(model, 0.1, 0.25)
    assert (head["lr"], body["lr"]) == (0.1, 0.025)
    ids = [id(p) for g in (head, body) for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    freeze(model.backbone)
    (only,) = parameter_groups(model, 0.1, 0.25)
    assert only["params"] == list(model.head.parameters())
    with pytest.raises(ValueError, match="不该比头走得快"):
        parameter_groups(model, 0.1, 2.0)


# ---------------------------------------------------------------- 主成分


def test_pca_is_the_eigenvectors_of_the_covariance() -> None:
    f = normal(50, 6) * torch.tensor([5.0, 3, 1, 1, 1, 0.1]) + 10
    points, share = pca(f, 3)
    values, vectors = torch.linalg.eigh(torch.cov(f.T, correction=0))
    assert_equal(share, values.flip(0)[:3] / values.sum(), 1e-10)
    expected = (f - f.mean(dim=0)) @ vectors.flip(1)[:, :3]
    assert_equal(points.abs(), expected.abs(), 1e-10)
    assert_equal(pca(-f, 3)[0], -points, 1e-10)  # 方向不随数据的符号翻转：符号是定好的
    with pytest.raises(ValueError, match="components=7"):
        pca(f, 7)


# ---------------------------------------------------------------- 少量标签


def split_of(count: int, classes: int = 3, seed: int = 0) -> ImageSet:
    """每类一种颜色、带噪声的小图。"""
    labels = torch.arange(count) % classes
    rng = make_generator(seed)
    images = torch.randint(0, 120, (count, 3, 16, 16), generator=rng)
    images[torch.arange(count), labels] += 100
    return ImageSet(images.to(torch.uint8), labels, tuple("abc"[:classes]))


@pytest.fixture
def task() -> Task:
    splits = {s: split_of(30, seed=i) for i, s in enumerate(("train", "val", "test"))}
    return Task.draw(splits, (2, 5), draws=2, seed=0)


def test_draws_are_balanced_nested_and_reproducible(task: Task) -> None:
    order = nested_order(task.train.labels, 3, make_generator(0))
    assert order.shape == (3, 10)
    assert (task.train.labels[order] == torch.arange(3)[:, None]).all()
    few, many = (set(task.chosen(0, n)[0].tolist()) for n in (2, 5))
    assert len(few) == 6 and len(many) == 15 and few < many
    assert set(task.chosen(1, 5)[0].tolist()) != many
    splits = {"train": task.train, "val": task.val, "test": task.test}
    again = Task.draw(splits, (2, 5), draws=2, seed=0)
    assert torch.equal(again.orders[1][0], task.orders[1][0])
    with pytest.raises(UserError, match="最少的一类只有 10 张"):
        Task.draw(splits, (11,), draws=1, seed=0)


def test_inputs_use_the_statistics_of_the_source() -> None:
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1.0, 2.0])
    grey = torch.full((1, 1, 28, 28), 255, dtype=torch.uint8)
    x = Inputs(mean, std, 32)(grey)
    assert x.shape == (1, 3, 32, 32)
    torch.testing.assert_close(x[0, :, 16, 16], (1 - mean) / std)  # 白的图
    torch.testing.assert_close(x[0, :, 1, 31], -mean / std)  # 补的是黑，不是归一化之后的 0
    large = Inputs(mean, std, 64)(grey)
    torch.testing.assert_close(large, ((1 - mean) / std).view(1, 3, 1, 1).expand(1, 3, 64, 64))


def test_tables_hold_exactly_the_drawn_images(task: Task) -> None:
    tables = tabulate(task, pixel_features)
    used = torch.cat([order[0].flatten() for order in task.orders]).unique()
    assert torch.equal(tables.train[used], pixel_features(task.train.images[used]))
    unused = torch.ones(30, dtype=torch.bool).index_fill(0, used, False)
    assert (tables.train[unused] == 0).all()
    assert torch.equal(tables.test, pixel_features(task.test.images))


def channel_means(images: Tensor) -> Tensor:
    return images.float().mean(dim=(2, 3)) / 255


def test_frozen_methods_solve_an_easy_task(task: Task) -> None:
    tables = tabulate(task, channel_means)
    assert best_knn(task, tables, 0, 2) == best_probe(task, tables, 0, 2) == 1.0
    assert fit_head(task, tables, 1, 5, steps=60) == 1.0


def test_hyperparameters_are_chosen_on_validation(task: Task) -> None:
    """验证集的标签全错一位时，选中的是在验证集上最好的那个 ``k``，不是测试集上的。"""
    tables = tabulate(task, channel_means)
    noise = Tables(*(normal(*t.shape, seed=i).float() for i, t in enumerate(tables)))
    train, val = task.chosen(0, 5)
    known = (noise.train[train], task.train.labels[train])

    def right(split: str, k: int) -> float:
        rows = val if split == "val" else torch.arange(30)
        queries, labels = getattr(noise, split)[rows], getattr(task, split).labels[rows]
        guess = knn_predict(*known, queries, k=k, num_classes=3)
        return (guess == labels).double().mean().item()

    best = max((1, 3, 5, 10), key=lambda k: right("val", k))
    assert best_knn(task, noise, 0, 5) == right("test", best)


def test_fine_tuning_learns_and_moves_the_backbone_less(task: Task) -> None:
    inputs = Inputs(torch.full((3,), 0.4), torch.full((3,), 0.2), 16)
    backbone, channels = split_head(tiny())

    def moved(pretrained: bool) -> float:
        model = fine_tune(backbone, channels, task, inputs, 0, 5, 12, pretrained)
        return (model.backbone.conv1.weight - backbone.conv1.weight).norm().item()

    assert 0 < moved(True) < moved(False)
    model = fine_tune(backbone, channels, task, inputs, 0, 5, 12)
    assert not torch.equal(model.backbone.bn1.running_mean, backbone.bn1.running_mean)


def test_descent_is_the_loop_written_by_hand(task: Task) -> None:
    """一批就是全部样本，次序无关：预热、余弦与动量都与手写的循环相同。"""
    features, labels = channel_means(task.train.images), task.train.labels
    ours, by_hand = nn.Linear(3, 3), nn.Linear(3, 3)
    by_hand.load_state_dict(ours.state_dict())
    groups = [{"params": list(ours.parameters()), "lr": 0.5}]
    descend(ours, features, labels, groups, 20, make_generator(0), lambda x: x)
    optimizer = torch.optim.SGD(
        by_hand.parameters(), lr=0.5, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = WarmupCosineLR(optimizer, 2, 20)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(by_hand(features), labels).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(ours.weight, by_hand.weight)


def test_head_on_cached_features_is_head_on_the_network(task: Task) -> None:
    """主干冻结且处于评估模式：在缓存上训练与每一步都过一遍网络，结果相同。"""
    inputs = Inputs(torch.full((3,), 0.4), torch.full((3,), 0.2), 16)
    backbone, channels = split_head(tiny())
    drift = frozen_in_the_wrong_mode(backbone, channels, task, inputs, 5, 20)
    tables = tabulate(task, lambda images: extract(backbone, inputs.batches(images)))
    assert drift.right == fit_head(task, tables, 0, 5, 20)
    assert drift.moved > 0.01


# ---------------------------------------------------------------- 脚本


def error_of(argv: list[str], tmp_path: Path, capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        common = ["--smoke", "--device", "cpu", "--out-dir", str(tmp_path / "out")]
        run_main(lambda: features.main([*argv, *common]))
    err = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and len(err) == 1
    return err[0]


def test_bad_arguments_are_one_line(tmp_path: Path, capsys) -> None:
    for argv, words in (
        (["--backbone", "resnet18"], "须同时给出 --weights"),
        (["--image-size", "64"], "--image-size 只用于 --backbone"),
        (["--stem-stride", "1", "--backbone", "resnet18", "--weights", __file__], "只用于小图"),
        (["--dataset", "synth-objects"], "迁移要换一个任务"),
        (["--labels", "0"], "逗号分隔的正整数"),
        (["--weights", str(tmp_path / "none.pt")], "找不到文件"),
    ):
        assert words in error_of(argv, tmp_path, capsys)


def test_weights_of_another_model_are_one_line(tmp_path: Path, capsys) -> None:
    file = tmp_path / "other.pt"
    torch.save(build_model("resnet32", 10, (3, 32, 32)).state_dict(), file)
    assert "不属于这个 CifarResNet" in error_of(["--weights", str(file)], tmp_path, capsys)
    argv = ["--backbone", "resnet18", "--weights", str(file)]
    assert "不属于这个 ResNet：conv1.weight" in error_of(argv, tmp_path, capsys)


@pytest.mark.usefixtures("needs_torchvision")
def test_folder_with_one_class_and_small_images(tmp_path, write_class_folders, capsys) -> None:
    from torchvision.models import resnet18

    write_class_folders(tmp_path / "one", {"cat": 40})
    argv = ["--dataset", "folder", "--data-dir", str(tmp_path / "one")]
    assert "一个类别" in error_of(argv, tmp_path, capsys)
    write_class_folders(tmp_path / "two", {"cat": 40, "dog": 40})
    file = tmp_path / "resnet18.pth"
    torch.save(resnet18(weights=None).state_dict(), file)
    argv = ["--dataset", "folder", "--data-dir", str(tmp_path / "two"), "--backbone", "resnet18"]
    argv += ["--weights", str(file)]
    found = error_of([*argv, "--image-size", "8"], tmp_path, capsys)
    assert "--image-size 8 不合 resnet18" in found


@pytest.mark.usefixtures("needs_torchvision")
def test_official_weights_give_official_features(tmp_path: Path) -> None:
    import torchvision

    for name in ("resnet18", "mobilenet_v2"):
        official = getattr(torchvision.models, name)(weights=None).eval()
        file = tmp_path / f"{name}.pth"
        torch.save(official.state_dict(), file)
        argv = ["--backbone", name, "--weights", str(file)]
        source = sources.imagenet_source(features.parse_args(argv), features.get_device("cpu"))
        x = source.inputs(torch.randint(256, (2, 3, 20, 20), dtype=torch.uint8))
        assert x.shape == (2, 3, 64, 64)
        found = extract(source.backbone, [x])
        with torch.no_grad():
            assert torch.equal(head_of(official)[1](found), official(x))


def test_last_layer_of_each_size_of_resnet20() -> None:
    model = build_model("resnet20", 10, (3, 32, 32), 2).eval()
    found = features.last_layer_of_each_size(model, torch.zeros(2, 3, 32, 32))
    assert found == {16: model.blocks[2], 8: model.blocks[5], 4: model.blocks}  # 容器最后结束
    assert all(not m._forward_hooks for m in model.modules())


# ---------------------------------------------------------------- 图


def test_figures_show_every_method_class_and_layer() -> None:
    row = {"mean": [0.2, 0.5], "std": [0.1, None], "seconds": [0.1, 1.0]}
    figure = accuracy_figure((2, 5), {"kNN": row, "fine-tuning": row}, 0.1)
    left, right = figure.axes
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["fine-tuning", "kNN"]
    assert len(right.patches) == 2 and "50.0%" in right.texts[0].get_text()
    points = np.random.default_rng(0).normal(size=(9, 2))
    figure = projection_figure({"a": points, "b": points}, np.arange(9) % 3, "xyz")
    assert [t.get_text() for t in figure.axes[1].texts] == list("xyz")
    pictures = np.zeros((2, 8, 8, 3))
    figure = cam_figure(pictures, ["disk", "ring"], {"4x4": np.zeros((2, 8, 8))})
    assert len(figure.axes) == 4 and figure.axes[2].get_ylabel() == "4x4"
