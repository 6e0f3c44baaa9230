"""The autoencoder piece by piece: large pictures in little memory, and the same picture.

A GroupNorm reads the whole map. So its statistics are pooled over all pieces first, and then pieces of a map
are normalised and convolved with the rows beside them that a convolution reads. Nothing is blended, no seam
is there to hide, and the result is the whole computation's up to rounding. What a statistic needs and is too
large to keep is computed again. The reference's tiles (`tiled_decode` in diffusers'
models/autoencoders/autoencoder_kl.py) each have statistics of their own, which tints them.
Shapes: B batch (1 within pieces), C channels, H height, W width, G groups, P pieces, R rows of a piece.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.attention import device_type

FEWEST_ROWS = 8  # of a piece: fewer, and most of the work is rows that are computed twice
SMALLEST_SIDE = 32
Change = Callable[[Tensor], Tensor]

# Whose forward is written again here for pieces. Attention is not: it reads the whole of a small map.
KNOWN = {f"{name}.forward" for name in ("Encoder", "Decoder", "Middle", "DownLevel", "UpLevel", "ResBlock")}
GEOMETRY = {"downsample": ((3, 3), (2, 2), (0, 0)), "shortcut": ((1, 1), (1, 1), (0, 0))}
SAME_SIZE = ((3, 3), (1, 1), (1, 1))  # kernel, stride, padding of all other convolutions


class Tiles:
    """What an autoencoder has to run its encoder and decoder in pieces; off at first, as in the reference."""

    use_tiling = False
    use_slicing = False
    tile_sample_min_size = 256
    encoder: Any
    decoder: Any

    def enable_tiling(self, use_tiling: bool = True, *, tile_sample_min_size: int | None = None) -> None:
        """Work on pieces of a picture: less memory, more time, the same result up to rounding.

        tile_sample_min_size: pixels; a piece has as many values as a square of this side at the outermost
        level, and a picture that has no more pixels than the square is run whole. None keeps what is set, 256
        at first. There are no gradients, and blocks that are run in pieces run no hooks of their own, only
        their layers'. ValueError for a side that is no multiple of 8 from 32 on, TypeError naming a part that
        is not as vae.py has it.
        """
        side = self.tile_sample_min_size if tile_sample_min_size is None else tile_sample_min_size
        _check_side(side)
        if use_tiling:
            _check(self.encoder, "encoder")
            _check(self.decoder, "decoder")
        self.use_tiling, self.tile_sample_min_size = use_tiling, side

    def disable_tiling(self) -> None:
        """Run pictures whole again."""
        self.use_tiling = False

    def enable_slicing(self) -> None:
        """Run one picture of a batch after another."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Run batches whole again."""
        self.use_slicing = False

    def through(self, coder: nn.Module, x: Tensor) -> Tensor:
        """coder(x), of the encoder or the decoder; in pieces or slices, one picture after another.

        In half precision on a CPU with channels last, where convolutions are 1.07 times as fast
        (benchmarks/NOTES.md) and need no copies in a layout of their own. Not in float32: there torch's
        GroupNorm adds such maps up in a way that loses digits, 2e-4 at 1024x1024.
        """
        if device_type(x) == "cpu" and x.dtype.itemsize == 2 and x.is_contiguous():
            return self._through(coder, x.contiguous(memory_format=torch.channels_last)).contiguous()
        return self._through(coder, x)

    def _through(self, coder: nn.Module, x: Tensor) -> Tensor:
        run, in_pieces = coder, False
        if self.use_tiling:  # checked again: scripts set the side, and layers may have been replaced
            _check_side(side := self.tile_sample_min_size)
            _check(coder, "encoder" if coder is self.encoder else "decoder")
            in_pieces = _pixels(coder, x) > side * side
            run = partial(_tiled, coder, side=side) if in_pieces else coder
        if len(x) == 1 or not (in_pieces or self.use_slicing):
            return run(x)
        return torch.cat([run(one) for one in x.split(1)])


def _tiled(coder: Any, x: Tensor, side: int) -> Tensor:
    """coder(x) of one picture, for vae.py's Encoder and Decoder; side: see `Tiles.enable_tiling`.

    A map that would have to be computed again is kept where all that is kept takes no more than the picture
    and one map of the outermost level, which there has to be. Raises RuntimeError where there would be
    gradients.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *coder.parameters())):
        raise RuntimeError("no gradients go through tiles: use torch.no_grad(), or disable_tiling()")
    encodes = hasattr(coder, "down")
    outer = coder.conv_in if encodes else coder.conv_out  # where the picture comes in or out
    wide = max(outer.in_channels, outer.out_channels)
    run = _Run(side * side * wide, _pixels(coder, x) * (outer.in_channels + outer.out_channels))
    with torch.no_grad():
        return run.encode(coder, x) if encodes else run.decode(coder, x)


def _pixels(coder: Any, x: Tensor) -> int:
    """Of the picture that an encoder reads or a decoder makes."""
    doublings = sum(level.upsample is not None for level in getattr(coder, "up", ()))
    return x.shape[2] * x.shape[3] * 4**doublings


class _Kept:
    """A map [1, C, H, W] in memory, as bands of rows, which leave one by one when it is read for the last
    time."""

    def __init__(self, bands: list[Tensor]) -> None:
        self.bands: list[tuple[int, int, Tensor | None]] = []
        start = 0
        for band in bands:
            self.bands.append((start, start + band.shape[2], band))
            start += band.shape[2]
        self.channels, self.height, self.width = bands[0].shape[1], start, bands[0].shape[3]
        self.held = self.size = self.channels * self.height * self.width
        self.row = self.channels * self.width
        self._is_spent = False

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows [1, C, R, W] from top to before bottom."""
        found = []
        for i, (start, stop, band) in enumerate(self.bands):
            if start < bottom and top < stop:
                assert band is not None, "it has left already"
                found.append(band[:, :, max(top - start, 0) : bottom - start])  # [1, C, .., W]
            elif stop <= top and self._is_spent:
                self.bands[i] = start, stop, None
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)

    def spend(self) -> None:
        """From now on it is read for the last time, from top to bottom: a band above a reading can leave."""
        self._is_spent = True


class _Computed:
    """A map [1, C, H, W] that is not kept: its rows are computed from another map's when they are read."""

    def __init__(
        self,
        source: "_Map",
        shape: tuple[int, int, int],
        compute: Callable[[int, int], Tensor],
        row: int,
        remembers: bool = False,
    ) -> None:
        """row: values of the largest map on the way, for one row of this. remembers: the last rows read."""
        self.source, self.compute, self._remembers = source, compute, remembers
        self.channels, self.height, self.width = shape
        self.size, self.held = self.channels * self.height * self.width, source.held
        self.row = max(row, self.channels * self.width)
        self._last: tuple[int, int, Tensor] | None = None

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows [1, C, R, W] from top to before bottom."""
        if self._last is not None and self._last[0] <= top and bottom <= self._last[1]:
            return self._last[2][:, :, top - self._last[0] : bottom - self._last[0]]
        self._last = None
        rows = self.compute(top, bottom)
        if self._remembers:
            self._last = top, bottom, rows
        return rows

    def spend(self) -> None:
        """From now on it is read for the last time, from top to bottom."""
        self.source.spend()


_Map = _Kept | _Computed


def _convolved(
    conv: nn.Conv2d, x: _Map, change: Change = lambda rows: rows, remembers: bool = False
) -> _Computed:
    """The 3x3 convolution of a changed map; its zeros stand around the map, not around a piece."""

    def compute(top: int, bottom: int) -> Tensor:
        first, last = max(top - 1, 0), min(bottom + 1, x.height)
        rows = conv(change(x.read(first, last)))
        return rows[:, :, top - first : bottom - first]  # [1, C, R, W]

    return _Computed(x, (conv.out_channels, x.height, x.width), compute, x.row, remembers)


def _doubled(x: _Map) -> _Computed:
    """Each value four times."""

    def compute(top: int, bottom: int) -> Tensor:
        first = top // 2
        rows = F.interpolate(x.read(first, (bottom + 1) // 2), scale_factor=2.0, mode="nearest")
        return rows[:, :, top - 2 * first : bottom - 2 * first]  # [1, C, R, 2 W]

    return _Computed(x, (x.channels, 2 * x.height, 2 * x.width), compute, x.row // 2)


def _halved(conv: nn.Conv2d, x: _Map) -> _Computed:
    """The convolution of stride 2, with a row of zeros below the map and a column to its right."""

    def compute(top: int, bottom: int) -> Tensor:
        last = min(2 * bottom + 1, x.height)
        return conv(F.pad(x.read(2 * top, last), (0, 1, 0, 2 * bottom + 1 - last)))  # [1, C, R, W / 2]

    return _Computed(x, (conv.out_channels, x.height // 2, x.width // 2), compute, 2 * x.row)


class _Run:
    """One encoding or decoding.

    piece: values that a piece may have. limit: values that kept maps may have beside what must be kept.
    """

    def __init__(self, piece: int, limit: int) -> None:
        self.piece, self.limit = piece, limit

    def encode(self, coder: Any, image: Tensor) -> Tensor:
        """As `Encoder.forward`."""
        x: _Map = _convolved(coder.conv_in, _Kept([image]), remembers=True)
        for level in coder.down:
            for resnet in level.resnets:
                x = self.residual(resnet, x)
            if level.downsample is not None:
                x = self.keep(_halved(level.downsample, x))
        return self.head(coder, self.middle(coder.mid, x))

    def decode(self, coder: Any, latents: Tensor) -> Tensor:
        """As `Decoder.forward`."""
        x: _Map = self.middle(coder.mid, _Kept([coder.conv_in(latents)]))
        for level in coder.up:
            for resnet in level.resnets:
                x = self.residual(resnet, x)
            if level.upsample is not None:
                x = self.kept_if_small(_convolved(level.upsample, _doubled(x), remembers=True))
        return self.head(coder, x)

    def middle(self, block: Any, x: _Map) -> _Kept:
        """As `Middle.forward`."""
        x = self.residual(block.resnet_in, x)
        x = _Kept([block.attention(x.read(0, x.height))])
        return self.residual(block.resnet_out, x)

    def residual(self, block: Any, x: _Map) -> _Kept:
        """As `ResBlock.forward`. x leaves while the result grows."""
        if max(x.row, block.conv1.out_channels * x.width) * x.height <= self.piece:
            return _Kept([block(x.read(0, x.height))])
        h = self.kept_if_small(_convolved(block.conv1, x, self.activation(block.norm1, x)))
        after = _convolved(block.conv2, h, self.activation(block.norm2, h))
        h.spend()

        def compute(top: int, bottom: int) -> Tensor:
            rows = after.read(top, bottom)
            return block.shortcut(x.read(top, bottom)) + rows

        return self.keep(_Computed(x, (after.channels, x.height, x.width), compute, after.row))

    def head(self, coder: Any, x: _Map) -> Tensor:
        """conv_out(silu(norm_out(x)))"""
        head = self.keep(_convolved(coder.conv_out, x, self.activation(coder.norm_out, x)))
        return head.read(0, x.height)

    def activation(self, norm: nn.GroupNorm, x: _Map) -> Change:
        """silu(norm(.)) for pieces, with the statistics of the whole map x, in float32 at least."""
        precision = torch.promote_types(norm.weight.dtype, torch.float32)

        def moments(top: int, bottom: int) -> Tensor:
            rows = x.read(top, bottom).to(precision).unflatten(1, (norm.num_groups, -1))  # [1, G, C/G, R, W]
            variance, mean = torch.var_mean(rows, (0, 2, 3, 4), correction=0)
            return torch.stack((mean, variance))  # [2, G]

        pieces = list(self.pieces(x))
        means, variances = torch.stack([moments(*piece) for piece in pieces], dim=1)  # [P, G] each
        shares = means.new_tensor([(bottom - top) / x.height for top, bottom in pieces])[:, None]  # [P, 1]
        mean = (shares * means).sum(0)  # [G]
        variance = (shares * (variances + (means - mean) ** 2)).sum(0)
        # Its hooks run: offload brings the weights that are read below.
        norm(torch.zeros(1, x.channels, 1, 2, dtype=norm.weight.dtype, device=mean.device))
        mean, scale = (
            value.repeat_interleave(x.channels // norm.num_groups)[:, None, None]
            for value in (mean, (variance + norm.eps).rsqrt())
        )  # [C, 1, 1]
        scale = norm.weight.to(precision)[:, None, None] * scale
        shift = norm.bias.to(precision)[:, None, None] - mean * scale

        def change(rows: Tensor) -> Tensor:
            normal = torch.addcmul(shift, rows.to(precision), scale).to(rows.dtype)
            return F.silu(normal, inplace=True)

        return change

    def pieces(self, x: _Map) -> Iterator[tuple[int, int]]:
        """First row, and the one after the last, of pieces of about the same height."""
        rows = max(FEWEST_ROWS, self.piece // x.row)
        count = -(-x.height // rows)
        for i in range(count):
            yield i * x.height // count, (i + 1) * x.height // count

    def keep(self, x: _Computed) -> _Kept:
        """Compute the map, and let go of what it is computed from."""
        x.spend()
        return self.compute(x)

    def kept_if_small(self, x: _Computed) -> _Map:
        """Computed now, if there is room for it beside what it is computed from, which stays."""
        return self.compute(x) if x.held + x.size <= self.limit else x

    def compute(self, x: _Computed) -> _Kept:
        """All of it, now. A band that is a view of larger memory is copied out of that."""
        bands = []
        for top, bottom in self.pieces(x):
            band = x.read(top, bottom)
            bands.append(band.clone() if band.untyped_storage().nbytes() > band.nbytes else band)
        return _Kept(bands)


def _check_side(side: int) -> None:
    if isinstance(side, bool) or not isinstance(side, int) or side < SMALLEST_SIDE or side % 8:
        raise ValueError(
            f"tile_sample_min_size must be a multiple of 8 from {SMALLEST_SIDE} on, got {side!r}"
        )


def _check(coder: nn.Module, name: str) -> None:
    """TypeError for a part whose forward is not the one that is written again here."""
    for path, part in coder.named_modules(prefix=name):
        last = path.rpartition(".")[2]
        forward = getattr(part.forward, "__func__", part.forward)
        known = forward.__module__ == "kolors_core.vae" and forward.__qualname__ in KNOWN
        if path.startswith(f"{name}.mid.attention") or known or isinstance(part, nn.ModuleList | nn.Identity):
            continue
        if forward is nn.GroupNorm.forward and part.weight is not None and part.bias is not None:
            continue
        if isinstance(part, nn.Conv2d):
            geometry = part.kernel_size, part.stride, part.padding
            plain = part.dilation == (1, 1) and part.padding_mode == "zeros"
            if plain and geometry == GEOMETRY.get(last, SAME_SIZE):
                continue
        got = f"{type(part).__module__}.{type(part).__qualname__}({part.extra_repr()})"
        raise TypeError(f"tiling cannot run {path}: {got} is not as kolors_core/vae.py has it")
