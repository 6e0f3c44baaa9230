"""Queries, keys and values of self-attention in one matrix product in place of three.

The weights of to_q, to_k and to_v become slices of one tensor, which the product reads whole. That takes no
memory, and the three layers stay, for adapters and checkpoints. Each layer runs by itself where the slices
are not together any more, as after `.to()` or under offload, where a layer is no plain `nn.Linear`, as with
a LoRA or quantized weights, with gradients, and under torch.compile.
Source: `fuse_projections` in diffusers' models/attention_processor.py, which copies the weights.
Shapes: B batch, N pixels, C channels.
"""

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.attention import split_heads
from kolors_core.context import Context, KeysValues
from kolors_core.unet import Attention, TransformerBlock


class FusedAttention(Attention):
    """The UNet's self-attention with one product for queries, keys and values."""

    def project(self, x: Tensor, context: Context | KeysValues) -> tuple[Tensor, KeysValues]:
        """Compute `Attention.project`."""
        weight = joint_weight(self)
        if weight is None or not isinstance(context, Context) or context.tokens is not x or context.images:
            return super().project(x, context)
        q, k, v = (split_heads(part, self.heads) for part in F.linear(x, weight).chunk(3, dim=-1))
        return q, KeysValues(k, v, context.bias, (), context.perturbed)


def fuse_projections(model: nn.Module) -> int:
    """Fuse the self-attentions of a UNet or ControlNet; return how many are.

    It can be called again, as after `.to()`. Attentions of other classes stay as they are, and so do layers
    whose weights cannot be written, such as quantized ones.
    """
    return sum(_join(attention) for attention in _self_attentions(model))


@torch.no_grad()
def unfuse_projections(model: nn.Module) -> None:
    """Give to_q, to_k and to_v of every fused attention memory of their own again."""
    for attention in _self_attentions(model):
        if type(attention) is FusedAttention:
            _set_class(attention, Attention)
            for weight in _weights(attention) or ():
                weight.data = weight.data.clone()


def keep_fused(model: nn.Module) -> None:
    """Join again the weights of fused attentions that were moved since."""
    for attention in _self_attentions(model):
        if type(attention) is FusedAttention:
            _join(attention)


def joint_weight(attention: Attention) -> Tensor | None:
    """Return the three weights as one [3C, C], not copied; None if each layer runs by itself."""
    if torch.compiler.is_compiling() or attention.image_branches:
        return None
    layers = attention.to_q, attention.to_k, attention.to_v
    hooks = [hooks for layer in layers for hooks in (layer._forward_hooks, layer._forward_pre_hooks)]
    if any(hooks) or any(type(layer) is not nn.Linear for layer in layers):
        return None
    weights = [layer.weight for layer in layers]
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        return None
    width = len(weights[0])
    return weights[0].as_strided((3 * width, width), (width, 1)) if _are_joined(weights) else None


def _self_attentions(model: nn.Module) -> Iterator[Attention]:
    found = (part.self_attention for part in model.modules() if isinstance(part, TransformerBlock))
    return (attention for attention in found if type(attention) in (Attention, FusedAttention))


def _weights(attention: Attention) -> list[Tensor] | None:
    """Return the three weights, also of layers with a LoRA; None if one of them cannot be replaced."""
    layers = attention.to_q, attention.to_k, attention.to_v
    weights = [layer._parameters.get("weight") for layer in layers]
    is_written = all(weight is not None and not weight.is_meta for weight in weights)
    is_written = is_written and all(layer.bias is None for layer in layers)
    return cast("list[Tensor]", weights) if is_written else None


@torch.no_grad()
def _join(attention: Attention) -> bool:
    """Make an attention a fused one, with weights in one tensor, and return whether it is."""
    if (weights := _weights(attention)) is None:
        return False
    _set_class(attention, FusedAttention)
    if not _are_joined(weights):
        parts = torch.cat([weight.data for weight in weights]).chunk(3)
        for weight, part in zip(weights, parts, strict=True):
            weight.data = part
    return True


def _set_class(attention: Attention, kind: type[Attention]) -> None:
    attention.__class__ = kind


def _are_joined(weights: list[Tensor]) -> bool:
    """Return whether three weights follow each other in one memory."""
    first, size = weights[0], weights[0].nbytes
    place, memory = first.data_ptr(), first.untyped_storage().data_ptr()
    return all(
        weight.data_ptr() == place + i * size and weight.untyped_storage().data_ptr() == memory
        and weight.is_contiguous() and weight.shape == first.shape and weight.dtype == first.dtype
        for i, weight in enumerate(weights)
    )  # fmt: skip
