"""Quantized layers: weights of 8 or 4 bits or float8 with scales, dequantized or multiplied as stored.

| format | a weight | its product |
|---|---|---|
| 8, 4 | integers of 8 or 4 bits | with the dequantized weight, in the model's dtype |
| "fp8" | float8_e4m3fn | the same |
| "w8a8" | as 8 | int8 by int8: inputs are rounded too, each row with its own scale |
| "w8a8-fp8", "w8a8-fp8-fast" | as "fp8" | float8 by float8, likewise; fast: sums of fewer bits on CUDA |

All linear layers of ChatGLM are quantized, and of the UNet those in its transformers, 86% of its weights;
"fp8" also stores the convolutions and linear layers of its residual blocks, 99% in all. The others embed text
and time or are the ends: little would be saved, and the error of 4 bits would grow by an eighth.
Source: rounding to nearest by rows and by groups, the baseline of GPTQ (https://arxiv.org/abs/2210.17323);
inputs by rows as in LLM.int8() (https://arxiv.org/abs/2208.07339); e4m3: https://arxiv.org/abs/2209.05433.
Shapes: O and I the layer's output and input widths, g a group of neighbors along I, N rows of inputs.
"""

import math
from collections.abc import Callable, Mapping
from functools import cache
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.changed_models import is_ours
from kolors_core.chatglm import ChatGLMLayer
from kolors_core.module import apply_to_all, is_block, require_plain
from kolors_core.unet import DownBlock, MidBlock, Transformer, UpBlock
from kolors_core.validation import check_int

Format = int | str  # of `FORMATS`
Progress = Callable[[int, int], object]  # of layers done, and of all
STORED_AS: dict[Format, Format] = {
    4: 4, 8: 8, "fp8": "fp8", "w8a8": 8, "w8a8-fp8": "fp8", "w8a8-fp8-fast": "fp8",
}  # fmt: skip
FORMATS = tuple(STORED_AS)
GROUP = 64  # int4 weights that share a scale; 32 gain 0.001 of cosine for a half bit a weight
PER_ROW = 0  # one group a row, as in files of THUDM's ChatGLM
CHUNK = 2**18  # weights that a CPU quantizes at a time: their float32 values stay in its cache
ACCELERATOR_CHUNK = 2**24
LARGEST_E4M3 = 448.0
E4M3_EXPONENTS = -24, 15  # of scales, which float16 has too
_int_mm: Any = getattr(torch, "_int_mm", None)  # private names of torch
_scaled_mm: Any = getattr(torch, "_scaled_mm", None)
# Since then scales of rows are for a CPU and Ada too, before for Hopper alone.
HAS_NEW_SCALED_MM = hasattr(torch, "_scaled_mm_v2")


class QuantizedLayer(nn.Module):
    """Base of layers that store their weight in fewer bits; reading `weight` dequantizes it.

    8: q * scale, with quantized int8 [O, I] from -127 to 127 and scale [O, 1], of each row.
    4: q * scale + lowest, with q from 0 to 15, scale and lowest [O, I/g, 1] of each group, and quantized
    uint8 [O, I/g, g/2]: a group's first half in the low four bits, its second half in the high ones. g is 64,
    or for other widths the largest power of two below that divides I; with `PER_ROW` it is I.
    fp8: q * scale, with quantized uint8 [O, I, *K], the bits of float8_e4m3fn, and scale [O, 1, *1], a power
    of two: every weight that has such bits already, as those of a float8 checkpoint, is kept exactly.
    All are buffers. scale and lowest have the model's dtype, as the weight, but only bfloat16's 8 significant
    bits, so that a later change of dtype does not change them. The weight cannot be written or trained. A
    backward pass keeps each layer's dequantized weight, or with `training.checkpoint_blocks` one block's.
    """

    not_plain = "quantized"  # see module.require_plain
    quantized: Tensor
    scale: Tensor
    lowest: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: nn.Module, weight_format: Format, group: int = GROUP) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(layer))  # sizes, mode and hooks; of the parameters only the bias
        self._parameters, self._buffers = {}, {}
        self.weight_format, self.group = weight_format, group
        self.adds_on_cpu = weight_format == "w8a8" and cpu_adds_int8()  # compiled code cannot ask
        self.register_parameter("bias", cast(nn.Parameter | None, layer.bias))
        weight = cast(Tensor, layer.weight).detach()
        buffers = self.encode(weight, weight.dtype, weight.device)
        for name in ("quantized", "scale", "lowest"):
            self.register_buffer(name, buffers.get(name))

    def encode(self, weight: Tensor, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
        """Quantize a weight [O, I, *K] as this layer's would be in a dtype, and return the buffers of it.

        A few rows at a time are converted and quantized: on a CPU in an eighth of the time of all at once.
        """
        if torch.device(device).type == "meta":  # by the shapes of one row, without importing decompositions
            row = self._encode_rows(torch.zeros(1, *weight.shape[1:], dtype=dtype)).items()
            shapes = {name: (len(weight), *part.shape[1:]) for name, part in row}
            return {name: part.new_empty(shapes[name], device="meta") for name, part in row}
        chunk = CHUNK if torch.device(device).type == "cpu" else ACCELERATOR_CHUNK
        rows = max(1, chunk // weight[0].numel())
        parts = [self._encode_rows(part.to(device, dtype)) for part in weight.split(rows)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _encode_rows(self, weight: Tensor) -> dict[str, Tensor]:
        kind = STORED_AS[self.weight_format]
        if kind == 8:
            return _in_8_bits(weight)
        return _in_4_bits(weight, self.group) if kind == 4 else _in_float8(weight)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight [O, I, *K], in the dtype of the scale: a new tensor each time."""
        if self.lowest is not None:
            q = torch.cat([self.quantized & 15, self.quantized >> 4], dim=-1)  # [O, I/g, g]
            return q.to(self.scale.dtype).mul_(self.scale).add_(self.lowest).flatten(1)
        return self._values(self.scale.dtype).mul_(self.scale)

    def _values(self, dtype: torch.dtype) -> Tensor:
        """Return q as floats: a new tensor."""
        is_float = self.quantized.dtype == torch.uint8
        return decode_e4m3(self.quantized, dtype) if is_float else self.quantized.to(dtype)

    def state_key(self) -> tuple[Format, ...]:
        """Return the format: "w8a8" stores the weights of 8, and multiplies otherwise; see module.py."""
        return (self.weight_format,)

    def extra_repr(self) -> str:
        """Describe this layer for `print`, with its format."""
        return f"{super().extra_repr()}, format={self.weight_format}"


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Convolution that stores its weight in fewer bits: [B, I, H, W] -> [B, O, H', W']."""


class QuantizedLinear(QuantizedLayer, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Linear layer that stores its weight in fewer bits, and may multiply by it as it is stored.

    The products of "w8a8" formats are rounded as `quantize_rows` says. Where a kernel cannot take the sizes,
    or there is none, the same values are multiplied as floats. They have no gradient: where the input needs
    one, as in training, and on MPS, which has no float8, the weight is dequantized instead.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
        return self.product(input, self.bias)

    def product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """Map [..., I] to [..., O] with another bias [O], or None."""
        is_int8, is_float8 = self.weight_format == "w8a8", str(self.weight_format).startswith("w8a8-fp8")
        needs_gradient = torch.is_grad_enabled() and input.requires_grad
        if needs_gradient or not (is_int8 or (is_float8 and input.device.type != "mps")):
            return F.linear(input, self.weight, bias)
        x = input.reshape(-1, self.in_features)  # [N, I]
        y = self._int8_product(x) if is_int8 else self._float8_product(x)  # [N, O]
        y = y if bias is None else y.add_(bias)
        return y.to(input.dtype).view(*input.shape[:-1], -1)

    def _int8_product(self, x: Tensor) -> Tensor:
        q, scale = quantize_rows(x, torch.int8)
        (rows, width), outputs, device = q.shape, len(self.quantized), q.device
        # A CPU's kernel takes all sizes, CUDA's these.
        takes_sizes = device.type != "cuda" or (rows > 16 and width % 8 == outputs % 8 == 0)
        if takes_sizes and (self.adds_on_cpu if device.type == "cpu" else device.type in ("cuda", "meta")):
            sums = _int_mm(q, self.quantized.t()).to(scale.dtype)
        else:
            sums = F.linear(q.to(scale.dtype), self.quantized.to(scale.dtype))
        return sums.mul_(scale).mul_(self.scale.to(scale.dtype).t())

    def _float8_product(self, x: Tensor) -> Tensor:
        q, scale = quantize_rows(x, torch.float8_e4m3fn)
        weight_scale = self.scale.to(scale.dtype).t()  # [1, O]
        is_sixteens = q.shape[1] % 16 == len(self.quantized) % 16 == 0
        if scale.dtype == torch.float64 or not (is_sixteens and multiplies_float8(q.device)):
            sums = F.linear(q.to(scale.dtype), self._values(scale.dtype))
            return sums.mul_(scale).mul_(weight_scale)
        return _scaled_mm(
            q, self.quantized.view(torch.float8_e4m3fn).t(), scale_a=scale, scale_b=weight_scale,
            # All of CUDA's kernels for scales of rows have this dtype; its rounding is far below float8's.
            out_dtype=torch.bfloat16 if q.device.type == "cuda" else torch.float32,
            use_fast_accum=self.weight_format == "w8a8-fp8-fast",
        )  # fmt: skip


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round rows [N, I] to int8 or float8_e4m3fn [N, I], whose largest value is the row's; scales [N, 1].

    Scales are float32, or float64 for that. That of a row with a value that is not finite is not either.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    largest = 127 if dtype == torch.int8 else LARGEST_E4M3
    scale = (x.abs().amax(dim=-1, keepdim=True).to(wide) / largest).clamp_(min=torch.finfo(wide).tiny)
    q = x / scale
    return (q.round_() if dtype == torch.int8 else q).to(dtype), scale


@cache
def cpu_adds_int8() -> bool:
    """Return whether this CPU adds products of int8 exactly: without VNNI, torch cuts sums off at 16 bits."""
    largest = torch.full((2, 64), 127, dtype=torch.int8, device="cpu")
    return bool((_int_mm(largest, largest.t()) == 64 * 127**2).all())


def multiplies_float8(device: torch.device) -> bool:
    """Return whether torch multiplies float8 with scales of rows on a device."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return (gpu.major, gpu.minor) >= ((8, 9) if HAS_NEW_SCALED_MM else (9, 0))
    return device.type in ("cpu", "meta") and HAS_NEW_SCALED_MM


def quantize(
    model: nn.Module, weight_format: Format, group: int = GROUP, *,
    exceptions: Mapping[str, Format | None] | None = None, progress: Progress | None = None,
) -> None:  # fmt: skip
    """Replace each large layer of a ChatGLM or UNet by a `QuantizedLinear` or `QuantizedConv2d`.

    This goes layer by layer, never with two whole models in memory, and cannot be undone. A model on the meta
    device gets the shapes, for a quantized state dict to be assigned to. weight_format: of `FORMATS`. group:
    with 4 bits, how many weights share a scale, an even number; `PER_ROW` for all of a row. exceptions: other
    formats of some layers, by their paths; None leaves one as it is. progress: called after each layer with
    the number done and of all.
    ValueError, before any change, as of `quantizable_layers`, and for a path that is none of these. Once it
    has begun, an interrupt is raised when all layers are quantized: what is left of the weights is theirs.
    """
    group = check_int("group", group, 2, PER_ROW)
    formats = formats_of_layers(model, weight_format, exceptions or {})
    done = 0

    def quantize_layer(path: str) -> None:
        nonlocal done
        layer = model.get_submodule(path)
        if not isinstance(layer, QuantizedLayer):
            kind = QuantizedConv2d if isinstance(layer, nn.Conv2d) else QuantizedLinear
            model.set_submodule(path, kind(layer, formats[path], group))
            done += 1
            if progress is not None:
                progress(done, len(formats))

    apply_to_all(quantize_layer, formats)


def formats_of_layers(
    model: nn.Module, weight_format: Format, exceptions: Mapping[str, Format | None]
) -> dict[str, Format]:
    """Return the format of each layer to quantize, by its path; ValueError as `quantize`."""
    paths = quantizable_layers(model, weight_format)
    if strangers := sorted(exceptions.keys() - {*paths}):
        raise ValueError(f"exceptions: {strangers[0]!r} is no layer that {weight_format!r} quantizes")
    found = {path: exceptions.get(path, weight_format) for path in paths}
    for path, one in found.items():
        if one is not None:
            check_format(one)
            _check_layer(model, path, one)
    return {path: one for path, one in found.items() if one is not None}


def quantizable_layers(model: nn.Module, weight_format: Format) -> list[str]:
    """List the paths of the layers that `quantize` replaces; an IP-Adapter's branches are not among them.

    ValueError for other formats, a model that is quantized already or has no such layers, and a layer that
    has a LoRA (attach it after) or, with 4 bits, an odd width.
    """
    check_format(weight_format)
    require_plain(model, "quantize it again")
    paths = large_layers(model, weight_format)
    if not paths:
        got = f"a {type(model).__name__}: it has no transformers to quantize, and no blocks (module.py)"
        raise ValueError(f"expected a ChatGLM or a UNet, got {got}")
    for path in paths:
        layer = model.get_submodule(path)
        if type(layer) not in (nn.Linear, nn.Conv2d):
            expected = f"a plain {'nn.Conv2d' if isinstance(layer, nn.Conv2d) else 'nn.Linear'}"
            got = f"{path} is a {type(layer).__name__}"
            raise ValueError(f"{got}, expected {expected}: LoRAs are attached after quantizing")
        _check_layer(model, path, weight_format)
    return paths


def large_layers(model: nn.Module, weight_format: Format) -> list[str]:
    """List the paths of the layers that a format is for, also of those that are quantized already."""
    is_fp8 = weight_format == "fp8"
    blocks = (ChatGLMLayer, DownBlock, MidBlock, UpBlock) if is_fp8 else (ChatGLMLayer, Transformer)
    kinds = (nn.Linear, nn.Conv2d) if is_fp8 else (nn.Linear,)
    found = [(prefix, block) for prefix, block in model.named_modules() if isinstance(block, blocks)]
    if not found and not is_ours(type(model)):  # a model of your own
        found = [(prefix, block) for prefix, block in model.named_modules() if is_block(block)]
    return [*dict.fromkeys(
        path
        for prefix, block in found
        for path, layer in block.named_modules(prefix=prefix)
        if isinstance(layer, kinds) and ".image_branches." not in path
    )]  # fmt: skip


def check_format(weight_format: Format) -> None:
    """Raise ValueError for what is no format."""
    if isinstance(weight_format, bool) or weight_format not in FORMATS:
        expected = ", ".join(map(repr, FORMATS[:-1]))
        raise ValueError(f"a weight's format is {expected} or {FORMATS[-1]!r}, got {weight_format!r}")


def _check_layer(model: nn.Module, path: str, weight_format: Format) -> None:
    layer = model.get_submodule(path)
    if weight_format != "fp8" and isinstance(layer, nn.Conv2d):
        raise ValueError(f"{path} is a convolution: expected 'fp8' or None, got {weight_format!r}")
    if weight_format == 4 and cast(nn.Linear, layer).in_features % 2:
        raise ValueError(f"{path} is {layer.in_features} wide, expected an even width for 4 bits")


def format_name(weight_format: Format) -> str:
    """Return a format's name in reports: "int8" for 8."""
    return f"int{weight_format}" if isinstance(weight_format, int) else weight_format


def is_quantized(model: nn.Module) -> bool:
    """Return whether any layer is quantized, also one with a LoRA."""
    return any(getattr(module, "not_plain", None) == QuantizedLayer.not_plain for module in model.modules())


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, adapters included."""
    return sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))


def decode_e4m3(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert the bits of float8_e4m3fn, in uint8, to a dtype that has all their values: a new tensor.

    By integers, which is faster on a CPU than torch's conversion and needs no float8, which MPS lacks: the
    exponent of four bits is the last four of bfloat16's eight, whose bias is 120 more. NaN becomes 480: no
    weight is stored as one.
    """
    if bits.device.type == "cuda":
        return bits.view(torch.float8_e4m3fn).to(dtype)
    wide = bits.view(torch.int8).to(torch.int16)
    wide <<= 4
    wide &= -0x7810  # 0x87F0: the sign, the exponent's and the fraction's bits
    return wide.view(torch.bfloat16).mul_(2.0**120).to(dtype)


def _in_8_bits(weight: Tensor) -> dict[str, Tensor]:
    w = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = _round_scale(w.abs().amax(dim=1, keepdim=True) / 127, weight.dtype)
    q = (w / scale).round_().clamp_(-127, 127).to(torch.int8)  # [O, I]
    return {"quantized": q, "scale": scale}


def _in_4_bits(weight: Tensor, group: int) -> dict[str, Tensor]:
    group = math.gcd(weight.shape[1], group)
    w = weight.to(torch.promote_types(weight.dtype, torch.float32)).unflatten(1, (-1, group))  # [O, I/g, g]
    lowest, highest = w.amin(dim=-1, keepdim=True), w.amax(dim=-1, keepdim=True)  # [O, I/g, 1]
    lowest = lowest.to(torch.bfloat16).to(weight.dtype)
    scale = _round_scale((highest - lowest) / 15, weight.dtype)
    q = ((w - lowest) / scale).round_().clamp_(0, 15).to(torch.uint8)
    first, second = q.chunk(2, dim=-1)
    return {"quantized": first | second << 4, "scale": scale, "lowest": lowest}


def _in_float8(weight: Tensor) -> dict[str, Tensor]:
    w = weight.to(torch.promote_types(weight.dtype, torch.float32))
    w = w.cpu() if w.device.type == "mps" else w
    largest = w.abs().amax(dim=tuple(range(1, w.ndim)), keepdim=True) / LARGEST_E4M3  # [O, 1, ...]
    fraction, exponent = torch.frexp(largest)
    exponent = (exponent - (fraction == 0.5).int()).clamp(*E4M3_EXPONENTS)  # the least 2^n >= largest
    scale = torch.where(largest.isfinite(), torch.ldexp(torch.ones_like(largest), exponent), math.nan)
    q = (w / scale).clamp_(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn).view(torch.uint8)
    return {"quantized": q.to(weight.device), "scale": scale.to(weight.device, weight.dtype)}


def _round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to 8 significant bits, which every dtype has; 0 (all weights are equal) becomes 1."""
    scale = scale.to(torch.bfloat16).to(dtype)
    return torch.where(scale == 0, 1, scale)
