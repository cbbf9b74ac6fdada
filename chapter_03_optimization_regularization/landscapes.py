"""损失的地形：测试函数与轨迹，Hessian 与锐度，过滤器归一化的切片，梯度噪声尺度。

本文件教什么：不显式写出 Hessian，只用"Hessian 乘向量"就能求它最大的特征值（锐度）；
怎样画高维损失的二维切片才可以互相比较；一个批该多大。
不涉及：优化器本身（见 optimizers.py）、SAM 怎样利用锐度（见 optimizers_modern.py）。
对应 landscapes.md 的「损失的地形」与「批大小与梯度噪声」两节。

维度约定：``T`` 步数，``P`` 参数的总个数，``N`` 样本数，``A`` 切片一边的格点数。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

LossFn = Callable[[], Tensor]  # 不带参数，返回标量损失；参数由闭包带进来
Operator = Callable[[Tensor], Tensor]  # 线性算子 v ↦ Hv，(P,) -> (P,)

# ---------------------------------------------------------------- 测试函数：(..., 2) -> (...)


def quadratic(points: Tensor, condition: float = 30.0, angle: float = math.pi / 6) -> Tensor:
    """椭圆碗 ``½ (u² + κ v²)``，条件数 ``κ = condition``；坐标轴逆时针转了 ``angle``。"""
    x, y = points.unbind(-1)
    u = math.cos(angle) * x + math.sin(angle) * y
    v = -math.sin(angle) * x + math.cos(angle) * y
    return 0.5 * (u.square() + condition * v.square())


def rosenbrock(points: Tensor) -> Tensor:
    """``(1 − x)² + 100 (y − x²)²``：弯曲的窄谷，谷底几乎是平的。参考: Rosenbrock, 1960。"""
    x, y = points.unbind(-1)
    return (1 - x).square() + 100 * (y - x.square()).square()


def beale(points: Tensor) -> Tensor:
    """``Σ_i (c_i − x + x y^i)²``，``c = (1.5, 2.25, 2.625)``：平台接着陡墙。参考: Beale, 1958。"""
    x, y = points.unbind(-1)
    return sum((c - x + x * y**i).square() for i, c in enumerate((1.5, 2.25, 2.625), start=1))


def saddle(points: Tensor) -> Tensor:
    """``½ x² − ½ y² + ¼ y⁴``：原点是鞍点，两侧各有一个极小点 ``(0, ±1)``。"""
    x, y = points.unbind(-1)
    return 0.5 * x.square() - 0.5 * y.square() + 0.25 * y**4


class Landscape(NamedTuple):
    """一个二维测试函数，以及画它、用它所需的一切。"""

    function: Callable[[Tensor], Tensor]
    minima: tuple[tuple[float, float], ...]  # 全部极小点，取值相同
    start: tuple[float, float]
    window: tuple[float, float, float, float]  # 画图的范围 (x 左, x 右, y 下, y 上)

    @property
    def lowest(self) -> float:
        """极小值。"""
        return self.function(torch.tensor(self.minima[0], dtype=torch.float64)).item()


LANDSCAPES: dict[str, Landscape] = {
    "quadratic": Landscape(quadratic, ((0.0, 0.0),), (-4.0, -0.6), (-4.8, 2.2, -3.2, 2.2)),
    "rosenbrock": Landscape(rosenbrock, ((1.0, 1.0),), (-1.2, 1.0), (-1.7, 1.7, -0.7, 1.9)),
    "beale": Landscape(beale, ((3.0, 0.5),), (1.0, 1.2), (0.2, 4.2, -1.2, 1.8)),
    "saddle": Landscape(saddle, ((0.0, 1.0), (0.0, -1.0)), (-1.6, 1e-3), (-2.0, 1.4, -0.6, 1.6)),
}


def trajectory(
    function: Callable[[Tensor], Tensor],
    optimizer_factory: Callable[[list[Tensor]], torch.optim.Optimizer],
    start: Sequence[float],
    steps: int,
) -> Tensor:
    """优化器从 ``start`` 出发走 ``steps`` 步经过的点。

    参数:
        function: ``(2,) -> ()``。
        optimizer_factory: 由参数列表造出优化器，如 ``lambda p: SGD(p, lr=0.1)``。
        start: 起点的坐标。
        steps: 步数 T。

    返回:
        ``(T + 1, 2)``，float64，第一行是起点；发散时后面的行是 inf 或 nan。
    """
    point = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = optimizer_factory([point])

    def closure() -> Tensor:  # SAM 之类的优化器一步要算不止一次梯度，所以给闭包
        optimizer.zero_grad()
        loss = function(point)
        loss.backward()
        return loss

    path = [point.detach().clone()]
    for _ in range(steps):
        optimizer.step(closure)
        path.append(point.detach().clone())
    return torch.stack(path)


# ---------------------------------------------------------------- Hessian


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def hessian_operator(loss_fn: LossFn, params: Sequence[Tensor]) -> Operator:
    """Hessian 乘向量 ``v ↦ Hv = ∇(∇L · v)``：反向两次，从不写出 ``P × P`` 的矩阵。

    梯度的计算图只建一次；此后每乘一次只多做一次反向，代价约为一次梯度的两倍，内存 ``O(P)``。

    参数:
        loss_fn: 返回标量损失，必须二阶可导。
        params: 对它们求导，共 P 个数。

    返回:
        ``(P,) -> (P,)`` 的函数；各参数按次序展平拼接。

    参考: Pearlmutter, 1994, Fast Exact Multiplication by the Hessian。
    """
    shapes = [p.shape for p in params]
    grads = torch.autograd.grad(loss_fn(), params, create_graph=True, materialize_grads=True)

    def product(vector: Tensor) -> Tensor:
        parts = vector.split([s.numel() for s in shapes])
        parts = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        # 以 v 为上游梯度对 ∇L 反向，得到的就是 ∇(∇L · v)；与 L 无关的参数补零
        rows = torch.autograd.grad(grads, params, parts, retain_graph=True, materialize_grads=True)
        return _flatten(rows)

    return product


def power_iteration(operator: Operator, start: Tensor, steps: int) -> float:
    """幂迭代：反复 ``v ← Hv / ‖Hv‖``，返回 ``vᵀHv``。

    收敛到*绝对值*最大的特征值，误差每步乘 ``(λ₂/λ₁)²``：谱的前几名挨得近时很慢。
    这是照定义写的对照；``sharpness`` 用 ``lanczos``。

    参数:
        operator: 对称算子。
        start: 初始向量 ``(P,)``。
        steps: 乘多少次。
    """
    v = start / start.norm()
    value = 0.0
    for _ in range(steps):
        product = operator(v)
        value = (v @ product).item()
        v = product / product.norm()
    return value


def lanczos(operator: Operator, start: Tensor, steps: int) -> Tensor:
    """Lanczos：在 ``span{v, Hv, …, H^{k−1}v}`` 中求特征值的最好近似（Ritz 值）。

    ``H`` 在这组标准正交基 ``Q`` 下是三对角阵 ``T = QᵀHQ``：对角 ``α_k = q_kᵀHq_k``，次对角
    ``β_k = ‖Hq_k − α_k q_k − β_{k−1} q_{k−1}‖``。与幂迭代用同样的乘积，却不丢弃任何一个，
    谱的两端收敛得快得多。

    参数:
        operator: 对称算子。
        start: 初始向量 ``(P,)``。
        steps: 至多乘多少次，k；子空间已不变时提前结束。

    返回:
        ``T`` 的特征值，由小到大，至多 k 个，float64。

    参考: Golub 与 Van Loan, Matrix Computations, 第 10 章。
    """
    basis = (start / start.norm()).unsqueeze(0)  # (1, P)，每行一个 q
    diagonal, off = [], []
    for _ in range(min(steps, start.numel())):
        w = operator(basis[-1])
        scale = w.norm().item()
        diagonal.append((basis[-1] @ w).item())
        for _ in range(2):  # 只减最近两项会因舍入失去正交，冒出假的重复特征值；减两遍才够
            w = w - basis.T @ (basis @ w)
        off.append(w.norm().item())
        if off[-1] <= 10 * torch.finfo(w.dtype).eps * scale:
            break
        basis = torch.cat([basis, (w / off[-1]).unsqueeze(0)])
    tri = torch.tensor(diagonal, dtype=torch.float64).diag()
    side = torch.tensor(off[: len(diagonal) - 1], dtype=torch.float64)
    matrix = tri + side.diag(1) + side.diag(-1)
    if not matrix.isfinite().all():  # 损失已经溢出
        return torch.full((len(diagonal),), math.nan, dtype=torch.float64)
    return torch.linalg.eigvalsh(matrix)


def sharpness(
    loss_fn: LossFn,
    params: Sequence[Tensor],
    generator: torch.Generator,
    steps: int = 20,
) -> float:
    """锐度：Hessian 最大的特征值 ``λ_max``（带符号；梯度下降稳定的条件是 ``lr < 2/λ_max``）。

    参数:
        loss_fn: 返回标量损失；要全批、要确定（Dropout 与 BatchNorm 用 eval 模式）。
        params: 对它们求导。
        generator: 抽初始向量用的生成器。
        steps: Lanczos 的步数。
    """
    flat = _flatten([p.detach() for p in params])
    start = torch.empty(flat.shape, dtype=flat.dtype).normal_(generator=generator)
    start = start.to(flat.device)  # 在 CPU 上抽，各种设备得到同一个向量
    return lanczos(hessian_operator(loss_fn, params), start, steps)[-1].item()


# ---------------------------------------------------------------- 切片


def filter_normalized_direction(model: nn.Module, generator: torch.Generator) -> list[Tensor]:
    """过滤器归一化的随机方向：``d_i ← d_i · ‖w_i‖ / ‖d_i‖``，逐个神经元（卷积核）进行。

    ReLU 网络把一层乘 c、下一层除以 c，函数不变，而普通随机方向的切片会变宽或变窄；
    让方向的每一行与权重的那一行同样长，切片就与这种缩放无关，不同的网络才可以比较。
    偏置与归一化层的参数（一维的）方向取零，如论文所做。

    参数:
        model: 参数的第 0 维是神经元或卷积核。
        generator: 抽方向用的生成器。

    返回:
        与 ``model.parameters()`` 同序、同形状的张量列表。

    参考: Li 等, 2018, arXiv:1712.09913, 第 4 节。
    """
    directions = []
    for p in model.parameters():
        d = torch.zeros_like(p)
        if p.ndim > 1:
            rows = torch.empty(d.shape, dtype=d.dtype).normal_(generator=generator)
            rows = rows.to(d.device).flatten(1)
            length = p.detach().flatten(1).norm(dim=1, keepdim=True)
            d = (rows * (length / rows.norm(dim=1, keepdim=True))).view_as(p)
        directions.append(d)
    return directions


@torch.no_grad()
def loss_slice(
    loss_fn: LossFn,
    params: Sequence[Tensor],
    directions: Sequence[Sequence[Tensor]],
    grid: Tensor,
) -> Tensor:
    """损失的一维或二维切片 ``f(a, b) = L(θ + a d₁ + b d₂)``；结束后参数复原。

    参数:
        loss_fn: 返回标量损失。
        params: 网络的参数 θ。
        directions: 一个或两个方向，各与 ``params`` 同形状。
        grid: 每个方向上取的坐标 ``(A,)``。

    返回:
        ``(A,)`` 或 ``(A, A)``，float64；第 ``[i, j]`` 项是 ``f(grid[i], grid[j])``。

    异常:
        ValueError: 方向不是一个或两个。
    """
    if len(directions) not in (1, 2):
        raise ValueError(f"directions 有 {len(directions)} 个：切片是一维或二维的，应给 1 或 2 个")
    origin = [p.detach().clone() for p in params]
    places = torch.cartesian_prod(*[grid] * len(directions)).view(-1, len(directions))
    values = []
    try:
        for place in places.tolist():
            for p, center, *steps in zip(params, origin, *directions, strict=True):
                p.copy_(center + sum(a * d for a, d in zip(place, steps, strict=True)))
            values.append(loss_fn().item())
    finally:
        for p, center in zip(params, origin, strict=True):
            p.copy_(center)
    return torch.tensor(values, dtype=torch.float64).view([len(grid)] * len(directions))


# ---------------------------------------------------------------- 梯度噪声


def per_sample_gradients(
    model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> Tensor:
    """每个样本各自的梯度 ``(N, P)``：对"一个样本的损失"求导，再沿样本维 vmap。

    内存是 ``N · P`` 个数，只适合小网络。

    参数:
        model: 各样本互不相干的网络（不含 BatchNorm）。
        loss_fn: ``(输出 (1, ...), 目标 (1, ...)) -> 标量``。
        x, y: 输入与目标，第 0 维长 N。
    """

    def one(params: dict[str, Tensor], xi: Tensor, yi: Tensor) -> Tensor:
        return loss_fn(functional_call(model, params, (xi.unsqueeze(0),)), yi.unsqueeze(0))

    params = {name: p.detach() for name, p in model.named_parameters()}
    grads = vmap(grad(one), in_dims=(None, 0, 0))(params, x, y)
    return torch.cat([g.flatten(1) for g in grads.values()], dim=1)


class GradientNoise(NamedTuple):
    """真实梯度的平方长度 ``|G|²`` 与单样本梯度的总方差 ``tr Σ``。"""

    signal: float  # |G|²
    noise: float  # tr Σ

    @property
    def scale(self) -> float:
        """噪声尺度 ``B_simple = tr Σ / |G|²``：批大小到此，噪声与信号一样大。"""
        return self.noise / self.signal


def gradient_noise(per_sample: Tensor) -> GradientNoise:
    """由单样本梯度 ``(N, P)`` 无偏地估计 ``|G|²`` 与 ``tr Σ``。

    ``tr Σ`` 用除以 ``N − 1`` 的样本方差；而 ``E|ḡ|² = |G|² + tr Σ / N``，要减去多出的一项，
    因此信号很弱时 ``|G|²`` 的估计可能是负的。

    异常:
        ValueError: 样本不足两个。
    """
    count = len(per_sample)
    if count < 2:
        raise ValueError(f"只有 {count} 个样本的梯度：估计方差至少要两个")
    mean = per_sample.mean(dim=0)
    noise = (per_sample - mean).square().sum().item() / (count - 1)
    return GradientNoise(mean.square().sum().item() - noise / count, noise)


def gradient_noise_from_batches(
    small_square: float, big_square: float, small: int, big: int
) -> GradientNoise:
    """由两种批大小下梯度的平方长度，无偏地估计 ``|G|²`` 与 ``tr Σ``。

    ``E|g_B|² = |G|² + tr Σ / B`` 对两个 B 各写一次，是两个未知数的两个方程。
    数据并行时白来：各卡自己的梯度是小批，all-reduce 之后是大批。

    参数:
        small_square, big_square: 小批与大批的 ``|g|²``，宜先对许多步取平均再代入
            （两者的估计无偏，但比值不是）。
        small, big: 两个批大小。

    异常:
        ValueError: 不满足 ``0 < small < big``。

    参考: McCandlish 等, 2018, arXiv:1812.06162, 附录 A.1。
    """
    if not 0 < small < big:
        raise ValueError(f"small={small}，big={big}：应有 0 < small < big")
    signal = (big * big_square - small * small_square) / (big - small)
    noise = (small_square - big_square) / (1 / small - 1 / big)
    return GradientNoise(signal, noise)
