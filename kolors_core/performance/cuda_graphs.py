"""CUDA graphs: a step's kernels are recorded once and then launched together.

The UNet launches over 1,000 kernels a step; on a fast GPU launching them takes longer than computing.
Source: https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from kolors_core.attention import forced_kernel
from kolors_core.context import ResizedMasks
from kolors_core.module import state_of

Replay = Callable[[], object]


def record(run: Callable[[], Any]) -> tuple[Replay, Any]:
    """Record a function on the GPU; returns what launches it again, and the tensors that hold its result."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile, choose kernels and allocate before recording
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


@dataclass
class CapturedStep:
    """Recorded step: its inputs, what launches it, its result, and the run whose constants it has."""

    inputs: Any
    replay: Replay
    result: Any
    run: object = None


class CUDAGraphCache:
    """Cache, a `module.WrapStep`, of the last few recorded steps by shape, each for all runs of that shape.

    recorder: `record`, or a stand-in for it where there is no GPU.
    """

    MAX_GRAPHS = 8

    def __init__(self, recorder: Callable[[Callable[[], Any]], tuple[Replay, Any]] = record) -> None:
        self.recorder = recorder
        self.captured: OrderedDict[Any, CapturedStep] = OrderedDict()

    def __call__(
        self, step: Callable[..., Any], constant: Any, nets: Sequence[nn.Module], key: Hashable = ()
    ) -> Callable[..., Any]:
        """Return `step(constant, *changing)` of one run as a function of `changing`; see `module.WrapStep`.

        A recorded step would call no hook: where one of the nets' modules has any, the step itself runs; as
        where image prompts have masks, which are resized while a step runs.
        """
        if any(isinstance(leaf, ResizedMasks) for leaf in tree_leaves(constant)):
            return partial(step, constant)
        run, key = object(), (key, forced_kernel(), *map(state_of, nets))
        hooks = [h for net in nets for m in net.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]

        def replayed(*changing: Tensor) -> Any:
            if any(hooks):
                return step(constant, *changing)
            shapes = tuple((x.shape, x.dtype, x.device) for x in tensors_in((constant, changing)))
            if (captured := self.captured.get((key, shapes))) is None:
                inputs = tree_map_only(Tensor, Tensor.clone, (constant, changing))
                captured = CapturedStep(inputs, *self.recorder(lambda: step(inputs[0], *inputs[1])))
                self.captured[key, shapes] = captured
            self.captured.move_to_end((key, shapes))
            if len(self.captured) > self.MAX_GRAPHS:
                self.captured.popitem(last=False)
            if captured.run is not run:
                _copy(captured.inputs[0], constant)
                captured.run = run
            _copy(captured.inputs[1], changing)
            captured.replay()
            return tree_map_only(Tensor, Tensor.clone, captured.result)

        return replayed


def tensors_in(tree: Any) -> list[Tensor]:
    """Return all tensors in nested arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _copy(targets: Any, values: Any) -> None:
    for target, value in zip(tensors_in(targets), tensors_in(values), strict=True):
        target.copy_(value)
