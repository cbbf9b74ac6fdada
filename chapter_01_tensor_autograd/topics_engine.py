"""demo.py 的专题，前一半：张量的布局、两个引擎、数值检查、两种模式、高阶导数、手推。"""

from __future__ import annotations

import gc
import math
import warnings
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from chapter_01_tensor_autograd import demo_figures, gradcheck, manual_backprop, modes, tensor_ops
from chapter_01_tensor_autograd import functional as F
from chapter_01_tensor_autograd.engine import Tensor, grad
from chapter_01_tensor_autograd.graph import record, topological_order
from chapter_01_tensor_autograd.graph_viz import draw_graphs, mermaid, trace
from chapter_01_tensor_autograd.scalar_mlp import ScalarMLP, hinge_step
from utils import make_generator
from utils.model_summary import display_width
from utils.synth_points import two_moons
from utils.timer import seconds_of
from utils.topics import Check, Outcome, Topic

# ---------------------------------------------------------------- 张量的布局


def topic_tensors(seed: int, smoke: bool) -> Outcome:
    """转置、切片、广播各动了什么？哪些操作复制，哪些只是换个看法？"""
    x = torch.arange(12.0).reshape(3, 4)
    storage, wrong = x.flatten().tolist(), 0
    views = {
        "x": x,
        "x.T": x.T,
        "x[:, ::2]": x[:, ::2],
        "x[1]": x[1],
        "x.flip(0)": x.flip(0),
        "x[:1].expand(3, 4)": x[:1].expand(3, 4),
        "x.reshape(2, 6)": x.reshape(2, 6),
        "x.T.reshape(2, 6)": x.T.reshape(2, 6),
    }
    print(f"  x 的 dtype {x.dtype}，设备 {x.device}，每个元素 {x.element_size()} 字节")
    print("  操作                   形状      步幅     起点  共用内存    连续")
    for name, y in views.items():
        shared = y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        memory = "是" if shared else "否（复制）"
        print(
            f"  {name:22s} {str(tuple(y.shape)):9s} {str(y.stride()):8s} {y.storage_offset():4d}"
            f"  {memory}{' ' * (12 - display_width(memory))}{'是' if y.is_contiguous() else '否'}"
        )
        if shared:  # 只凭形状、步幅与起点，从一条数里读出同样的元素
            ours = tensor_ops.strided_index(storage, y.shape, y.stride(), y.storage_offset())
            wrong += ours != y.flatten().tolist()
    for y, shape in ((x, (2, 6)), (x.T, (2, 6)), (x.T, (2, 2, 3)), (x[:, ::2], (6,))):
        ours = tensor_ops.view_strides(y.shape, y.stride(), shape)
        try:
            official = y.view(shape).stride()
        except RuntimeError:
            official = None
        wrong += ours != official
        verdict = "只能复制" if ours is None else f"步幅 {ours}"
        print(f"  形状 {tuple(y.shape)} 步幅 {y.stride()} 看成 {shape}：{verdict}")
    wrong += _show_broadcasting() + _show_einsum(seed) + _show_gather()
    check = Check("张量操作：与 PyTorch 不符的条数", 1.0, (0.0, 0.0), floor=0.0)
    shown = {name: y for name, y in views.items() if name in demo_figures.LAYOUTS}
    return Outcome(demo_figures.layouts_figure(shown), [(check, float(wrong))])


def _show_broadcasting() -> int:
    """广播表：形状与步幅，0 就是复制；返回与 PyTorch 不符的条数。"""
    wrong = 0
    for a, b in (((3, 4), (4,)), ((3, 1), (4,)), ((2, 1, 4), (3, 1)), ((3, 4), (3,))):
        results: list[Any] = []
        for function in (tensor_ops.broadcast_shapes, torch.broadcast_shapes):
            try:
                results.append(tuple(function(a, b)))
            except (ValueError, RuntimeError):
                results.append(None)
        wrong += results[0] != results[1]
        if results[0] is None:
            print(f"  广播 {a} 与 {b}：不行，最后一维 4 ≠ 3")
            continue
        target, strides = results[0], []
        for shape in (a, b):
            x = torch.empty(shape)
            strides.append(tensor_ops.broadcast_strides(shape, x.stride(), target))
            wrong += strides[-1] != x.broadcast_to(target).stride()
        print(f"  广播 {a} 与 {b} -> {target}，步幅 {strides[0]} 与 {strides[1]}")
    return wrong


def _show_einsum(seed: int) -> int:
    """einsum 表；返回与 PyTorch 不符的条数。"""
    cases = {
        "i,j->ij": ((3,), (4,), "外积"),
        "bi,oi->bo": ((2, 3), (4, 3), "线性层"),
        "bij,bjk->bik": ((2, 3, 4), (2, 4, 5), "批矩阵乘法"),
        "bhtd,bhsd->bhts": ((2, 3, 4, 5), (2, 3, 6, 5), "注意力的打分"),
        "ii,i->": ((3, 3), (3,), "对角线的加权和"),
    }
    generator, wrong = make_generator(seed), 0
    for equation, (shape_a, shape_b, meaning) in cases.items():
        a, b = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in (shape_a, shape_b)
        )
        ours = tensor_ops.einsum_by_hand(equation, a, b)
        error = (ours - torch.einsum(equation, a, b)).abs().max().item()
        wrong += error > 1e-12
        print(f"  einsum {equation:15s} {shape_a} × {shape_b} -> {tuple(ours.shape)}（{meaning}）")
    return wrong


def _show_gather() -> int:
    """gather 与 scatter_add；返回与 PyTorch 不符的条数。"""
    x = torch.arange(12.0).reshape(3, 4)
    index = torch.tensor([[0, 0, 3], [1, 1, 1]])
    picked = tensor_ops.gather_by_hand(x, 1, index)
    returned = tensor_ops.scatter_add_by_hand(torch.zeros(3, 4), 1, index, picked)
    print(f"  gather(1, {index.tolist()}) -> {picked.tolist()}")
    print(f"  scatter_add 放回零张量 -> {returned.tolist()}（同一处取过几次，就加几次）")
    official = x.gather(1, index)
    expected = torch.zeros(3, 4).scatter_add(1, index, official)
    return int(not torch.equal(picked, official)) + int(not torch.equal(returned, expected))


# ---------------------------------------------------------------- 计算图


def _small_network(lib: Any, v: dict[str, Any], target: Any) -> Any:
    hidden = (v["x"] @ v["W1"].T + v["b1"]).tanh()
    return lib.cross_entropy(hidden @ v["W2"].T + v["b2"], target)


def topic_graph(seed: int, smoke: bool) -> Outcome:
    """同一个网络，在本章的引擎与 PyTorch 里各建成什么样的图？"""
    generator = make_generator(seed)
    shapes = {"x": (4, 3), "W1": (5, 3), "b1": (5,), "W2": (2, 5), "b2": (2,)}
    arrays = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    target = torch.tensor([0, 1, 1, 0])
    ours = {name: Tensor(a.numpy(), requires_grad=name != "x") for name, a in arrays.items()}
    theirs = {name: a.clone().requires_grad_(name != "x") for name, a in arrays.items()}
    graphs = {
        "this chapter's engine": trace(_small_network(F, ours, target.numpy()), ours),
        "PyTorch": trace(_small_network(torch.nn.functional, theirs, target), theirs),
    }
    for name, graph in graphs.items():
        operations = len(graph.labels) - sum(graph.is_leaf) - 1
        print(
            f"  {name}：{sum(graph.is_leaf)} 个叶子，{operations} 次运算，{len(graph.edges)} 条边"
        )
    print("  mermaid 文字（可贴进 Markdown）：")
    print("    " + mermaid(graphs["this chapter's engine"]).replace("\n", "\n    "))
    return Outcome(draw_graphs(graphs), [])


# ---------------------------------------------------------------- 标量引擎


def topic_scalar(seed: int, smoke: bool) -> Outcome:
    """一百来行的标量引擎，真的能训练网络吗？"""
    points, labels = two_moons(100, make_generator(seed), noise=0.1)
    xs, ys = points.tolist(), (2 * labels - 1).tolist()
    model, steps = ScalarMLP((2, 16, 16, 1), make_generator(seed)), 3 if smoke else 100
    losses = []
    gc.disable()  # 图里没有环，引用计数就够了；回收器每隔几步就把全部活着的对象白扫一遍
    try:
        for step in tqdm(range(steps), desc="训练", leave=False):
            losses.append(hinge_step(model, xs, ys, lr=1.0 - 0.9 * step / steps))
    finally:
        gc.enable()
    right = ((model.scores(points.numpy())[:, 0] > 0) == (labels.numpy() == 1)).mean()
    print(f"  {steps} 步之后：损失 {losses[0]:.3f} -> {losses[-1]:.3f}，分对 {right:.0%}")
    grid = np.stack(np.meshgrid(np.linspace(-1.6, 2.6, 120), np.linspace(-1.2, 1.7, 120)), -1)
    scores = model.scores(grid.reshape(-1, 2)).reshape(120, 120)
    figure = demo_figures.scalar_figure(losses, scores, points.numpy(), labels.numpy())
    check = Check("标量引擎：分对的训练样本", 0.5, (0.9, 1.0), floor=1.0, percent=True)
    return Outcome(figure, [(check, float(right))])


# ---------------------------------------------------------------- 数值检查


def _probe(x: np.ndarray) -> np.ndarray:
    return np.exp(x) * np.sin(3 * x)


def _probe_slope(x: np.ndarray) -> np.ndarray:
    return np.exp(x) * (np.sin(3 * x) + 3 * np.cos(3 * x))


def topic_gradcheck(seed: int, smoke: bool) -> Outcome:
    """差分的步长取多大最准？写错的梯度查得出来吗？"""
    x = torch.rand(100, generator=make_generator(seed), dtype=torch.float64).numpy()
    steps = 10.0 ** np.arange(-15, 0.1, 0.25)
    methods = {
        "forward, float64": (gradcheck.forward_difference, np.float64),
        "central, float64": (gradcheck.central_difference, np.float64),
        "central, float32": (gradcheck.central_difference, np.float32),
        "complex step, float64": (gradcheck.complex_step, np.float64),
    }
    curves: dict[str, np.ndarray] = {}
    for name, (method, dtype) in methods.items():
        point = x.astype(dtype)
        truth = _probe_slope(point.astype(np.float64))
        errors = [np.abs(method(_probe, point, h) - truth).max() for h in steps]
        curves[name] = np.array(errors) / np.abs(truth).max()
        best = int(curves[name].argmin())
        print(f"  {name:22s} 最小误差 {curves[name][best]:.1e}，在步长 {steps[best]:.0e}")
    generator = make_generator(seed)
    inputs = [torch.randn(3, 4, generator=generator, dtype=torch.float64).numpy()]
    error = gradcheck.gradcheck(lambda a: F.gelu(a).softmax(1).log(), inputs)
    try:
        gradcheck.gradcheck(_wrong_tanh, inputs)
        caught = 0.0
    except gradcheck.GradientError as found:
        caught = 1.0
        print(f"  故意写错的 tanh：{found}")
    large = [torch.randn(200, 300, generator=generator, dtype=torch.float64).numpy()]
    directional = gradcheck.directional_check(lambda a: (a @ a.T / 300).tanh(), large)
    print(f"  六万个元素的输入，沿 5 个随机方向检查：最大相对误差 {directional:.1e}")
    results = [
        (Check("gradcheck：正确的梯度的相对误差", 1.0, (1e-6, 0.0)), max(error, directional)),
        (Check("gradcheck：查出写错的梯度（1 为查出）", 0.0, (1.0, 1.0)), caught),
        (
            Check("中心差分 float64 的最小相对误差", 1.0, (1e-9, 1e-12)),
            float(curves["central, float64"].min()),
        ),
    ]
    return Outcome(demo_figures.steps_figure(steps, curves), results)


def _wrong_tanh(x: Tensor) -> Tensor:
    """前向是 tanh，反向漏了平方：``1 − y`` 而不是 ``1 − y²``。"""
    return record("tanh", np.tanh(x.numpy()), (x, lambda g, y: g * (1.0 - y)), save_output=True)


# ---------------------------------------------------------------- 两种模式


def topic_modes(seed: int, smoke: bool) -> Outcome:
    """雅可比矩阵逐行（反向）还是逐列（前向）求便宜？"""
    total = 64 if smoke else 1024
    rows, worst = [], 0.0
    exponents = range(0, int(math.log2(total)) + 1, 2)
    for exponent in exponents:
        outputs = 2**exponent
        inputs = total // outputs
        network = modes.random_network(inputs, outputs, 256, make_generator(seed))
        x = torch.randn(inputs, generator=make_generator(seed), dtype=torch.float64).numpy()
        by_rows, by_columns = (
            modes.jacobian_by_rows(network, x),
            modes.jacobian_by_columns(network, x),
        )
        worst = max(worst, float(np.abs(by_rows - by_columns).max()))
        seconds = [
            min(seconds_of(partial(method, network, x)) for _ in range(1 if smoke else 3))
            for method in (modes.jacobian_by_rows, modes.jacobian_by_columns)
        ]
        rows.append((inputs, outputs, *seconds))
        print(
            f"  n = {inputs:4d} 个输入，m = {outputs:4d} 个输出："
            f"逐行 {1e3 * seconds[0]:7.1f} 毫秒，逐列 {1e3 * seconds[1]:7.1f} 毫秒"
        )
    worst = max(worst, _against_torch_func(seed))
    check = Check("两种模式与 torch.func 的最大差别", 1.0, (1e-10, 0.0))
    return Outcome(demo_figures.modes_figure(rows), [(check, worst)])


def _against_torch_func(seed: int) -> float:
    """JVP、VJP、雅可比矩阵、海森向量积各与 ``torch.func`` 比较，返回最大差别。"""
    generator = make_generator(seed)
    x, v, u, w = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (6, 6, 4, 6))
    matrix = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    ours = lambda a: (a @ Tensor(matrix.numpy())).tanh() * 2.0 + a.sum().sin()  # noqa: E731
    theirs = lambda a: (a @ matrix).tanh() * 2.0 + a.sum().sin()  # noqa: E731
    scalar = lambda a: (a * a * a).sum() + (a.exp() * 0.1).sum() ** 2  # noqa: E731
    x_, v_, u_, w_ = (t.numpy() for t in (x, v, u, w))
    gradient = torch.func.grad(scalar)
    with warnings.catch_warnings():  # PyTorch 的前向模式自己会触发一条弃用警告
        warnings.simplefilter("ignore", FutureWarning)
        pairs = {
            "JVP（前向）": (modes.jvp(ours, x_, v_)[1], torch.func.jvp(theirs, (x,), (v,))[1]),
            "VJP（反向）": (modes.vjp(ours, x_, u_)[1], torch.func.vjp(theirs, x)[1](u)[0]),
            "雅可比，逐行": (modes.jacobian_by_rows(ours, x_), torch.func.jacrev(theirs)(x)),
            "雅可比，逐列": (modes.jacobian_by_columns(ours, x_), torch.func.jacfwd(theirs)(x)),
            "Hv，反向套反向": (modes.hvp(scalar, x_, w_), torch.func.jvp(gradient, (x,), (w,))[1]),
            "Hv，反向套前向": (
                modes.hvp_reverse_over_forward(scalar, x_, w_),
                torch.func.vjp(gradient, x)[1](w)[0],
            ),
            "海森矩阵": (modes.hessian(scalar, x_), torch.func.hessian(scalar)(x)),
        }
    errors = {name: float(np.abs(a - b.numpy()).max()) for name, (a, b) in pairs.items()}
    for name, error in errors.items():
        print(f"  {name}：与 torch.func 之差 {error:.1e}")
    return max(errors.values())


# ---------------------------------------------------------------- 高阶导数


def topic_newton(seed: int, smoke: bool) -> Outcome:
    """有了二阶导数，Rosenbrock 的窄谷要走几步？"""
    start = np.array([-1.2, 1.0])
    newton = modes.newton(modes.rosenbrock, start, 7)
    descent = modes.gradient_descent(modes.rosenbrock, start, 50 if smoke else 2000, 1e-3)
    values = {
        name: [modes.rosenbrock(Tensor(x)).item() for x in path]
        for name, path in (("newton", newton), ("gradient descent", descent))
    }
    for step, (x, value) in enumerate(zip(newton, values["newton"], strict=True)):
        print(f"  牛顿法第 {step} 步：({x[0]:+.8f}, {x[1]:+.8f})，函数值 {value:.3e}")
    print(f"  梯度下降 {len(descent) - 1} 步之后：函数值 {values['gradient descent'][-1]:.3e}")
    check = Check("牛顿法 7 步之后与 (1, 1) 的距离", 2.2, (1e-10, 0.0))
    distance = float(np.linalg.norm(newton[-1] - 1))
    return Outcome(demo_figures.newton_figure(newton, descent, values), [(check, distance)])


def topic_higher(seed: int, smoke: bool) -> Outcome:
    """反向也能建图：一个函数能求几阶导数？"""
    x = np.linspace(-3, 3, 241)
    ours, theirs = Tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    y, t = ours.tanh(), theirs.tanh()
    curves, worst = [y.numpy()], 0.0
    for order in range(1, 6):
        (y,) = grad(y.sum(), ours, create_graph=True)
        (t,) = torch.autograd.grad(t.sum(), theirs, create_graph=True)
        error = float(np.abs(y.numpy() - t.detach().numpy()).max() / t.detach().abs().max())
        worst = max(worst, error)
        curves.append(y.numpy())
        print(
            f"  tanh 的 {order} 阶导数：图有 {_graph_size(y)} 个顶点，与 PyTorch 之差 {error:.1e}"
        )
    check = Check("tanh 的 1 至 5 阶导数：与 PyTorch 的相对误差", 1.0, (1e-12, 0.0))
    return Outcome(demo_figures.higher_figure(x, curves), [(check, worst)])


def _graph_size(y: Tensor) -> int:
    return len(topological_order(y.grad_fn))


# ---------------------------------------------------------------- 手推


def topic_manual(seed: int, smoke: bool) -> Outcome:
    """不用任何引擎，手推线性、批归一化、tanh、交叉熵的梯度，对得上吗？"""
    values = manual_backprop.random_problem(32, 6, 5, 3, seed)
    manual = manual_backprop.manual_gradients(values)
    engine = manual_backprop.engine_gradients(values)
    official = manual_backprop.torch_gradients(values)
    worst = 0.0
    scale = max(float(np.abs(g).max()) for g in official.values())
    print("  变量        形状       手推与 PyTorch  引擎与 PyTorch")
    for name, expected in official.items():
        errors = [float(np.abs(g[name] - expected).max()) / scale for g in (manual, engine)]
        worst = max(worst, *errors)
        shape = str(tuple(expected.shape))
        print(f"  {name:10s}  {shape:9s}  {errors[0]:.1e}         {errors[1]:.1e}")
    check = Check("手推与引擎的梯度：与 PyTorch 的相对误差", 1.0, (1e-12, 0.0))
    return Outcome(None, [(check, worst)])


TOPICS: dict[str, Topic] = {
    "tensors": topic_tensors,
    "graph": topic_graph,
    "scalar": topic_scalar,
    "gradcheck": topic_gradcheck,
    "modes": topic_modes,
    "newton": topic_newton,
    "higher": topic_higher,
    "manual": topic_manual,
}
