"""CUDA graphs: a step's kernels are recorded once and then launched together.

The UNet launches over 1,000 kernels a step; on a fast GPU launching them takes longer than computing.
Source: https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from kolors_core.attention import forced_kernel
from kolors_core.context import ResizedMasks
from kolors_core.performance.model_version import ModelListing

Replay = Callable[[], object]
Recorder = Callable[[Callable[[], Any]], tuple[Replay, Any]]


class GraphRecorder:
    """Recorder of functions on a GPU.

    All recordings that there are share one pool of memory: a result must be read before the next replay.
    """

    def __init__(self) -> None:
        self.graphs: WeakSet[Any] = WeakSet()  # a pool of which no graph is left cannot be used again

    def __call__(self, run: Callable[[], Any]) -> tuple[Replay, Any]:
        """Record a function; returns what launches it again, and the tensors that hold its result."""
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compile, choose kernels and allocate before recording
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        pool = next((other.pool() for other in self.graphs), None)
        # By default a call in any thread, such as one that pins memory, ends the recording with an error.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = run()
        self.graphs.add(graph)
        return graph.replay, result


class Hashed:
    """Large value whose hash is computed once, for a dictionary that is asked in every step."""

    def __init__(self, value: Hashable) -> None:
        self.value, self.hash = value, hash(value)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Hashed) and self.value == other.value)


class NetState(ModelListing):
    """State of networks that a recording has in it: layers, settings, and where their tensors are.

    Not the tensors' values: a replay reads those of the moment.
    """

    def list_modules(self) -> None:
        """Walk through all modules."""
        super().list_modules()
        self._hooks = [own[name] for own in self.own for name in ("_forward_hooks", "_forward_pre_hooks")]
        self._last, self._kept, self._key = None, list[Tensor | None](), Hashed(None)

    def has_hooks(self) -> bool:
        """Return whether any module has a hook, which a replay would not call."""
        return any(self._hooks)

    def key(self) -> Hashed:
        """Return the present state. It is compared in every step: a callback may change the networks."""
        self.refresh()
        tensors, settings = self.tensors(), self.settings()
        places = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        forwards = [own.get("forward") for own in self.own]
        now = [*map(id, tensors)], places, settings, forwards
        if now != self._last:
            self._last, self._kept = now, tensors  # so that no new tensor gets the identity of one
            forms = tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors)
            kinds = tuple(map(type, self.modules))
            self._key = Hashed((kinds, forms, tuple(places), tuple(settings), tuple(forwards)))
        return self._key


@dataclass
class CapturedStep:
    """Recorded step: its inputs, what launches it, its result, and the run whose constants it has."""

    inputs: Any
    replay: Replay
    result: Any
    run: object = None


class CUDAGraphCache:
    """Cache, a `module.WrapStep`, of the last few recorded steps by shape, each for all runs of that shape.

    Where the step's tensors are not on CUDA, it runs as it is. recorder: a stand-in for `GraphRecorder` on
    any device, for tests.
    """

    MAX_GRAPHS = 24  # a step cache has three for each kind of step, and up to three kinds

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder: Recorder = GraphRecorder() if recorder is None else recorder
        self.device_type = "cuda" if recorder is None else None
        self.captured: OrderedDict[Any, CapturedStep] = OrderedDict()

    def records_on(self, device: torch.device) -> bool:
        """Return whether steps on this device are recorded."""
        return self.device_type in (None, device.type)

    def clear(self) -> None:
        """Free all recordings and their memory."""
        self.captured.clear()

    def __call__(
        self, step: Callable[..., Any], constant: Any, nets: Sequence[nn.Module], key: Hashable = ()
    ) -> Callable[..., Any]:
        """Return `step(constant, *changing)` of one run as a function of `changing`; see `module.WrapStep`.

        A recorded step would call no hook: where one of the nets' modules has any, the step itself runs; as
        where image prompts have masks, which are resized while a step runs. It is recorded anew where a net
        has changed, also between two steps.
        """
        if any(isinstance(leaf, ResizedMasks) for leaf in tree_leaves(constant)):
            return partial(step, constant)
        run, state, of_constant = object(), NetState(nets), Hashed(forms_of(constant))

        def replayed(*changing: Tensor) -> Any:
            if not self.records_on(changing[0].device):
                return step(constant, *changing)
            full_key = key, forced_kernel(), state.key(), of_constant, forms_of(changing)
            if state.has_hooks():
                return step(constant, *changing)
            if (captured := self.captured.get(full_key)) is None:
                inputs = tree_map_only(Tensor, Tensor.clone, (constant, changing))
                captured = CapturedStep(inputs, *self.recorder(lambda: step(inputs[0], *inputs[1])))
                self.captured[full_key] = captured
            self.captured.move_to_end(full_key)
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


def forms_of(tree: Any) -> tuple[Any, ...]:
    """Return the shape, dtype and device of each tensor in nested arguments."""
    return tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors_in(tree))


def _copy(targets: Any, values: Any) -> None:
    for target, value in zip(tensors_in(targets), tensors_in(values), strict=True):
        target.copy_(value)
