"""第 3 章的 Muon、Schedule-Free、SAM：按定义核对，手算，存取，出错。"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from chapter_03_optimization_regularization.optimizers import SGD
from chapter_03_optimization_regularization.optimizers_adam import AdamW
from chapter_03_optimization_regularization.optimizers_modern import (
    SAM,
    Muon,
    ScheduleFreeAdamW,
    muon_groups,
    newton_schulz,
)
from tests.optimizing import SHAPES, make_params, parameters, walk
from tests.parity import assert_equal, normal


def test_schedule_free_equals_the_three_sequences() -> None:
    """照论文写出 x、y、z 三个序列，与只存 z 的写法比较；``eval`` 与 ``train`` 互逆。"""
    lr, (b1, b2), eps, decay, warmup = 0.05, (0.9, 0.99), 1e-8, 0.1, 7
    ours = normal(6).requires_grad_()
    optimizer = ScheduleFreeAdamW([ours], lr, (b1, b2), eps, decay, warmup)
    x = z = ours.detach().clone()
    v, total = torch.zeros(6).double(), 0.0
    for t in range(1, 61):
        y = (1 - b1) * z + b1 * x
        assert_equal(ours.detach(), y)
        g = y + normal(6, seed=t)
        ours.grad = g.clone()
        optimizer.step()
        v = b2 * v + (1 - b2) * g**2
        gamma = lr * min(1, t / warmup)
        z = z - gamma * (g / ((v / (1 - b2**t)).sqrt() + eps) + decay * y)
        total += gamma**2
        x = (1 - gamma**2 / total) * x + gamma**2 / total * z
        if t % 20 == 0:
            optimizer.eval()
            optimizer.eval()  # 第二次什么也不做
            assert_equal(ours.detach(), x)
            optimizer.train()
    optimizer.eval()
    with pytest.raises(RuntimeError, match="请先调用 train"):
        optimizer.step()


def test_sam_uses_the_gradient_at_the_perturbed_point() -> None:
    """二次函数 ``½ Σ aᵢ pᵢ²``：两个参数共用一个范数，一步可以手算。"""
    a, b = torch.tensor(2.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    p = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)  # 梯度 2 · 1.5 = 3
    q = torch.tensor(4 / 3, dtype=torch.float64, requires_grad=True)  # 梯度 3 · 4/3 = 4
    optimizer = SAM([p, q], SGD, rho=0.5, lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (a * p**2 + b * q**2) / 2
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == pytest.approx((2 * 1.5**2 + 3 * (4 / 3) ** 2) / 2)
    # e = 0.5 · (3, 4)/5 = (0.3, 0.4)
    assert p.item() == pytest.approx(1.5 - 0.1 * 2 * (1.5 + 0.3), abs=1e-14)
    assert q.item() == pytest.approx(4 / 3 - 0.1 * 3 * (4 / 3 + 0.4), abs=1e-14)


def test_sam_passes_train_and_eval_on_to_its_base() -> None:
    sam = SAM(make_params(SHAPES), ScheduleFreeAdamW, rho=0.1, lr=0.05)
    walk(sam, 5)
    training = [p.clone() for p in parameters(sam)]
    sam.eval()
    assert not torch.equal(parameters(sam)[0], training[0])
    sam.train()
    for p, q in zip(parameters(sam), training, strict=True):
        assert_equal(p, q)
    SAM(make_params(SHAPES), torch.optim.SGD, lr=0.1).eval()  # 没有这个方法的，什么也不做


def test_schedule_free_resumes_from_a_checkpoint_taken_in_eval_mode() -> None:
    straight, first = (ScheduleFreeAdamW(make_params(SHAPES), 0.05) for _ in range(2))
    walk(straight, 20)
    walk(first, 10)
    first.eval()
    second = ScheduleFreeAdamW([p.clone().requires_grad_() for p in parameters(first)], 0.05)
    second.load_state_dict(first.state_dict())
    second.train()
    walk(second, 10, start=10)
    for p, q in zip(parameters(second), parameters(straight), strict=True):
        assert_equal(p, q, 1e-10)


def test_sam_with_zero_radius_is_its_base_optimizer() -> None:
    sam, plain = SAM(make_params(SHAPES), AdamW, rho=0.0, lr=0.05), AdamW(make_params(SHAPES), 0.05)
    walk(sam, 30)
    walk(plain, 30)
    for p, q in zip(parameters(sam), parameters(plain), strict=True):
        assert_equal(p, q)


@pytest.mark.parametrize("shape", [(8, 8), (20, 5), (5, 20), (1, 7), (7, 1)])
def test_newton_schulz_flattens_the_singular_values(shape: tuple[int, int]) -> None:
    u, s, vt = torch.linalg.svd(normal(*shape), full_matrices=False)
    s = s.clamp(min=0.3 * s.max())  # 条件数不太大，五步就够
    result = newton_schulz(u @ s.diag() @ vt)
    a, b, c = 3.4445, -4.7750, 2.0315
    sigma = s / s.norm()
    for _ in range(5):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    assert_equal(result, u @ sigma.diag() @ vt, 1e-10)  # 只动奇异值，不动奇异向量
    assert sigma.min() > 0.6 and sigma.max() < 1.3


def test_newton_schulz_of_zero_is_zero() -> None:
    assert newton_schulz(torch.zeros(3, 4)).abs().sum() == 0


def test_muon_groups_know_a_tied_output_layer() -> None:
    embedding, head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Linear(4, 4), nn.Linear(4, 4), head)
    muon, rest = muon_groups(model, 0.02, 0.003)
    assert [p is q.weight for p, q in zip(muon["params"], model[1:3], strict=True)] == [True, True]
    assert len(rest["params"]) == 3  # 共用的一份，与两个偏置


def test_sam_survives_deepcopy() -> None:
    sam = SAM(make_params(SHAPES), AdamW, rho=0.1, lr=0.05)
    walk(sam, 5)
    twin = copy.deepcopy(sam)
    walk(twin, 5, start=5)
    walk(sam, 5, start=5)
    assert twin.base.param_groups is twin.param_groups
    for p, q in zip(parameters(twin), parameters(sam), strict=True):
        assert torch.equal(p, q)


def test_sam_lets_its_base_check_new_groups() -> None:
    sam = SAM([torch.zeros(2, 2, requires_grad=True)], Muon)
    with pytest.raises(ValueError, match="Muon 只处理二维参数"):
        sam.add_param_group({"params": [torch.zeros(3, requires_grad=True)]})
    with pytest.raises(ValueError, match="lr=-5 无效"):
        sam.add_param_group({"params": [torch.zeros(3, 3, requires_grad=True)], "lr": -5})


def test_sam_uses_the_radius_of_each_group_and_survives_zero_gradients() -> None:
    p, q = (torch.tensor(2.0, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sam = SAM([{"params": [p], "rho": 0.0}, {"params": [q], "rho": 1.0}], SGD, lr=0.1)

    def closure() -> Tensor:
        sam.zero_grad()
        loss = (p**2 + q**2) / 2
        loss.backward()
        return loss

    sam.step(closure)  # 只有 q 移到 2 + 2/√8
    assert p.item() == pytest.approx(1.8) and q.item() == pytest.approx(2 - 0.1 * (2 + 0.5**0.5))
    with torch.no_grad():
        p.zero_(), q.zero_()
    sam.step(closure)
    assert (p.item(), q.item()) == (0.0, 0.0)


def test_schedule_free_stands_still_at_zero_lr() -> None:
    optimizer = ScheduleFreeAdamW(make_params(SHAPES), lr=0.0)
    walk(optimizer, 3)
    for p, q in zip(parameters(optimizer), make_params(SHAPES), strict=True):
        assert torch.equal(p, q.detach())


def test_muon_groups_send_only_hidden_matrices_to_muon() -> None:
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    muon, rest = muon_groups(model, 0.02, 0.003, weight_decay=0.0)
    assert [p.shape for p in muon["params"]] == [(6, 8)]
    assert len(rest["params"]) == 6 and rest["lr"] == 0.003 and rest["weight_decay"] == 0.0
    optimizer = Muon([muon, rest])
    reference = AdamW([p.detach().clone().requires_grad_() for p in rest["params"]], 0.003,
                      weight_decay=0.0)  # fmt: skip
    for t in range(5):
        for p in muon["params"]:
            p.grad = normal(*p.shape, seed=t).float()
        for i, (p, q) in enumerate(zip(rest["params"], parameters_of(reference), strict=True)):
            p.grad = normal(*p.shape, seed=10 * t + i).float()
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    for p, q in zip(rest["params"], parameters_of(reference), strict=True):
        assert torch.equal(p, q)  # 其余的参数走的就是 AdamW


def test_muon_groups_without_a_hidden_matrix_is_an_error() -> None:
    """只有输出层、卷积核、冻结的矩阵：没有什么可以正交化。"""
    frozen = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 3))
    convolution = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    for model in (nn.Linear(4, 3), frozen, convolution):
        with pytest.raises(ValueError, match="没有可训练的隐藏层矩阵.*请用 AdamW"):
            muon_groups(model, 0.02, 0.003)


def test_muon_groups_leave_convolutions_to_adamw() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    muon, rest = muon_groups(model, 0.02, 0.003)
    assert [p.shape for p in muon["params"]] == [(8, 16)]
    assert model[0].weight.shape in [p.shape for p in rest["params"]]


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return optimizer.param_groups[0]["params"]
