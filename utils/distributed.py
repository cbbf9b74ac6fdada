"""多进程：由脚本自己派生，或由 torchrun 启动；进程之间经 ``torch.distributed`` 通信。

    result = launch(worker, processes=2, args=(x,))     # worker(x) 在每个进程里运行

同一个脚本两种启动方式：``python 脚本.py`` 时在这里派生子进程；由 ``torchrun`` 启动时进程已经有了，
只要加入进程组。

``world()`` 说出自己是几号、共几个进程；``Shard`` 把每一批分给各个进程；``sum_over_processes`` 与
``average_buffers`` 汇总。只有一个进程时它们都照常可用，什么也不做。
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from utils.cli import EXIT_INTERRUPTED, UserError


def launched_by_torchrun() -> bool:
    """本进程是否由 torchrun 启动。"""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def launch(
    worker: Callable[..., Any], processes: int, args: tuple[Any, ...] = (), backend: str = "gloo"
) -> Any:
    """在 ``processes`` 个进程里各运行一次 ``worker(*args)``，返回 0 号进程的返回值。

    ``worker`` 里可以直接使用 ``torch.distributed``；每个进程只用一个线程。由 torchrun 启动时
    不再派生，进程数以它为准，每个进程都得到自己的返回值。

    参数:
        worker: 模块最外层的函数（派生的进程要能按名字找到它）。
        processes: 进程数。
        args: 传给 ``worker`` 的参数，须能序列化。
        backend: ``gloo``（CPU）或 ``nccl``（GPU）。

    异常:
        UserError: 这个 PyTorch 没有编入 ``torch.distributed``；或 ``worker`` 抛出了 ``UserError``。
    """
    if not dist.is_available():
        raise UserError("这个 PyTorch 没有编入 torch.distributed，无法多进程运行")
    if launched_by_torchrun():
        _start(backend)
        result = worker(*args)
        _stop()
        return result
    with tempfile.TemporaryDirectory() as folder:
        arguments = (Path(folder), processes, worker, args, backend)
        context = torch.multiprocessing.start_processes(
            _child, arguments, nprocs=processes, join=False, start_method="spawn"
        )
        try:
            while not context.join():
                pass
        except ProcessRaisedException:
            message = Path(folder) / "error"
            if message.exists():  # 用户的错误，不必给出各进程的调用栈
                raise UserError(message.read_text(encoding="utf-8")) from None
            raise
        except ProcessExitedException as error:
            if error.exit_code == EXIT_INTERRUPTED:  # 子进程先收到了 Ctrl-C
                raise KeyboardInterrupt from None
            raise
        finally:  # 无论怎样结束，都不留下无主的进程
            for process in context.processes:
                process.terminate()
                process.join()
        return pickle.loads((Path(folder) / "result").read_bytes())


def _child(
    rank: int, folder: Path, processes: int, worker: Callable, args: tuple, backend: str
) -> None:
    # Ctrl-C 或父进程消失时（PyTorch 会送来同样的信号）悄悄退出，由父进程报告
    signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
    store = dist.FileStore(str(folder / "store"), processes)
    try:
        _start(backend, store=store, rank=rank, world_size=processes)
        result = worker(*args)
    except UserError as error:
        (folder / "error").write_text(str(error), encoding="utf-8")
        raise
    # 出错时不拆组：否则别的进程会抢先报告“连接断开”，真正的原因反而看不到
    _stop()
    if rank == 0:
        (folder / "result").write_bytes(pickle.dumps(result))


def _start(backend: str, **where: Any) -> None:
    """加入进程组。"""
    # 它的缺省参数会捉住当时的进程组；若在建组之后才（被优化器、DDP 间接地）导入，退出时组就放不掉
    import torch.distributed.nn

    # 逐通道卷积的核有一维是 1，那一维的步长是多少都一样，DDP 却要为此提醒
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    torch.set_num_threads(1)
    dist.init_process_group(backend, **where)


def _stop() -> None:
    """退出进程组。"""
    # PyTorch 2.4 拆组时握着 GIL 等通信线程结束，而通信线程放掉 Python 的张量又要 GIL；紧接在通信
    # 之后拆组，两边会互相等死。让出 GIL 片刻，通信线程就放完了
    time.sleep(0.1)
    dist.destroy_process_group()


@contextmanager
def join_torchrun(device: str = "cpu") -> Iterator[None]:
    """由 torchrun 启动时加入进程组，离开时退出；否则什么也不做。

    CPU 上用 gloo，每个进程一个线程；GPU 上用 nccl，每个进程占用编号为 ``LOCAL_RANK`` 的一块，
    ``get_device("auto")`` 与 ``get_device("cuda")`` 随后选中的就是它。

    参数:
        device: ``--device`` 的值。

    异常:
        UserError: 本机的 GPU 不够每个进程一块，或指定了其中一块。
    """
    if not launched_by_torchrun():
        yield
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count or ":" in device:
            raise UserError(
                f"多进程时每个进程占一块 GPU：本机有 {count} 块，--device 应为 auto、cuda 或 cpu，"
                f"--nproc-per-node 不超过 {count}"
            )
        torch.cuda.set_device(local)
    _start("nccl" if on_gpu else "gloo")
    yield
    _stop()  # 出错时不到这里，理由同上


# ---------------------------------------------------------------- 互不相干的任务


def run_parallel(
    function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]], jobs: int
) -> Iterator[Any]:
    """同时用 ``jobs`` 个进程对每个 ``tasks`` 运行 ``function(*task)``，按次序产出返回值。

    每个进程一个线程：小网络这样比一个进程用几个线程快，结果也与 ``jobs`` 无关。中断或出错时不等其余
    的任务，直接结束它们。

    参数:
        function: 模块最外层的函数；参数与返回值须能序列化。
        tasks: 各个任务的位置参数。
        jobs: 进程数；1 表示就在本进程里依次运行。
    """
    if jobs == 1:
        torch.set_num_threads(1)
        yield from (function(*task) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, _begin_worker, (os.getpid(),))
    try:
        for future in [pool.submit(function, *task) for task in tasks]:
            yield future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    pool.shutdown()


def _begin_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C 由父进程处理
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)


def _leave_with(parent: int) -> None:
    """父进程被杀掉之后不独自留下：否则续训时有两个进程写同样的检查点。"""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


# ---------------------------------------------------------------- 数据并行训练


class World(NamedTuple):
    """进程组：本进程的编号与进程数。"""

    rank: int
    size: int

    @property
    def is_main(self) -> bool:
        """是否 0 号进程；打印、存盘、画图只由它来做。"""
        return self.rank == 0


def world() -> World:
    """当前的进程组；没有建组时是唯一的一个进程。"""
    if not (dist.is_available() and dist.is_initialized()):
        return World(0, 1)
    return World(dist.get_rank(), dist.get_world_size())


@contextmanager
def main_first() -> Iterator[None]:
    """其间的事由 0 号先做，做完其余进程再一齐做：例如下载，同时写一个文件会写坏。"""
    rank, size = world()
    if size > 1 and rank > 0:
        dist.barrier()
    yield
    if size > 1 and rank == 0:
        dist.barrier()


class Shard:
    """把 ``batches`` 的每一批分给各个进程：依次切成 ``size`` 段，``rank`` 号取自己的一段。

    每个进程都产出完整的（全局的）一批再切：打乱与增强用同一个生成器，所以与进程数无关；一段也不重复，
    一段也不遗漏。切不匀时各段至多差一个样本；空的一段不产出。

    参数:
        batches: 产出 ``(x, y)``，第一维是样本。
        rank, size: 见 ``World``。
    """

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]], rank: int, size: int) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank={rank} 应在 [0, size={size}) 之内")
        self.batches, self.rank, self.size = batches, rank, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.batches:
            start, stop = (len(x) * r // self.size for r in (self.rank, self.rank + 1))
            if stop > start:
                yield x[start:stop], y[start:stop]


def sum_over_processes(values: Tensor) -> Tensor:
    """各进程的 ``values`` 逐元素之和，人人得到同样的结果；原张量不变。"""
    if world().size == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """把各进程的浮点缓冲区（BatchNorm 的统计量）原地换成平均：每个进程只见过自己的那一份数据。"""
    size = world().size
    if size > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= size
