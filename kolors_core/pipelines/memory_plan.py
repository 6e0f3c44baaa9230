"""What each stage needs in memory: the pipeline runs without values, and what it would allocate is counted.

A twin of the pipeline whose models are on the meta device runs a few steps. Nothing is computed, no weight is
read or copied, and a changed architecture is planned as it stands. A `Ledger` follows every storage from the
operation that makes it to its end. What a kernel takes and gives back within one operation is not seen there:
attention says what its kernels keep (`attention.planned_for`), and of a CPU's convolutions `workspace` does.
Sizes are bytes inside and GiB (2^30 bytes) in a `Plan`. Shapes: B pictures, L text tokens.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any
from weakref import finalize

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kolors_core.adapters.controlnet import as_list
from kolors_core.adapters.ip_adapter import attached
from kolors_core.attention import planned_for
from kolors_core.chatglm import TextEmbedding
from kolors_core.devices import plain, planned_device
from kolors_core.guidance import without_interval
from kolors_core.performance.offload import Lane, Models, Offload, bytes_of, whole
from kolors_core.pipelines.base import MODELS
from kolors_core.pipelines.stages import Request, Task
from kolors_core.pipelines.text_prompts import MAX_TOKENS
from kolors_core.tokenizer import TokenBatch
from kolors_core.validation import whole_number

META = torch.device("meta")
STEPS = 2  # of the denoiser: in the second what comes next is known, and the sampler has a past
WAYS = {"resident": "all resident", "by_model": "model by model", "by_block": "block by block"}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage in GiB: all its weights, the most it takes beside them, and the most of both together where
    blocks come and go."""

    weights: float
    work: float
    by_block: float

    @property
    def total(self) -> float:
        """With all its weights there, and no others."""
        return self.weights + self.work


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs on its device in GiB: by stage, in the run's order, and in three ways of running.

    resident: all models are there. by_model: as after `enable_model_cpu_offload`. by_block: as after
    `enable_sequential_cpu_offload`. mode: which of the three it is now; None of weights that are not loaded.
    run: what was planned, in words.
    """

    stages: Mapping[str, Stage]
    resident: float
    by_model: float
    by_block: float
    mode: str | None
    run: str

    def __str__(self) -> str:
        lines = [f"GiB for {self.run}", f"{'':<16}{'weights':>9}{'work':>9}{'both':>9}{'by block':>10}"]
        for name, stage in self.stages.items():
            numbers = f"{stage.weights:>9.3f}{stage.work:>9.3f}{stage.total:>9.3f}{stage.by_block:>10.3f}"
            lines.append(f"{name:<16}{numbers}")
        for name, way in WAYS.items():
            remark = "  as it is now" if name == self.mode else ""
            lines.append(f"{way:<34}{getattr(self, name):>9.3f}{remark}")
        return "\n".join(lines)


class Planning(Task):
    """A task that says what it will need."""

    @torch.no_grad()
    def plan(
        self,
        height: int | None = None,
        width: int | None = None,
        batch: int = 1,
        *,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 5.0,
        max_sequence_length: int = MAX_TOKENS,
        device: torch.device | str | None = None,
    ) -> Plan:
        """Print and return what each stage needs on its device, before anything is computed or even loaded.

        height, width, num_images_per_prompt, guidance_scale: as for the pipeline. batch: how many prompts.
        max_sequence_length: tokens of the longest. device: whose kernels are meant, such as "cuda", which
        this machine need not have; if None the pipeline's own, or on the meta device the best there is.
        Quantised models, adapters (with one picture each) and what saves memory count as they are now. Not
        counted: what the device's own libraries keep, and the workspaces of an accelerator's convolutions.
        What is compiled may need less. Encoding a picture to start from needs less than decoding.
        Raises ValueError or TypeError as the pipeline does.
        """
        size = self._size("height", height), self._size("width", width)
        prompts = whole_number("batch", batch)
        copies = whole_number("num_images_per_prompt", num_images_per_prompt)
        length = whole_number("max_sequence_length", max_sequence_length, least=3, most=MAX_TOKENS)
        request = Request(
            guidance_scale=guidance_scale, num_images_per_prompt=copies, output_type="pt",
            generator=torch.Generator(), callback_on_step_end=_stop,
        )  # fmt: skip
        request.check()
        own = None if self.device.type == "meta" else self.device
        place = planned_device(own if device is None else device)
        ledger = Ledger(place.type)
        twin = twin_of(self, PlannedOffload(ledger, by_block=True))
        with planned_for(place.type), ledger, Layouts() if place.type == "cpu" else nullcontext():
            _run(twin, request, size, prompts, length)
        twin.offload.end()
        brought = _brought(list(ledger.work), twin._models(), ledger)
        models = self._models()
        weights = {stage: bytes_of(whole(listed)) for stage, listed in models.items()}
        pictures = "1 picture" if prompts * copies == 1 else f"{prompts * copies} pictures"
        made = Plan(
            stages={
                stage: Stage(weights=_gib(weights[stage]), work=_gib(work), by_block=_gib(ledger.both[stage]))
                for stage, work in ledger.work.items()
                if stage is not None
            },
            resident=_gib(bytes_of(whole(chain(*models.values()))) + max(ledger.work.values())),
            by_model=_gib(max(brought[stage] + work for stage, work in ledger.work.items())),
            by_block=_gib(max(ledger.both.values())),
            mode=self._mode(),
            run=f"{pictures} of {size[1]}x{size[0]} {'with' if request.is_guided else 'without'} guidance "
            f"on {place.type}",
        )
        print(made)
        return made

    def _mode(self) -> str | None:
        """The name in a `Plan` of the way that it runs now."""
        if self.offload.device is not None:
            return "by_block" if self.offload.by_block else "by_model"
        return None if self.device.type == "meta" else "resident"


class Ledger(TorchDispatchMode):
    """Within it, counts the bytes of new storages on the meta device, and keeps the most of each stage.

    device: the type of the device that is meant. work: all but weights. both: with weights that are on loan,
    which are made while `is_lending`. What was there before counts nowhere.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.is_lending = device, False
        self.stage: str | None = None
        self.work: dict[str | None, int] = {}
        self.both: dict[str | None, int] = {}
        self._now = {"work": 0, "lent": 0}
        self._known: set[int] = set()  # of storages, while they are alive
        self._made_before: dict[Any, list[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made, or answer one that asks for values."""
        inputs = _tensors((args, kwargs))
        if func in _ANSWERS and inputs[0].is_meta:
            return _ANSWERS[func](inputs[0])
        for tensor in inputs:
            self._see(tensor, is_new=False)
        result = func(*args, **(kwargs or {})) if func.is_view else self._made(func, args, kwargs or {})
        is_convolved = self.device == "cpu" and func is torch.ops.aten.convolution.default and result.is_meta
        if is_convolved and not args[0].is_contiguous():  # as a CPU's does, it keeps channels last
            result = torch.empty_like(result, memory_format=torch.channels_last)
        for tensor in _tensors(result):
            self._see(tensor, is_new=True)
        if is_convolved:
            self._count(workspace(args[0], args[1], result))
        return result

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation makes. For inputs like earlier ones it is not run again, which is much faster."""
        key = func, _shapes(args), _shapes(tuple(kwargs.items()))
        if key in self._made_before:
            made = [
                torch.empty_strided(*shape, dtype=dtype, device=META)
                for *shape, dtype in self._made_before[key]
            ]
            return made[0] if len(func._schema.returns) == 1 else tuple(made)
        result = func(*args, **kwargs)
        made = _tensors(result)
        is_plain = isinstance(result, Tensor) or 1 < len(made) == len(func._schema.returns)
        if is_plain and all(x.is_meta and x.untyped_storage()._cdata not in self._known for x in made):
            self._made_before[key] = [(x.shape, x.stride(), x.dtype) for x in made]
        return result

    def _see(self, tensor: Tensor, is_new: bool) -> None:
        if not tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        kind, size = "lent" if self.is_lending else "work", storage.nbytes() if is_new else 0
        self._now[kind] += size
        # Torch keeps the Python object of a storage as long as the storage itself.
        finalize(storage, self._forget, storage._cdata, kind, size)
        self._count()

    def _count(self, passing: int = 0) -> None:
        """Remember the most there was; passing: bytes that are there for this moment only."""
        work = self._now["work"] + passing
        self.work[self.stage] = max(self.work.get(self.stage, 0), work)
        self.both[self.stage] = max(self.both.get(self.stage, 0), work + self._now["lent"])

    def _forget(self, key: int, kind: str, size: int) -> None:
        self._known.discard(key)
        self._now[kind] -= size


def _tensors(tree: Any) -> list[Tensor]:
    """All tensors in an operation's arguments or result."""
    if isinstance(tree, tuple | list | dict):
        return [x for part in (tree.values() if isinstance(tree, dict) else tree) for x in _tensors(part)]
    return [tree] if isinstance(tree, Tensor) else []


def _shapes(tree: Any) -> Any:
    """An operation's arguments without their values, to be a key."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.stride(), tree.dtype, tree.device
    return tuple(map(_shapes, tree)) if isinstance(tree, tuple | list) else (type(tree), tree)


def _truth(tensor: Tensor) -> bool:
    """What is asked to be true, such as that all is finite, is. NotImplementedError for another value."""
    if tensor.dtype is not torch.bool:
        raise NotImplementedError(f"a plan has no values, and the model asks for one of a {tensor.dtype}")
    return True


_ANSWERS: Mapping[Any, Callable[[Tensor], bool]] = {
    torch.ops.aten.equal.default: lambda _: False,  # prompts differ, which takes the most
    torch.ops.aten._local_scalar_dense.default: _truth,
}


def workspace(x: Tensor, weight: Tensor, out: Tensor) -> int:
    """Bytes that a convolution takes and gives back on a CPU, by oneDNN (seen in torch's memory events).

    x [B, ...] and the weight are copied into a layout of its own; then they go, and the result is copied out
    of it. A 1x1 kernel in float32 needs none of that, in half precision also float32 sums of one picture.
    """
    if not x.is_contiguous() or x.dtype == torch.float64:  # with channels last only the weight is copied
        return 0 if x.dtype == torch.float64 else weight.nbytes
    if weight.shape[2:].numel() > 1:
        return max(x.nbytes + weight.nbytes, out.nbytes)
    return 0 if x.dtype == torch.float32 else x.nbytes + weight.nbytes + 4 * out[0].numel()


class PlannedLane(Lane):
    """The way to the accelerator where both ends are the meta device."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(META)
        self.ledger = ledger

    def home(self, data: Tensor) -> Tensor:
        """The same: all is at home."""
        return data

    def send(self, homes: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Copies that the ledger counts as lent."""
        self.ledger.is_lending = True
        copies = [torch.empty_like(home) for home in homes]
        self.ledger.is_lending = False
        return copies, None


class PlannedOffload(Offload):
    """Offload to the meta device, which tells the ledger whose work begins."""

    def __init__(self, ledger: Ledger, by_block: bool) -> None:
        super().__init__()
        self.start(META, by_block)
        self.lane, self.ledger = PlannedLane(ledger), ledger

    def enter(self, stage: str | None, models: Models) -> None:
        """As in any offload."""
        self.ledger.stage = stage
        super().enter(stage, models)


class Layouts(TorchFunctionMode):
    """Within it a GroupNorm keeps channels last, as on a CPU; on the meta device it would copy its input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result's memory, without the statistics."""
        return torch.empty_like(args[0]) if func is F.group_norm else func(*args, **(kwargs or {}))


class Weightless(TorchFunctionMode):
    """Within it, copies of tensors are on the meta device: shapes, and no values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A parameter's copy is made by `clone`, any other tensor's by `__deepcopy__`."""
        if func is Tensor.clone:
            return torch.empty_like(args[0], device=META)
        if func is Tensor.__deepcopy__:
            return args[1].setdefault(id(args[0]), torch.empty_like(args[0], device=META))
        return func(*args, **(kwargs or {}))


def twin_of(pipe: Task, offload: Offload) -> Task:
    """The pipeline with copies of its models that have no values and no hooks and are not compiled."""
    models = {name: plain(getattr(pipe, name)) for name in MODELS if getattr(pipe, name) is not None}
    nets = [plain(net) for net in as_list(pipe.controlnet)]
    parts = [*models.values(), *(handle.adapter for handle in attached(models["unet"])), *nets]
    memo = {
        id(hooks): OrderedDict()
        for module in (module for part in parts for module in part.modules())
        for name, hooks in vars(module).items()
        if name.endswith("_hooks")
    }
    with Weightless():
        copies = copy.deepcopy(models | {"controlnet": nets or None}, memo)
    if pipe._image_encoder is None:
        copies.pop("image_encoder", None)  # it came with an IP-Adapter, and so does its copy
    twin = copy.copy(pipe)
    for name, model in copies.items():
        setattr(twin, name, model)
    twin.offload, twin._progress = offload, {"disable": True}
    twin.guided = without_interval(pipe.guided)
    return twin


def _run(twin: Task, request: Request, size: tuple[int, int], prompts: int, length: int) -> None:
    """A run of some steps on the meta device, by the pipeline's own stages."""
    text = _encoded(twin, prompts, length)
    given: dict[str, Any] = {"prompt_embeds": text.tokens, "pooled_prompt_embeds": text.pooled}
    if request.is_guided:
        negative = _encoded(twin, 1, length)
        given |= {"negative_prompt_embeds": negative.tokens, "negative_pooled_prompt_embeds": negative.pooled}
    given |= twin.stand_ins(META, request.is_guided)
    if nets := as_list(twin.controlnet):
        given["control_image"] = [torch.empty(1, 3, *size, device=META)] * len(nets)
    request = Request(**vars(request) | given)
    halves = twin._conditions(request, size)
    shape, channels = twin._latent_shape(len(halves[0].size_ids), size), twin.unet.config.in_channels
    positive, negative = (half and half.with_zero_extra_channels(channels, shape) for half in halves)
    assert positive is not None
    x = torch.empty(shape, device=META, dtype=twin.precision)
    twin._interrupt = False
    twin._pictures(request, twin.scheduler.schedule(50), x, positive, negative, {})
    twin._on_device()


def _encoded(twin: Task, prompts: int, length: int) -> TextEmbedding:
    """Embeddings of prompts that are L tokens long; empty tensors where there is no text encoder."""
    shape = prompts, length
    if twin.text_encoder is None:
        width, place = twin.unet.config.text_dim, {"device": META, "dtype": twin.dtype}
        return TextEmbedding(torch.empty(*shape, width, **place), torch.empty(prompts, width, **place))
    ids, mask = (torch.empty(shape, dtype=dtype, device=META) for dtype in (torch.long, torch.bool))
    counts = torch.empty(shape, device=META) if twin.savings.collapse_pads else None
    twin._on_device("text_encoder")
    return twin.text_encoder(TokenBatch(ids, mask, ids, counts))


def _stop(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The callback that ends the run early."""
    pipe._interrupt = step + 1 >= STEPS
    return {}


def _brought(order: Sequence[str | None], models: Models, ledger: Ledger) -> dict[str | None, int]:
    """The most bytes of weights that are there in each stage if whole models come and go, in two runs: the
    second has learned from the first what comes next."""
    offload, most = PlannedOffload(ledger, by_block=False), dict.fromkeys(order, 0)
    for stage in (*order, None, *order, None):
        offload.enter(stage, models)
        most[stage] = max(most.get(stage, 0), offload.bytes_on_device)
    offload.end()
    return most


def _gib(count: int) -> float:
    return count / 2**30
