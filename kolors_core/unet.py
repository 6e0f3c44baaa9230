"""UNet: noisy latents, a timestep and the text -> predicted noise.

SDXL's UNet (https://arxiv.org/abs/2307.01952) with three levels, a projection of ChatGLM's tokens, and a
wider added embedding. Source: `UNet2DConditionModel` in diffusers' models/unets/unet_2d_condition.py.
Shapes: B batch, C channels, H height, W width (in latents), N = H * W, S text tokens, T time embedding width.

The file is ordered bottom up:

    sinusoid, TimestepEmbedding    timestep; sizes and pooled text -> two vectors [B, T], summed to the time
    ResBlock                       [B, C, H, W] and the time -> [B, C', H, W]
    Attention                      from pixels [B, N, C] to pixels, the text [B, S, 2048] and images
    TransformerBlock               Attention to pixels, to text, FeedForward; a Transformer has several
    DownBlock, MidBlock, UpBlock   ResBlocks, each with its Transformer, and resampling
    UNetEncoder, UNet              all levels, and their inputs

The released model at 1024x1024 (ResBlocks and transformer blocks of each level; skips connect each row):

    conv_in   4 -> 320 at 128x128                    conv_out   320 -> 4 at 128x128
    down.0    320 at 128x128, 2 ResBlocks            up.2       320 at 128x128, 3 ResBlocks
    down.1    640 at 64x64, 2 with 2 blocks each     up.1       640 at 64x64, 3 with 2 blocks each
    down.2    1280 at 32x32, 2 with 10 blocks each   up.0       1280 at 32x32, 3 with 10 blocks each
              mid   1280 at 32x32, 2 ResBlocks around 10 blocks
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.attention import attention, log_multiplicity_bias, split_heads
from kolors_core.config import UNetConfig
from kolors_core.context import Context, ImagePrompt, KeysValues, KnownOutput, ResizedMasks, resize_masks
from kolors_core.module import Model


def sinusoid(values: Tensor, width: int) -> Tensor:
    """Compute cosines, then sines, of values [...] at frequencies 1 down to 1/10000: float32 [..., width]."""
    half = width // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values[..., None].float() * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """MLP of two layers that maps a sinusoid, or the added embedding's input, to a time embedding."""

    def __init__(self, width: int, time_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., width] to [..., T]."""
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeShift(NamedTuple):
    """Shift [..., C] that a ResBlock adds to its feature map, as a function of the time."""

    added: Tensor


Times = Iterator[Tensor | TimeShift]
Contexts = Iterator[Context | KeysValues | KnownOutput]


class ResBlock(nn.Module):
    """ResBlock of two convolutions, with the time embedding added between them, and a shortcut."""

    is_block = True

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_groups, in_channels, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(config.time_dim, out_channels)
        self.norm2 = nn.GroupNorm(config.norm_groups, out_channels, eps=config.norm_eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        is_same = in_channels == out_channels
        self.shortcut = nn.Identity() if is_same else nn.Conv2d(in_channels, out_channels, 1)

    def time_shift(self, time: Tensor) -> TimeShift:
        """Compute this block's shift for time embeddings [..., T]; it depends on nothing else."""
        return TimeShift(self.time_proj(F.silu(time)))

    def forward(self, x: Tensor, time: Tensor | TimeShift) -> Tensor:
        """Map x [B, C, H, W] to [B, C', H, W]; time: [B, T], or its shift by `time_shift`."""
        h = self.conv1(F.silu(self.norm1(x)))
        shift = time if isinstance(time, TimeShift) else self.time_shift(time)
        h = h + shift.added[:, :, None, None]  # [B, C', H, W]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Multi-head attention from x to a context, which is x itself in self-attention."""

    def __init__(self, width: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.Linear(width, width)
        self.image_branches = nn.ModuleList()  # of attached IP-Adapters; empty, it adds no key
        self.observers: list[Callable[..., None]] = []  # called with q and k, see attention_maps.py

    def project_kv(self, context: Context) -> KeysValues:
        """Compute keys and values, which depend neither on x nor on time: one call a run is enough."""
        if len(context.images) != len(self.image_branches):
            expected = f"{len(self.image_branches)}, one for each attached IP-Adapter"
            raise ValueError(f"image_prompts: expected {expected}, got {len(context.images)}")
        branches = zip(cast("Iterable[Any]", self.image_branches), context.images, strict=True)
        images = tuple(branch.project_kv(image, self.heads) for branch, image in branches)
        k, v = (split_heads(project(context.tokens), self.heads) for project in (self.to_k, self.to_v))
        return KeysValues(k, v, context.bias, images, context.perturbed)

    def project(self, x: Tensor, context: Context | KeysValues) -> tuple[Tensor, KeysValues]:
        """Compute queries [B, heads, N, C/heads], and keys and values unless the context is these already."""
        q = split_heads(self.to_q(x), self.heads)
        return q, self.project_kv(context) if isinstance(context, Context) else context

    def forward(self, x: Tensor, context: Context | KeysValues | KnownOutput, perturbed: int = 0) -> Tensor:
        """Map x [B, N, C] to [B, N, C]; perturbed: number of last rows with the identity as attention map."""
        if isinstance(context, KnownOutput):
            return context.output
        q, kv = self.project(x, context)
        h = attention(q, kv.k, kv.v, kv.bias)
        if perturbed:
            h = torch.cat([h[:-perturbed], kv.v[-perturbed:]])
        for branch, images in zip(self.image_branches, kv.images, strict=True):
            h = branch(h, q, images)
        for observe in self.observers:
            observe(q, kv.k, kv.bias, perturbed)
        h = self.project_out(h, x)
        if kv.outputs is not None:
            kv.outputs.append(h)
        return h

    def project_out(self, h: Tensor, x: Tensor) -> Tensor:
        """Map the heads' outputs [B, heads, N, C/heads] to [B, N, C]; x: the input, for subclasses."""
        return self.to_out(h.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """GEGLU: value * gelu(gate), with the exact (erf) gelu."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width, 8 * width)
        self.proj_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, N, C] to [B, N, C]."""
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Transformer block: self-attention, cross-attention, feed-forward; each after a norm, as a residual."""

    is_block = True

    def __init__(self, width: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attention = Attention(width, context_dim, heads)
        self.norm3 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor, context: Context | KeysValues | KnownOutput) -> Tensor:
        """Map x [B, N, C] to [B, N, C]; context: the cross-attention's, see `Contexts`."""
        normed = self.norm1(x)
        x = x + self.self_attention(normed, Context(normed), context.perturbed)
        x = x + self.cross_attention(self.norm2(x), context)
        return x + self.feed_forward(self.norm3(x))


class Transformer(nn.Module):
    """Transformer of a level's blocks over the pixels of a feature map, as a residual."""

    def __init__(self, level: int, config: UNetConfig) -> None:
        super().__init__()
        width, heads, depth = config.channels[level], config.heads[level], config.depths[level]
        self.norm = nn.GroupNorm(config.norm_groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, config.context_dim, heads) for _ in range(depth))
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor, contexts: Contexts) -> Tensor:
        """Map x [B, C, H, W] to [B, C, H, W], taking the next context for each block."""
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # [B, N, C]
        for block in self.blocks:
            if (context := next(contexts, None)) is None:
                raise ValueError("expected a context for each transformer block, got fewer")
            h = block(h, resize_masks(context, *x.shape[-2:]))
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, x.shape[-2:])  # [B, C, H, W]


class DownBlock(nn.Module):
    """Down level: ResBlocks, each with a Transformer if depth > 0, then downsampling unless innermost."""

    def __init__(self, in_channels: int, level: int, config: UNetConfig) -> None:
        super().__init__()
        width = config.channels[level]
        inputs = [in_channels] + [width] * (config.resnets_per_level - 1)
        self.resnets = nn.ModuleList([ResBlock(channels, width, config) for channels in inputs])
        self.attentions = nn.ModuleList([Transformer(level, config) for _ in inputs if config.depths[level]])
        is_last = level == len(config.channels) - 1
        self.downsample = None if is_last else nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, times: Times, contexts: Contexts) -> list[Tensor]:
        """Map x [B, C, H, W] to the skips of the up path; the last is the next level's input."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, next(times))
            if self.attentions:
                x = self.attentions[i](x, contexts)
            skips.append(x)
        if self.downsample is not None:
            skips.append(self.downsample(x))
        return skips


class MidBlock(nn.Module):
    """Mid level: ResBlock, Transformer, ResBlock at the innermost size."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.channels[-1]
        self.resnets = nn.ModuleList([ResBlock(width, width, config) for _ in range(2)])
        self.attentions = nn.ModuleList([Transformer(-1, config)])

    def forward(self, x: Tensor, times: Times, contexts: Contexts) -> Tensor:
        """Map x [B, C, H, W] to [B, C, H, W]."""
        x = self.attentions[0](self.resnets[0](x, next(times)), contexts)
        return self.resnets[1](x, next(times))


class UpBlock(nn.Module):
    """Up level: ResBlocks, each reading a skip, and Transformers; then upsampling unless outermost."""

    def __init__(self, in_channels: int, skip_channels: list[int], level: int, config: UNetConfig) -> None:
        super().__init__()
        width = config.channels[level]
        inputs = [in_channels] + [width] * (len(skip_channels) - 1)
        joined = [channels + skip for channels, skip in zip(inputs, skip_channels, strict=True)]
        self.resnets = nn.ModuleList([ResBlock(channels, width, config) for channels in joined])
        self.attentions = nn.ModuleList([Transformer(level, config) for _ in inputs if config.depths[level]])
        self.upsample = nn.Conv2d(width, width, 3, padding=1) if level > 0 else None
        self.freeu: Callable[[Tensor, Tensor], Tensor] | None = None  # replaces `join`, see freeu.py

    def state_key(self) -> tuple[str, ...]:
        """Return FreeU's settings, see module.py."""
        return () if self.freeu is None else (repr(self.freeu),)

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        """Concatenate [B, C, H, W] and [B, C', H, W] to [B, C + C', H, W]."""
        return torch.cat([x, skip], dim=1) if self.freeu is None else self.freeu(x, skip)

    def forward(self, x: Tensor, skips: list[Tensor], times: Times, contexts: Contexts) -> Tensor:
        """Map x [B, C, H, W] to [B, C', H', W'], popping skips; the next skip sets H' and W', even or odd."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(self.join(x, skips.pop()), next(times))
            if self.attentions:
                x = self.attentions[i](x, contexts)
        if self.upsample is not None:
            x = self.upsample(F.interpolate(x, size=skips[-1].shape[-2:], mode="nearest"))
        return x


class UNetEncoder(Model):
    """Encoder that a UNet and a ControlNet share: embeddings, down path and middle."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        first, time_dim = config.channels[0], config.time_dim
        self.time_embedding = TimestepEmbedding(first, time_dim)
        self.add_embedding = TimestepEmbedding(config.text_dim + 6 * config.size_dim, time_dim)
        self.text_proj = nn.Linear(config.text_dim, config.context_dim)
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.down, self.skip_channels, width = nn.ModuleList(), [first], first
        for level, channels in enumerate(config.channels):
            self.down.append(DownBlock(width, level, config))
            self.skip_channels += [channels] * (config.resnets_per_level + (level < len(config.channels) - 1))
            width = channels
        self.mid = MidBlock(config)

    def encode(self, x: Tensor, times: Times, contexts: Contexts) -> tuple[list[Tensor], Tensor]:
        """Map x [B, channels[0], H, W] to the skips of the up path and the middle's output."""
        skips = [x]
        for level in self.down:
            skips += level(skips[-1], times, contexts)
        return skips, self.mid(skips[-1], times, contexts)

    def time_shifts(self, time: Tensor) -> list[TimeShift]:
        """Compute the shifts of all ResBlocks, in their order of execution, for time embeddings [..., T]."""
        return [module.time_shift(time) for module in self.modules() if isinstance(module, ResBlock)]

    def context(
        self, text_tokens: Tensor, text_counts: Tensor | None, image_prompts: Sequence[ImagePrompt] = ()
    ) -> Context:
        """Make the context of all cross-attentions; arguments as in `forward`."""
        bias = None if text_counts is None else log_multiplicity_bias(text_counts, text_tokens.dtype)
        images = tuple(
            image._replace(masks=ResizedMasks(image.masks)) if isinstance(image.masks, Tensor) else image
            for image in image_prompts
        )
        return Context(self.text_proj(text_tokens), bias, images)

    def project_kv(self, context: Context) -> Iterator[KeysValues]:
        """Yield the keys and values of all cross-attentions, in their order of execution."""
        blocks = (module for module in self.modules() if isinstance(module, TransformerBlock))
        return (block.cross_attention.project_kv(context) for block in blocks)

    def embed_time(self, timestep: Tensor) -> Tensor:
        """Embed timesteps [n]: [n, T]; the sinusoid is float32."""
        weight = self.time_embedding.linear_1.weight
        return self.time_embedding(sinusoid(timestep, self.config.channels[0]).to(weight.dtype))

    def added_embedding(self, pooled_text: Tensor, size_ids: Tensor, added: Tensor | None = None) -> Tensor:
        """Embed pooled text and size ids (float32 sinusoid), plus `added`: [B, T], to add to the time."""
        sizes = sinusoid(size_ids, self.config.size_dim).flatten(1).to(pooled_text.dtype)  # [B, 6 * size_dim]
        embedding = self.add_embedding(torch.cat([pooled_text, sizes], dim=-1))
        return embedding if added is None else embedding + added.to(embedding)


class UNet(UNetEncoder):
    """UNet of a down path, a middle and an up path; `config` has each level's channels, heads and depth."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        first, width, skips = config.channels[0], config.channels[-1], list(self.skip_channels)
        self.up = nn.ModuleList()
        for level in reversed(range(len(config.channels))):
            level_skips = [skips.pop() for _ in range(config.resnets_per_level + 1)]
            self.up.append(UpBlock(width, level_skips, level, config))
            width = config.channels[level]
        self.norm_out = nn.GroupNorm(config.norm_groups, first, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)

    def forward(
        self, latents: Tensor, timestep: Tensor, text_tokens: Tensor, pooled_text: Tensor, size_ids: Tensor,
        text_counts: Tensor | None = None, image_prompts: Sequence[ImagePrompt] = (),
        residuals: Sequence[Tensor] = (), perturbed: Sequence[int] = (), added: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """Predict the noise in `latents`.

        latents: [B, in_channels, H, W], any H and W, scaled to unit variance. timestep: [] or [B], 0 to 1099,
        may be fractional. text_tokens: [B, S, text_dim]. pooled_text: [B, text_dim]. size_ids: [B, 6], in
        pixels: original height and width, crop top and left, target height and width. text_counts: None, or
        [B, S], the multiplicity of each text token. image_prompts: one for each attached IP-Adapter.
        residuals: ControlNets' (controlnet.py), added to each skip and to the middle, of the same shapes.
        perturbed: none, or for each TransformerBlock the number of last rows whose self-attention map is the
        identity. added: None, or [B, T], added to the time. Returns [B, out_channels, H, W].
        """
        time = self.embed_time(timestep.expand(latents.shape[0]))  # [B, T]
        time = time + self.added_embedding(pooled_text, size_ids, added)  # [B, T]
        context = self.context(text_tokens, text_counts, image_prompts)
        blocks = sum(isinstance(module, TransformerBlock) for module in self.modules())
        if perturbed and len(perturbed) != blocks:
            raise ValueError(f"perturbed: expected {blocks}, one a transformer block, got {len(perturbed)}")
        contexts = [context._replace(perturbed=rows) for rows in perturbed] or repeat(context)
        return self.forward_precomputed(latents, repeat(time), contexts, residuals=residuals)

    def forward_precomputed(
        self, latents: Tensor, times: Iterable[Tensor | TimeShift],
        contexts: Iterable[Context | KeysValues | KnownOutput],
        copies: int = 1, residuals: Sequence[Tensor] = ()
    ) -> Tensor:  # fmt: skip
        """Compute `forward` from inputs that a run computes once.

        latents: [b, in_channels, H, W]. times: for each ResBlock in order of execution (down, mid, up),
        `embed_time` plus `added_embedding` [B, T], or its `time_shifts`. contexts: likewise for each
        TransformerBlock, a context, its `project_kv`, or a known output. copies: B / b, repeats of each
        latent, 2 with guidance. residuals: as in `forward`. Returns [B, out_channels, H, W].
        """
        times, contexts = iter(times), iter(contexts)
        x = self.conv_in(latents)
        if copies > 1:
            x = x.repeat(copies, 1, 1, 1)  # [B, C, H, W]
        skips, x = self.encode(x, times, contexts)
        if residuals:
            if len(residuals) != len(skips) + 1:
                raise ValueError(f"expected {len(skips) + 1} residuals, skips and mid, got {len(residuals)}")
            *skips, x = map(torch.add, [*skips, x], residuals)
        for level in self.up:
            x = level(x, skips, times, contexts)
        return self.conv_out(F.silu(self.norm_out(x)))
