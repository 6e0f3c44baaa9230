"""The VAE in bands of rows: the same picture in less memory.

A feature map is asked for its rows, and asks the map that it is made of for those that it needs. What is
between two kept maps exists only in the band at work, and is computed again for each reader. A GroupNorm's
statistics are pooled over the bands of the whole map before it gives its first row, and a convolution reads
the rows around its own, so that nothing differs from the whole, and nothing needs to be blended.
Source: in place of `tiled_decode` of diffusers' models/autoencoders/autoencoder_kl.py, whose tiles each have
statistics of their own: colours shift from tile to tile.
Shapes: B batch, C channels, H height, W width, G groups.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.config import VAEConfig

SIDE = 256  # of a tile, in pixels
FEWEST_ROWS = 8  # in a band: each needs up to four more around it


class Map:
    """A feature map [B, C, H, W] that is made, of its sources, when its rows are asked for.

    row: elements, for a row of it, of the widest map that it is made of.
    """

    def __init__(self, shape: tuple[int, int, int, int], *sources: "Map") -> None:
        self.shape, (batch, channels, height, width) = shape, shape
        self.row = max(batch * channels * width, *(s.row * s.shape[2] // height for s in sources), 0)

    def rows(self, start: int, stop: int) -> Tensor:
        """[B, C, stop - start, W], for 0 <= start < stop <= H."""
        raise NotImplementedError

    def bands(self, elements: int) -> list[tuple[int, int]]:
        """From where to where each band goes: none needs a map of more elements, unless of few rows."""
        height, rows = self.shape[2], max(FEWEST_ROWS, elements // self.row)
        return [(start, min(start + rows, height)) for start in range(0, height, rows)]


class Kept(Map):
    """One that is there as a whole."""

    def __init__(self, whole: Tensor) -> None:
        batch, channels, height, width = whole.shape
        super().__init__((batch, channels, height, width))
        self.whole = whole

    def rows(self, start: int, stop: int) -> Tensor:
        return self.whole[:, :, start:stop]


class Convolved(Map):
    """A convolution's result. The last band is kept, for who asks for it or a part of it again.

    Of height and width as its input, or half of that: such a one was trained with one row added below and one
    column to the right.
    """

    def __init__(self, conv: Any, source: Map) -> None:
        if not isinstance(conv, nn.Conv2d) or conv.padding_mode != "zeros":
            raise TypeError(f"tiling knows convolutions padded with zeros, got {conv}: vae.disable_tiling()")
        self.conv, self.source, (height, width) = conv, source, source.shape[2:]
        self.stride, self.halo = conv.stride[0], int(conv.padding[0])
        sides = -(-height // self.stride), -(-width // self.stride)
        super().__init__((source.shape[0], conv.out_channels, *sides), source)
        self.last = (0, 0, torch.empty(0))

    def rows(self, start: int, stop: int) -> Tensor:
        if not self.last[0] <= start < stop <= self.last[1]:
            self.last = (0, 0, torch.empty(0))  # before the next one is made
            self.last = (start, stop, self.made(start, stop))
        return self.last[2][:, :, start - self.last[0] : stop - self.last[0]]

    def made(self, start: int, stop: int) -> Tensor:
        """The module is called with the rows around, which it pads; what comes of the padding is cut off."""
        height = self.source.shape[2]
        if self.stride == 1:
            above, below = max(0, start - self.halo), min(height, stop + self.halo)
            made = self.conv(self.source.rows(above, below))
            return made[:, :, start - above : stop - above]
        above, below = start * self.stride, stop * self.stride + 1
        x = self.source.rows(above, min(below, height))
        return self.conv(F.pad(x, (0, 1, 0, max(0, below - height))))


class Doubled(Map):
    """Every pixel four times."""

    def __init__(self, source: Map) -> None:
        batch, channels, height, width = source.shape
        super().__init__((batch, channels, 2 * height, 2 * width), source)
        self.source = source

    def rows(self, start: int, stop: int) -> Tensor:
        x = self.source.rows(start // 2, (stop + 1) // 2)
        above = start // 2 * 2
        return F.interpolate(x, scale_factor=2.0, mode="nearest")[:, :, start - above : stop - above]


class Normed(Map):
    """GroupNorm and SiLU. The whole source is read for the statistics when this is made."""

    def __init__(self, norm: Any, source: Map, elements: int) -> None:
        if type(norm) is not nn.GroupNorm or not norm.affine:
            raise TypeError(f"tiling knows GroupNorm with weights, got {norm}: vae.disable_tiling()")
        super().__init__(source.shape, source)
        self.source = source
        mean, variance = pooled(source, norm.num_groups, elements)  # [B, G]
        scale = (variance + norm.eps).rsqrt()
        norm(mean.new_zeros(1, self.shape[1], 1, 2, dtype=norm.weight.dtype))  # for hooks that bring weights
        width = self.shape[1] // norm.num_groups
        scale, mean = (part.repeat_interleave(width, dim=1) for part in (scale, mean))  # [B, C]
        scale = scale * norm.weight
        self.scale, self.shift = scale[:, :, None, None], (norm.bias - mean * scale)[:, :, None, None]

    def rows(self, start: int, stop: int) -> Tensor:
        x = self.source.rows(start, stop)
        return F.silu((x * self.scale + self.shift).to(x.dtype), inplace=True)


class Added(Map):
    """The sum of two."""

    def __init__(self, one: Map, other: Map) -> None:
        super().__init__(one.shape, one, other)
        self.one, self.other = one, other

    def rows(self, start: int, stop: int) -> Tensor:
        return self.one.rows(start, stop) + self.other.rows(start, stop)


def pooled(source: Map, groups: int, elements: int) -> tuple[Tensor, Tensor]:
    """Mean and variance [B, G] of each group over all rows, of at least float32.

    Source: pairs are merged as in Chan, Golub and LeVeque, "Algorithms for computing the sample variance".
    """
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for start, stop in source.bands(elements):
        x = source.rows(start, stop).unflatten(1, (groups, -1)).flatten(2)  # [B, G, n]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, middle = torch.var_mean(x, dim=2, correction=0)
        if count == 0:
            mean, squares = torch.zeros_like(middle), torch.zeros_like(middle)
        n, both = x.shape[2], count + x.shape[2]
        squares = squares + variance * n + (middle - mean) ** 2 * (count * n / both)
        mean, count = mean + (middle - mean) * (n / both), both
    return mean, squares / count


Step = Callable[[Map], Map]
Rule = Callable[["Bands", Any], Iterator[Step]]


class Bands:
    """Takes a VAE's parts apart into steps. rules: by the part's class; elements: what a band has at most."""

    def __init__(self, rules: Mapping[type, Rule], elements: int) -> None:
        self.rules, self.elements = rules, elements

    def run(self, part: nn.Module, x: Tensor) -> Tensor:
        """part(x). Between two steps there is one map, and no caller that holds another."""
        now: Map = Kept(x)
        for step in self.steps(part):
            now = step(now)
        return self.keep(now).whole

    def steps(self, part: nn.Module) -> Iterator[Step]:
        """TypeError for a part of a class that has no rule."""
        if type(part) not in self.rules:
            known = ", ".join(kind.__name__ for kind in self.rules)
            raise TypeError(f"tiling knows {known}, got a {type(part).__name__}: vae.disable_tiling()")
        return self.rules[type(part)](self, part)

    def keep(self, source: Map) -> Kept:
        """Make the whole map, band by band."""
        if isinstance(source, Kept):
            return source
        whole = torch.empty(0)
        for start, stop in source.bands(self.elements):
            band = source.rows(start, stop)
            whole = band.new_empty(source.shape) if start == 0 else whole
            whole[:, :, start:stop] = band
        return Kept(whole)

    def norm(self, norm: nn.Module, x: Map) -> Normed:
        """A norm and its activation."""
        return Normed(norm, x, self.elements)


def res_block(bands: Bands, block: Any) -> Iterator[Step]:
    """`vae.ResBlock`."""

    def step(x: Map) -> Map:
        h = Convolved(block.conv1, bands.norm(block.norm1, x))
        h = Convolved(block.conv2, bands.norm(block.norm2, h))
        is_changed = isinstance(block.shortcut, nn.Conv2d)
        return bands.keep(Added(h, Convolved(block.shortcut, x) if is_changed else x))

    yield step


def middle(bands: Bands, mid: Any) -> Iterator[Step]:
    """`vae.Middle`, whose attention sees all of its map, which is the smallest."""
    yield from bands.steps(mid.resnet_in)
    yield lambda x: Kept(mid.attention(bands.keep(x).whole))
    yield from bands.steps(mid.resnet_out)


def down_level(bands: Bands, level: Any) -> Iterator[Step]:
    """`vae.DownLevel`."""
    for block in level.resnets:
        yield from bands.steps(block)
    if level.downsample is not None:
        yield lambda x: bands.keep(Convolved(level.downsample, x))


def up_level(bands: Bands, level: Any) -> Iterator[Step]:
    """`vae.UpLevel`. What it doubles is not kept: of the last level that would be the largest map of all."""
    for block in level.resnets:
        yield from bands.steps(block)
    if level.upsample is not None:
        yield lambda x: Convolved(level.upsample, Doubled(x))


def coder(bands: Bands, part: Any) -> Iterator[Step]:
    """`vae.Encoder`, and `vae.Decoder`, which begins in the middle."""
    yield lambda x: bands.keep(Convolved(part.conv_in, x))
    for level in [*part.down, part.mid] if hasattr(part, "down") else [part.mid, *part.up]:
        yield from bands.steps(level)
    yield lambda x: Convolved(part.conv_out, bands.norm(part.norm_out, x))


class Sparing(nn.Module):
    """A VAE's switches for less memory, by the reference's names; both change nothing but rounding.

    use_slicing: one picture after another. use_tiling: in bands, each of as much as a tile of
    tile_sample_min_size x tile_sample_min_size pixels has; what is no larger is computed as a whole.
    """

    RULES: Mapping[type, Rule]
    config: VAEConfig
    use_slicing, use_tiling, tile_sample_min_size = False, False, SIDE

    def enable_tiling(self, use_tiling: bool = True, *, tile_sample_min_size: int = SIDE) -> None:
        """Less memory for more time: a third convolutions more. Compiled blocks and hooks on blocks are
        passed by. ValueError for a side below 64 pixels."""
        if isinstance(tile_sample_min_size, bool) or not isinstance(tile_sample_min_size, int):
            raise TypeError(f"tile_sample_min_size must be a whole number, got {tile_sample_min_size!r}")
        if tile_sample_min_size < 64:
            raise ValueError(f"tile_sample_min_size must be at least 64 pixels, got {tile_sample_min_size}")
        self.use_tiling, self.tile_sample_min_size = use_tiling, tile_sample_min_size

    def disable_tiling(self) -> None:
        """Maps as a whole again."""
        self.use_tiling = False

    def enable_slicing(self) -> None:
        """One picture after another."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """All pictures at once again."""
        self.use_slicing = False

    def sparing(self, part: nn.Module, x: Tensor, pixels: int) -> Tensor:
        """part(x), an encoder's or decoder's, as the switches say. pixels: of each picture."""
        if self.use_slicing and len(x) > 1:
            return torch.cat([self.sparing(part, one, pixels) for one in x.split(1)])
        if not self.use_tiling or pixels <= self.tile_sample_min_size**2:
            return part(x)
        widest_map = self.config.channels[0] * self.tile_sample_min_size**2
        return Bands(self.RULES, widest_map).run(part, x)
