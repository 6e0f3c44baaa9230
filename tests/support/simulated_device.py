"""A simulated accelerator for a CPU build of torch: real "cuda:0" tensors over ordinary memory.

    operations   one fallback for the CUDA dispatch key runs the CPU's kernel on the same memory; as on CUDA
                 operands on different devices are an error, but for scalars and indices
    streams      what is copied on a side stream is NaN until the computing stream waits for it; memory freed
                 before is counted (`Copy.lost`, simulated_streams.py)
    graphs       a recorded graph runs its operations again, on the memory of then; no Python runs
    pinned       memory that is pinned, in powers of two as torch's allocator takes it
    counts       `launched` and `synchronized`: operations, and those for which the host waits

Equal to the CPU bit for bit, since the kernels are its own. Not simulated: autograd (it asks for streams of
CUDA's own), compiled code, autocast, memory that is used again. `simulate_for_training` makes a device with
gradients, for a process of its own. Both need private interfaces of torch, and so the version of CI.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary, finalize

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.simulated_streams import Copy, Graph, Stream, flat, tensor_in

PINNED = "2.13.0"  # .ci/constraints.txt
IS_SIMULATED = torch.__version__.partition("+")[0] == PINNED and torch.version.cuda is None
WHY = f"devices are simulated by private interfaces of torch {PINNED} without CUDA, not {torch.__version__}"
simulates = pytest.mark.skipif(not IS_SIMULATED, reason=WHY)

CPU = torch.device("cpu")
CPU_TYPE, CUDA_TYPE, PRIVATE_TYPE = 1, 2, 12  # DLPack's numbers
DEVICE_OFFSET = 8  # of the device in its struct
PRIVATE_GUARD, CUDA_GUARD, GUARDS = 20, 1, 21  # in torch's registry
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero"}
# Given to the fallback by name, as torch would take them apart: into other arithmetic than the CPU's, or into
# an allocation and the operation itself. The last two have gradients only as their parts.
WHOLE = (
    "copy_", "convolution", "convolution_backward", "native_group_norm", "native_layer_norm", "silu",
    "silu_backward", "gelu", "add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "cat", "mm", "addmm",
    "bmm", "_softmax", "rsqrt", "cos", "sin", "exp", "log", "upsample_nearest2d", "linear",
    "scaled_dot_product_attention",
)  # fmt: skip
ALLOCATES = {"empty", "empty_strided", "empty_like"}

_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def renamed(tensor: Tensor, device: int) -> Tensor:
    """The same memory as a tensor of another device."""
    capsule = torch._C._to_dlpack(tensor.detach() if tensor.requires_grad else tensor)
    address = _pointer(capsule, b"dltensor") + DEVICE_OFFSET
    ctypes.c_int32.from_address(address).value = device
    return torch._C._from_dlpack(capsule)


class Generator(torch.Generator):
    """The CPU's under the device's name, as torch makes none."""

    places: dict[int, torch.device] = {}  # by the address of torch's own object, which it hands on alone

    def __new__(cls, device: Any = "cpu") -> "Generator":
        made = super().__new__(cls, "cpu")
        made.place = Generator.places[made._cdata] = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.place


class _GeneratorType(type):
    """Of a stand-in for the name `torch.Generator`, of which all generators are instances."""

    own = torch.Generator

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _GeneratorType.own)

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return Generator(device)


class AnyGenerator(metaclass=_GeneratorType):
    """Stand-in for `torch.Generator`."""


class Known(NamedTuple):
    """What is read of an operation once. tensors: which arguments are. is_free: whether scalars may be away.
    grows: whether a result that is given may be empty, and grow.
    """

    name: str
    tensors: tuple[int, ...]
    is_index: bool
    is_free: bool
    grows: bool


@cache
def _known(op: Any) -> Known:
    name, arguments = op._schema.name.partition("::")[2], op._schema.arguments
    is_index = name in ("index", "index_put", "index_put_", "_index_put_impl_")
    is_free = is_index or torch.Tag.pointwise in op.tags or "where" in name or "foreach" in name
    tensors = tuple(i for i, argument in enumerate(arguments) if argument.type.kind() == "TensorType")
    return Known(name, tensors, is_index, is_free, "out" in op._overloadname)


def as_operand(value: float) -> Tensor:
    """A number as the tensor that it was before torch handed it to Python."""
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


class Simulation:
    """A simulated device: what it was given, and the memory it knows."""

    active: "Simulation"

    def __init__(self, name: str, number: int) -> None:
        self.name, self.number = name, number
        self.launched: list[str] = []
        self.synchronized: list[str] = []
        self.memory: WeakValueDictionary[int, np.ndarray] = WeakValueDictionary()  # of `empty`, by address
        self.pinned: WeakValueDictionary[int, np.ndarray] = WeakValueDictionary()
        self.libraries: list[torch.library.Library] = []
        self.cached_pinned_bytes = 0  # freed, and kept by torch's allocator

    def run(self, op: Any, *args: Any, **named: Any) -> Any:
        """Run an operation of the device on the CPU."""
        known = _known(op)
        name = known.name
        self.launched.append(name)
        if name == "copy_":
            return self._copy(op, *args)
        if name == "empty_strided":
            return self._allocate(args[0], args[1], named.get("dtype") or torch.get_default_dtype())
        self.check(op, known, args, named)
        if name in WAITS:
            self._wait(name)
        originals: dict[int, Tensor] = {}

        def to_cpu(value: Any) -> Any:
            if isinstance(value, Tensor):
                if value.device.type != self.name:
                    return value
                grows = known.grows and not value.numel()
                alias = torch.zeros(0, dtype=value.dtype) if grows else renamed(value, CPU_TYPE)
                originals[id(alias)] = value
                return alias
            if type(value) in (list, tuple):
                return type(value)(map(to_cpu, value))
            return CPU if type(value) is torch.device and value.type == self.name else value

        cpu_args = list(map(to_cpu, args))
        for i in known.tensors:
            if i < len(args) and type(args[i]) in (int, float, bool):
                cpu_args[i] = as_operand(args[i])
        cpu_named = {key: to_cpu(value) for key, value in named.items()} if named else named
        with torch.no_grad():
            result = op(*cpu_args, **cpu_named)
        if Graph.recording is not None:
            Graph.recording.add(op, cpu_args, cpu_named, result)
        if name in ALLOCATES:
            return self._allocate(result.shape, result.stride(), result.dtype)

        def back(value: Any) -> Any:
            if isinstance(value, Tensor):
                if (own := originals.get(id(value))) is None:
                    return renamed(value, self.number)
                if own.shape != value.shape:  # an `out` that has grown
                    own.data = renamed(value, self.number)
                return own
            return type(value)(map(back, value)) if type(value) in (list, tuple) else value

        return back(result)

    def check(self, op: Any, known: "Known", args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Raise RuntimeError for operands that CUDA refuses, which are on another device."""
        for value in flat([*args[:1], *args[2:]] if known.is_index else args, named.values()):
            if isinstance(value, Tensor):
                if value.device.type != self.name and not (known.is_free and value.dim() == 0):
                    found = [str(v.device) for v in flat(args, named.values()) if isinstance(v, Tensor)]
                    raise RuntimeError(f"Expected all tensors to be on the same device, {op}: got {found}")
            elif type(value) in (Generator, _GeneratorType.own):
                place = Generator.places.get(value._cdata, value.device)
                if place.type != self.name:
                    raise RuntimeError(f"Expected a {self.name!r} generator but found {place}")

    def _copy(self, op: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        memory = None if Stream.current is Stream.compute else self.memory.get(target.data_ptr())
        if target.device != source.device and not (non_blocking and (memory is None or source.is_pinned())):
            self._wait("copy_")
        if memory is not None:
            Copy(Stream.current, memory, target, source)
            return target
        both = [t if t.device.type == "cpu" else renamed(t, CPU_TYPE) for t in (target, source)]
        with torch.no_grad():
            both[0].copy_(both[1])
        if Graph.recording is not None:
            Graph.recording.add(op, both, {}, both[0])
        return target

    def _wait(self, name: str) -> None:
        self.synchronized.append(name)
        if Graph.recording is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")

    def _allocate(self, shape: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor, full of NaN, whose end is seen."""
        if 0 in shape:
            return renamed(torch.zeros(1, dtype=dtype).as_strided(shape, stride), self.number)
        last = sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        memory = np.full((last + 1) * dtype.itemsize, 255, np.uint8)
        made = renamed(tensor_in(memory, dtype, shape, stride), self.number)
        self.memory[made.data_ptr()] = memory
        return made

    def pin(self, tensor: Tensor) -> Tensor:
        """Stand-in for `Tensor.pin_memory`."""
        pinned = self.empty_pinned(tensor.nbytes)[: tensor.nbytes]
        return pinned.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def empty_pinned(self, size: int) -> Tensor:
        """Pinned memory, rounded as torch's allocator does; freed, it stays there until that is emptied."""
        memory = np.empty(1 << max(0, size - 1).bit_length(), np.uint8)
        self.pinned[memory.ctypes.data] = memory
        finalize(memory, self._keep_pinned, memory.nbytes)
        return torch.from_numpy(memory)

    def _keep_pinned(self, size: int) -> None:
        self.cached_pinned_bytes += size

    def empty_host_cache(self) -> None:
        """Stand-in for `torch.accelerator.empty_host_cache`."""
        self.cached_pinned_bytes = 0

    def is_pinned(self, tensor: Tensor) -> bool:
        """Stand-in for `Tensor.is_pinned`."""
        return tensor.untyped_storage().data_ptr() in self.pinned

    @property
    def pinned_bytes(self) -> int:
        """Bytes that are pinned, or were and are kept."""
        return self.cached_pinned_bytes + sum(memory.nbytes for memory in list(self.pinned.values()))


def _run(op: Any, *args: Any, **named: Any) -> Any:
    return Simulation.active.run(op, *args, **named)


def _register(key: str, whole: tuple[str, ...]) -> list[torch.library.Library]:
    """Give torch the operations of a dispatch key, until the libraries are destroyed."""
    every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(_run, key)
    for name in whole:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        aten.impl(name, partial(_run, op), key)
    aten.impl("_fused_sdp_choice", lambda *_, **__: 0, key)  # written out in matrix products
    return [every, aten]


def _device_guard(kind: str) -> Any:
    """What torch asks for a device's number, of a `DeviceType`."""

    class Guard(torch._C._acc.DeviceGuard):
        def type_(self) -> Any:
            return getattr(torch._C._autograd.DeviceType, kind)

    return Guard()


@contextmanager
def simulated_cuda() -> Iterator[Simulation]:
    """A simulated "cuda:0" while the block lasts."""
    torch.zeros(1, requires_grad=True).sum().backward()  # starts the threads of the devices that there are
    with torch.device("meta"):
        torch.empty(0)  # torch lists what makes tensors at the first such block: its own `empty`, not ours
    libraries = _register("CUDA", WHOLE)
    guards = (ctypes.c_void_p * GUARDS).in_dll(
        ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libc10.so")),
        "_ZN3c104impl26device_guard_impl_registryE",
    )
    before = guards[PRIVATE_GUARD]
    torch._C._acc.register_python_privateuseone_device_guard(guard := _device_guard("CUDA"))
    guards[CUDA_GUARD], guards[PRIVATE_GUARD] = guards[PRIVATE_GUARD], before
    made, empty = Simulation("cuda", CUDA_TYPE), torch.empty
    properties = SimpleNamespace(major=9, minor=0, total_memory=2**37)

    def empty_or_pinned(*size: Any, pin_memory: bool = False, dtype: torch.dtype | None = None, **named: Any):
        if not pin_memory:
            return empty(*size, dtype=dtype, **named)
        assert dtype == torch.uint8
        return made.empty_pinned(*size)[: size[0]]

    cuda: dict[str, Any] = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "set_device": lambda *_: None,
        "get_device_properties": lambda *_: properties, "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "simulated",
        "synchronize": lambda *_: None, "empty_cache": lambda: None, "Stream": Stream,
        "mem_get_info": lambda *_: (2**37, 2**37), "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0, "current_stream": lambda *_: Stream.compute,
        "stream": lambda stream: nullcontext() if stream is None else stream.using(),
        "CUDAGraph": Graph, "graph": Graph.capture,
    }  # fmt: skip
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Simulation, "active", made, raising=False)
            for name, value in cuda.items():
                patch.setattr(torch.cuda, name, value)
            patch.setattr(torch, "Generator", AnyGenerator)
            patch.setattr(torch, "empty", empty_or_pinned)
            patch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: made.pin(tensor))
            patch.setattr(torch.Tensor, "is_pinned", lambda tensor, *_: made.is_pinned(tensor))
            patch.setattr(torch.accelerator, "empty_host_cache", made.empty_host_cache, raising=False)
            yield made
    finally:
        guards[CUDA_GUARD] = None
        for library in libraries:
            library._destroy()
        del guard


class _Module:
    """What torch asks of a backend that is no part of it."""

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    current_device = get_device_index = staticmethod(lambda *_: 0)
    get_rng_state = staticmethod(lambda *_: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, *_: torch.set_rng_state(state))
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)


def simulate_for_training() -> Simulation:
    """Give this process, which has not computed a gradient yet, a device "sim:0" for good."""
    setup = torch.utils.backend_registration._setup_privateuseone_for_python_backend
    setup("sim", backend_module=_Module(), device_guard=_device_guard("PrivateUse1"))
    Simulation.active = Simulation("sim", PRIVATE_TYPE)
    Simulation.active.libraries = _register("PrivateUse1", WHOLE[:-2])
    Simulation.active.libraries[0].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    return Simulation.active


class Device(NamedTuple):
    """A device for tests, and its simulation, None for a real one."""

    name: str
    simulation: Simulation | None


@contextmanager
def any_device() -> Iterator[Device]:
    """CUDA's or MPS's device where there is one, else the simulated one, else the test is skipped."""
    if torch.cuda.is_available():
        yield Device("cuda", None)
    elif torch.backends.mps.is_available():
        yield Device("mps", None)
    elif IS_SIMULATED:
        with simulated_cuda() as simulation:
            yield Device("cuda", simulation)
    else:
        pytest.skip(WHY)
