"""第 1 章的梯度相加：环形 all-reduce 与官方一致；装桶归约之后的梯度等于单进程的大批。

两个、三个进程各启动一次：全部实测在子进程里做完，一并带回来，断言都在父进程里。
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from chapter_01_tensor_autograd.all_reduce import (
    BucketedReducer,
    backward_on,
    ring_all_reduce,
    shard,
)
from tests.parity import normal
from utils import make_generator
from utils.distributed import launch

SHAPES = [(), (1,), (2,), (3,), (7,), (10_007,), (4, 5), (0,)]
DTYPES = [torch.float32, torch.float64, torch.int64]
BUCKETS = [1, 300, 2**20]  # 每个参数一桶、几个参数一桶、全部一桶（字节）
TOTALS = [2, 11, 24]  # 大批的样本数；2 小于 3 个进程，11 分不匀


def make_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """六个参数；各进程的初值相同。"""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 4)]
    return nn.Sequential(*layers).to(dtype)


def make_batch(total: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return normal(total, 6, seed=total).to(dtype), torch.arange(total) % 4


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def error(actual: Tensor, expected: Tensor) -> float:
    """最大绝对误差除以最大的数。"""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# ---------------------------------------------------------------- 子进程里的实测


def gather(value: Any) -> list[Any]:
    """各进程的 ``value``，按进程编号排。"""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def message_of(work: Callable[[], Any]) -> str:
    """``work`` 抛出的异常：类名与消息。"""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "没有出错"


def try_ring() -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES:
        for dtype in DTYPES:
            generator = make_generator(dist.get_rank())
            ours = (100 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
            official = ours.clone()
            sent = ring_all_reduce(ours)
            dist.all_reduce(official)
            rows.append({"sent": gather(sent), "ours": gather(ours), "official": official})
    return rows


def try_reducer(dtype: torch.dtype, bucket_bytes: int, total: int) -> dict[str, Any]:
    """连续三步：各进程只算自己那份，与单进程算全部样本比较。"""
    parallel, single = make_model(dtype), make_model(dtype)
    reducer = BucketedReducer(list(parallel.parameters()), bucket_bytes)
    x, y = make_batch(total, dtype)
    errors, losses = [], []
    for _ in range(3):
        mine = backward_on(parallel, shard(x), shard(y), total)
        left_early = len(reducer.flying)  # 反向结束时，各桶都已出发
        reducer.finish()
        losses.append(abs(sum(gather(mine)) - backward_on(single, x, y, total)))
        errors.append(error(gradients(parallel), gradients(single)))
        for p in [*parallel.parameters(), *single.parameters()]:
            p.data -= 0.5 * p.grad  # 不用 torch.optim：头一次用要多花一两秒导入
    buckets = len(reducer.buckets)
    reducer.detach()
    return {
        "dtype": dtype,
        "errors": max(gather(max(errors))),
        "loss": max(losses),
        "early": (left_early, buckets),
        "identical": len({tuple(g.tolist()) for g in gather(gradients(parallel))}) == 1,
    }


def try_official_ddp() -> float:
    """各份相等时，与官方的 DDP 比较；它把和除以了进程数。"""
    total = 4 * dist.get_world_size()
    x, y = make_batch(total, torch.float64)
    ours = make_model()
    reducer = BucketedReducer(list(ours.parameters()), 300)
    backward_on(ours, shard(x), shard(y), total)
    reducer.finish()
    official = nn.parallel.DistributedDataParallel(make_model())
    F.cross_entropy(official(shard(x)), shard(y)).backward()
    return error(gradients(ours), gradients(official))


def try_unused_parameter(bucket_bytes: int, unused_last: bool) -> str:
    """三层里有一层没有用到；它最后到达或最先到达。"""
    layers = [nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)]
    parameters = [p for layer in layers for p in layer.parameters()]
    reducer = BucketedReducer(parameters, bucket_bytes)
    x = torch.ones(2, 3)
    (layers[2](layers[1](x)) if unused_last else layers[1](layers[0](x))).sum().backward()
    return message_of(reducer.finish)


def mixed_parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (torch.float32, torch.float64)]


def try_misuse() -> tuple[str, float]:
    """两次反向之间没有 finish：应报错；此后（以及少了梯度的一步之后）仍能照常使用。"""
    x, y = make_batch(11, torch.float64)
    parallel, single = make_model(), make_model()
    reducer = BucketedReducer(list(parallel.parameters()), 300)
    backward_on(parallel, shard(x), shard(y), 11)
    message = message_of(lambda: backward_on(parallel, shard(x), shard(y), 11))
    reducer.finish()
    backward_on(parallel, shard(x), shard(y), 11)
    reducer.finish()
    list(parallel.parameters())[-1].sum().backward()  # 只有一个参数得到梯度
    message_of(reducer.finish)
    backward_on(parallel, shard(x), shard(y), 11)
    reducer.finish()
    backward_on(single, x, y, 11)
    return message, error(gradients(parallel), gradients(single))


def try_detached() -> tuple[int, float]:
    """摘掉钩子之后：出发的桶数；梯度与本进程自己那份的误差。"""
    x, y = make_batch(11, torch.float64)
    model, alone = make_model(), make_model()
    reducer = BucketedReducer(list(model.parameters()), 1)
    reducer.detach()
    for m in (model, alone):
        backward_on(m, shard(x), shard(y), 11)
    return len(reducer.flying), error(gradients(model), gradients(alone))


def everything() -> dict[str, Any]:
    cases = [(dtype, b, n) for dtype in DTYPES[:2] for b in BUCKETS for n in TOTALS]
    return {
        "processes": dist.get_world_size(),
        "ring": try_ring(),
        "dtypes": gather(message_of(lambda: BucketedReducer(mixed_parameters(), 100))),
        "strided": gather(message_of(lambda: ring_all_reduce(torch.ones(4, 6)[:, ::2]))),
        "reducer": [try_reducer(*case) for case in cases],
        # 头一次用官方的 DDP 要多花一秒导入，只在两个进程时做
        "ddp": gather(try_official_ddp()) if dist.get_world_size() == 2 else None,
        "unused": {
            (size, last): gather(try_unused_parameter(size, last))
            for size in (1, 2**20)
            for last in (True, False)
        },
        "misuse": gather(try_misuse()),
        "detached": gather(try_detached()),
        "shards": {n: gather(shard(torch.arange(n)).tolist()) for n in (*TOTALS, 1, 100)},
    }


@pytest.fixture(scope="module", params=[2, 3])
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    return launch(everything, request.param)


# ---------------------------------------------------------------- 环形 all-reduce


def test_ring_equals_official(found: dict[str, Any]) -> None:
    cases = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.int64: 0}
    for (shape, dtype), row in zip(cases, found["ring"], strict=True):
        first, official = row["ours"][0], row["official"]
        assert first.shape == shape and first.dtype == dtype
        assert all(torch.equal(each, first) for each in row["ours"])  # 各进程逐位相同
        if found["processes"] == 2:  # 两个数相加，次序无关
            assert torch.equal(first, official)
        torch.testing.assert_close(first, official, rtol=0, atol=300 * tolerance[dtype])
        if first.numel() > 3:
            assert first.count_nonzero() > 0


def test_ring_sends_exactly_the_chunks(found: dict[str, Any]) -> None:
    n, cases = found["processes"], [(s, d) for s in SHAPES for d in DTYPES]
    for (shape, dtype), row in zip(cases, found["ring"], strict=True):
        count, width = torch.Size(shape).numel(), dtype.itemsize
        chunks = [count // n + (i < count % n) for i in range(n)]
        for rank, sent in enumerate(row["sent"]):
            # 相加时不发右邻的那一段，传一圈时不发再右邻的那一段
            skipped = chunks[(rank + 1) % n] + chunks[(rank + 2) % n]
            assert sent == width * (2 * count - skipped)
            assert sent <= 2 * (n - 1) * max(chunks) * width
        assert sum(row["sent"]) == 2 * (n - 1) * count * width  # 平均每进程 2(N−1)/N


def test_ring_refuses_non_contiguous(found: dict[str, Any]) -> None:
    message = "ValueError: ring_all_reduce：形状 (4, 3) 的张量应是连续的"
    assert all("dtype 应全部相同" in text for text in found["dtypes"])
    assert found["strided"] == [message] * found["processes"]


# ---------------------------------------------------------------- 装桶归约


def test_gradients_equal_the_large_batch(found: dict[str, Any]) -> None:
    assert len(found["reducer"]) == 2 * len(BUCKETS) * len(TOTALS)
    for row in found["reducer"]:
        limit = 1e-6 if row["dtype"] == torch.float32 else 1e-12
        assert row["errors"] <= limit and row["loss"] <= limit
        assert row["early"][0] == row["early"][1]
        assert row["identical"]
    assert [row["early"][1] for row in found["reducer"][9::3]] == [6, 4, 1]


@pytest.mark.parametrize("found", [2], indirect=True)
def test_gradients_equal_official_ddp(found: dict[str, Any]) -> None:
    assert max(found["ddp"]) <= 1e-12


def test_parameter_without_gradient_is_reported(found: dict[str, Any]) -> None:
    expected = "RuntimeError: BucketedReducer：2 个参数没有得到梯度：每个参数都应参与损失"
    for messages in found["unused"].values():
        assert messages == [expected] * found["processes"]


def test_reducer_recovers_from_misuse(found: dict[str, Any]) -> None:
    for message, gap in found["misuse"]:
        assert "每次反向之后都要 finish()，才能再反向" in message
        assert gap < 1e-12


def test_detached_reducer_does_nothing(found: dict[str, Any]) -> None:
    assert found["detached"] == [(0, 0.0)] * found["processes"]


def test_shards_partition_the_batch(found: dict[str, Any]) -> None:
    for total, parts in found["shards"].items():
        assert [i for part in parts for i in part] == list(range(total))
        sizes = [len(part) for part in parts]
        assert len(sizes) == found["processes"] and max(sizes) - min(sizes) <= 1


# ---------------------------------------------------------------- 不需要多进程的


@pytest.mark.parametrize("bucket_bytes", [0, 1, 40, 72, 300, 432, 500, 10_000])
def test_buckets(bucket_bytes: int) -> None:
    parameters = list(make_model().parameters())
    reducer = BucketedReducer(parameters, bucket_bytes)
    assert all(reducer.buckets)
    flat = [p for bucket in reducer.buckets for p in bucket]
    assert [id(p) for p in flat] == [id(p) for p in reversed(parameters)]
    sizes = [sum(p.numel() * 8 for p in bucket) for bucket in reducer.buckets]
    for size, bucket in zip(sizes, reducer.buckets, strict=True):
        assert size <= bucket_bytes or len(bucket) == 1
    for size, following in zip(sizes, reducer.buckets[1:], strict=False):
        assert size + following[0].numel() * 8 > bucket_bytes  # 还装得下就不另起一桶
    with pytest.raises(RuntimeError, match="6 个参数没有得到梯度"):
        reducer.finish()  # 没有反向过


def test_backward_on_divides_by_the_global_count_and_clears_old_gradients() -> None:
    x, y = make_batch(5, torch.float64)
    model = make_model()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    value = backward_on(model, x, y, 20)
    reference = F.cross_entropy(model(x), y) * 5 / 20
    assert value == pytest.approx(reference.item(), rel=1e-14)
    expected = torch.autograd.grad(reference, list(model.parameters()))
    assert error(gradients(model), torch.cat([g.flatten() for g in expected])) <= 1e-14
