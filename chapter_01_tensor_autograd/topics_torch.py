"""demo.py 的专题，后一半：PyTorch 里的叶子与开关、经典错误、自定义算子、检查点、累积、图的捕获。"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from chapter_01_tensor_autograd import demo_figures, engine
from chapter_01_tensor_autograd.checkpointing import (
    checkpoint,
    checkpoint_by_hooks,
    checkpoint_sequential,
)
from chapter_01_tensor_autograd.custom_function import (
    binarize,
    fused_cross_entropy,
    saved_bytes,
    silu,
)
from utils import make_generator, set_seed
from utils.memory import TensorMemory
from utils.model_summary import display_width
from utils.synth_points import two_moons
from utils.timer import seconds_of
from utils.topics import Check, Outcome, Topic

# ---------------------------------------------------------------- 叶子与开关


def topic_leaf(seed: int, smoke: bool) -> Outcome:
    """谁是叶子，谁有 grad_fn，反向之后谁有 grad？"""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = x * 3
    y.retain_grad()
    seen: list[float] = []
    y.register_hook(lambda g: seen.append(g.sum().item()))
    z = (y**2).sum()
    with torch.no_grad():
        quiet = x * 3
    with torch.inference_mode():
        frozen = x * 3
    z.backward()
    tensors = {
        "x（叶子）": x,
        "y = 3x，retain_grad": y,
        "z = Σy²": z,
        "x.detach()": x.detach(),
        "no_grad 里的 3x": quiet,
        "inference_mode 里的 3x": frozen,
    }
    print("  张量                     叶子  要求梯度  grad_fn          grad")
    for name, t in tensors.items():
        history = type(t.grad_fn).__name__ if t.grad_fn is not None else "—"
        kept = t.is_leaf or t.retains_grad  # 没有留梯度的中间结果，读 grad 会警告
        value = "—" if not kept or t.grad is None else str(t.grad.tolist())
        pad = " " * (24 - display_width(name))
        flags = ["是" if flag else "否" for flag in (t.is_leaf, t.requires_grad)]
        print(f"  {name}{pad} {flags[0]}    {flags[1]}        {history:15s}  {value}")
    print(f"  y 上的钩子收到的梯度之和 {seen[0]:.0f}；dz/dx = 18x = {(18 * x).tolist()}")
    ours = engine.Tensor([1.0, 2.0], requires_grad=True)
    ((ours * 3.0) ** 2).sum().backward()
    gap = (x.grad - torch.from_numpy(ours.grad.numpy())).abs().max().item()
    return Outcome(None, [(Check("叶子的梯度：引擎与 PyTorch 之差", 1.0, (0.0, 0.0)), gap)])


# ---------------------------------------------------------------- 经典错误


def _double_backward(lib: Callable[[list[float]], object], cured: bool) -> None:
    x = lib([1.0, 2.0])
    y = (x * x).sum()
    y.backward(retain_graph=cured)
    y.backward()


def _in_place(lib: Callable[[list[float]], object], cured: bool) -> None:
    y = lib([1.0, 2.0]).exp()
    z = (y * y).sum()
    if cured:
        y = y + 1.0  # 新的内存，旧的还在
    else:
        y.add_(1.0)  # 反向要用的 y 被改掉了
    z.backward()


def _leaf_in_place(lib: Callable[[list[float]], object], cured: bool) -> None:
    x = lib([1.0, 2.0])
    no_grad = engine.no_grad if isinstance(x, engine.Tensor) else torch.no_grad
    with no_grad() if cured else nullcontext():
        x.add_(1.0)


def _non_scalar(lib: Callable[[list[float]], object], cured: bool) -> None:
    y = lib([1.0, 2.0]) * 2.0
    (y.sum() if cured else y).backward()


def _detached(lib: Callable[[list[float]], object], cured: bool) -> None:
    x = lib([1.0, 2.0])
    y = x * 2.0 if cured else (x * 2.0).detach()
    y.sum().backward()


def _none_grad(lib: Callable[[list[float]], object], cured: bool) -> None:
    y = lib([1.0, 2.0]) * 2.0
    if cured:
        y.retain_grad()
    y.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch 对此只给一条警告
        if y.grad is None:
            raise RuntimeError("没有报错，只是 y.grad 为 None：y 不是叶子")


def _integer(lib: Callable[[list[float]], object], cured: bool) -> None:
    lib([1.0, 2.0] if cured else [1, 2])


ERRORS = {
    "第二次反向": (_double_backward, "第一次写 retain_graph=True，或重做前向"),
    "保存之后原地修改": (_in_place, "改用 y = y + 1"),
    "原地修改叶子": (_leaf_in_place, "放进 no_grad"),
    "输出不是标量": (_non_scalar, "先 sum() 或 mean()，或给出上游梯度"),
    "图断了": (_detached, "去掉 detach、.item()、NumPy 往返"),
    "中间结果没有 grad": (_none_grad, "反向之前 y.retain_grad()"),
    "对整数求导": (_integer, "换成浮点数"),
}


def _first_words(message: str, limit: int = 110) -> str:
    """一行之内放得下的开头，在空格处截断。"""
    message = " ".join(message.split())
    return message if len(message) <= limit else message[:limit].rsplit(" ", 1)[0] + " …"


def topic_errors(seed: int, smoke: bool) -> Outcome:
    """自动微分的经典错误：怎样触发，两个引擎怎么说，怎样治好？"""
    libraries = {
        "PyTorch": lambda values: torch.tensor(values, requires_grad=True),
        "引擎": lambda values: engine.Tensor(values, requires_grad=True),
    }
    raised = cured = 0
    for name, (scenario, cure) in ERRORS.items():
        print(f"  {name}（治法：{cure}）")
        for library, make in libraries.items():
            try:
                scenario(make, False)
            except (RuntimeError, ValueError, TypeError) as error:
                raised += 1
                print(f"    {library}：{_first_words(str(error))}")
            scenario(make, True)
            cured += 1
    total = len(ERRORS) * len(libraries)
    return Outcome(
        None,
        [
            (Check("经典错误：触发了几种（两个引擎）", 0.0, (total, total)), float(raised)),
            (Check("经典错误：治好了几种（两个引擎）", 0.0, (total, total)), float(cured)),
        ],
    )


# ---------------------------------------------------------------- 自定义算子


def topic_custom(seed: int, smoke: bool) -> Outcome:
    """自己写的算子对不对，省了多少？不可导的前向怎样训练？"""
    generator = make_generator(seed)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, 1, 1, 2])
    fused = partial(fused_cross_entropy, target=target)
    passed = 0
    for name, function in (("fused_cross_entropy", fused), ("silu", silu)):
        for check in (gradcheck, gradgradcheck):
            passed += check(function, x)
            print(f"  {name} 通过 {check.__name__}")
    passed += gradgradcheck(binarize, x)
    try:
        gradcheck(binarize, x)
    except RuntimeError:
        passed += 1
        print("  binarize 不过 gradcheck（直通估计本来就不是前向的导数），通过 gradgradcheck")
    _show_saved(generator)
    curves = binary_training(seed, steps=20 if smoke else 600)
    for name, losses in curves.items():
        print(f"  {name}：损失 {losses[0]:.3f} -> {statistics.fmean(losses[-20:]):.3f}")
    with_ste, without = (statistics.fmean(losses[-20:]) for losses in curves.values())
    results = [
        (Check("自定义算子：通过的核对（共 6 项）", 0.0, (6.0, 6.0)), float(passed)),
        (Check("二值网络：直通估计的损失 ÷ 照实求导", 1.0, (0.7, 0.0)), with_ste / without),
    ]
    return Outcome(demo_figures.binary_figure(curves), results)


def _show_saved(generator: torch.Generator) -> None:
    x = torch.randn(1000, 1000, generator=generator, requires_grad=True)
    logits = torch.randn(1000, 1000, generator=generator, requires_grad=True)
    target = torch.zeros(1000, dtype=torch.long)
    cases = {
        "x σ(x)，照字面写": saved_bytes(lambda t: t * torch.sigmoid(t), x),
        "silu（本章）": saved_bytes(silu, x),
        "交叉熵，照字面写": saved_bytes(
            lambda z: -(z.exp() / z.exp().sum(1, keepdim=True)).log().gather(1, target[:, None])
            .mean(), logits),
        "fused_cross_entropy（本章）": saved_bytes(fused_cross_entropy, logits, target),
    }  # fmt: skip
    for name, count in cases.items():
        print(f"  {name}：为反向保存 {count / 2**20:.1f} MiB")


def binary_training(seed: int, steps: int) -> dict[str, list[float]]:
    """隐藏层输出只能是 ±1 的网络分双月：直通估计，与照实求导（处处为零）。"""
    x, y = two_moons(600, make_generator(seed))

    def run(activation: Callable[[Tensor], Tensor]) -> list[float]:
        set_seed(seed)
        layers = nn.ModuleList([nn.Linear(2, 16), nn.Linear(16, 16), nn.Linear(16, 2)])
        optimizer = torch.optim.Adam(layers.parameters(), lr=0.01)
        losses = []
        for _ in range(steps):
            hidden = activation(layers[1](activation(layers[0](x))))
            loss = nn.functional.cross_entropy(layers[2](hidden), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return {"straight-through": run(binarize), "true derivative (zero)": run(torch.sign)}


# ---------------------------------------------------------------- 激活检查点


def make_layers(count: int, width: int) -> list[nn.Module]:
    """``count`` 个 Linear-GELU-Dropout 层。"""
    return [
        nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1)) for _ in range(count)
    ]


def checkpoint_run(
    layers: list[nn.Module], x: Tensor, segments: int, method: Callable[..., Tensor]
) -> tuple[list[Tensor], float, float]:
    """一次前向加反向：返回 (全部参数的梯度, 激活的峰值 MiB, 秒)。

    参数与输入的梯度事先分配好，不算在峰值里。
    """
    parameters = [p for layer in layers for p in layer.parameters()]

    def step() -> None:
        for p in [*parameters, x]:
            p.grad = torch.zeros_like(p)
        set_seed(0)  # 每次同样的 dropout 掩码
        checkpoint_sequential(layers, segments, x, method).square().mean().backward()

    seconds = min(seconds_of(step) for _ in range(3))
    for p in [*parameters, x]:
        p.grad = torch.zeros_like(p)
    set_seed(0)
    with TensorMemory() as memory:
        checkpoint_sequential(layers, segments, x, method).square().mean().backward()
    return [p.grad.clone() for p in [*parameters, x]], memory.peak_mib, seconds


def topic_checkpoint(seed: int, smoke: bool) -> Outcome:
    """分成几段最省内存？要多花多少时间？梯度还一样吗？"""
    count, width, batch = (8, 16, 8) if smoke else (64, 256, 256)
    set_seed(seed)
    layers = make_layers(count, width)
    generator = make_generator(seed)
    x = torch.randn(batch, width, generator=generator).requires_grad_()
    splits = [2**k for k in range(count.bit_length())]
    reference, plain, base = checkpoint_run(layers, x, 1, checkpoint)
    rows, equal = [], True
    for method in (checkpoint, checkpoint_by_hooks):
        for segments in splits[1:] if method is checkpoint else [count // 8]:
            grads, peak, seconds = checkpoint_run(layers, x, segments, method)
            same = all(torch.equal(a, b) for a, b in zip(grads, reference, strict=True))
            equal &= same
            print(
                f"  {method.__name__:19s} {segments:2d} 段：激活峰值 {peak:6.2f} MiB"
                f"（{peak / plain:.3f} 倍），时间 {seconds / base:.2f} 倍，"
                f"梯度{'逐位相同' if same else '不同！'}"
            )
            if method is checkpoint:
                rows.append((segments, peak, seconds))
    eighth = next(peak for segments, peak, _ in rows if segments == max(2, count // 8))
    figure = demo_figures.checkpoint_figure([(1, plain, base), *rows], count)
    results = [
        (Check(f"{count} 层 {max(2, count // 8)} 段：激活峰值 ÷ 不设检查点", 1.0, (0.3, 0.0)),
         eighth / plain),
        (Check("检查点：梯度逐位相同（1 为是）", 0.0, (1.0, 1.0)), float(equal)),
    ]  # fmt: skip
    return Outcome(figure, results)


# ---------------------------------------------------------------- 梯度累积


def topic_accumulate(seed: int, smoke: bool) -> Outcome:
    """显存放不下大批怎么办？分成几个小批，梯度累加，等于大批吗？"""
    set_seed(seed)
    width, batch = (16, 60) if smoke else (256, 960)
    model = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 10)).double()
    generator = make_generator(seed)
    x = torch.randn(batch, 32, generator=generator, dtype=torch.float64)
    y = torch.randint(10, (batch,), generator=generator)
    rows, reference, worst = [], None, 0.0
    for micro in (1, 2, 4, 8, 7):  # 7 个小批，大小不一
        model.zero_grad(set_to_none=False)
        with TensorMemory() as memory:
            for part, labels in zip(x.tensor_split(micro), y.tensor_split(micro), strict=True):
                # 除以大批的总数，不是小批自己的：大小不一时也对
                loss = nn.functional.cross_entropy(model(part), labels, reduction="sum") / batch
                loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()]).clone()
        reference = grads if reference is None else reference
        error = ((grads - reference).abs().max() / reference.abs().max()).item()
        worst = max(worst, error)
        rows.append((micro, memory.peak_mib))
        print(
            f"  {micro} 个小批：激活峰值 {memory.peak_mib:6.2f} MiB，与大批的相对误差 {error:.1e}"
        )
    results = [
        (Check("梯度累积与大批的相对误差", 1.0, (1e-12, 0.0)), worst),
        (Check("8 个小批的激活峰值 ÷ 大批", 1.0, (0.4, 0.1)), rows[3][1] / rows[0][1]),
    ]
    return Outcome(None, results)


# ---------------------------------------------------------------- 动态图与静态图


class _Branching(nn.Module):
    """前向有一个取决于数据的分支。"""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() if x.sum() > 0 else -x


def topic_trace(seed: int, smoke: bool) -> Outcome:
    """动态图每次前向都重新建；能不能只建一次，反复使用？"""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    traced = torch.fx.symbolic_trace(model)
    print("  torch.fx 捕获的静态图：")
    for node in traced.graph.nodes:
        sources = "，".join(str(a) for a in node.all_input_nodes)
        print(f"    {node.op:12s} {node.name:8s} ← {sources or '（输入）'}")
    x = torch.randn(5, 3, generator=make_generator(seed))
    same = torch.equal(traced(x), model(x))
    try:
        torch.fx.symbolic_trace(_Branching())
        refused = False
    except torch.fx.proxy.TraceError as error:
        refused = True
        print(f"  取决于数据的分支：{str(error).splitlines()[0][:90]}")
    branch = _Branching()
    positive, negative = torch.ones(2, requires_grad=True), -torch.ones(2, requires_grad=True)
    names = [type(branch(t).grad_fn).__name__ for t in (positive, negative)]
    print(f"  动态图则毫不在意：两个输入各建各的图，{names[0]} 与 {names[1]}")
    check = Check("静态图：结果相同，且拒绝了数据分支（1 为是）", 0.0, (1.0, 1.0))
    return Outcome(None, [(check, float(same and refused and names[0] != names[1]))])


TOPICS: dict[str, Topic] = {
    "leaf": topic_leaf,
    "errors": topic_errors,
    "custom": topic_custom,
    "checkpoint": topic_checkpoint,
    "accumulate": topic_accumulate,
    "trace": topic_trace,
}
