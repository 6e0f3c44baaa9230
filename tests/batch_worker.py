"""Two processes of one batch, as `torchrun` would start them, but watched by nobody and quick to start."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kolors_core import KolorsPipeline
from kolors_core.batch import main
from kolors_core.guidance import guided
from kolors_core.placement import join_processes
from kolors_core.split_guidance import Pair

CONTEXT = multiprocessing.get_context("forkserver")  # imports once, not in every process
CONTEXT.set_forkserver_preload(["tests.batch_worker"])


def start_two(work: Callable[..., int], log: Path, *arguments: Any) -> list[BaseProcess]:
    """Start `work(*arguments)`, which returns an exit status, in both; what they print goes to the log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=_run, args=(rank, port, log, work, arguments), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    return list(processes)


def _run(rank: int, port: int, log: Path, work: Callable[..., int], arguments: tuple[Any, ...]) -> None:
    told = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in told.items()})
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    torch.set_num_threads(1)
    sys.exit(work(*arguments))


def draw_unlike(*arguments: list[str]) -> int:
    """A batch with as many threads as the rank + 1, and its own arguments if there are several."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(rank + 1)
    return main(arguments[rank % len(arguments)])


def measure_split(out: Path, arguments: list[str]) -> int:
    """Write how far split guidance is from whole in float64 and float32 latents; then run a batch."""
    join_processes("cpu")
    pair, errors = Pair(), []
    pipe = KolorsPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    for dtype in (torch.float64, torch.float32):
        pipe.to(dtype)
        pipe.guided = guided
        expected = _latents(pipe)
        pipe.guided = pair.guided
        errors.append(((_latents(pipe) - expected).abs().max() / expected.abs().max()).item())
    if dist.get_rank() == 0:
        out.write_text("\n".join(map(str, errors)))
    return main(arguments)


def _latents(pipe: KolorsPipeline) -> torch.Tensor:
    return pipe(
        ["一张瓢虫的照片", "a red apple"], 64, 72, 4, negative_prompt="cat", output_type="latent",
        generator=torch.Generator().manual_seed(1),
    )[0]  # fmt: skip
