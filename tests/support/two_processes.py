"""Processes of one run, as `torchrun` would start them, but watched by nobody and quick to start."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")  # imports once, not in every process
WORKERS = ("batch_worker", "cache_worker", "row_worker", "small_training", "train_worker")
# An optimizer's first step imports torch's compiler.
CONTEXT.set_forkserver_preload(["torch._dynamo", *(f"tests.support.{name}" for name in WORKERS)])


def start_two(work: Callable[..., int], log: Path, *arguments: Any) -> list[BaseProcess]:
    """Start `work(*arguments)`, which returns an exit status, in both; what they print goes to the log."""
    return start(2, work, log, *arguments)


def start(count: int, work: Callable[..., int], log: Path, *arguments: Any) -> list[BaseProcess]:
    """Start `work(*arguments)` in so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=_run, args=(rank, count, port, log, work, arguments), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    return list(processes)


def _run(
    rank: int, count: int, port: int, log: Path, work: Callable[..., int], arguments: tuple[Any, ...]
) -> None:
    told = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in told.items()})
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    torch.set_num_threads(1)
    status = work(*arguments)
    sys.stdout.flush()
    os._exit(status)  # the first to leave takes their meeting place along, and the other's clean end may wait
