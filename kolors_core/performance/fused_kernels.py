"""Fused kernels: GEGLU, addition with LayerNorm and GroupNorm with SiLU, each in one kernel for two or three.

`fuse_kernels(unet)` makes the UNet's blocks compute by them; parameters, names, hooks and adapters stay. On
CUDA with Triton its kernels run, with the same results up to rounding; `kernel("torch")` turns them off.
Torch's operators run on other devices and where no kernel is written for the inputs: with gradients,
autocast or float64, on maps that are not channels-last, with hooks on a norm, where rows are split; and under
torch.compile, which fuses by itself.
Shapes: B batch, N pixels, C channels, H height, W width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core import unet
from kolors_core.context import Context, KeysValues, KnownOutput
from kolors_core.precompute import has_default_forward
from kolors_core.unet import TimeShift

KERNELS = ("torch", "triton")
LAST = torch.channels_last
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_forced: str | None = None


@contextmanager
def kernel(name: str) -> Iterator[None]:
    """Force the kernels of this name in `KERNELS` within the block; ValueError as of `force_kernel`."""
    before = _forced
    force_kernel(name)
    try:
        yield
    finally:
        force_kernel(before)


def force_kernel(name: str | None) -> None:
    """Force the kernels of this name in `KERNELS`, on any device, or let the device choose.

    ValueError for another name, and for "triton" where Triton is not installed.
    """
    global _forced
    if name is not None and name not in KERNELS:
        raise ValueError(f"fused kernel {name!r} is not one of {', '.join(KERNELS)}")
    if name == "triton" and not has_triton():
        raise ValueError("fused kernel 'triton' needs the package triton, which is not installed")
    _forced = name


def forced_kernel() -> str | None:
    """Return the name of the forced kernels, or None."""
    return _forced


@cache
def has_triton() -> bool:
    """Return whether Triton is installed; torch for CUDA brings it on Linux."""
    return find_spec("triton") is not None


def select_kernel(device: torch.device) -> str:
    """Return the forced kernels, or else "triton" on CUDA where Triton is installed, "torch" elsewhere."""
    if _forced is not None:
        return _forced
    return "triton" if device.type == "cuda" and has_triton() else "torch"


def geglu(h: Tensor) -> Tensor:
    """Compute value * gelu(gate), the halves of h [..., 2C]: [..., C]."""
    if (kernels := _triton_for(h)) is not None and h.is_contiguous():
        return kernels.geglu(h)
    value, gate = h.chunk(2, dim=-1)
    return value * F.gelu(gate)


def add_layer_norm(x: Tensor, y: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Compute x + y and norm(x + y), both [..., C]."""
    if has_default_forward(norm, nn.LayerNorm):
        kernels = _triton_for(x, y, norm.weight, norm.bias)
        is_whole = x.is_contiguous() and y.is_contiguous() and x.shape == y.shape
        if kernels is not None and is_whole and norm.normalized_shape == x.shape[-1:]:
            return kernels.add_layer_norm(x, y, norm.weight, norm.bias, norm.eps)
    x = x + y
    return x, norm(x)


def group_norm(x: Tensor, norm: nn.GroupNorm, has_silu: bool = True) -> Tensor:
    """Compute silu(norm(x)), or norm(x), of x [B, C, H, W]; a channels-last map stays one by Triton's."""
    if has_default_forward(norm, FusedGroupNorm):
        kernels, is_last = _triton_for(x, norm.weight, norm.bias), x.is_contiguous(memory_format=LAST)
        if kernels is not None and is_last and x.shape[1] == norm.num_channels:
            return kernels.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, has_silu)
    return F.silu(norm(x)) if has_silu else nn.GroupNorm.forward(norm, x)


def _triton_for(x: Tensor, *others: Tensor | None) -> Any:
    """Return the module of Triton's kernels if they are selected and compute what torch would, else None."""
    if torch.compiler.is_compiling() or select_kernel(x.device) != "triton":
        return None
    if x.dtype not in DTYPES or not x.numel() or torch.is_autocast_enabled(x.device.type):
        return None
    if any(other is None or other.dtype != x.dtype for other in others):
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *others) if tensor is not None):
        return None
    from kolors_core.performance import triton_kernels

    return triton_kernels


class FusedGroupNorm(nn.GroupNorm):
    """GroupNorm, of a channels-last map by Triton's kernel."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize [B, C, H, W]."""
        return group_norm(input, self, has_silu=False)


class FusedResBlock(unet.ResBlock):
    """The UNet's ResBlock with fused norms."""

    def forward(self, x: Tensor, time: Tensor | TimeShift) -> Tensor:
        """Compute `ResBlock.forward`."""
        h = self.conv1(group_norm(x, self.norm1))
        shift = time if isinstance(time, TimeShift) else self.time_shift(time)
        h = h + shift.added[:, :, None, None]  # [B, C', H, W]
        h = self.conv2(group_norm(h, self.norm2))
        return self.shortcut(x) + h


class FusedFeedForward(unet.FeedForward):
    """The UNet's FeedForward with a fused GEGLU."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute `FeedForward.forward`."""
        return self.proj_out(geglu(self.proj_in(x)))


class FusedTransformerBlock(unet.TransformerBlock):
    """The UNet's TransformerBlock, in which two residuals are added by the kernel of the next norm."""

    def state_key(self) -> tuple[str, ...]:
        """Return the selected kernels, which round in other places, see kolors_core/module.py."""
        return (select_kernel(self.norm1.weight.device),)

    def forward(self, x: Tensor, context: Context | KeysValues | KnownOutput) -> Tensor:
        """Compute `TransformerBlock.forward`."""
        normed = self.norm1(x)
        attended = self.self_attention(normed, Context(normed), context.perturbed)
        x, normed = add_layer_norm(x, attended, self.norm2)
        x, normed = add_layer_norm(x, self.cross_attention(normed, context), self.norm3)
        return x + self.feed_forward(normed)


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: FusedGroupNorm, unet.ResBlock: FusedResBlock, unet.FeedForward: FusedFeedForward,
    unet.TransformerBlock: FusedTransformerBlock,
}  # fmt: skip


def fuse_kernels(model: unet.UNetEncoder) -> None:
    """Make a UNet's or ControlNet's blocks compute by fused kernels, and its convolutions channels-last.

    Each block becomes one of the subclass above, as torch's `fully_shard` does it, so that whatever holds it
    still does. Blocks of other classes, such as a researcher's, stay as they are.
    """
    _replace_classes(model, FUSED)
    model.to(memory_format=LAST)


def unfuse_kernels(model: unet.UNetEncoder) -> None:
    """Undo `fuse_kernels`."""
    _replace_classes(model, {fused: plain for plain, fused in FUSED.items()})
    model.to(memory_format=torch.contiguous_format)


def _replace_classes(model: nn.Module, kinds: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in model.modules():
        module.__class__ = kinds.get(type(module), type(module))
