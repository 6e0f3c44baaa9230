"""Weights in 8 or 4 bits: integers with a scale, dequantized to the model's dtype layer by layer.

All linear layers of ChatGLM are quantized, and of the UNet those in its transformers, 86% of its weights. Its
other linear layers, 1.4%, embed text and time: 4 bits there would save little and add an eighth to the error.
Activations keep their precision: `F.linear` gets a dequantized weight, which is freed after it.
Source: rounding to nearest by rows and by groups, the baseline of GPTQ (https://arxiv.org/abs/2210.17323).
Shapes: O and I the layer's output and input widths, g a group of neighbors along I.
"""

import math
from itertools import chain
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.chatglm import ChatGLMLayer
from kolors_core.module import apply_to_all, require_plain
from kolors_core.unet import Transformer

BITS = (4, 8)
GROUP = 64  # int4 weights that share a scale; 32 gain 0.001 of cosine for a half bit a weight
PER_ROW = 0  # one group a row, as in files of THUDM's ChatGLM


class QuantizedLinear(nn.Linear):
    """Linear layer that stores its weight as integers; reading `weight` dequantizes them.

    8 bits: q * scale, with quantized int8 [O, I] from -127 to 127 and scale [O, 1], of each row.
    4 bits: q * scale + lowest, with q from 0 to 15, scale and lowest [O, I/g, 1] of each group, and quantized
    uint8 [O, I/g, g/2]: a group's first half in the low four bits, its second half in the high ones. g is 64,
    or for other widths the largest power of two below that divides I; with `PER_ROW` it is I.
    All are buffers. scale and lowest have the model's dtype, as the weight, but only bfloat16's 8 significant
    bits, so that a later change of dtype does not change them. The weight cannot be written or trained. A
    backward pass keeps each layer's dequantized weight, or with `training.checkpoint_blocks` one block's.
    """

    not_plain = "quantized"  # see module.require_plain
    quantized: Tensor
    scale: Tensor
    lowest: Tensor | None

    def __init__(self, linear: nn.Linear, bits: int, group: int = GROUP) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(linear))  # sizes, mode and hooks; of the parameters only the bias
        self._parameters, self._buffers, self.bits = {}, {}, bits
        self.register_parameter("bias", linear.bias)
        weight = linear.weight.detach()
        buffers = _in_8_bits(weight) if bits == 8 else _in_4_bits(weight, group)
        for name, tensor in zip(("quantized", "scale", "lowest"), buffers, strict=True):
            self.register_buffer(name, tensor)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight [O, I], in the dtype of the scale: a new tensor each time."""
        if self.lowest is None:
            return self.quantized.to(self.scale.dtype).mul_(self.scale)
        q = torch.cat([self.quantized & 15, self.quantized >> 4], dim=-1)  # [O, I/g, g]
        return q.to(self.scale.dtype).mul_(self.scale).add_(self.lowest).flatten(1)

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Describe this layer for `print`, with its bits."""
        return f"{super().extra_repr()}, bits={self.bits}"


def quantize(model: nn.Module, bits: int, group: int = GROUP) -> None:
    """Replace each large linear layer of a ChatGLM or UNet by a `QuantizedLinear`.

    This goes layer by layer, never with two whole models in memory, and cannot be undone. A model on the meta
    device gets the shapes, for a quantized state dict to be assigned to. group: with 4 bits, how many weights
    share a scale; `PER_ROW` for all of a row. ValueError, before any change, as of `quantizable_layers`. Once
    it has begun, an interrupt is raised when all layers are quantized: what is left of the weights is theirs.
    """

    def quantize_layer(path: str) -> None:
        layer = model.get_submodule(path)
        if not isinstance(layer, QuantizedLinear):
            model.set_submodule(path, QuantizedLinear(cast(nn.Linear, layer), bits, group))

    apply_to_all(quantize_layer, quantizable_layers(model, bits))


def quantizable_layers(model: nn.Module, bits: int) -> list[str]:
    """List the paths of the layers that `quantize` replaces; an IP-Adapter's branches are not among them.

    ValueError for other bits, a model that is quantized already or has no such layers, and a layer that has a
    LoRA (attach it after) or, with 4 bits, an odd width.
    """
    if bits not in BITS:
        raise ValueError(f"a weight has 4 or 8 bits, got {bits!r}")
    require_plain(model, "quantize it again")
    paths = [
        path
        for prefix, block in model.named_modules() if isinstance(block, ChatGLMLayer | Transformer)
        for path, layer in block.named_modules(prefix=prefix)
        if isinstance(layer, nn.Linear) and ".image_branches." not in path
    ]  # fmt: skip
    if not paths:
        kind = type(model).__name__
        raise ValueError(f"expected a ChatGLM or a UNet, got a {kind}: it has no transformers to quantize")
    for path in paths:
        layer = model.get_submodule(path)
        if type(layer) is not nn.Linear:
            got = f"{path} is a {type(layer).__name__}"
            raise ValueError(f"{got}, expected a plain nn.Linear: LoRAs are attached after quantizing")
        if bits == 4 and layer.in_features % 2:
            raise ValueError(f"{path} is {layer.in_features} wide, expected an even width for 4 bits")
    return paths


def is_quantized(model: nn.Module) -> bool:
    """Return whether any layer is quantized, also one with a LoRA."""
    return any(getattr(module, "not_plain", None) == QuantizedLinear.not_plain for module in model.modules())


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, adapters included."""
    return sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))


def _in_8_bits(weight: Tensor) -> tuple[Tensor, Tensor, None]:
    w = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = _round_scale(w.abs().amax(dim=1, keepdim=True) / 127, weight.dtype)
    return (w / scale).round_().clamp_(-127, 127).to(torch.int8), scale, None  # [O, I], [O, 1]


def _in_4_bits(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    group = math.gcd(weight.shape[1], group)
    w = weight.to(torch.promote_types(weight.dtype, torch.float32)).unflatten(1, (-1, group))  # [O, I/g, g]
    lowest, highest = w.amin(dim=-1, keepdim=True), w.amax(dim=-1, keepdim=True)  # [O, I/g, 1]
    lowest = lowest.to(torch.bfloat16).to(weight.dtype)
    scale = _round_scale((highest - lowest) / 15, weight.dtype)
    q = ((w - lowest) / scale).round_().clamp_(0, 15).to(torch.uint8)
    first, second = q.chunk(2, dim=-1)
    return first | second << 4, scale, lowest


def _round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to 8 significant bits, which every dtype has; 0 (all weights are equal) becomes 1."""
    scale = scale.to(torch.bfloat16).to(dtype)
    return torch.where(scale == 0, 1, scale)
