"""Models that rest on the CPU and come to the accelerator to work: whole models, or block by block.

A parameter's data has its home on the CPU, page-locked for CUDA. It comes by `tensor.data = copy` and leaves
by `tensor.data = home`; nothing is copied back unless it was written meanwhile. While a unit (a model or a
block) works, the one that followed it last time is copied; a whole model only if both together are no larger
than the largest, so that this costs no memory. For inference: a backward pass would find weights gone.
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

STAGES = ("text_encoder", "image_encoder", "unet", "vae")  # a run's order, until a run has shown its own
Models = Mapping[str, Sequence[nn.Module]]  # by stage
Unit = tuple[tuple[nn.Module, str], ...]  # models, and in each the path of what comes and goes together


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """What of a model comes and goes by itself, by path: its blocks, and outside of them each layer.

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


def whole(models: Iterable[nn.Module]) -> Unit:
    """Models as one unit."""
    return tuple((model, "") for model in models)


def tensors_of(unit: Unit) -> dict[int, Tensor]:
    """The parameters and buffers that a unit has now, by their identity."""
    modules = [model.get_submodule(path) for model, path in unit]
    return {id(tensor): tensor for m in modules for tensor in chain(m.parameters(), m.buffers())}


def bytes_of(unit: Unit) -> int:
    """How much memory a unit takes."""
    return sum(tensor.nbytes for tensor in tensors_of(unit).values())


def refuse_compiled(models: Models) -> None:
    """ValueError for a compiled model: no block of it can wait for its weights while the whole runs."""
    for stage, listed in models.items():
        for model in listed:
            if plain(model) is not model or any(part._compiled_call_impl for part in model.modules()):
                wanted = "it is compiled: enable_model_cpu_offload brings it whole"
                raise ValueError(f"{stage} cannot come to the accelerator block by block, {wanted}")


class Lane:
    """The way to the accelerator: on CUDA a stream beside the computation, elsewhere plain copies.

    Memory is taken from the computing stream, which the lane waits for before it writes there, and is given
    back after the computing stream has waited for the copy. So it can be used again at once by either, and
    no `record_stream` is needed, whose late frees would let a program that runs ahead take ever more.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def home(self, data: Tensor) -> Tensor:
        """The same data on the CPU, page-locked for CUDA; itself if it is that already."""
        data = data.to("cpu")
        return data if self.stream is None or data.is_pinned() else data.pin_memory()

    def send(self, homes: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Copies on the accelerator, and the event to `wait` for before one is used or dropped."""
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
        """Let the computation that follows start after this event."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def settle(self) -> None:
        """Let the computation that follows wait for every copy, and for what an exception left behind."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def tidy(self) -> None:
        """Make the memory whole that a model has left: for the next one, and for other programs."""
        if self.stream is not None:
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Loan:
    """A copy of a tensor's data on the accelerator."""

    tensor: Tensor
    home: Tensor  # its data on the CPU
    copy: Tensor
    version: int  # of the tensor, when it was copied
    arrival: Any  # the event from which on the copy is there

    def is_still(self, data: Tensor) -> bool:
        """Whether this is the tensor's data, and unwritten. A write through `.data` goes unnoticed."""
        return self.tensor.data_ptr() == data.data_ptr() and self.tensor._version == self.version


class Arrive:
    """The hook that brings a module's unit before the module runs. A copied or pickled one does nothing."""

    def __init__(self, offload: Callable[[], "Offload | None"] = lambda: None, unit: str = "") -> None:
        self.offload, self.unit = offload, unit

    def __call__(self, *_: Any) -> None:
        """Bring it, unless it is at work already."""
        offload = self.offload()
        if offload is not None and offload.at_work != self.unit:
            offload.need(self.unit)

    def __reduce__(self) -> tuple[type["Arrive"], tuple[()]]:
        return Arrive, ()


class Offload:
    """Which weights are on the accelerator; one for all pipelines that share their models. Off at first.

    device: where models work, None while this is off. by_block: whether blocks come by themselves.
    bytes_on_device, peak_bytes: of weights, now and the most since `start` or since it was set to 0.
    """

    def __init__(self) -> None:
        self.device: torch.device | None = None
        self.by_block, self.lane = False, Lane(torch.device("cpu"))
        self.peak_bytes = 0
        self.at_work: str | None = None
        self._before: str | None = None  # the unit that was at work before
        self._units: dict[str, Unit] = {}
        self._limit: int | None = None  # in bytes, up to which the next unit comes beside the present one
        # Of units that worked one after another, as (the first, the second): what came then.
        self._followed: dict[tuple[str | None, str | None], str | None] = {}
        self._here: dict[int, Loan] = {}  # by the tensor's identity
        self._coming: dict[int, Loan] = {}  # copied already, or on the way, and not yet in the tensor
        self._hooks: list[Any] = []

    def __getstate__(self) -> tuple[Any, ...]:
        """For copies and pickles: they have models of their own, which are at home."""
        return self.device, self.by_block

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__()
        if state[0] is not None:
            self.start(*state)

    def start(self, device: torch.device, by_block: bool) -> None:
        """Let models that are on the CPU work on a device from the next `enter` on."""
        self.end()
        self.device, self.by_block, self.lane = device, by_block, Lane(device)
        self.peak_bytes, self._followed = 0, {}

    def end(self) -> None:
        """Send all weights home and forget the mode."""
        self.release()
        self._unhook()
        self.device, self._units = None, {}

    def enter(self, stage: str | None, models: Models) -> None:
        """The stage that works now; None for the end of a run, when all rest.

        models: those of the pipeline that works, looked at anew for adapters that came or went. ValueError if
        one is compiled that should come block by block.
        """
        if self.device is None:
            return
        if stage is None or self.by_block:
            self.release()
        self._look(models)
        if stage is not None and not self.by_block:
            self.need(stage)

    @property
    def bytes_on_device(self) -> int:
        """Of weights that are there or on their way."""
        return sum(loan.copy.nbytes for loan in (self._coming | self._here).values())

    @torch.inference_mode(False)
    def need(self, name: str) -> None:
        """Bring a unit, after the others have left, and start to bring the one that is likely next."""
        if name != self.at_work:
            self._followed[self._before, self.at_work] = name
            self._before, self.at_work = self.at_work, name
        own = tensors_of(self._units[name])
        guess = self._next(name)
        coming = {} if guess is None else tensors_of(self._units[guess])
        if self._keep(own, own | coming) and not self.by_block:
            self.lane.tidy()
        self._send(own)
        arrived = {key: self._coming[key] for key in own if key in self._coming}
        self._wait(arrived.values())
        self._here |= arrived  # noted first: what comes is sent home even if an exception cuts this short
        for key, loan in arrived.items():
            loan.tensor.data = loan.copy
            del self._coming[key]
        self._send(coming)

    def release(self) -> None:
        """Send all weights home, as after a run."""
        if self.at_work is not None:
            self._followed[self._before, self.at_work] = None
        self._before = self.at_work = None
        self.lane.settle()
        if self._keep({}, {}):
            self.lane.tidy()

    def _next(self, now: str) -> str | None:
        """The unit that is likely next, if there is room for it."""
        in_order = dict(pairwise(self._units)).get(now)
        guess = self._followed.get((self._before, now), in_order)
        if guess is None or guess not in self._units or guess == now:
            return None
        size = bytes_of(self._units[now]) + bytes_of(self._units[guess])
        return guess if self._limit is None or size <= self._limit else None

    @torch.inference_mode(False)
    def _keep(self, here: Mapping[int, Tensor], coming: Mapping[int, Tensor]) -> bool:
        """Send home what is not of `here`, and drop copies that are not of `coming` or are out of date.

        Returns whether anything went home.
        """
        leaving = [loan for key, loan in self._here.items() if key not in here]
        dropped = [
            loan for key, loan in self._coming.items() if key not in coming or not loan.is_still(loan.home)
        ]
        self._wait([*leaving, *dropped])
        for loan in leaving:
            tensor = loan.tensor
            tensor.data = loan.home if loan.is_still(loan.copy) else self.lane.home(tensor.data)
            del self._here[id(tensor)]
        for loan in dropped:
            del self._coming[id(loan.tensor)]
        return bool(leaving)

    def _send(self, wanted: Mapping[int, Tensor]) -> None:
        """Start to copy what is neither there nor on its way."""
        tensors = [tensor for key, tensor in wanted.items() if key not in self._here | self._coming]
        for tensor in tensors:
            tensor.data = self.lane.home(tensor.data)
        homes = [tensor.data for tensor in tensors]
        copies, arrival = self.lane.send(homes) if homes else ([], None)
        for tensor, home, copy in zip(tensors, homes, copies, strict=True):
            self._coming[id(tensor)] = Loan(tensor, home, copy, tensor._version, arrival)
        self.peak_bytes = max(self.peak_bytes, self.bytes_on_device)

    def _wait(self, loans: Iterable[Loan]) -> None:
        for event in {id(loan.arrival): loan.arrival for loan in loans}.values():
            self.lane.wait(event)

    def _look(self, models: Models) -> None:
        """Find the units of these models as they are now, and send home what was made on the accelerator."""
        stages = {name: whole(models[name]) for name in STAGES if name in models}
        if self.by_block:
            refuse_compiled(models)
            self._hook(stages)
        else:
            self._units = stages
            self._limit = max(map(bytes_of, stages.values()), default=0)
        for unit in stages.values():
            for key, tensor in tensors_of(unit).items():
                if key not in self._here and tensor.device.type != "cpu":
                    tensor.data = self.lane.home(tensor.data)

    def _hook(self, stages: Mapping[str, Unit]) -> None:
        """Let each module of a block bring the block: not every block is called as a whole.

        What two models share, such as an IP-Adapter's branches, is of the first. No hook is on a model
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
            part.register_forward_pre_hook(Arrive(ref(self), name), prepend=True)
            for part, name in owners.items()
        ]

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
