# pyright: reportMissingImports=false, reportIndexIssue=false
"""Triton kernels of fused_kernels.py: GEGLU, addition with LayerNorm, GroupNorm with SiLU.

Each computes in float32 and rounds once, where torch's operators round in between. Triton is optional, so
only fused_kernels.py imports this file, when it needs it. Source: https://triton-lang.org/main/python-api.
Shapes: B batch, C channels, H height, W width, G groups, K chunks of pixels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024  # of a row of GEGLU, in one program
PIXELS, CHANNELS = 128, 64  # of a tile of a channels-last map; a row of 64 halves is 128 bytes
POOLED = 1024  # moments of chunks and channels that are pooled at a time


def geglu(h: Tensor) -> Tensor:
    """Compute value * gelu(gate), the halves of h [..., 2C], contiguous: [..., C]."""
    out = h.new_empty(*h.shape[:-1], width := h.shape[-1] // 2)
    with torch.cuda.device_of(h):  # Triton launches on the current device, whichever its tensors are on
        _geglu[(out.numel() // width, triton.cdiv(width, COLUMNS))](h, out, width, COLUMNS)
    return out


def add_layer_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute x + y and its LayerNorm, for contiguous x and y [..., C]; the sum is rounded as torch's."""
    total, normed, width = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    columns = triton.next_power_of_2(width)
    warps = min(max(columns // 256, 1), 8)
    with torch.cuda.device_of(x):
        _add_layer_norm[(x.numel() // width,)](
            x, y, weight, bias, total, normed, width, eps, columns, num_warps=warps
        )
    return total, normed


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, has_silu: bool) -> Tensor:
    """Normalize a channels-last map x [B, C, H, W] by groups of channels, then apply SiLU if `has_silu`.

    Mean and squared deviations of the tiles are pooled (https://doi.org/10.2307/2683386): sums of squares
    would lose digits. Returns [B, C, H, W], channels-last.
    """
    (batch, channels), pixels = x.shape[:2], x.shape[2] * x.shape[3]
    chunks = triton.cdiv(pixels, PIXELS)
    tiles = (chunks, batch, triton.cdiv(channels, CHANNELS))
    moments = x.new_empty(2, batch, chunks, channels, dtype=torch.float32)
    pooled = x.new_empty(2, batch, groups, dtype=torch.float32)
    out, size = torch.empty_like(x), channels // groups
    columns = triton.next_power_of_2(size)
    with torch.cuda.device_of(x):
        _moments[tiles](x, moments[0], moments[1], pixels, channels, PIXELS, CHANNELS, num_warps=8)
        _pool[(groups, batch)](
            moments[0], moments[1], pooled[0], pooled[1], pixels, channels, chunks, size, eps,
            PIXELS, max(POOLED // columns, 1), columns,
        )  # fmt: skip
        _normalize[tiles](
            x, pooled[0], pooled[1], weight, bias, out, pixels, channels, size, has_silu,
            PIXELS, CHANNELS, num_warps=8,
        )  # fmt: skip
    return out


@triton.jit
def _geglu(h, out, width, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, source = column < width, h + row * 2 * width + column
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    result = value * gate * 0.5 * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_layer_norm(x, y, weight, bias, total, normed, width, eps, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    inside, place = column < width, tl.program_id(0).to(tl.int64) * width + column
    one = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
    rounded = (one + other).to(total.dtype.element_ty)
    tl.store(total + place, rounded, mask=inside)
    added = rounded.to(tl.float32)
    deviation = tl.where(inside, added - tl.sum(added, axis=0) / width, 0.0)
    scaled = deviation / tl.sqrt(tl.sum(deviation * deviation, axis=0) / width + eps)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + place, (scaled * w + b).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _moments(x, mean, squares, pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write the mean of each chunk and channel, and the sum of squared deviations from it: [B, K, C]."""
    chunk, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pixel = chunk * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    exists, inside = pixel < pixels, channel < channels
    mask = exists[:, None] & inside[None, :]
    place = (image * pixels + pixel)[:, None] * channels + channel[None, :]
    values = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)  # [PIXELS, CHANNELS]
    average = tl.sum(values, axis=0) / tl.minimum(pixels - chunk * PIXELS, PIXELS)
    deviation = tl.where(mask, values - average[None, :], 0.0)
    target = (image * tl.num_programs(0) + chunk) * channels + channel
    tl.store(mean + target, average, mask=inside)
    tl.store(squares + target, tl.sum(deviation * deviation, axis=0), mask=inside)


@triton.jit
def _pool(
    mean, squares, means, scales, pixels, channels, chunks, size, eps,
    PIXELS: tl.constexpr, CHUNKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Pool the moments of a group of `size` channels: its mean and 1 / standard deviation, [B, G]."""
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    own, step = tl.arange(0, SIZE), tl.arange(0, CHUNKS)
    total = tl.zeros([CHUNKS, SIZE], dtype=tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + step
        mask = (chunk < chunks)[:, None] & (own < size)[None, :]
        place = (image * chunks + chunk)[:, None] * channels + (group * size + own)[None, :]
        count = tl.minimum(pixels - chunk * PIXELS, PIXELS).to(tl.float32)
        total += tl.load(mean + place, mask=mask, other=0.0) * count[:, None]
    average = tl.sum(tl.sum(total, axis=1), axis=0) / (size * pixels)
    total = tl.zeros([CHUNKS, SIZE], dtype=tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + step
        mask = (chunk < chunks)[:, None] & (own < size)[None, :]
        place = (image * chunks + chunk)[:, None] * channels + (group * size + own)[None, :]
        count = tl.minimum(pixels - chunk * PIXELS, PIXELS).to(tl.float32)
        deviation = tl.where(mask, tl.load(mean + place, mask=mask, other=0.0) - average, 0.0)
        total += tl.load(squares + place, mask=mask, other=0.0) + deviation * deviation * count[:, None]
    variance = tl.sum(tl.sum(total, axis=1), axis=0) / (size * pixels)
    target = image * tl.num_programs(0) + group
    tl.store(means + target, average)
    tl.store(scales + target, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _normalize(
    x, means, scales, weight, bias, out, pixels, channels, size, HAS_SILU: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    mask = (pixel < pixels)[:, None] & inside[None, :]
    place = (image * pixels + pixel)[:, None] * channels + channel[None, :]
    group = image * (channels // size) + channel // size
    mean = tl.load(means + group, mask=inside, other=0.0)
    scale = tl.load(scales + group, mask=inside, other=0.0)
    w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32) * scale
    b = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    result = (values - mean[None, :]) * w[None, :] + b[None, :]
    if HAS_SILU:
        result = result / (1.0 + tl.exp(-result))
    tl.store(out + place, result.to(out.dtype.element_ty), mask=mask)
