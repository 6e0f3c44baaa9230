"""Row split: one image on several processes, each with a band of rows of every feature map.

    convolution      reads the rows beside its band from the two neighbors
    GroupNorm        pools the statistics of all bands
    self-attention   gathers keys and values while it computes its band's own queries
    all else         is computed by pixel, or is the same for all pixels

The image is the same within rounding. Bands are chosen at the innermost level, and are twice as high one
level further out, where an odd map ends with its last row. So a convolution of stride 2 reads one row above
its band, and upsampling no other's. Latents, and what samplers do with them, are whole in every process.
While a step or a coder runs, the forwards of these modules are replaced, and afterwards restored.
DistriFusion (https://arxiv.org/abs/2402.19481) has the same split, with the other bands of the step before.
Shapes: B batch, C channels, H height, W width, N pixels of a band, D width of a head, G groups, P processes.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core import unet, vae
from kolors_core.attention import attention, split_heads
from kolors_core.conditioning import Conditioning
from kolors_core.context import Context
from kolors_core.guidance import GuidanceRule
from kolors_core.module import WrapStep
from kolors_core.performance.fused_kernels import FUSED
from kolors_core.performance.offload import OnloadHook
from kolors_core.performance.vae_tiling import TiledCoder, pooled_affine
from kolors_core.precompute import has_default_forward
from kolors_core.sampling import Denoiser
from kolors_core.schedule import Schedule

Band = tuple[int, int]  # (top, bottom): rows from top to before bottom
Bands = tuple[Band, ...]  # of one level's map, in the order of the processes

# The forwards that a band can run as they are; of these modules' attentions only those over pixels are not.
SUPPORTED_FORWARDS = [
    getattr(module, name).forward for module, names in (
        (unet, "DownBlock MidBlock UpBlock ResBlock Transformer TransformerBlock Attention FeedForward"),
        (vae, "Encoder Decoder DownBlock MidBlock UpBlock ResBlock Attention"),
    ) for name in names.split()
] + [kind.forward for kinds in FUSED.items() for kind in kinds]  # fmt: skip
BY_PIXEL = (nn.Linear, nn.LayerNorm, nn.Identity, nn.ModuleList, nn.ModuleDict)
KERNELS = {((1, 1), (1, 1), (0, 0)), ((3, 3), (1, 1), (1, 1)), ((3, 3), (2, 2), (1, 1))}  # stride, padding
PADDED_BEFORE = ((3, 3), (2, 2), (0, 0))  # of the VAE's downsampling
# Parts of a UNet or ControlNet that do not run in a step, but once a run and on all of their input.
ONCE_A_RUN = {"time_embedding", "add_embedding", "text_proj", "image_embedding"}


def split_rows(height: int, levels: int, processes: int) -> list[Bands]:
    """Return the bands of each level's map, from the outermost, `height` rows high, to the innermost.

    ValueError if a process would have no row of the innermost, of height / 2^(levels - 1), rounded up.
    """
    rows = -(-height // 2 ** (levels - 1))
    if processes > rows:
        got = f"got {processes} for {rows} rows of the innermost level, of {height} of the outermost"
        raise ValueError(f"rows are split over at most as many processes as there are rows, {got}")
    edges = [k * rows // processes for k in range(processes + 1)]
    factors = [2 ** (levels - 1 - level) for level in range(levels)]
    heights = [-(-height // 2**level) for level in range(levels)]
    return [
        tuple((top * f, min(bottom * f, h)) for top, bottom in zip(edges, edges[1:], strict=False))
        for f, h in zip(factors, heights, strict=True)
    ]


@lru_cache(maxsize=64)
def _shares(bands: Bands, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the part of the map in each band: [P, 1, 1]."""
    shares = [(bottom - top) / bands[-1][1] for top, bottom in bands]
    return torch.tensor(shares, dtype=dtype, device=device)[:, None, None]


class Ranks:
    """Processes that share an image, in the order of their bands, and all that they exchange.

    group: a process group of torch.distributed, of which this process is one; None for all processes.
    received, calls: bytes that this process received from others, and exchanges, by kind. ValueError where
    torch.distributed is not initialized.
    """

    def __init__(self, group: Any = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            hint = "start them with torchrun and call torch.distributed.init_process_group()"
            raise ValueError(f"rows are split over several processes, got one: {hint}")
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.received, self.calls = Counter[str](), Counter[str]()

    def gather(self, kind: str, band: Tensor, rows: Sequence[int]) -> Callable[[], Tensor]:
        """Start to gather bands [..., rows[rank], any]; returns a function that waits for the whole.

        rows: of each process's band, in the last axis but one.
        """
        most = max(rows)
        padded = F.pad(band, (0, 0, 0, most - band.shape[-2])) if band.shape[-2] < most else band.contiguous()
        parts = padded.new_empty(self.size, *padded.shape)
        work = self._all_gather(parts, padded)
        self._count(kind, (self.size - 1) * padded.nbytes)

        def whole(sent: Tensor = padded) -> Tensor:  # what is sent lives until all of it is
            work.wait()
            return torch.cat([part[..., :n, :] for part, n in zip(parts, rows, strict=True)], dim=-2)

        return whole

    def stack(self, kind: str, own: Tensor) -> Tensor:
        """Gather tensors of one shape: [P, ...]."""
        parts = own.new_empty(self.size, *own.shape)
        self._all_gather(parts, own.contiguous()).wait()
        self._count(kind, (self.size - 1) * own.nbytes)
        return parts

    def extend(self, band: Tensor, has_above: bool) -> Tensor:
        """Append to a band [B, C, R, W] the neighbors' rows below and, if asked for, above; or zeros.

        Returns [B, C, R + 1 or R + 2, W].
        """
        first, last = band[:, :, :1].contiguous(), band[:, :, -1:].contiguous()
        above, below = torch.zeros_like(last), torch.zeros_like(first)
        pairs = [("isend", first, self.rank - 1), ("irecv", below, self.rank + 1)]
        if has_above:
            pairs += [("isend", last, self.rank + 1), ("irecv", above, self.rank - 1)]
        pairs = [pair for pair in pairs if 0 <= pair[2] < self.size]
        self._send_and_receive(pairs)
        self._count("neighbors' rows", sum(rows.nbytes for name, rows, _ in pairs if name == "irecv"))
        return torch.cat([above, band, below] if has_above else [band, below], dim=2)

    def check_same(self, x: Tensor) -> None:
        """Raise ValueError if processes have other values, as of noise from generators of their own."""
        totals = self.stack("checks", x.to(torch.promote_types(x.dtype, torch.float32)).sum()[None])
        if bool((totals != totals[0]).any()) and not bool(totals.isnan().any()):
            hint = "give all a generator of the same seed, and the same arguments"
            raise ValueError(f"the processes that split rows have different latents: {hint}")

    def _all_gather(self, parts: Tensor, own: Tensor) -> Any:
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before 2.13
        return all_gather(parts.flatten(0, 1), own, self.group, async_op=True)

    def _send_and_receive(self, pairs: Sequence[tuple[str, Tensor, int]]) -> None:
        ops = [dist.P2POp(getattr(dist, op), x, group=self.group, group_peer=peer) for op, x, peer in pairs]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    def _count(self, kind: str, received: int) -> None:
        self.received[kind] += received
        self.calls[kind] += 1


class RowSplit:
    """Row split of a UNet's, ControlNets' and a VAE's feature maps over the processes of a group.

    It is the `wrap_step` of a guidance rule (`module.WrapStep`), and `run_coder` that of a VAE. Every process
    calls the same with the same inputs, and gets the same results, bit for bit. There are no gradients.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.wrapped = ranks, 0  # wrapped: steps so far

    def wrap_rule(self, rule: GuidanceRule) -> GuidanceRule:
        """Return a guidance rule that computes another with split rows.

        Its calls raise ValueError or TypeError, naming the reason, where rows cannot be split.
        """

        def split(
            net: unet.UNet, schedule: Schedule, positive: Conditioning, negative: Conditioning | None = None,
            scale: float = 1.0, *, precompute: bool = True, wrap_step: WrapStep | None = None, **options: Any
        ) -> Denoiser:  # fmt: skip
            if wrap_step is not None:
                raise ValueError("rows are not split together with CUDA graphs or a step cache")
            if not precompute or not has_default_forward(net, unet.UNet):
                what = "the UNet is compiled as a whole, hooked, overridden, or not precomputed"
                raise ValueError(f"rows cannot be split where {what}")
            if any(image.masks is not None for image in positive.image_prompts):
                raise ValueError("rows are not split where image prompts have masks")
            before = self.wrapped
            options |= {"precompute": precompute, "wrap_step": self}
            denoise = rule(net, schedule, positive, negative, scale, **options)
            if self.wrapped == before:
                name = getattr(rule, "__qualname__", repr(rule))
                raise ValueError(f"rows cannot be split: the guidance rule {name} uses no wrap_step")
            return denoise

        return split

    def __call__(
        self, step: Callable[..., Any], constant: Any, nets: Sequence[nn.Module], key: Hashable = ()
    ) -> Callable[..., Any]:
        """Return a step of the UNet on whole latents, or of a ControlNet, whose result are this band's rows.

        Tensors in `constant`, a ControlNet's image, are whole maps; keys and values are no maps. TypeError or
        ValueError for a net that cannot be split.
        """
        self.wrapped += 1
        [net] = nets
        check_splits(net)
        levels, rank = len(net.down), self.ranks.rank  # pyright: ignore[reportArgumentType]
        unchecked = [True]  # until the first step

        def split(latents: Tensor, shifts: Tensor, *residuals: Tensor) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError("split rows have no gradients: use torch.no_grad()")
            for i, level in enumerate(getattr(net, "up", ())):  # a callback may have enabled FreeU
                _check_state(f"up.{i}", level)
            bands = split_rows(latents.shape[-2], levels, self.ranks.size)
            top, bottom = bands[0][rank]
            if residuals and residuals[0].shape[-2] != bottom - top:
                raise ValueError("rows cannot be split where a ControlNet is compiled as a whole or hooked")
            own = [part[..., top:bottom, :] if isinstance(part, Tensor) else part for part in constant]
            if unchecked:
                self.ranks.check_same(latents)
                unchecked.clear()
            with self._replaced(net, bands):
                result = step(own, latents[..., top:bottom, :], shifts, *residuals)
            return self._whole(result, bands[0]) if isinstance(result, Tensor) else result

        return split if self.ranks.size > 1 else partial(step, constant)

    def run_coder(self, coder: nn.Module, x: Tensor) -> Tensor:
        """Return coder(x) for a VAE's encoder or decoder, see `VAE.run_coder`; errors as of `__call__`."""
        if self.ranks.size == 1:
            return coder(x)
        if torch.is_grad_enabled():
            raise RuntimeError("split rows have no gradients: use torch.no_grad()")
        check_splits(coder)
        encodes = isinstance(coder, vae.Encoder)
        levels = len(coder.down if encodes else coder.up)  # pyright: ignore[reportArgumentType]
        height = x.shape[-2] if encodes else x.shape[-2] * 2 ** (levels - 1)
        bands = split_rows(height, levels, self.ranks.size)
        given, returned = (bands[0], bands[-1]) if encodes else (bands[-1], bands[0])
        top, bottom = given[self.ranks.rank]
        with self._replaced(coder, bands):
            return self._whole(coder(x[..., top:bottom, :]), returned)

    def _whole(self, band: Tensor, bands: Bands) -> Tensor:
        return self.ranks.gather("results", band, [bottom - top for top, bottom in bands])()

    @contextmanager
    def _replaced(self, net: nn.Module, levels: Sequence[Bands]) -> Iterator[None]:
        """Replace the forwards of modules that read other rows than their band's, while the block lasts."""
        # They are searched anew each time: a callback between two steps may replace some.
        restored: list[tuple[nn.Module, Any]] = []
        try:
            for level, part in parts_with_level(net):
                for module in modules_across_rows(part):
                    padding: Any = getattr(module, "padding", None)
                    restored.append((module, padding))
                    vars(module)["forward"] = self._forward_of(module, levels[level])
                    if padding is not None:
                        vars(module)["padding"] = 0, padding[1]  # rows are padded before it
            yield
        finally:
            for module, padding in restored:
                vars(module).pop("forward", None)
                if padding is not None:
                    vars(module)["padding"] = padding

    def _forward_of(self, module: Any, bands: Bands) -> Callable[..., Tensor]:
        if isinstance(module, nn.Conv2d):
            return partial(self._convolve, module, module.padding != (0, 0))
        if isinstance(module, nn.GroupNorm):
            return partial(self._normalize, module, bands)
        attend = self._attend if isinstance(module, unet.Attention) else self._attend_vae
        return partial(attend, module, bands)

    def _convolve(self, conv: nn.Conv2d, is_padded: bool, x: Tensor) -> Tensor:
        # The VAE's downsampling gets a row of zeros below, in place of which comes the neighbor's first row.
        rows = self.ranks.extend(x if is_padded else x[:, :, :-1], has_above=is_padded)
        return type(conv).forward(conv, rows)

    def _normalize(self, norm: nn.GroupNorm, bands: Bands, x: Tensor) -> Tensor:
        precision = torch.promote_types(x.dtype, torch.float32)
        groups = x.to(precision).unflatten(1, (norm.num_groups, -1))  # [B, G, C/G, R, W]
        variance, mean = torch.var_mean(groups, (2, 3, 4), correction=0)
        moments = self.ranks.stack("statistics", torch.stack((mean, variance)))  # [P, 2, B, G]
        shares = _shares(bands, precision, x.device)
        scale, shift = pooled_affine(norm, moments[:, 0], moments[:, 1], shares)
        return torch.addcmul(shift, x.to(precision), scale).to(x.dtype)

    def _attend(self, own: Any, bands: Bands, x: Tensor, context: Context, perturbed: int = 0) -> Tensor:
        """Compute `unet.Attention.forward` from a band [B, N, C] to the pixels of all bands."""
        kv = own.project_kv(context)
        gathered = self._gather_pixels(torch.stack((kv.k, kv.v)), bands)  # of [2, B, heads, N, D]
        q = split_heads(own.to_q(x), own.heads)
        h = attention(q, *gathered())
        if perturbed:
            h = torch.cat([h[:-perturbed], kv.v[-perturbed:]])
        return own.project_out(h, x)

    def _attend_vae(self, own: vae.Attention, bands: Bands, x: Tensor) -> Tensor:
        """Compute `vae.Attention.forward` of a band [B, C, R, W]."""
        h = own.norm(x).flatten(2).transpose(1, 2)  # [B, N, C]
        gathered = self._gather_pixels(torch.stack((own.to_k(h), own.to_v(h)))[:, :, None], bands)
        q = own.to_q(h)[:, None]  # [B, 1, N, C]
        h = own.to_out(attention(q, *gathered())[:, 0])
        return x + h.transpose(1, 2).unflatten(2, x.shape[-2:])

    def _gather_pixels(self, band: Tensor, bands: Bands) -> Callable[[], Tensor]:
        top, bottom = bands[self.ranks.rank]
        width = band.shape[-2] // (bottom - top)
        return self.ranks.gather("keys and values", band, [width * (end - start) for start, end in bands])


@dataclass(frozen=True)
class SplitCoder:
    """VAE's `run_coder` that splits rows; a copied or pickled one runs coders whole."""

    split: RowSplit

    def __call__(self, coder: nn.Module, x: Tensor) -> Tensor:
        """Return coder(x), see `RowSplit.run_coder`."""
        return self.split.run_coder(coder, x)

    def __reduce__(self) -> tuple[Callable[[], vae.RunCoder], tuple[()]]:
        return _plain_coder, ()


def _plain_coder() -> vae.RunCoder:
    return vae.call


def set_coder(model: vae.VAE, split: RowSplit | None) -> None:
    """Split a VAE's rows, or run a split one whole again; TypeError for a `run_coder` that runs in tiles."""
    own = model.run_coder
    is_off = isinstance(own, TiledCoder) and not (own.use_tiling or own.use_slicing)
    if split is not None and not (own is vae.call or is_off or isinstance(own, SplitCoder)):
        raise TypeError(f"rows can be split of a VAE whose run_coder is vae.call, got {own!r}")
    if split is not None or isinstance(own, SplitCoder):
        model.run_coder = vae.call if split is None else SplitCoder(split)


def parts_with_level(net: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """Yield the parts of a UNet, ControlNet, encoder or decoder that run on bands, with their level."""
    down, up = (list(getattr(net, name, ())) for name in ("down", "up"))
    last = max(len(down), len(up)) - 1
    yield from enumerate(down)
    yield from ((last - i, level) for i, level in enumerate(up))
    for name, part in net.named_children():
        if name not in {"down", "up"} | ONCE_A_RUN:  # of the others only norms and attentions need the level
            yield last if name == "mid" or not up else 0, part


def modules_across_rows(part: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a part whose forwards read other rows than those they compute."""
    if isinstance(part, unet.TransformerBlock):
        yield part.self_attention  # the rest of it is by pixel
    elif isinstance(part, nn.Conv2d):
        yield from [part] if part.kernel_size[0] > 1 else []
    else:
        yield from [part] if isinstance(part, nn.GroupNorm | vae.Attention) else []
        for child in part.children():
            yield from modules_across_rows(child)


def check_splits(net: nn.Module) -> None:
    """Raise TypeError or ValueError, naming it, for a module that would not compute the same on rows.

    net: a UNet, a ControlNet, or a VAE's encoder or decoder.
    """
    if not isinstance(net, unet.UNetEncoder | vae.Encoder | vae.Decoder):
        raise TypeError(f"rows can be split of a UNet, ControlNet or VAE, got {type(net).__name__}")
    for path, part in net.named_modules():
        is_checked = not path and isinstance(part, unet.UNetEncoder)  # see `precompute.has_default_forward`
        if is_checked or path.partition(".")[0] in ONCE_A_RUN or hasattr(part, "is_adapter"):
            continue
        _check_state(path, part)
        forward = getattr(part.forward, "__func__", part.forward)
        is_known = forward in SUPPORTED_FORWARDS or isinstance(part, BY_PIXEL)
        if isinstance(part, nn.GroupNorm):
            is_known = is_known and part.weight is not None and part.bias is not None
        elif isinstance(part, nn.Conv2d) and part.dilation == (1, 1) and part.padding_mode == "zeros":
            geometry = part.kernel_size, part.stride, part.padding
            is_vaes = geometry == PADDED_BEFORE and path.endswith(".downsample")
            is_known = "forward" not in vars(part) and (geometry in KERNELS or is_vaes)
        if not is_known:
            got = f"{type(part).__module__}.{type(part).__qualname__}({part.extra_repr()})"
            expected = f"{path or 'the VAE'}: expected a module of kolors_core"
            raise TypeError(f"rows cannot be split in {expected}, got {got}")


def _check_state(path: str, part: Any) -> None:
    """Raise ValueError if something is on for a module that works on whole maps only."""
    hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
    reasons = {
        "it is compiled": part._compiled_call_impl is not None,
        "it has a hook": any(not isinstance(hook, OnloadHook) for hook in hooks),
        "its attention maps are recorded": isinstance(part, unet.Attention) and part.observers,
        "FreeU is enabled": isinstance(part, unet.UpBlock) and part.freeu is not None,
    }
    if found := [reason for reason, is_on in reasons.items() if is_on]:
        raise ValueError(f"rows cannot be split in {path or 'the VAE'}: {found[0]}")
