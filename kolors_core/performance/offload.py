"""Offload: models are kept on the CPU and copied to the accelerator to run, as models or block by block.

A parameter's data is kept on the CPU, page-locked for CUDA. It is replaced by `tensor.data = copy` and put
back by `tensor.data = home`; nothing is copied back unless it was written meanwhile. While a unit (a model or
a block) runs, the one that followed it last time is copied; a whole model only if both together are no larger
than the largest, so that this costs no memory. For inference: a backward pass would not find the weights.
Source: `enable_model_cpu_offload` and `enable_sequential_cpu_offload` of diffusers'
pipelines/pipeline_utils.py, where work waits for every copy.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from kolors_core.devices import plain
from kolors_core.module import is_block

STAGE_ORDER = ("text_encoder", "image_encoder", "unet", "vae")  # a run's order, until a run has shown its own
Models = Mapping[str, Sequence[nn.Module]]  # by stage
OffloadUnit = tuple[
    tuple[nn.Module, str], ...
]  # models, and in each the path of what comes and goes together


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Find the units of a model, by path: its blocks, and outside of them each layer.

    A module that has parameters of its own is one unit with all that is below it.
    """
    found = {}

    def look(module: nn.Module, path: str) -> None:
        own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
        if is_block(module) or any(True for _ in own):
            found[path] = module
            return
        for name, child in module.named_children():
            look(child, f"{path}.{name}" if path else name)

    look(model, "")
    return found


def as_unit(models: Iterable[nn.Module]) -> OffloadUnit:
    """Make one unit of models."""
    return tuple((model, "") for model in models)


def tensors_of(unit: OffloadUnit) -> dict[int, Tensor]:
    """Return the parameters and buffers that a unit has now, by their identity."""
    modules = [model.get_submodule(path) for model, path in unit]
    return {id(tensor): tensor for m in modules for tensor in chain(m.parameters(), m.buffers())}


def bytes_of(unit: OffloadUnit) -> int:
    """Return the bytes of a unit."""
    return sum(tensor.nbytes for tensor in tensors_of(unit).values())


def refuse_compiled(models: Models) -> None:
    """Raise ValueError for a compiled model: its blocks cannot wait for their weights while it runs."""
    for stage, listed in models.items():
        for model in listed:
            if plain(model) is not model or any(part._compiled_call_impl for part in model.modules()):
                hint = "it is compiled: use enable_model_cpu_offload"
                raise ValueError(f"{stage} cannot be offloaded block by block, {hint}")


class TransferStream:
    """Copies to the accelerator: on CUDA in a stream beside the computation, elsewhere plain copies.

    Memory is allocated in the computing stream, which this one waits for before it writes there, and is freed
    after the computing stream has waited for the copy. So either can use it again at once, and no
    `record_stream` is needed, whose late frees would let a program that runs ahead allocate ever more.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def cpu_copy(self, data: Tensor) -> Tensor:
        """Return the same data on the CPU, page-locked for CUDA; itself if it is that already."""
        data = data.to("cpu")
        return data if self.stream is None or data.is_pinned() else data.pin_memory()

    def copy_to_device(self, homes: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Start copies to the accelerator; returns them, and the event to `wait` for before any use."""
        copies = [torch.empty_like(home, device=self.device) for home in homes]
        if self.stream is None:
            for copy, home in zip(copies, homes, strict=True):
                copy.copy_(home)
            return copies, None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for copy, home in zip(copies, homes, strict=True):
                copy.copy_(home, non_blocking=True)
            return copies, self.stream.record_event()

    def wait(self, event: Any) -> None:
        """Make the computation that follows wait for this event."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def synchronize(self) -> None:
        """Make the computation that follows wait for every copy, also those that an exception left behind."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def empty_cache(self) -> None:
        """Return cached memory to the device, to avoid fragmentation."""
        if self.stream is not None:
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class DeviceCopy:
    """A copy of a tensor's data on the accelerator."""

    tensor: Tensor
    cpu_data: Tensor  # its data on the CPU
    device_data: Tensor
    version: int  # of the tensor, when it was copied
    arrival: Any  # the event from which on the copy is there

    def is_unmodified(self, data: Tensor) -> bool:
        """Return whether this is the tensor's data, and unwritten. A write through `.data` goes unnoticed."""
        return self.tensor.data_ptr() == data.data_ptr() and self.tensor._version == self.version


class OnloadHook:
    """A hook that copies a module's unit to the device before the module runs; a pickled one does nothing."""

    def __init__(self, offload: Callable[[], "Offload | None"] = lambda: None, unit: str = "") -> None:
        self.offload, self.unit = offload, unit

    def __call__(self, *_: Any) -> None:
        """Copy the unit, unless it is the one that runs."""
        offload = self.offload()
        if offload is not None and offload.running != self.unit:
            offload.onload(self.unit)

    def __reduce__(self) -> tuple[type["OnloadHook"], tuple[()]]:
        return OnloadHook, ()


class Offload:
    """The weights on the accelerator, of all pipelines that share their models. Off at first.

    device: where models run, None while this is off. by_block: whether the units are blocks.
    bytes_on_device, peak_bytes: of weights, now and the most since `start` or since it was set to 0.
    """

    def __init__(self) -> None:
        self.device: torch.device | None = None
        self.by_block, self.transfers = False, TransferStream(torch.device("cpu"))
        self.peak_bytes = 0
        self.running: str | None = None
        self._before: str | None = None  # the unit that was at work before
        self._units: dict[str, OffloadUnit] = {}
        self._limit: int | None = None  # in bytes, up to which the next unit comes beside the present one
        # Of units that worked one after another, as (the first, the second): what came then.
        self._followed: dict[tuple[str | None, str | None], str | None] = {}
        self._here: dict[int, DeviceCopy] = {}  # by the tensor's identity
        self._coming: dict[int, DeviceCopy] = {}  # copied already, or on the way, and not yet in the tensor
        self._hooks: list[Any] = []

    def __getstate__(self) -> tuple[Any, ...]:
        """Return the state of copies and pickles, whose models are their own and on the CPU."""
        return self.device, self.by_block

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__()
        if state[0] is not None:
            self.start(*state)

    def start(self, device: torch.device, by_block: bool) -> None:
        """Run models that are on the CPU on a device, from the next `enter` on."""
        self.end()
        self.device, self.by_block, self.transfers = device, by_block, TransferStream(device)
        self.peak_bytes, self._followed = 0, {}

    def end(self) -> None:
        """Offload all weights and forget the mode."""
        self.release()
        self._unhook()
        self.device, self._units = None, {}

    def enter(self, stage: str | None, models: Models) -> None:
        """Prepare the models of the stage that runs now; None for the end of a run, when all are offloaded.

        models: those of the pipeline that runs, searched each time for adapters that came or went. ValueError
        for a compiled model under block offload.
        """
        if self.device is None:
            return
        if stage is None or self.by_block:
            self.release()
        self._refresh_units(models)
        if stage is not None and not self.by_block:
            self.onload(stage)

    @property
    def bytes_on_device(self) -> int:
        """Bytes of weights that are on the device or being copied there."""
        return sum(entry.device_data.nbytes for entry in (self._coming | self._here).values())

    @torch.inference_mode(False)
    def onload(self, name: str) -> None:
        """Copy a unit to the device, after the others are offloaded, and prefetch the likely next one."""
        if name != self.running:
            self._followed[self._before, self.running] = name
            self._before, self.running = self.running, name
        own = tensors_of(self._units[name])
        guess = self._next(name)
        coming = {} if guess is None else tensors_of(self._units[guess])
        if self._offload_others(own, own | coming) and not self.by_block:
            self.transfers.empty_cache()
        self._send(own)
        arrived = {key: self._coming[key] for key in own if key in self._coming}
        self._wait(arrived.values())
        self._here |= arrived  # first, so that all is offloaded even if an exception follows
        for key, entry in arrived.items():
            entry.tensor.data = entry.device_data
            del self._coming[key]
        self._send(coming)

    def release(self) -> None:
        """Offload all weights, as after a run."""
        if self.running is not None:
            self._followed[self._before, self.running] = None
        self._before = self.running = None
        self.transfers.synchronize()
        if self._offload_others({}, {}):
            self.transfers.empty_cache()

    def _next(self, now: str) -> str | None:
        """Return the unit that is likely next, if there is room for it."""
        in_order = dict(pairwise(self._units)).get(now)
        guess = self._followed.get((self._before, now), in_order)
        if guess is None or guess not in self._units or guess == now:
            return None
        size = bytes_of(self._units[now]) + bytes_of(self._units[guess])
        return guess if self._limit is None or size <= self._limit else None

    @torch.inference_mode(False)
    def _offload_others(self, here: Mapping[int, Tensor], coming: Mapping[int, Tensor]) -> bool:
        """Offload what is not in `here`, and free copies that are not in `coming` or are out of date.

        Returns whether anything was offloaded.
        """
        leaving = [entry for key, entry in self._here.items() if key not in here]
        dropped = [
            entry
            for key, entry in self._coming.items()
            if key not in coming or not entry.is_unmodified(entry.cpu_data)
        ]
        self._wait([*leaving, *dropped])
        for entry in leaving:
            tensor = entry.tensor
            tensor.data = (
                entry.cpu_data
                if entry.is_unmodified(entry.device_data)
                else self.transfers.cpu_copy(tensor.data)
            )
            del self._here[id(tensor)]
        for entry in dropped:
            del self._coming[id(entry.tensor)]
        return bool(leaving)

    def _send(self, wanted: Mapping[int, Tensor]) -> None:
        """Start to copy what is neither on the device nor being copied."""
        tensors = [tensor for key, tensor in wanted.items() if key not in self._here | self._coming]
        for tensor in tensors:
            tensor.data = self.transfers.cpu_copy(tensor.data)
        homes = [tensor.data for tensor in tensors]
        copies, arrival = self.transfers.copy_to_device(homes) if homes else ([], None)
        for tensor, home, copy in zip(tensors, homes, copies, strict=True):
            self._coming[id(tensor)] = DeviceCopy(tensor, home, copy, tensor._version, arrival)
        self.peak_bytes = max(self.peak_bytes, self.bytes_on_device)

    def _wait(self, entries: Iterable[DeviceCopy]) -> None:
        for event in {id(entry.arrival): entry.arrival for entry in entries}.values():
            self.transfers.wait(event)

    def _refresh_units(self, models: Models) -> None:
        """Find the units of these models as they are now, and offload what was created on the accelerator."""
        stages = {name: as_unit(models[name]) for name in STAGE_ORDER if name in models}
        if self.by_block:
            refuse_compiled(models)
            self._hook(stages)
        else:
            self._units = stages
            self._limit = max(map(bytes_of, stages.values()), default=0)
        for unit in stages.values():
            for key, tensor in tensors_of(unit).items():
                if key not in self._here and tensor.device.type != "cpu":
                    tensor.data = self.transfers.cpu_copy(tensor.data)

    def _hook(self, stages: Mapping[str, OffloadUnit]) -> None:
        """Register on each module of a block a hook that copies the block: not every block is called itself.

        What two models share, such as an IP-Adapter's branches, belongs to the first. No hook is on a model
        itself unless it has parameters of its own.
        """
        self._unhook()
        self._units, owners = {}, dict[nn.Module, str]()
        for stage, unit in stages.items():
            for i, (model, _) in enumerate(unit):
                for path, block in blocks_of(model).items():
                    if block not in owners:
                        name = f"{stage}.{i}.{path}"
                        self._units[name] = ((model, path),)
                        owners |= {part: name for part in block.modules() if part not in owners}
        self._hooks = [
            part.register_forward_pre_hook(OnloadHook(ref(self), name), prepend=True)
            for part, name in owners.items()
        ]

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
