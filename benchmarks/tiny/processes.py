"""Trainings of several processes: on a CPU, two of one thread each are faster than one of two.

torchrun --nproc-per-node 2 -m benchmarks.tiny.controlnet OUT
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from kolors_core.training.step import OnStep, Step


@contextmanager
def processes() -> Iterator[bool]:
    """Join the processes that torchrun started, if it did; yields whether this is the first of them."""
    if "RANK" not in os.environ:
        yield True
        return
    dist.init_process_group("gloo")
    try:
        yield is_first()
    finally:
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this is the first process, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def report_every(steps: int, name: str) -> OnStep:
    """A Trainer's `on_step` that prints, in the first process, the loss of each `steps`-th step."""
    start = time.monotonic()

    def report(step: Step) -> None:
        if step.step % steps == 0 and is_first():
            seconds = time.monotonic() - start
            print(f"{name} step {step.step}: loss {step.loss:.4f}, {seconds:.0f} s", flush=True)

    return report
