"""Offload: models are kept on the CPU and copied to the accelerator to run, as models or block by block.

A parameter's data is kept on the CPU, page-locked for CUDA while this is on, and copied back only if it was
written meanwhile. While a unit (model or block) runs, the next, as observed before, is prefetched; a whole
model only if both together are no larger than the largest, which costs no memory. A backward pass would find
no weights.
Source: diffusers' pipelines/pipeline_utils.py, `enable_{model,sequential}_cpu_offload`; they wait for copies.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from kolors_core.devices import unwrap_compiled
from kolors_core.module import find_blocks, is_block
from kolors_core.performance.pinned_memory import pin, unpin

STAGE_ORDER = ("text_encoder", "image_encoder", "unet", "vae")  # assumed until a run was observed
Models = Mapping[str, Sequence[nn.Module]]  # by stage
OffloadUnit = tuple[tuple[nn.Module, str], ...]  # (model, path) of modules that are copied and freed together


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Find a model's units, by path: blocks, and outside of them modules with parameters of their own."""
    if is_block(model) or [*model.parameters(recurse=False), *model.buffers(recurse=False)]:
        return {"": model}
    return {
        f"{name}.{path}" if path else name: module
        for name, child in model.named_children() for path, module in blocks_of(child).items()
    }  # fmt: skip


def as_unit(models: Iterable[nn.Module]) -> OffloadUnit:
    """Make one unit of whole models."""
    return tuple((model, "") for model in models)


def tensors_of(unit: OffloadUnit) -> dict[int, Tensor]:
    """Return a unit's present parameters and buffers, by their identity.

    Each step of sequential offload asks twice for each block: torch's own iterators take 10 times as long.
    """
    found, modules = dict[int, Tensor](), [model.get_submodule(path) for model, path in unit]
    while modules:
        module = modules.pop()
        for own in (module._parameters, module._buffers):
            found |= {id(tensor): tensor for tensor in own.values() if tensor is not None}
        modules += filter(None, module._modules.values())
    return found


def bytes_of(unit: OffloadUnit) -> int:
    """Return the bytes of a unit."""
    return sum(tensor.nbytes for tensor in tensors_of(unit).values())


def refuse_compiled(models: Models) -> None:
    """Raise ValueError for a compiled model: its blocks cannot wait for their weights while it runs."""
    for stage, model in ((stage, model) for stage, listed in models.items() for model in listed):
        if unwrap_compiled(model) is not model or any(part._compiled_call_impl for part in model.modules()):
            hint = "it is compiled: use enable_model_cpu_offload"
            raise ValueError(f"{stage} cannot be offloaded block by block, {hint}")


def check_blocks(models: Models) -> None:
    """Raise ValueError for a model that cannot be copied block by block, but only as a whole."""
    for model in (model for listed in models.values() for model in listed):
        find_blocks(model, "offload one by one")
        own = [*model._parameters, *model._buffers]
        if own and not is_block(model):
            what = f"this {type(model).__name__} has {own[0]} beside its blocks"
            raise ValueError(f"{what}, and would be copied as a whole: put it into a submodule")


class TransferStream:
    """Stream of copies to the accelerator: on CUDA beside the computation, elsewhere plain copies.

    Memory is allocated in the computing stream, which this one waits for before it writes, and is freed after
    that has waited for the copy: no `record_stream` is needed, whose late frees would let memory grow.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device) if device.type == "cuda" else None

    def move_to_cpu(self, tensors: Iterable[Tensor]) -> None:
        """Move the tensors' data to the CPU, page-locked for CUDA, unless it is so already."""
        moved = list(tensors)
        for tensor in moved:
            if tensor.device.type != "cpu":
                tensor.data = tensor.data.to("cpu")
        if self.stream is not None and (pageable := [t for t in moved if not t.is_pinned()]):
            pin(pageable)

    def unpin(self, tensors: Iterable[Tensor]) -> None:
        """Move the data of tensors on the CPU to ordinary memory."""
        if self.stream is not None:
            unpin(list(tensors))

    def copy_to_device(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Start copies to the accelerator; returns them, and the event to `wait` for before any use."""
        copies = [torch.empty_like(tensor, device=self.device) for tensor in tensors]
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):  # does nothing for None
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=self.stream is not None)
        return copies, None if self.stream is None else self.stream.record_event()

    def wait(self, event: Any) -> None:
        """Make later computation wait for this event."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def synchronize(self) -> None:
        """Make later computation wait for every copy, also those that an exception left unfinished."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


@dataclass(frozen=True)
class DeviceCopy:
    """Copy of a tensor's data on the accelerator."""

    tensor: Tensor
    cpu_data: Tensor
    device_data: Tensor
    version: int  # of the tensor, when it was copied
    ready: Any  # the event that ends the copy

    def is_unmodified(self, data: Tensor) -> bool:
        """Return whether the tensor still has this data, unwritten; a write through `.data` is not seen."""
        return self.tensor.data_ptr() == data.data_ptr() and self.tensor._version == self.version


class OnloadHook:
    """Hook that copies a module's unit to the device before the module runs; a pickled one does nothing."""

    def __init__(self, offload: Callable[[], "Offload | None"] = lambda: None, unit: str = "") -> None:
        self.offload, self.unit = offload, unit

    def __call__(self, *_: Any) -> None:
        """Copy the unit, unless it runs already."""
        offload = self.offload()
        if offload is not None and offload.running != self.unit:
            offload.onload(self.unit)

    def __reduce__(self) -> tuple[type["OnloadHook"], tuple[()]]:
        return OnloadHook, ()


class Offload:
    """Manager of the weights on the accelerator, of all pipelines that share their models. Off at first.

    device: where models run, None while this is off. by_block: whether the units are blocks. running: the
    unit that runs. peak_bytes: the most `bytes_on_device` since `start` or since it was set to 0.
    """

    def __init__(self) -> None:
        self.device: torch.device | None = None
        self.by_block, self.peak_bytes, self.transfers = False, 0, TransferStream(torch.device("cpu"))
        self.running: str | None = None
        self._previous: str | None = None  # the unit that ran before
        self._units: dict[str, OffloadUnit] = {}
        self._limit: int | None = None  # bytes that the running unit and the prefetched one may take
        self._followers: dict[tuple[str | None, str | None], str | None] = {}  # by (previous, running)
        self._on_device: dict[int, DeviceCopy] = {}  # by the tensor's identity
        self._prefetched: dict[int, DeviceCopy] = {}  # copies done or under way, not yet in the tensor
        self._hooks: list[Any] = []

    def __getstate__(self) -> tuple[Any, ...]:
        return self.device, self.by_block  # a copy's or pickle's models are its own and on the CPU

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__()
        if state[0] is not None:
            self.start(*state)

    def start(self, device: torch.device, by_block: bool) -> None:
        """Run models that are on the CPU on a device, from the next `enter` on."""
        self.end()
        self.device, self.by_block, self.transfers = device, by_block, TransferStream(device)
        self.peak_bytes, self._followers = 0, {}

    @torch.inference_mode(False)
    def end(self) -> None:
        """Offload all weights, to ordinary memory, and forget the mode."""
        self.release()
        self._unhook()
        self.transfers.unpin(tensors_of(tuple(chain(*self._units.values()))).values())
        self.device, self._units = None, {}

    def __del__(self) -> None:
        self.transfers.synchronize()  # freed earlier, the memory of a copy under way would be given to others

    def enter(self, stage: str | None, models: Models) -> None:
        """Prepare the models of the stage that runs now; None at the end of a run offloads all.

        models: the running pipeline's, with its present adapters. ValueError for compiled ones by block.
        """
        if self.device is None:
            return
        if stage is None or self.by_block:
            self.release()
        stages = {name: as_unit(models[name]) for name in STAGE_ORDER if name in models}
        if self.by_block:
            refuse_compiled(models)
            self._hook(stages)
        else:
            self._units, self._limit = stages, max(map(bytes_of, stages.values()), default=0)
        self.transfers.move_to_cpu(
            tensor for key, tensor in tensors_of(tuple(chain(*stages.values()))).items()
            if key not in self._on_device and tensor.device.type != "cpu"  # created on the accelerator
        )  # fmt: skip
        if stage is not None and not self.by_block:
            self.onload(stage)

    @property
    def bytes_on_device(self) -> int:
        """Bytes of weights that are on the device or being copied there."""
        return sum(entry.device_data.nbytes for entry in (self._prefetched | self._on_device).values())

    @torch.inference_mode(False)
    def onload(self, name: str) -> None:
        """Offload the other units, copy this one to the device, and prefetch the likely next one."""
        if name != self.running:
            self._followers[self._previous, self.running] = name
            self._previous, self.running = self.running, name
        current, following = tensors_of(self._units[name]), self._likely_next(name)
        self._offload_others(current, current | following)
        self._start_copies(current)
        copied = {key: self._prefetched[key] for key in current if key in self._prefetched}
        self._wait(copied.values())
        self._on_device |= copied  # first, so that all is offloaded even if an exception follows
        for key, entry in copied.items():
            entry.tensor.data = entry.device_data
            del self._prefetched[key]
        self._start_copies(following)

    def release(self) -> None:
        """Offload all weights, as after a run."""
        if self.running is not None:
            self._followers[self._previous, self.running] = None
        self._previous = self.running = None
        self.transfers.synchronize()
        self._offload_others({}, {})

    def _likely_next(self, name: str) -> dict[int, Tensor]:
        guess = self._followers.get((self._previous, name), dict(pairwise(self._units)).get(name))
        if guess not in self._units or guess == name:
            return {}
        both = (self._units[name], self._units[guess])
        if self._limit is not None and sum(map(bytes_of, both)) > self._limit:
            return {}
        return tensors_of(self._units[guess])

    @torch.inference_mode(False)
    def _offload_others(self, current: Mapping[int, Tensor], kept: Mapping[int, Tensor]) -> None:
        """Offload all but `current`, and free prefetched copies that are outdated or not `kept`."""
        leaving = {key: entry for key, entry in self._on_device.items() if key not in current}
        dropped = {
            key: entry for key, entry in self._prefetched.items()
            if key not in kept or not entry.is_unmodified(entry.cpu_data)
        }  # fmt: skip
        self._wait([*leaving.values(), *dropped.values()])
        modified = {k: e.tensor for k, e in leaving.items() if not e.is_unmodified(e.device_data)}
        self.transfers.move_to_cpu(modified.values())
        for key, entry in leaving.items():
            if key not in modified:
                entry.tensor.data = entry.cpu_data
            del self._on_device[key]
        for key in dropped:
            del self._prefetched[key]
        if leaving and self.transfers.stream is not None and not (self.by_block and current):
            torch.cuda.empty_cache()  # to avoid fragmentation

    def _start_copies(self, tensors: Mapping[int, Tensor]) -> None:
        present = self._on_device.keys() | self._prefetched.keys()
        if not (new := [tensor for key, tensor in tensors.items() if key not in present]):
            return
        self.transfers.move_to_cpu(new)
        copies, ready = self.transfers.copy_to_device([tensor.data for tensor in new])
        for tensor, copy in zip(new, copies, strict=True):
            self._prefetched[id(tensor)] = DeviceCopy(tensor, tensor.data, copy, tensor._version, ready)
        self.peak_bytes = max(self.peak_bytes, self.bytes_on_device)

    def _wait(self, entries: Iterable[DeviceCopy]) -> None:
        for event in {id(entry.ready): entry.ready for entry in entries}.values():
            self.transfers.wait(event)

    def _hook(self, stages: Mapping[str, OffloadUnit]) -> None:
        """Register on each module of a block a hook that copies the block: not every block is called itself.

        A module that two models share, such as an IP-Adapter's branch, is of the first one's unit.
        """
        self._unhook()
        self._units, hooked = {}, set[nn.Module]()
        for stage, unit in stages.items():
            for i, (model, _) in enumerate(unit):
                for path, block in blocks_of(model).items():
                    if block not in hooked:
                        name, new = f"{stage}.{i}.{path}", set(block.modules()) - hooked
                        hooked |= new
                        hook, self._units[name] = OnloadHook(ref(self), name), as_unit([block])
                        for part in new:
                            self._hooks.append(part.register_forward_pre_hook(hook, prepend=True))

    def _unhook(self) -> None:
        for hook in self._hooks:  # none is forgotten before it is removed
            hook.remove()
        self._hooks = []
