"""Layers with low-rank adapters: a `LoRALinear` is an `nn.Linear`, a `LoRAConv2d` an `nn.Conv2d`; and a
`LoRAReadOnlyLinear` stands for a quantized layer (QLoRA, https://arxiv.org/abs/2305.14314).

The base weight keeps its name, so every table and checkpoint still fits; adapters add keys,
`<layer>.lora.<adapter>.down`, and never rename. How models get them is lora.py's.
Shapes: R rank, I and O the layer's widths, K a convolution's kernel (no axes in a linear layer).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.module import ReplacedModule


class LoRAWeights(nn.Module):
    """One adapter's share of one layer: two factors, or a delta of the weight's shape.

    down: [R, I, *K]; up: [O, R], of a convolution [O, R, 1, 1]. delta: [O, I, *K], which files of other forms
    are turned into (LoHa, LoKr). magnitude: DoRA's (https://arxiv.org/abs/2402.09353), [O, 1, ...], or
    [1, I, ...] in files that divide by the norms of columns. bias: [O]. scale: alpha / rank. strength:
    how much of it is expected. order: a number that is larger for adapters that came later.
    """

    is_adapter = True
    down: nn.Parameter | None
    up: nn.Parameter | None
    delta: nn.Parameter | None
    magnitude: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, tensors: Mapping[str, Tensor], scale: float) -> None:
        super().__init__()
        for name in ("down", "up", "delta", "magnitude", "bias"):
            tensor = tensors.get(name)
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
        self.scale, self.strength, self.is_active, self.order = scale, 1.0, True, 0
        self.call_scale = 1.0  # a further factor, during one run

    @property
    def wanted(self) -> float:
        """How much of the adapter is expected now, before its own scale."""
        return self.strength * self.call_scale

    def change(self, weight: Tensor, share: float = 1.0) -> Tensor:
        """What `share` of the adapter adds to a layer's weight, of the weight's shape and dtype.

        With a magnitude it is m * V / |V| - W, where V = W + share * scale * up @ down; the norm takes no
        gradient (section 4.3 of the paper). A strength of 0 then still leaves m * W / |W|.
        """
        amount = share * self.wanted * self.scale
        if self.delta is not None:
            change = self.delta.to(weight.dtype) * amount
        else:
            assert self.up is not None and self.down is not None
            up, down = (factor.to(weight.dtype).flatten(1) for factor in (self.up, self.down))
            change = (up @ down).view_as(weight) * amount
        if self.magnitude is None:
            return change
        turned, magnitude = weight + change, self.magnitude.to(weight.dtype)
        summed = [axis for axis, size in enumerate(magnitude.shape) if size == 1]
        norm = torch.linalg.vector_norm(turned, dim=summed, keepdim=True).detach()
        return magnitude / norm * turned - weight


class LoRALayer(ReplacedModule, ABC):
    """What linear layers and convolutions with adapters share."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.lora = nn.ModuleDict()
        self.is_enabled = True
        self.fused: tuple[str, ...] = ()  # adapters that the model's weights contain, in any of its layers
        self.kept: tuple[Tensor, ...] = ()  # weight and bias from before, on the CPU

    def state_key(self) -> tuple[Any, ...]:
        """See kolors_core/module.py: how the adapters are weighed, and which of them act."""
        parts = tuple((part.scale, part.wanted, part.is_active) for part in self.parts().values())
        return parts, self.is_enabled, self.fused

    def parts(self) -> dict[str, LoRAWeights]:
        """The adapters of this layer, by name."""
        return cast("dict[str, LoRAWeights]", dict(self.lora.items()))

    def forward(self, input: Tensor) -> Tensor:
        """As the layer without adapters, plus what the active ones add. Fused adapters cost nothing."""
        weight, bias, added = self.weight, self.bias, []
        parts = self.parts().values() if self.is_enabled and not self.fused else ()
        for part in (part for part in parts if part.is_active):
            if part.down is None or part.up is None or part.magnitude is not None:
                weight = weight + part.change(self.weight)
            else:
                h = self.run(input, part.down.to(input.dtype), None)  # [..., R]
                widen = F.linear if part.up.ndim == 2 else F.conv2d
                added.append(part.wanted * part.scale * widen(h, part.up.to(input.dtype)))
            if part.bias is not None and bias is not None:
                bias = bias + part.wanted * part.bias.to(bias.dtype)
        return sum(added, self.run(input, weight, bias))

    @abstractmethod
    def run(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with this weight and bias."""

    @torch.no_grad()
    def fuse(self, names: Sequence[str], share: float) -> None:
        """Add adapters to the weight, in float32 at least; what the weight was is kept on the CPU."""
        self.fused = tuple(names)
        parts = [part for name, part in self.parts().items() if name in names]
        if not parts:
            return
        own = [self.weight] if self.bias is None else [self.weight, self.bias]
        self.kept = tuple(tensor.detach().to("cpu", copy=True) for tensor in own)
        base = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        self.weight.copy_(sum((part.change(base, share) for part in parts), base))
        for part in parts:
            if part.bias is not None and self.bias is not None:
                self.bias.add_(part.bias.to(self.bias.dtype), alpha=share * part.wanted)

    @torch.no_grad()
    def unfuse(self) -> None:
        """Put the kept weight and bias back."""
        for tensor, kept in zip((self.weight, self.bias), self.kept, strict=False):
            if tensor is not None:
                tensor.copy_(kept)
        self.fused, self.kept = (), ()


class LoRALinear(LoRALayer, nn.Linear):
    """A linear layer with adapters."""

    def run(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[..., I] -> [..., O]."""
        return F.linear(input, weight, bias)


class LoRAReadOnlyLinear(LoRALinear):
    """A linear layer with adapters whose weight is made when it is read, of a quantized layer's buffers.

    It cannot be fused.
    """

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight [O, I], dequantized."""
        return cast(Tensor, self.base[0].weight)  # whose buffers are this layer's too

    @property
    def not_plain(self) -> str:
        """See `module.require_plain`."""
        return cast(str, self.base[0].not_plain)

    def fuse(self, names: Sequence[str], share: float) -> None:
        """ValueError: the weight cannot be written."""
        raise ValueError(f"cannot fuse {', '.join(names)}: the layer's weight is {self.not_plain}")


class LoRAConv2d(LoRALayer, nn.Conv2d):
    """A convolution with adapters; `down` has its kernel and stride, `up` is 1x1."""

    def run(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[B, I, H, W] -> [B, O, H', W'], with the layer's stride and padding."""
        return self._conv_forward(input, weight, bias)


def lora_class(layer: nn.Module) -> type[LoRALayer] | None:
    """Return what takes a layer's place when it gets adapters; None for a layer that can have none."""
    if isinstance(layer, nn.Linear) and getattr(layer, "not_plain", None) is not None:
        return LoRAReadOnlyLinear
    return LoRALinear if type(layer) is nn.Linear else LoRAConv2d if type(layer) is nn.Conv2d else None
