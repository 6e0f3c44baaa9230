"""LoRA layers: `LoRALinear` is an `nn.Linear`, `LoRAConv2d` an `nn.Conv2d`, and those with ReadOnly in their
names replace quantized layers (QLoRA, https://arxiv.org/abs/2305.14314).

The base weight keeps its name, so every table and checkpoint still fits; adapters add keys,
`<layer>.lora.<adapter>.down`, and never rename. lora.py attaches them to models.
Shapes: R rank, I and O the layer's widths, K a convolution's kernel (no axes in a linear layer).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast
from urllib.parse import unquote

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.module import ReplacedModule


class LoRAWeights(nn.Module):
    """Weights of one adapter in one layer: two factors, or a delta of the weight's shape.

    down: [R, I, *K]; up: [O, R], of a convolution [O, R, 1, 1]. delta: [O, I, *K], of LoHa or LoKr. bias:
    [O]. magnitude: DoRA's (https://arxiv.org/abs/2402.09353), [O, 1, ...], or of columns [1, I, ...]. scale:
    alpha / rank. strength: among adapters. call_scale: during one call. index: larger if attached later.
    """

    is_adapter = True
    source: str | None = None  # the file or repository that it was loaded from

    def __init__(self, tensors: Mapping[str, Tensor], scale: float) -> None:
        super().__init__()
        given = (tensors.get(name) for name in ("down", "up", "delta", "magnitude", "bias"))
        self.down, self.up, self.delta, self.magnitude, self.bias = (
            None if tensor is None else nn.Parameter(tensor) for tensor in given
        )
        self.scale, self.strength, self.call_scale, self.is_active, self.index = scale, 1.0, 1.0, True, 0

    @property
    def effective_scale(self) -> float:
        """The factor that applies now, without alpha / rank."""
        return self.strength * self.call_scale

    def add_delta(self, total: Tensor, weight: Tensor, factor: float) -> None:
        """Add a layer's `delta_weight`, in the dtype of the contiguous `total`, to that."""
        if self.up is None or self.down is None or self.magnitude is not None:
            total += self.delta_weight(weight.to(total.dtype), factor)
        else:  # in one product, which is some ten times faster than adding one
            up, down = (matrix.to(total.dtype).flatten(1) for matrix in (self.up, self.down))
            total.flatten(1).addmm_(up * (factor * self.effective_scale * self.scale), down)

    def delta_weight(self, weight: Tensor, factor: float = 1.0) -> Tensor:
        """Compute the change of a layer's weight, times `factor`, in the weight's shape and dtype.

        With a magnitude it is m * V / |V| - W, where V = W + factor * scale * up @ down; the norm takes no
        gradient (section 4.3 of the paper). A strength of 0 then still leaves m * W / |W|.
        """
        scale = factor * self.effective_scale * self.scale
        if self.delta is not None:
            delta = self.delta.to(weight.dtype) * scale
        else:
            assert self.up is not None and self.down is not None
            up, down = (matrix.to(weight.dtype).flatten(1) for matrix in (self.up, self.down))
            delta = (up @ down).view_as(weight) * scale
        if self.magnitude is None:
            return delta
        direction, magnitude = weight + delta, self.magnitude.to(weight.dtype)
        axes = [axis for axis, size in enumerate(magnitude.shape) if size == 1]
        norm = torch.linalg.vector_norm(direction, dim=axes, keepdim=True).detach()
        return magnitude / norm * direction - weight


class LoRALayer(ReplacedModule):
    """Base class of linear layers and convolutions with adapters. run: computes input, weight and bias."""

    weight: Tensor
    bias: Tensor | None
    run: Callable[..., Tensor]

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.lora, self.is_enabled = nn.ModuleDict(), True
        self.fused: tuple[str, ...] = ()  # adapters that the model's weights contain, in any of its layers
        self.base_backup: tuple[Tensor, ...] = ()  # weight and bias before fusing, on the CPU

    def state_key(self) -> tuple[Any, ...]:
        """Return the adapters' scales and which are active, see kolors_core/module.py."""
        parts = tuple((part.scale, part.effective_scale, part.is_active) for part in self.parts().values())
        return parts, self.is_enabled, self.fused

    def parts(self) -> dict[str, LoRAWeights]:
        """Return the adapters of this layer, by name."""
        return {unquote(key): cast(LoRAWeights, part) for key, part in self.lora.items()}

    def add(self, name: str, part: LoRAWeights) -> None:
        """Add an adapter's weights."""
        self.lora[module_name(name)] = part

    def remove(self, name: str) -> None:
        """Remove an adapter's weights."""
        del self.lora[module_name(name)]

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer without adapters plus the active ones' outputs. Fused adapters cost nothing."""
        weight, bias, outputs = None, self.bias, []
        is_on = self.is_enabled and not self.fused
        for part in (part for part in self.parts().values() if is_on and part.is_active):
            if part.down is None or part.up is None or part.magnitude is not None:
                weight = (self.weight if weight is None else weight) + part.delta_weight(self.weight)
            else:
                h = self.run(input, part.down.to(input.dtype), None)  # [..., R]
                project_up = F.linear if part.up.ndim == 2 else F.conv2d
                outputs.append(part.effective_scale * part.scale * project_up(h, part.up.to(input.dtype)))
            if part.bias is not None and bias is not None:
                bias = bias + part.effective_scale * part.bias.to(bias.dtype)
        base = self.run_base(input, bias) if weight is None else self.run(input, weight, bias)
        return sum(outputs, base)

    def run_base(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the layer without adapters, with this bias."""
        return self.run(input, self.weight, bias)

    @torch.no_grad()
    def fuse(self, names: Sequence[str], factor: float) -> None:
        """Add adapters times `factor` to the weight, in float32 at least; the weight is saved on the CPU."""
        self.fused = tuple(names)
        parts = [part for name, part in self.parts().items() if name in names]
        if not parts:
            return
        tensors = [self.weight] if self.bias is None else [self.weight, self.bias]
        self.base_backup = tuple(tensor.detach().to("cpu", copy=True) for tensor in tensors)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        total = self.weight.to(dtype, copy=True, memory_format=torch.contiguous_format)
        for part in parts:
            part.add_delta(total, self.weight, factor)
            if part.bias is not None and self.bias is not None:
                self.bias.add_(part.bias.to(self.bias.dtype), alpha=factor * part.effective_scale)
        self.weight.copy_(total)

    @torch.no_grad()
    def unfuse(self) -> None:
        """Restore the weight and bias saved by `fuse`."""
        for tensor, backup in zip((self.weight, self.bias), self.base_backup, strict=False):
            if tensor is not None:
                tensor.copy_(backup)
        self.fused, self.base_backup = (), ()


def module_name(name: str) -> str:
    """Quote an adapter's name for `nn.ModuleDict`: no dot, and no attribute of that; `unquote` undoes it."""
    quoted = name.replace("%", "%25").replace(".", "%2E")
    return f"%{ord(quoted[0]):02X}{quoted[1:]}" if hasattr(nn.ModuleDict(), quoted) else quoted


class LoRALinear(LoRALayer, nn.Linear):
    """Linear layer with adapters: [..., I] -> [..., O]."""

    run = staticmethod(F.linear)


class LoRAConv2d(LoRALayer, nn.Conv2d):
    """Convolution with adapters, [B, I, H, W] -> [B, O, H', W']; `down` has its kernel and stride."""

    run = nn.Conv2d._conv_forward


class ReadOnlyLayer(LoRALayer):
    """Base of layers with adapters on a quantized layer, whose weight is dequantized on read. Not fused."""

    def state_key(self) -> tuple[Any, ...]:
        """Return the quantized layer's settings and the adapters'."""
        base: Any = self.base[0]
        return *base.state_key(), *super().state_key()

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight [O, I, *K], dequantized."""
        return cast(Tensor, self.base[0].weight)  # the base's buffers are this layer's too

    @property
    def not_plain(self) -> str:
        """The base layer's reason, see `module.require_plain`."""
        return cast(str, self.base[0].not_plain)

    def fuse(self, names: Sequence[str], factor: float) -> None:
        """Raise ValueError, as the weight cannot be written."""
        raise ValueError(f"cannot fuse {', '.join(names)}: the layer's weight is {self.not_plain}")


class LoRAReadOnlyLinear(ReadOnlyLayer, LoRALinear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Linear layer with adapters on a quantized one, which multiplies as it does without them."""

    def run_base(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the quantized layer, with this bias."""
        return self.base[0].product(input, bias)  # pyright: ignore[reportCallIssue]


class LoRAReadOnlyConv2d(ReadOnlyLayer, LoRAConv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Convolution with adapters on a quantized one."""


def lora_class(layer: nn.Module) -> type[LoRALayer] | None:
    """Return the class of a layer with adapters, or of its replacement with some; None if it has none."""
    if isinstance(layer, LoRALayer):
        return type(layer)
    if getattr(layer, "not_plain", None) is not None:
        return LoRAReadOnlyConv2d if isinstance(layer, nn.Conv2d) else LoRAReadOnlyLinear
    return {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d}.get(type(layer))
