"""Devices and dtypes of the stages, and the check that results are finite."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Dtypes = torch.dtype | Mapping[str, torch.dtype] | None

OVERFLOW_HINT = {torch.float16: "try bfloat16 or float32", torch.bfloat16: "try float32"}
# Of a CPU's allocators, as torch's and C++' have them.
_OUT_OF_MEMORY = re.compile(  # the last is oneDNN's
    r"(?i)DefaultCPUAllocator|out of memory|bad_alloc|cannot allocate memory|could not create a primitive"
)
NO_DTYPE_HELPS = "no precision helps, look at the weights, at adapters' scales and at what was given"


def best_device() -> torch.device:
    """Return CUDA if it is available, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def named_device(name: str | None) -> torch.device:
    """Return the device of this name, `best_device` if None; ValueError if this machine lacks it."""
    if name is None:
        return best_device()
    try:
        if name == "meta":
            raise RuntimeError
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError):
        devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        devices += ["mps"] if torch.backends.mps.is_available() else []
        expected = f"expected a device of this machine, {' or '.join(devices)}"
        raise ValueError(f"{expected}, got {name!r}{_why_absent(name)}") from None


def _why_absent(name: str) -> str:
    """Say why this machine has no device of this type, if that is known."""
    kind = name.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        has_cuda = torch.version.cuda is not None or torch.version.hip is not None
        no_gpu = "CUDA finds no GPU or no driver"
        return f": {no_gpu}" if has_cuda else f": this torch, {torch.__version__}, is built without CUDA"
    if kind == "mps" and not torch.backends.mps.is_available():
        is_built = torch.backends.mps.is_built()
        return ": MPS needs a Mac with Apple's GPU" if is_built else ": this torch is built without MPS"
    return ": nothing is computed on it" if kind == "meta" else ""


def loading_device(device: torch.device | str) -> torch.device:
    """Return the device to load weights to, which may be "meta"; ValueError if this machine lacks it."""
    return torch.device("meta") if str(device) == "meta" else named_device(str(device))


def planned_device(name: torch.device | str | None) -> torch.device:
    """Return a device, `best_device` if None; ValueError unless CUDA, MPS or a device of this machine."""
    if name is not None and str(name).partition(":")[0] in ("cuda", "mps"):
        try:
            return torch.device(name)
        except RuntimeError:
            raise ValueError(f"expected a device such as cpu, cuda:0 or mps, got {str(name)!r}") from None
    return named_device(None if name is None else str(name))


def onednn_convolves(dtype: torch.dtype) -> bool:
    """Return whether oneDNN runs a dtype's convolutions on this CPU: halves if supported, float64 never."""
    half = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype in half and torch.backends.mkldnn.is_available():
        return getattr(torch.ops.mkldnn, half[dtype])()
    return dtype == torch.float32


def best_dtype(device: torch.device) -> torch.dtype:
    """Return float16 on an accelerator, as Kolors is published, or float32 on a CPU, where that is slow."""
    return torch.float32 if device.type == "cpu" else torch.float16


def dtype_of(component: str, torch_dtype: Dtypes) -> torch.dtype:
    """Return the dtype of one component; float32 by default.

    torch_dtype: one for all, or a mapping by component with a "default". float16 becomes float32 for the VAE,
    since SDXL's overflows. TypeError unless it is a floating dtype, ValueError for an unknown component.
    """
    dtype = torch_dtype
    if isinstance(torch_dtype, Mapping):
        known = ("text_encoder", "unet", "vae", "image_encoder", "default")
        if unknown := sorted(set(torch_dtype) - set(known)):
            raise ValueError(f"torch_dtype names {unknown[0]!r}; expected {', '.join(known)}")
        dtype = torch_dtype.get(component, torch_dtype.get("default"))
    if dtype is None:
        return torch.float32
    dtype = check_dtype(dtype, "torch_dtype")
    return torch.float32 if component == "vae" and dtype == torch.float16 else dtype


def check_dtype(dtype: Any, name: str = "dtype") -> torch.dtype:
    """Return a dtype; TypeError unless models can compute in it: floats of two bytes or more."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating torch.dtype, got {dtype!r}")
    if dtype.itemsize < 2:
        instead = "for less memory, quantize to 8 or 4 bits (pipelines/quantization_report.py)"
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {dtype}: {instead}")
    return dtype


def merge_dtype_arguments(torch_dtype: Dtypes, dtype: Dtypes) -> Dtypes:
    """Return `torch_dtype` or, by its newer name, `dtype`; ValueError if both are given."""
    if torch_dtype is not None and dtype is not None:
        raise ValueError("torch_dtype and dtype are two names of one argument: give one")
    return torch_dtype if dtype is None else dtype


def unwrap_compiled(model: Any) -> Any:
    """Return the model inside `torch.compile`'s wrapper, or the model itself."""
    return getattr(model, "_orig_mod", model)


def move_models(models: Iterable[tuple[nn.Module, torch.device | torch.dtype]]) -> None:
    """Move each model to its device or cast it to its dtype; if one fails, restore all, bit for bit.

    A cast that rounds keeps the old values until all is done, which takes no memory while they are a file's.
    """
    parameters: list[tuple[Tensor, Tensor | None, torch.device, torch.dtype]] = []
    buffers: list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]] = []
    try:
        for model, target in models:
            for tensor in model.parameters():
                old = tensor.data if _rounds(tensor.dtype, target) else None
                parameters.append((tensor, old, tensor.device, tensor.dtype))
            buffers += [(module._buffers, dict(module._buffers)) for module in model.modules()]
            model.to(target)
    except BaseException:
        for tensor, old, device, dtype in parameters:
            tensor.data = tensor.data.to(device, dtype) if old is None else old
        for own, old in buffers:
            own.update(old)
        raise


def _rounds(dtype: torch.dtype, target: torch.device | torch.dtype) -> bool:
    return isinstance(target, torch.dtype) and torch.promote_types(dtype, target) != target


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out: an accelerator's, or a CPU's, which has no class."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def all_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite, also of float8, for which torch has no such operation."""
    is_wide = tensor.itemsize > 1 or not tensor.is_floating_point()
    return bool(torch.isfinite(tensor if is_wide else tensor.float()).all())


def check_finite(tensor: Tensor, what: str | Callable[[], str], dtype: torch.dtype) -> Tensor:
    """Return the tensor; FloatingPointError naming the stage and its dtype unless all values are finite."""
    if not all_finite(tensor):
        what, hint = what if isinstance(what, str) else what(), OVERFLOW_HINT.get(dtype, NO_DTYPE_HELPS)
        raise FloatingPointError(f"{what} are not finite, computed in {dtype}: {hint}")
    return tensor
