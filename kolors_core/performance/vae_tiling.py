"""Tiled VAE: large images in little memory, with the result of the whole computation up to rounding.

A GroupNorm needs statistics of its whole map. So each norm takes two passes over the tiles, bands of rows:

    map -> tiles -> mean and variance of each, pooled
    map -> tiles with the adjacent rows that the convolution reads -> normalize, silu, convolve -> next map

Nothing is blended, and there are no seams. A map that the next norm needs and that is too large to keep is
computed again (`LazyMap`). The reference normalizes each tile by its own statistics, which tints it
(`tiled_decode` in diffusers' models/autoencoders/autoencoder_kl.py).
Shapes: B batch (1 within tiles), C channels, H height, W width, G groups, P tiles, R rows of a tile.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.vae import VAE, Decoder, DownBlock, Encoder, MidBlock, ResBlock, UpBlock, call
from kolors_core.validation import check_int

MIN_TILE_ROWS = 8  # below it, recomputing the rows that tiles share dominates
MIN_TILE_SIDE = 32
Pointwise = Callable[[Tensor], Tensor]
Shape = tuple[int, int, int]  # C, H, W
ReadRows = Callable[[int, int], Tensor]  # (top, bottom) -> rows [1, C, R, W] from top to before bottom

# The forwards that this file reimplements in tiles. Attention's is not one: it reads a small map as a whole.
SUPPORTED_FORWARDS = [kind.forward for kind in (Encoder, Decoder, MidBlock, DownBlock, UpBlock, ResBlock)]
GEOMETRY = {"downsample": ((3, 3), (2, 2), (0, 0)), "shortcut": ((1, 1), (1, 1), (0, 0))}
SAME_SIZE = ((3, 3), (1, 1), (1, 1))  # kernel, stride, padding of all other convolutions


@dataclass
class TiledCoder:
    """VAE's `run_coder` that runs encoder and decoder in tiles, or one image of a batch after another.

    tile_sample_min_size: pixels; a tile has as many values as a square of this side at the outermost level,
    and an image with no more pixels than the square is run whole.
    """

    use_tiling: bool = False
    use_slicing: bool = False
    tile_sample_min_size: int = 256

    def __call__(self, coder: nn.Module, x: Tensor) -> Tensor:
        """Return coder(x); ValueError or TypeError as of `enable_tiling`, since layers may be new."""
        run = coder
        if self.use_tiling:
            side = check_int("tile_sample_min_size", self.tile_sample_min_size, 8, MIN_TILE_SIDE)
            _check(coder)
            if _pixels(coder, x) > side * side:
                run = partial(_tiled, coder, side=side)
        by_image = x.shape[0] > 1 and (self.use_slicing or run is not coder)
        return torch.cat([run(image) for image in x.split(1)]) if by_image else run(x)


def enable_tiling(vae: VAE, *, tile_sample_min_size: int | None = None) -> None:
    """Run a VAE in tiles, by a `TiledCoder`: less memory, more time, the same result up to rounding.

    tile_sample_min_size: see `TiledCoder`; None keeps the present one. There are no gradients, and of blocks
    that run in tiles only the layers' hooks are called. ValueError for a side that is no multiple of 8 from
    32 on, TypeError naming a module that differs from vae.py, and for a VAE with another `run_coder`.
    """
    coder = tiled_coder(vae)
    side = coder.tile_sample_min_size if tile_sample_min_size is None else tile_sample_min_size
    side = check_int("tile_sample_min_size", side, 8, MIN_TILE_SIDE)
    _check(vae.encoder)
    _check(vae.decoder)
    vae.run_coder = replace(coder, use_tiling=True, tile_sample_min_size=side)


def disable_tiling(vae: VAE) -> None:
    """Run images whole again."""
    if isinstance(vae.run_coder, TiledCoder):  # else it runs in none
        vae.run_coder = replace(vae.run_coder, use_tiling=False)


def enable_slicing(vae: VAE) -> None:
    """Run one image of a batch after another."""
    vae.run_coder = replace(tiled_coder(vae), use_slicing=True)


def disable_slicing(vae: VAE) -> None:
    """Run batches whole again."""
    if isinstance(vae.run_coder, TiledCoder):
        vae.run_coder = replace(vae.run_coder, use_slicing=False)


def tiled_coder(vae: VAE) -> TiledCoder:
    """Return the VAE's `TiledCoder`, a new one that is off if it has none yet."""
    if isinstance(vae.run_coder, TiledCoder):
        return vae.run_coder
    if vae.run_coder is not call:
        raise TypeError(f"expected a VAE whose run_coder is vae.call or a TiledCoder, got {vae.run_coder!r}")
    return TiledCoder()


def _tiled(coder: Any, x: Tensor, side: int) -> Tensor:
    """Return coder(x) of one image, for vae.py's Encoder and Decoder; side: `tile_sample_min_size`.

    Maps are kept, not computed again, where they take no more than the image and one map of the outermost
    level, which are in memory in any case. RuntimeError where there would be gradients.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *coder.parameters())):
        raise RuntimeError("tiles have no gradients: use torch.no_grad(), or disable tiling")
    encodes = hasattr(coder, "down")
    outer = coder.conv_in if encodes else coder.conv_out  # the layer that reads or writes the image
    channels = outer.in_channels, outer.out_channels
    run = _TiledRun(side * side * max(channels), _pixels(coder, x) * sum(channels))
    with torch.no_grad():
        return run.encode(coder, x) if encodes else run.decode(coder, x)


def _pixels(coder: Any, x: Tensor) -> int:
    """Count the pixels of the image that an encoder reads or a decoder generates."""
    doublings = sum(level.upsample is not None for level in getattr(coder, "up", ()))
    return x.shape[2] * x.shape[3] * 4**doublings


class MaterializedMap:
    """Map [1, C, H, W] in memory, as bands of rows that are freed one by one when it is last read."""

    def __init__(self, bands: list[Tensor]) -> None:
        self.bands: list[tuple[int, int, Tensor | None]] = []
        self.channels, self.height, self.width = bands[0].shape[1], 0, bands[0].shape[3]
        for band in bands:
            self.bands.append((self.height, self.height + band.shape[2], band))
            self.height += band.shape[2]
        self.resident_values = self.size = self.channels * self.height * self.width
        self.row, self._is_last_read = self.channels * self.width, False

    def read(self, top: int, bottom: int) -> Tensor:
        """Return rows [1, C, R, W] from top to before bottom."""
        found = []
        for i, (start, stop, band) in enumerate(self.bands):
            if start < bottom and top < stop:
                assert band is not None, "this band is freed already"
                found.append(band[:, :, max(top - start, 0) : bottom - start])  # [1, C, .., W]
            elif stop <= top and self._is_last_read:
                self.bands[i] = start, stop, None
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)

    def release_after_read(self) -> None:
        """Free each band above the rows read: from now on the map is read a last time, from the top."""
        self._is_last_read = True


class LazyMap:
    """Map [1, C, H, W] that is not in memory: rows are computed from another map's when they are read.

    row: values of the largest intermediate map per row. cache_last: keep the rows last read.
    """

    def __init__(
        self, source: "_Map", shape: Shape, compute: ReadRows, row: int, cache_last: bool = False
    ) -> None:
        self.source, self.compute, self._cache_last = source, compute, cache_last
        self.channels, self.height, self.width = shape
        self.size, self.resident_values = self.channels * self.height * self.width, source.resident_values
        self.row = max(row, self.channels * self.width)
        self._last: tuple[int, int, Tensor] | None = None

    def read(self, top: int, bottom: int) -> Tensor:
        """Return rows [1, C, R, W] from top to before bottom."""
        if self._last is not None and self._last[0] <= top and bottom <= self._last[1]:
            return self._last[2][:, :, top - self._last[0] : bottom - self._last[0]]
        self._last = None  # freed before the new rows are computed
        rows = self.compute(top, bottom)
        self._last = (top, bottom, rows) if self._cache_last else None
        return rows

    def release_after_read(self) -> None:
        """Free the source's bands as they are read for the last time."""
        self.source.release_after_read()


_Map = MaterializedMap | LazyMap


def _convolve(
    conv: nn.Conv2d, x: _Map, change: Pointwise = lambda rows: rows, cache_last: bool = False
) -> LazyMap:
    """Convolve change(x) by a 3x3 kernel; zeros are padded around the map, not around a tile."""

    def compute(top: int, bottom: int) -> Tensor:
        first, last = max(top - 1, 0), min(bottom + 1, x.height)
        return conv(change(x.read(first, last)))[:, :, top - first : bottom - first]  # [1, C, R, W]

    return LazyMap(x, (conv.out_channels, x.height, x.width), compute, x.row, cache_last)


def _upsample(x: _Map) -> LazyMap:
    def compute(top: int, bottom: int) -> Tensor:
        first = top // 2
        rows = F.interpolate(x.read(first, (bottom + 1) // 2), scale_factor=2.0, mode="nearest")
        return rows[:, :, top - 2 * first : bottom - 2 * first]  # [1, C, R, 2 W]

    return LazyMap(x, (x.channels, 2 * x.height, 2 * x.width), compute, x.row // 2)


def _downsample(conv: nn.Conv2d, x: _Map) -> LazyMap:
    """Convolve with stride 2, with a row of zeros below the map and a column to its right."""

    def compute(top: int, bottom: int) -> Tensor:
        last = min(2 * bottom + 1, x.height)
        return conv(F.pad(x.read(2 * top, last), (0, 1, 0, 2 * bottom + 1 - last)))  # [1, C, R, W / 2]

    return LazyMap(x, (conv.out_channels, x.height // 2, x.width // 2), compute, 2 * x.row)


@dataclass
class _TiledRun:
    """Run of an encoder or decoder, whose methods compute the forwards of vae.py."""

    tile: int  # maximum values of a tile
    limit: int  # maximum values of maps that are kept to save computing them again

    def encode(self, coder: Any, image: Tensor) -> Tensor:
        x: _Map = _convolve(coder.conv_in, MaterializedMap([image]), cache_last=True)
        for level in coder.down:
            for resnet in level.resnets:
                x = self.residual(resnet, x)
            if level.downsample is not None:
                x = self.materialize(_downsample(level.downsample, x))
        return self.head(coder, self.middle(coder.mid, x))

    def decode(self, coder: Any, latents: Tensor) -> Tensor:
        x: _Map = self.middle(coder.mid, MaterializedMap([coder.conv_in(latents)]))
        for level in coder.up:
            for resnet in level.resnets:
                x = self.residual(resnet, x)
            if level.upsample is not None:
                x = self.materialize_if_small(_convolve(level.upsample, _upsample(x), cache_last=True))
        return self.head(coder, x)

    def middle(self, block: Any, x: _Map) -> MaterializedMap:
        x = self.residual(block.resnet_in, x)
        x = MaterializedMap([block.attention(x.read(0, x.height))])
        return self.residual(block.resnet_out, x)

    def residual(self, block: Any, x: _Map) -> MaterializedMap:
        if max(x.row, block.conv1.out_channels * x.width) * x.height <= self.tile:
            return MaterializedMap([block(x.read(0, x.height))])
        h = self.materialize_if_small(_convolve(block.conv1, x, self.activation(block.norm1, x)))
        branch = _convolve(block.conv2, h, self.activation(block.norm2, h))
        h.release_after_read()

        def compute(top: int, bottom: int) -> Tensor:
            rows = branch.read(top, bottom)
            return block.shortcut(x.read(top, bottom)) + rows

        # x is freed while the result grows
        return self.materialize(LazyMap(x, (branch.channels, x.height, x.width), compute, branch.row))

    def head(self, coder: Any, x: _Map) -> Tensor:
        x = self.materialize(_convolve(coder.conv_out, x, self.activation(coder.norm_out, x)))
        return x.read(0, x.height)

    def activation(self, norm: nn.GroupNorm, x: _Map) -> Pointwise:
        """Return silu(norm(.)) for tiles, by the statistics of the whole map x, in float32 at least."""
        precision = torch.promote_types(norm.weight.dtype, torch.float32)

        def moments(top: int, bottom: int) -> Tensor:
            rows = x.read(top, bottom).to(precision).unflatten(1, (norm.num_groups, -1))  # [1, G, C/G, R, W]
            variance, mean = torch.var_mean(rows, (0, 2, 3, 4), correction=0)
            return torch.stack((mean, variance))  # [2, G]

        tiles = self.tiles(x)
        means, variances = torch.stack([moments(*tile) for tile in tiles], dim=1)  # [P, G] each
        shares = means.new_tensor([(bottom - top) / x.height for top, bottom in tiles])[:, None]  # [P, 1]
        # Run its hooks: offload copies the weights that are read below to the device.
        norm(torch.zeros(1, x.channels, 1, 2, dtype=norm.weight.dtype, device=means.device))
        scale, shift = pooled_affine(norm, means, variances, shares)  # [C, 1, 1] each
        return lambda x: F.silu(torch.addcmul(shift, x.to(precision), scale).to(x.dtype), inplace=True)

    def tiles(self, x: _Map) -> list[tuple[int, int]]:
        """List (top, bottom) of tiles of about the same height."""
        count = -(-x.height // max(MIN_TILE_ROWS, self.tile // x.row))
        return [(i * x.height // count, (i + 1) * x.height // count) for i in range(count)]

    def materialize_if_small(self, x: LazyMap) -> _Map:
        """Compute the map now if there is room for it and the map it is computed from, which is kept."""
        return self.materialize(x, keep_source=True) if x.resident_values + x.size <= self.limit else x

    def materialize(self, x: LazyMap, keep_source: bool = False) -> MaterializedMap:
        """Compute all bands; one that is a view of larger memory is copied, to free the rest."""
        if not keep_source:
            x.release_after_read()
        bands = []
        for top, bottom in self.tiles(x):
            band = x.read(top, bottom)
            bands.append(band.clone() if band.untyped_storage().nbytes() > band.nbytes else band)
        return MaterializedMap(bands)


def pooled_affine(
    norm: nn.GroupNorm, means: Tensor, variances: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """Return scale and shift [..., C, 1, 1] of a GroupNorm, from the statistics of P parts of its map.

    means, variances: [P, ..., G]. shares: of the map in each part, their sum 1, of as many axes.
    """
    mean = (shares * means).sum(0)  # [..., G]
    variance = (shares * (variances + (means - mean) ** 2)).sum(0)
    mean_std = torch.stack((mean, (variance + norm.eps).rsqrt()))  # [2, ..., G]
    repeated = mean_std.repeat_interleave(norm.num_channels // norm.num_groups, dim=-1)
    mean, inverse_std = repeated[..., None, None]  # [..., C, 1, 1]
    scale = norm.weight.to(mean.dtype)[:, None, None] * inverse_std
    return scale, norm.bias.to(mean.dtype)[:, None, None] - mean * scale


def _check(coder: nn.Module) -> None:
    """Raise TypeError for a module whose forward is not one of those that are reimplemented here."""
    name = "encoder" if isinstance(coder, Encoder) else "decoder" if isinstance(coder, Decoder) else "coder"
    for path, part in coder.named_modules(prefix=name):
        forward = getattr(part.forward, "__func__", part.forward)
        is_known = forward in SUPPORTED_FORWARDS or isinstance(part, nn.ModuleList | nn.Identity)
        if forward is nn.GroupNorm.forward:
            is_known = part.weight is not None and part.bias is not None
        elif isinstance(part, nn.Conv2d) and part.dilation == (1, 1) and part.padding_mode == "zeros":
            geometry = part.kernel_size, part.stride, part.padding
            is_known = geometry == GEOMETRY.get(path.rpartition(".")[2], SAME_SIZE)
        if not is_known and not path.startswith(f"{name}.mid.attention"):
            got = f"{type(part).__module__}.{type(part).__qualname__}({part.extra_repr()})"
            raise TypeError(f"tiling cannot run {path}: expected a module of kolors_core/vae.py, got {got}")
