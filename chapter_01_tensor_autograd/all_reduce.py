"""梯度相加：环形 all-reduce，与一边反向一边归约的装桶。

本文件教什么：梯度是对样本的求和，所以可以分头算再相加；相加就是 all-reduce。``ring_all_reduce`` 用
点对点的收发把它写出来；``BucketedReducer`` 是分布式训练框架的核心：一边反向，一边把已经算好的梯度
装桶、在后台归约。不涉及：模型并行、参数分片、多机容错。对应 README 的「分布式训练：梯度相加」一节。

全部函数都要在 ``torch.distributed`` 的进程组里调用；入口见 data_parallel.py。

参考: Li 等, 2020, arXiv:2006.15704（PyTorch DDP）；Patarasuk, Yuan, 2009, J. Parallel and
Distributed Computing 69(2)（环形 all-reduce）。
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# ---------------------------------------------------------------- 环形 all-reduce


def ring_all_reduce(x: Tensor) -> int:
    """把各进程的 ``x`` 逐元素相加，结果原地写回每个进程；返回本进程发出的字节数。

    N 个进程排成一环，``x`` 切成 N 段。前 N−1 步，每步把一段发给右邻、收下左邻的一段并加上
    （reduce-scatter），此后每个进程手里有一段是完整的和；再走 N−1 步，把完整的段传一圈
    （all-gather）。每个进程共发 ``2(N−1)/N`` 倍的数据，与 N 几乎无关。

    参数:
        x: 连续的张量，各进程形状、dtype 相同。
    """
    if not x.is_contiguous():
        raise ValueError(f"ring_all_reduce：形状 {tuple(x.shape)} 的张量应是连续的")
    rank, size = dist.get_rank(), dist.get_world_size()
    chunks = x.view(-1).tensor_split(size)
    sent = 0
    for step in range(size - 1):
        outgoing, incoming = chunks[(rank - step) % size], chunks[(rank - step - 1) % size]
        sent += _shift(outgoing, received := torch.empty_like(incoming))
        incoming += received
    for step in range(size - 1):
        sent += _shift(chunks[(rank - step + 1) % size], chunks[(rank - step) % size])
    return sent


def _shift(outgoing: Tensor, incoming: Tensor) -> int:
    """把 ``outgoing`` 发给右邻，同时从左邻收进 ``incoming``；返回发出的字节数。"""
    rank, size = dist.get_rank(), dist.get_world_size()
    # 段可能为空（元素比进程少）；收发双方看的是同一段，因此判断一致
    request = dist.isend(outgoing, (rank + 1) % size) if outgoing.numel() else None
    if incoming.numel():
        dist.recv(incoming, (rank - 1) % size)
    if request is not None:
        request.wait()
    return outgoing.numel() * outgoing.element_size()


# ---------------------------------------------------------------- 装桶归约


class BucketedReducer:
    """一边反向，一边归约：梯度按反向到达的次序装桶，一桶装满就在后台 all-reduce。

    小梯度一个个地发，延迟占大头；全部算完再一起发，网络白白等着。装桶是两者的折中。各进程须以同样的
    次序发起归约，所以桶总是按编号依次出发。

    参数:
        parameters: 模型的参数，按前向的次序；反向到达的次序大致与之相反。
        bucket_bytes: 每桶至多多少字节（单个参数更大时自成一桶）。

    异常:
        ValueError: 参数的 dtype 不全相同。

    用法：``loss.backward()`` 之后调用 ``finish()``，各参数的 ``grad`` 就是各进程之和。
    下一次反向之前要清零：留着的旧梯度已经是各进程之和，会再被加一遍。
    """

    def __init__(self, parameters: Sequence[nn.Parameter], bucket_bytes: int) -> None:
        if len({p.dtype for p in parameters}) > 1:
            raise ValueError("BucketedReducer：参数的 dtype 应全部相同，才能拼成一条")
        self.buckets: list[list[nn.Parameter]] = []
        filled = bucket_bytes
        for p in reversed(parameters):
            size = p.numel() * p.element_size()
            if filled + size > bucket_bytes:
                self.buckets.append([])
                filled = 0
            self.buckets[-1].append(p)
            filled += size
        self.handles = [
            p.register_post_accumulate_grad_hook(partial(self._arrive, index))
            for index, bucket in enumerate(self.buckets)
            for p in bucket
        ]
        self._reset()

    def _reset(self) -> None:
        self.missing = [len(bucket) for bucket in self.buckets]  # 每桶还差几个梯度
        self.flying: list[tuple[Tensor, Any]] = []  # 已出发的桶：(拼成一条的梯度, 归约的句柄)

    def _arrive(self, index: int, parameter: nn.Parameter) -> None:
        if self.missing[index] == 0:
            raise RuntimeError("BucketedReducer：每次反向之后都要 finish()，才能再反向")
        self.missing[index] -= 1
        while len(self.flying) < len(self.buckets) and self.missing[len(self.flying)] == 0:
            bucket = self.buckets[len(self.flying)]
            flat = torch.cat([p.grad.reshape(-1) for p in bucket])
            self.flying.append((flat, dist.all_reduce(flat, async_op=True)))

    def finish(self) -> None:
        """等全部归约完成，各参数的 ``grad`` 换成各进程之和。

        异常:
            RuntimeError: 有的参数没有参与这次反向，它所在的桶永远装不满。
        """
        for _, work in self.flying:
            work.wait()
        flying, missing = self.flying, sum(self.missing)
        self._reset()
        if missing:
            raise RuntimeError(
                f"BucketedReducer：{missing} 个参数没有得到梯度：每个参数都应参与损失"
            )
        for (flat, _), bucket in zip(flying, self.buckets, strict=True):
            parts = flat.split([p.numel() for p in bucket])
            for p, part in zip(bucket, parts, strict=True):
                p.grad = part.view_as(p)  # 就用桶里的那一段，不再复制

    def detach(self) -> None:
        """摘掉全部钩子。"""
        for handle in self.handles:
            handle.remove()


def shard(batch: Tensor) -> Tensor:
    """本进程分到的那一份样本：第 rank 份，各份至多差一个。"""
    return batch.tensor_split(dist.get_world_size())[dist.get_rank()]


def backward_on(model: nn.Module, x: Tensor, y: Tensor, total: int) -> float:
    """在 ``x`` 上反向；损失除以全局的样本数 ``total``，于是各进程的梯度相加正是大批的梯度。

    若各自取平均再平均（DDP 的做法），各份样本数不等时就不等于大批。
    """
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y, reduction="sum") / total
    loss.backward()
    return loss.item()
