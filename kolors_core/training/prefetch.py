"""Prefetched batches: those of any source, made ahead by the workers of a torch DataLoader."""

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from kolors_core.training.trainer import BatchSource
from kolors_core.validation import check_int

Rows = tuple[int, int]  # the first, and that behind the last
CPU = torch.device("cpu")


class Prefetched:
    """Source of the batches of another source, which worker processes make before they are asked for.

    The rows that one step was asked for, in the parts of its micro-batches, are expected of the next ones.
    Any other batch is made when it is asked for: batches are the source's, workers change their time alone.
    source: it makes batches on the CPU, which have a method `to(device)`. ahead: batches a worker has ready.
    """

    def __init__(self, source: BatchSource, workers: int = 2, ahead: int = 2) -> None:
        self.source = source
        self.workers, self.ahead = check_int("workers", workers), check_int("ahead", ahead)
        self.step, self.parts = -1, list[Rows]()  # the last step, and what was asked for of it
        self.keys: Iterator[tuple[int, Rows]] = iter(())  # of the batches that workers make
        self.made: Iterator[Any] = iter(())

    def batch(self, step: int, rows: slice, device: torch.device) -> Any:
        """Build the `rows` of a step's batch, or take it from a worker."""
        part = rows.start, rows.stop
        is_made = next(self.keys, None) == (step, part)
        if not is_made:
            self.keys = self.made = iter(())  # ends the workers
            if step == self.step + 1 and self.parts[:1] == [part]:
                self._start(step)
                is_made = next(self.keys) == (step, part)
        self.parts = [*(self.parts if step == self.step else ()), part]
        self.step = step
        batch = next(self.made) if is_made else self.source.batch(step, rows, CPU)
        return batch.to(device)

    def _start(self, step: int) -> None:
        """Start workers on the parts of all steps from this one on."""
        keys = _Keys(step, self.parts)
        loader = DataLoader(
            _Parts(self.source), batch_size=None, sampler=keys, num_workers=self.workers,
            prefetch_factor=self.ahead, collate_fn=_as_it_is, generator=torch.Generator(),
        )  # fmt: skip
        self.keys, self.made = iter(keys), iter(loader)

    def record(self) -> Mapping[str, Any]:
        """Return the source's record: workers change no batch."""
        return self.source.record()


class _Keys:
    """Endless (step, part) from a step on."""

    def __init__(self, first: int, parts: list[Rows]) -> None:
        self.first, self.parts = first, list(parts)

    def __iter__(self) -> Iterator[tuple[int, Rows]]:
        return ((step, part) for step in count(self.first) for part in self.parts)


class _Parts(Dataset[Any]):
    """Batches of a source by (step, part)."""

    def __init__(self, source: BatchSource) -> None:
        self.source = source

    def __getitem__(self, key: tuple[int, Rows]) -> Any:
        step, (start, stop) = key
        return self.source.batch(step, slice(start, stop), CPU)


def _as_it_is(batch: Any) -> Any:
    return batch
