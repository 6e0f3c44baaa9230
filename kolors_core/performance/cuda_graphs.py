"""CUDA graphs: a step's kernels are recorded once and then launched together.

The UNet launches over 1,000 kernels a step; on a fast GPU launching them takes longer than computing.
Source: https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Step = Callable[..., Tensor]
Replay = Callable[[], object]


def record(run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """Record a function on the GPU: what launches it again, and the tensor that then has its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile, choose kernels and allocate before recording
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


@dataclass
class Recording:
    """A recorded step: what it reads, what launches it, what it writes, and which run's constants it has."""

    inputs: Any
    replay: Replay
    result: Tensor
    run: object = None


class Graphs:
    """Recordings of one step for the last few shapes, each used by every run of that shape.

    recorder: `record`, or what stands for it where there is no GPU.
    """

    KEPT = 4

    def __init__(self, recorder: Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]] = record) -> None:
        self.recorder = recorder
        self.known: OrderedDict[Any, Recording] = OrderedDict()

    def of_run(self, step: Step, key: Any, constant: Any) -> Step:
        """`step(constant, *changing)` of one run as a function of `changing`, which are tensors.

        key: what is baked into a recording beside shapes: where weights are, and all numbers that are no
        tensors. constant: tensors, nested as they like, that stay the same within the run.
        """
        run = object()

        def replayed(*changing: Tensor) -> Tensor:
            inputs = (constant, changing)
            shapes = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in _tensors(inputs))
            recording = self.known.get((key, shapes))
            if recording is None:
                own = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)
                recording = Recording(own, *self.recorder(lambda: step(own[0], *own[1])))
                self.known[key, shapes] = recording
                if len(self.known) > self.KEPT:
                    self.known.popitem(last=False)
            self.known.move_to_end((key, shapes))
            if recording.run is not run:
                _copy(recording.inputs[0], constant)
                recording.run = run
            _copy(recording.inputs[1], changing)
            recording.replay()
            return recording.result.clone()

        return replayed


def _copy(places: Any, values: Any) -> None:
    for place, value in zip(_tensors(places), _tensors(values), strict=True):
        place.copy_(value)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
