"""A stand-in for an accelerator, whose copies arrive only when they are waited for."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kolors_core.performance.offload import Offload, TransferStream
from kolors_core.pipelines.stages import Task

ACCELERATOR = torch.device("cpu", 0)  # the CPU under another name: a stand-in where there is no accelerator


class LateTransfers(TransferStream):
    """Copies are NaN until their event has come: who uses one too early computes NaN."""

    def __init__(self) -> None:
        super().__init__(ACCELERATOR)
        self.under_way: list[list[tuple[Tensor, Tensor]]] = []

    def copy_to_device(self, homes: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        copies = [torch.full_like(home, torch.nan if home.is_floating_point() else 77) for home in homes]
        self.under_way.append(list(zip(copies, homes, strict=True)))
        return copies, self.under_way[-1]

    def wait(self, event: Any) -> None:
        self._arrive(event)
        self.under_way = [other for other in self.under_way if other is not event]

    def synchronize(self) -> None:
        for event in self.under_way:
            self._arrive(event)
        self.under_way = []

    def _arrive(self, event: Any) -> None:
        for copy, home in event:
            copy.copy_(home)
        event.clear()


@contextmanager
def offloaded(pipe: Task, by_block: bool = False) -> Iterator[Offload]:
    """Within it the pipeline's models work on the stand-in; none is left there, and no copy on its way."""
    transfers = LateTransfers()
    pipe.offload.start(ACCELERATOR, by_block)
    pipe.offload.transfers = transfers
    pipe._enter_stage()
    try:
        yield pipe.offload
    finally:
        pipe.offload.end()
    assert pipe.offload.bytes_on_device == 0 and not transfers.under_way
