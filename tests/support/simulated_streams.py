"""Streams, events and graphs of a simulated device (simulated_device.py), in plain Python.

A copy on another stream than the computing one writes NaN at once, and its values when the computing stream
waits for it. So the order of copy, event, use and release shows: used early it is NaN, freed early `lost`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet, finalize, ref

import numpy as np
import torch
from torch import Tensor


def flat(*groups: Any) -> Iterator[Any]:
    """The leaves of arguments."""
    for group in groups:
        for value in group:
            if type(value) in (list, tuple):
                yield from flat(value)
            else:
                yield value


def tensor_in(memory: np.ndarray, dtype: torch.dtype, shape: Any, stride: Any) -> Tensor:
    """A CPU tensor in an array of bytes."""
    size = memory.nbytes // dtype.itemsize * dtype.itemsize
    return torch.from_numpy(memory[:size]).view(dtype).as_strided(shape, stride)


class Stream:
    """A stream of copies, and `compute`, which computes."""

    compute: "Stream"
    current: "Stream"

    def __init__(self, *_: Any) -> None:
        self.pending: list[Copy] = []

    @contextmanager
    def using(self) -> Iterator[None]:
        before, Stream.current = Stream.current, self
        try:
            yield
        finally:
            Stream.current = before

    def record_event(self) -> list["Copy"]:
        return list(self.pending)

    def wait_event(self, event: list["Copy"]) -> None:
        if self is Stream.compute:  # a side stream waits for the computation, which is done
            for copy in event:
                copy.finish()

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())


Stream.compute = Stream.current = Stream()


class Copy:
    """A copy on a side stream into memory that it does not keep alive."""

    lost = 0  # copies whose memory was freed, and so given to others, before the computing stream had waited

    def __init__(self, stream: Stream, memory: np.ndarray, target: Tensor, source: Tensor) -> None:
        self.stream, self.memory, self.source = stream, ref(memory), source
        self.form = target.dtype, target.shape, target.stride()
        memory[:] = 255  # NaN
        stream.pending.append(self)
        self.guard = finalize(memory, self._lose)

    def finish(self) -> None:
        if self in self.stream.pending and (memory := self.memory()) is not None:
            self.stream.pending.remove(self)
            self.guard.detach()
            tensor_in(memory, *self.form).copy_(self.source)

    def _lose(self) -> None:
        self.stream.pending.remove(self)
        Copy.lost += 1


class Pool:
    """Memory of graphs, as long as there is one."""

    def __init__(self) -> None:
        self.graphs: WeakSet[Graph] = WeakSet()


class Graph:
    """A CUDA graph: replayed, its operations run again on the memory of then."""

    recording: "Graph | None" = None
    recorded: list[tuple[Pool, str]] = []  # the pool and the error mode of every recording

    def __init__(self) -> None:
        self.operations: list[Callable[[], object]] = []

    def pool(self) -> Pool:
        return self.memory

    def replay(self) -> None:
        for operation in self.operations:
            operation()

    @contextmanager
    def capture(self, pool: Pool | None = None, capture_error_mode: str = "global") -> Iterator[None]:
        assert pool is None or pool.graphs, "torch aborts: no graph is left that uses the pool"
        self.memory = Pool() if pool is None else pool
        Graph.recording = self
        try:
            yield
        finally:
            Graph.recording = None
        self.memory.graphs.add(self)
        Graph.recorded.append((self.memory, capture_error_mode))

    def add(self, op: Any, args: list[Any], named: dict[str, Any], result: Any) -> None:
        """Record an operation."""
        self.operations.append(partial(_again, op, args, named, result))


def _again(op: Any, args: list[Any], named: dict[str, Any], result: Any) -> None:
    with torch.no_grad():
        new = op(*args, **named)
    for place, value in zip(flat((result,)), flat((new,)), strict=True):
        if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
            place.copy_(value)
