"""多进程：由脚本自己派生，或由 torchrun 启动；进程之间经 ``torch.distributed`` 通信。

    result = launch(worker, processes=2, args=(x,))     # worker(x) 在每个进程里运行

同一个脚本两种启动方式：``python 脚本.py`` 时在这里派生子进程；由 ``torchrun`` 启动时进程已经有了，
只要加入进程组。
"""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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
        result = _join(worker, args, backend)
        dist.destroy_process_group()
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
        result = _join(worker, args, backend, store=store, rank=rank, world_size=processes)
    except UserError as error:
        (folder / "error").write_text(str(error), encoding="utf-8")
        raise
    # 出错时不拆组：否则别的进程会抢先报告“连接断开”，真正的原因反而看不到
    dist.destroy_process_group()
    if rank == 0:
        (folder / "result").write_bytes(pickle.dumps(result))


def _join(worker: Callable, args: tuple, backend: str, **where: Any) -> Any:
    # 它的缺省参数会捉住当时的进程组；若在建组之后才（被优化器、DDP 间接地）导入，退出时组就放不掉
    import torch.distributed.nn

    torch.set_num_threads(1)
    dist.init_process_group(backend, **where)
    result = worker(*args)
    # PyTorch 2.4 拆组时握着 GIL 等通信线程结束，而通信线程放掉 Python 的张量又要 GIL；紧接在通信
    # 之后拆组，两边会互相等死。让出 GIL 片刻，通信线程就放完了
    time.sleep(0.1)
    return result
