"""Weights in 8 or 4 bits: whole numbers with a scale, turned back into the model's dtype layer by layer.

Of ChatGLM all linear layers; of the UNet those in its transformers, 86% of its weights. Its other linear
layers have 1.4% of them, and all text and time passes through: 4 bits there would save little and add an
eighth to the error. Activations keep their precision: `F.linear` gets a plain weight, made when it is needed
and dropped after.
Source: rounding to nearest by rows and by groups, the baseline of GPTQ (https://arxiv.org/abs/2210.17323).
Shapes: O and I the layer's widths, g a group of neighbours along I.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.chatglm import ChatGLMLayer
from kolors_core.module import require_plain
from kolors_core.unet import Transformer

BITS = (4, 8)
GROUP = 64  # int4 weights that share a scale; 32 gain 0.001 of cosine for a half bit a weight
PER_ROW = 0  # a group that is a whole row, as in files of THUDM's ChatGLM


class QuantizedLinear(nn.Linear):
    """A linear layer that holds its weight as whole numbers; `weight` is made of them when it is read.

    8 bits: q * scale, with quantized int8 [O, I] from -127 to 127 and scale [O, 1], of each row.
    4 bits: q * scale + lowest, with q from 0 to 15, scale and lowest [O, I/g, 1] of each group, and quantized
    uint8 [O, I/g, g/2]: a group's first half in the low four bits, its second half in the high ones. g is 64,
    or for other widths the largest power of two below that divides I; with `PER_ROW` it is I.
    All are buffers. scale and lowest have the model's dtype, and so the weight; they are rounded to the
    8 bits of bfloat16 before they are used, so that a later change of dtype does not change them.
    The weight cannot be written or trained; inputs and the bias have gradients. A backward pass keeps each
    layer's made weight, or with `training.checkpoint_blocks` one block's.
    """

    not_plain = "quantised"  # see module.require_plain
    quantized: Tensor
    scale: Tensor
    lowest: Tensor | None

    def __init__(self, linear: nn.Linear, bits: int, group: int = GROUP) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(linear))  # sizes, mode and hooks; of the parameters only the bias
        self._parameters, self._buffers, self.bits = {}, {}, bits
        self.register_parameter("bias", linear.bias)
        weight = linear.weight.detach()
        made = _in_8_bits(weight) if bits == 8 else _in_4_bits(weight, group)
        for name, tensor in zip(("quantized", "scale", "lowest"), made, strict=True):
            self.register_buffer(name, tensor)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight [O, I], in the dtype of the scale: a new tensor each time."""
        if self.lowest is None:
            return self.quantized.to(self.scale.dtype).mul_(self.scale)
        q = torch.cat([self.quantized & 15, self.quantized >> 4], dim=-1)  # [O, I/g, g]
        return q.to(self.scale.dtype).mul_(self.scale).add_(self.lowest).flatten(1)

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        """What `print` adds for this layer."""
        return f"{super().extra_repr()}, bits={self.bits}"


def quantize(model: nn.Module, bits: int, group: int = GROUP) -> None:
    """Put a `QuantizedLinear` in the place of each large linear layer of a ChatGLM or UNet.

    Layer by layer, so that both whole models are never in memory at once. There is no way back but to load
    the model again. A model on the meta device gets the shapes, for a quantised state dict to be assigned to.
    group: with 4 bits, how many weights share a scale; `PER_ROW` for all of a row.
    ValueError, before anything is changed, for what `quantizable_layers` refuses.
    """
    for path in quantizable_layers(model, bits):
        parent, _, name = path.rpartition(".")
        layer = QuantizedLinear(cast(nn.Linear, model.get_submodule(path)), bits, group)
        setattr(model.get_submodule(parent), name, layer)


def quantizable_layers(model: nn.Module, bits: int) -> list[str]:
    """The paths of the layers that `quantize` replaces; an IP-Adapter's branches are not among them.

    ValueError for bits other than 4 and 8, a model that is quantised already or has no such layers, and a
    layer that carries a LoRA (attach it after) or, with 4 bits, has an odd width.
    """
    kind = type(model).__name__
    if bits not in BITS:
        raise ValueError(f"a weight has 4 or 8 bits, got {bits!r}")
    require_plain(model, "quantise it again")
    paths = [
        f"{place}.{path}"
        for place, block in model.named_modules()
        if isinstance(block, ChatGLMLayer | Transformer)
        for path, layer in block.named_modules()
        if isinstance(layer, nn.Linear) and ".image_branches." not in path
    ]
    if not paths:
        raise ValueError(f"expected a ChatGLM or a UNet, got a {kind}: it has no transformers to quantise")
    for path in paths:
        layer = model.get_submodule(path)
        if type(layer) is not nn.Linear:
            wanted = "a plain nn.Linear: LoRAs are attached after quantising"
            raise ValueError(f"{path} is a {type(layer).__name__}, expected {wanted}")
        if bits == 4 and layer.in_features % 2:
            raise ValueError(f"{path} is {layer.in_features} wide, expected an even width for 4 bits")
    return paths


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer is."""
    kind = QuantizedLinear.not_plain  # which a LoRA in a layer's place says too
    return any(getattr(module, "not_plain", None) == kind for module in model.modules())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, adapters included."""
    return sum(tensor.nbytes for tensors in (model.parameters(), model.buffers()) for tensor in tensors)


def _in_8_bits(weight: Tensor) -> tuple[Tensor, Tensor, None]:
    """The buffers of a weight [O, I]."""
    w = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = _round_scale(w.abs().amax(dim=1, keepdim=True) / 127, weight.dtype)  # [O, 1]
    q = (w / scale).round_().clamp_(-127, 127).to(torch.int8)  # [O, I]
    return q, scale, None


def _in_4_bits(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """The buffers of a weight [O, I]."""
    group = math.gcd(weight.shape[1], group)
    w = weight.to(torch.promote_types(weight.dtype, torch.float32)).unflatten(1, (-1, group))  # [O, I/g, g]
    lowest, highest = w.amin(dim=-1, keepdim=True), w.amax(dim=-1, keepdim=True)  # [O, I/g, 1]
    lowest = lowest.to(torch.bfloat16).to(weight.dtype)
    scale = _round_scale((highest - lowest) / 15, weight.dtype)
    q = ((w - lowest) / scale).round_().clamp_(0, 15).to(torch.uint8)
    first, second = q.chunk(2, dim=-1)
    return first | second << 4, scale, lowest


def _round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in 8 significant bits, which every dtype has; 1 in place of 0, where all weights are equal."""
    scale = scale.to(torch.bfloat16).to(dtype)
    return torch.where(scale == 0, 1, scale)
