"""Devices and dtypes of the stages, and the check that results are finite."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

Dtypes = torch.dtype | Mapping[str, torch.dtype] | None

# What helps against numbers that have become too large for a precision.
OVERFLOW_HINT = {torch.float16: "try bfloat16 or float32", torch.bfloat16: "try float32"}
NO_DTYPE_HELPS = "no precision helps, look at the weights, at adapters' scales and at what was given"


def best_device() -> torch.device:
    """CUDA if there is one, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def named_device(name: str | None) -> torch.device:
    """The device of this name, the best there is if None; ValueError if it is not on this machine."""
    if name is None:
        return best_device()
    try:
        if name == "meta":
            raise RuntimeError("nothing is computed on the meta device")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise ValueError(
            f"expected a device of this machine, such as cpu, cuda:0 or mps, got {name!r}"
        ) from None


def loading_device(device: torch.device | str) -> torch.device:
    """Where weights are loaded to: a device of this machine, or "meta" for none; ValueError otherwise."""
    return torch.device("meta") if str(device) == "meta" else named_device(str(device))


def planned_device(name: torch.device | str | None) -> torch.device:
    """A device that this machine need not have, the best that it has if None; ValueError for another kind."""
    if name is not None and str(name).partition(":")[0] in ("cuda", "mps"):
        try:
            return torch.device(name)
        except RuntimeError:
            raise ValueError(f"expected a device such as cpu, cuda:0 or mps, got {str(name)!r}") from None
    return named_device(None if name is None else str(name))


def onednn_convolves(dtype: torch.dtype) -> bool:
    """Tell whether this CPU's convolutions of a dtype are oneDNN's: in half precision where it has the
    instructions, in float64 never.
    """
    half = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype in half and torch.backends.mkldnn.is_available():
        return getattr(torch.ops.mkldnn, half[dtype])()
    return dtype == torch.float32


def best_dtype(device: torch.device) -> torch.dtype:
    """float16 on an accelerator, as Kolors is published; float32 on a CPU, where float16 is very slow."""
    return torch.float32 if device.type == "cpu" else torch.float16


def dtype_of(component: str, torch_dtype: Dtypes) -> torch.dtype:
    """The dtype of one component; float32 if none is asked for.

    torch_dtype: one for all, or a mapping by component with a "default".
    The VAE asked for in float16 gets float32: SDXL's overflows. Raises TypeError for what is no floating
    dtype, ValueError for a mapping's unknown component.
    """
    asked = torch_dtype
    if isinstance(torch_dtype, Mapping):
        known = ("text_encoder", "unet", "vae", "image_encoder", "default")
        if strangers := sorted(set(torch_dtype) - set(known)):
            raise ValueError(f"torch_dtype names {strangers[0]!r}; expected {', '.join(known)}")
        asked = torch_dtype.get(component, torch_dtype.get("default"))
    if asked is None:
        return torch.float32
    if not isinstance(asked, torch.dtype) or not asked.is_floating_point:
        raise TypeError(f"torch_dtype must be a floating torch.dtype, got {asked!r}")
    return torch.float32 if component == "vae" and asked == torch.float16 else asked


def merge_dtype_arguments(torch_dtype: Dtypes, dtype: Dtypes) -> Dtypes:
    """The argument `torch_dtype`, or by its newer name `dtype`; ValueError if both are given."""
    if torch_dtype is not None and dtype is not None:
        raise ValueError("torch_dtype and dtype are two names of one argument: give one")
    return torch_dtype if dtype is None else dtype


def refuse_pickles(use_safetensors: bool | None) -> None:
    """ValueError for the reference's way to ask for pickles."""
    if use_safetensors is False:
        raise ValueError("use_safetensors=False: pickles can run code, only safetensors are opened")


def check_low_cpu_mem_usage(low_cpu_mem_usage: bool) -> None:
    """ValueError for the reference's way of loading by a second copy, which there is none of here."""
    if not low_cpu_mem_usage:
        raise ValueError("low_cpu_mem_usage=False has no effect: weights are always loaded once")


def plain(model: Any) -> Any:
    """The model itself, of one that `torch.compile` has wrapped."""
    return getattr(model, "_orig_mod", model)


def move(models: Iterable[tuple[nn.Module, torch.device | torch.dtype]]) -> None:
    """Bring each model to its device or dtype; if there is no room for one, all are brought back."""
    before: list[tuple[Tensor, torch.device, torch.dtype]] = []
    try:
        for model, target in models:
            before += [(t, t.device, t.dtype) for t in chain(model.parameters(), model.buffers())]
            model.to(target)
    except BaseException:
        for tensor, device, dtype in before:
            tensor.data = tensor.data.to(device, dtype)
        raise


def finite(tensor: Tensor, what: str | Callable[[], str], dtype: torch.dtype) -> Tensor:
    """The tensor, or FloatingPointError naming the stage and its precision instead of a black image."""
    if not torch.isfinite(tensor).all():
        what = what if isinstance(what, str) else what()
        raise FloatingPointError(
            f"{what} are not finite, computed in {dtype}: {OVERFLOW_HINT.get(dtype, NO_DTYPE_HELPS)}"
        )
    return tensor
