"""Queries, keys and values of self-attention in one matrix product in place of three.

The weights of to_q, to_k and to_v become parts of one tensor, which the product reads whole. That takes no
memory, and the three layers stay, for adapters and checkpoints. They run one by one where the parts are not
together, as under offload and in a copy of a model, where a layer is no plain `nn.Linear`, as with a LoRA or
quantized weights, or has a hook, with gradients, under torch.compile, and where rows are split.
Source: `fuse_projections` in diffusers' models/attention_processor.py, which copies the weights.
Shapes: B batch, N pixels, C channels.
"""

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.attention import split_heads
from kolors_core.context import Context, KeysValues
from kolors_core.precompute import has_default_forward
from kolors_core.unet import Attention, TransformerBlock


class FusedAttention(Attention):
    """The UNet's self-attention with one product for queries, keys and values."""

    def project(self, x: Tensor, context: Context | KeysValues) -> tuple[Tensor, KeysValues]:
        """Compute `Attention.project`."""
        is_self = isinstance(context, Context) and context.tokens is x and not context.images
        if not is_self or (weight := joint_weight(self)) is None:
            return super().project(x, context)
        q, k, v = (split_heads(part, self.heads) for part in F.linear(x, weight).chunk(3, dim=-1))
        return q, KeysValues(k, v, context.bias, ())

    def _apply(self, fn: Callable[..., Any], *given: Any, **named: Any) -> Self:
        """Move or cast as `nn.Module`, and join the weights again."""
        super()._apply(fn, *given, **named)
        _join(self)
        return self


def fuse_projections(model: nn.Module) -> None:
    """Fuse the self-attentions of a UNet or ControlNet; they stay fused when it is moved or cast.

    Attentions of other classes stay as they are, and so do layers whose weights cannot be joined, such as
    quantized ones. ValueError if these are all that there are.
    """
    attentions = list(_self_attentions(model))
    if not sum([_join(attention) for attention in attentions]):
        kinds = {type(attention.to_q).__name__ for attention in attentions}
        got = "none of the library's own class"
        if kinds:
            place = attentions[0].to_out.weight.device
            got = f"layers of {kinds.pop()} on {place}: fuse projections before quantizing"
        expected = f"this {type(model).__name__} must have self-attentions with weights that can be joined"
        raise ValueError(f"{expected}, got {got}")


@torch.no_grad()
def unfuse_projections(model: nn.Module) -> None:
    """Give to_q, to_k and to_v of every fused attention memory of their own again."""
    for attention in _self_attentions(model):
        if type(attention) is FusedAttention:
            attention.__class__ = Attention  # pyright: ignore[reportAttributeAccessIssue]
            for weight in _weights(attention) or ():
                weight.data = weight.data.clone()


def joint_weight(attention: Attention) -> Tensor | None:
    """Return the three weights as one [3C, C], not copied; None if each layer runs by itself."""
    if torch.compiler.is_compiling() or (weights := _weights(attention)) is None:
        return None
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        return None
    is_plain = all(has_default_forward(layer, nn.Linear) for layer in _layers(attention))
    return _joined(weights) if is_plain else None


def _self_attentions(model: nn.Module) -> Iterator[Attention]:
    found = (part.self_attention for part in model.modules() if isinstance(part, TransformerBlock))
    return (attention for attention in found if type(attention) in (Attention, FusedAttention))


def _layers(attention: Attention) -> list[Any]:
    own = attention._modules  # 70 attentions are asked in every step: attributes take ten times as long
    return [own["to_q"], own["to_k"], own["to_v"]]


def _weights(attention: Attention) -> list[nn.Parameter] | None:
    """Return the three weights, also of layers with a LoRA; None if they cannot be in one tensor."""
    parameters = [layer._parameters for layer in _layers(attention)]
    first, weights = parameters[0].get("weight"), [own.get("weight") for own in parameters]
    is_alike = all(
        type(weight) is nn.Parameter and weight.shape == first.shape and weight.dtype == first.dtype
        and weight.device == first.device for weight in weights
    )  # fmt: skip
    return weights if is_alike and all(own.get("bias") is None for own in parameters) else None


@torch.no_grad()
def _join(attention: Attention) -> bool:
    """Make an attention a fused one, with weights in one tensor, and return whether it is."""
    if (weights := _weights(attention)) is None or weights[0].is_meta:
        return False
    attention.__class__ = FusedAttention
    if _joined(weights) is None:
        parts = torch.cat([weight.data for weight in weights]).chunk(3)
        for weight, part in zip(weights, parts, strict=True):
            weight.data = part
    return True


def _joined(weights: list[nn.Parameter]) -> Tensor | None:
    """Return three weights as one [3C, C]; None if they do not follow each other in one memory."""
    first, (rows, columns) = weights[0], weights[0].shape
    start, size, memory = first.data_ptr(), first.nbytes, first.untyped_storage()
    follow = all(w.data_ptr() == start + i * size and w.is_contiguous() for i, w in enumerate(weights))
    has_room = memory.data_ptr() + memory.nbytes() >= start + 3 * size
    return first.as_strided((3 * rows, columns), (columns, 1)) if follow and has_room else None
