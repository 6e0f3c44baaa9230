"""The denoiser: noisy latents, a timestep and the text -> predicted noise.

SDXL's UNet (https://arxiv.org/abs/2307.01952) with three levels, a projection of ChatGLM's tokens inside, and
a wider added condition. Source: `UNet2DConditionModel` in diffusers' models/unets/unet_2d_condition.py.
Shapes: B batch, C channels, H height, W width (in latents), N = H * W, S text tokens, T time embedding width.

Reads bottom up, parts before what they are parts of:

    sinusoid, Embedding   timestep; sizes and pooled text -> two vectors [B, T], whose sum is the time
    ResBlock              [B, C, H, W] and the time -> [B, C', H, W]
    Attention             pixels [B, N, C] look at pixels, at the text [B, S, 2048] and at images
    TransformerBlock      Attention to pixels, Attention to text, FeedForward; a Transformer has some in a row
    DownBlock, MidBlock, UpBlock   ResBlocks, each with its Transformer, and another size at the end
    Encoder, UNet         all levels, and what they read

The released model at 1024x1024 (ResBlocks and transformer blocks of each level; skips go across):

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
from kolors_core.context import Context, ImagePrompt, KeysValues, Masks, resize_masks


def sinusoid(values: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of `values` [...] at frequencies from 1 down to 1/10000: float32 [..., width]."""
    half = width // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values[..., None].float() * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Embedding(nn.Module):
    """A two-layer perceptron that turns a sinusoid, or the added condition, into a time embedding."""

    def __init__(self, width: int, time_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., T]."""
        return self.linear_2(F.silu(self.linear_1(x)))


class Shift(NamedTuple):
    """What a ResBlock adds to its feature map at some times: [..., C]."""

    added: Tensor


Times = Iterator[Tensor | Shift]
Contexts = Iterator[Context | KeysValues]


class ResBlock(nn.Module):
    """Two convolutions around the time embedding, with a shortcut."""

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

    def shift(self, time: Tensor) -> Shift:
        """What this block adds for times [..., T], which depends on nothing else."""
        return Shift(self.time_proj(F.silu(time)))

    def forward(self, x: Tensor, time: Tensor | Shift) -> Tensor:
        """x: [B, C, H, W]; time: [B, T], or what this block has made of it."""
        h = self.conv1(F.silu(self.norm1(x)))
        shift = time if isinstance(time, Shift) else self.shift(time)
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
        self.image_branches = nn.ModuleList()  # of attached IP-Adapters; none adds no key and no work
        self.observers: list[Callable[..., None]] = []  # see all that makes the map, see attention_maps.py

    def read(self, context: Context) -> KeysValues:
        """Keys and values, which depend neither on x nor on time: once an image is enough."""
        if len(context.images) != len(self.image_branches):
            attached = f"{len(self.image_branches)} IP-Adapters are attached"
            raise ValueError(f"got image prompts for {len(context.images)} IP-Adapters, and {attached}")
        branches = zip(cast("Iterable[Any]", self.image_branches), context.images, strict=True)
        images = tuple(branch.read(image, self.heads) for branch, image in branches)
        k, v = (split_heads(project(context.tokens), self.heads) for project in (self.to_k, self.to_v))
        return KeysValues(k, v, context.bias, images, context.perturbed)

    def forward(self, x: Tensor, context: Context | KeysValues, perturbed: int = 0) -> Tensor:
        """x: [B, N, C]; context: tokens, or the keys and values that `read` made of them; perturbed: how many
        of the last rows have the identity as attention map. Returns [B, N, C].
        """
        q = split_heads(self.to_q(x), self.heads)  # [B, heads, N, C/heads]
        read = self.read(context) if isinstance(context, Context) else context
        h = attention(q, read.k, read.v, read.bias)
        if perturbed:
            h = torch.cat([h[:-perturbed], read.v[-perturbed:]])
        for branch, images in zip(self.image_branches, read.images, strict=True):
            h = branch(h, q, images)
        for watch in self.observers:
            watch(q, read.k, read.bias, perturbed)
        return self.to_out(h.transpose(1, 2).flatten(2))  # [B, N, C]


class FeedForward(nn.Module):
    """GEGLU: value * gelu(gate), with the exact (erf) gelu."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width, 8 * width)
        self.proj_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to text and images, feed-forward; each on a norm, each added."""

    is_block = True

    def __init__(self, width: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attention = Attention(width, context_dim, heads)
        self.norm3 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor, context: Context | KeysValues) -> Tensor:
        """x: [B, N, C]; context: what the cross-attention is to read, or has read already."""
        normed = self.norm1(x)
        x = x + self.self_attention(normed, Context(normed), context.perturbed)
        x = x + self.cross_attention(self.norm2(x), context)
        return x + self.feed_forward(self.norm3(x))


class Transformer(nn.Module):
    """A level's transformer blocks over the pixels of a feature map, as a residual."""

    def __init__(self, level: int, config: UNetConfig) -> None:
        super().__init__()
        width, heads, depth = config.channels[level], config.heads[level], config.depths[level]
        self.norm = nn.GroupNorm(config.norm_groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width)
        blocks = [TransformerBlock(width, config.context_dim, heads) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor, contexts: Contexts) -> Tensor:
        """x: [B, C, H, W]; takes a context for each of its blocks."""
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # [B, N, C]
        for block in self.blocks:
            if (context := next(contexts, None)) is None:
                raise ValueError("expected a context for each transformer block, got fewer")
            h = block(h, resize_masks(context, *x.shape[-2:]))
        h = self.proj_out(h).transpose(1, 2).unflatten(2, x.shape[-2:])  # [B, C, H, W]
        return x + h


class DownBlock(nn.Module):
    """Resnets, each with its transformer if the level has any, then a halving unless it is the innermost."""

    def __init__(self, in_channels: int, level: int, config: UNetConfig) -> None:
        super().__init__()
        width = config.channels[level]
        inputs = [in_channels] + [width] * (config.resnets_per_level - 1)
        self.resnets = nn.ModuleList([ResBlock(channels, width, config) for channels in inputs])
        self.attentions = nn.ModuleList([Transformer(level, config) for _ in inputs if config.depths[level]])
        is_last = level == len(config.channels) - 1
        self.downsample = None if is_last else nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, times: Times, contexts: Contexts) -> list[Tensor]:
        """Every map that the way up will read; the last of them goes on down."""
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
    """Resnet, transformer, resnet at the innermost size."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.channels[-1]
        self.resnets = nn.ModuleList([ResBlock(width, width, config) for _ in range(2)])
        self.attentions = nn.ModuleList([Transformer(-1, config)])

    def forward(self, x: Tensor, times: Times, contexts: Contexts) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = self.resnets[0](x, next(times))
        x = self.attentions[0](x, contexts)
        return self.resnets[1](x, next(times))


class UpBlock(nn.Module):
    """Resnets, each reading a skip of the way down; then a doubling unless it is the outermost."""

    def __init__(self, in_channels: int, skip_channels: list[int], level: int, config: UNetConfig) -> None:
        super().__init__()
        width = config.channels[level]
        inputs = [in_channels] + [width] * (len(skip_channels) - 1)
        joined = [channels + skip for channels, skip in zip(inputs, skip_channels, strict=True)]
        self.resnets = nn.ModuleList([ResBlock(channels, width, config) for channels in joined])
        self.attentions = nn.ModuleList([Transformer(level, config) for _ in inputs if config.depths[level]])
        self.upsample = nn.Conv2d(width, width, 3, padding=1) if level > 0 else None
        self.freeu: Callable[[Tensor, Tensor], Tensor] | None = None  # another way to join, see freeu.py

    def state_key(self) -> tuple[str, ...]:
        """See kolors_core/module.py."""
        return () if self.freeu is None else (repr(self.freeu),)

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        """[B, C, H, W] and [B, C', H, W] -> [B, C + C', H, W]."""
        return torch.cat([x, skip], dim=1) if self.freeu is None else self.freeu(x, skip)

    def forward(self, x: Tensor, skips: list[Tensor], times: Times, contexts: Contexts) -> Tensor:
        """Takes its skips off the list's end, and grows to the size of the next one, which may be odd."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(self.join(x, skips.pop()), next(times))
            if self.attentions:
                x = self.attentions[i](x, contexts)
        if self.upsample is not None:
            x = self.upsample(F.interpolate(x, size=skips[-1].shape[-2:], mode="nearest"))
        return x


class Encoder(nn.Module):
    """The way down and the middle with all that they read: what a UNet and a ControlNet have in common."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        first, time_dim = config.channels[0], config.time_dim
        self.time_embedding = Embedding(first, time_dim)
        self.add_embedding = Embedding(config.text_dim + 6 * config.size_dim, time_dim)
        self.text_proj = nn.Linear(config.text_dim, config.context_dim)
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.down, self.skip_channels, width = nn.ModuleList(), [first], first
        for level, channels in enumerate(config.channels):
            self.down.append(DownBlock(width, level, config))
            is_last = level == len(config.channels) - 1
            self.skip_channels += [channels] * (config.resnets_per_level + (not is_last))
            width = channels
        self.mid = MidBlock(config)

    def descend(self, x: Tensor, times: Times, contexts: Contexts) -> tuple[list[Tensor], Tensor]:
        """From [B, channels[0], H, W] the maps that the way up will read, and the middle's own."""
        skips = [x]
        for level in self.down:
            skips += level(skips[-1], times, contexts)
        return skips, self.mid(skips[-1], times, contexts)

    def shifts(self, time: Tensor) -> list[Shift]:
        """What every ResBlock makes of times [..., T], in the order in which they run."""
        return [module.shift(time) for module in self.modules() if isinstance(module, ResBlock)]

    def context(
        self, text_tokens: Tensor, text_counts: Tensor | None, image_prompts: Sequence[ImagePrompt]
    ) -> Context:
        """What all cross-attentions read; arguments as in `forward`."""
        bias = None if text_counts is None else log_multiplicity_bias(text_counts, text_tokens.dtype)
        images = tuple(
            image._replace(masks=Masks(image.masks)) if isinstance(image.masks, Tensor) else image
            for image in image_prompts
        )
        return Context(self.text_proj(text_tokens), bias, images)

    def read(self, context: Context) -> Iterator[KeysValues]:
        """Keys and values of every cross-attention, one by one in the order in which the blocks run."""
        blocks = (module for module in self.modules() if isinstance(module, TransformerBlock))
        return (block.cross_attention.read(context) for block in blocks)

    def embed_time(self, timestep: Tensor) -> Tensor:
        """Timesteps [n] as embeddings [n, T]; the sinusoid is float32."""
        weight = self.time_embedding.linear_1.weight
        return self.time_embedding(sinusoid(timestep, self.config.channels[0]).to(weight.dtype))

    def added_embedding(self, pooled_text: Tensor, size_ids: Tensor, added: Tensor | None = None) -> Tensor:
        """Pooled text, sizes and `added`, which are added to the time: [B, T]. The sinusoid is float32."""
        sizes = sinusoid(size_ids, self.config.size_dim).flatten(1).to(pooled_text.dtype)  # [B, 6 * size_dim]
        told = self.add_embedding(torch.cat([pooled_text, sizes], dim=-1))
        return told if added is None else told + added.to(told)


class UNet(Encoder):
    """The whole denoiser. `config.depths`, `heads` and `channels` say what stands at each level."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        first, width, skips = config.channels[0], config.channels[-1], list(self.skip_channels)
        self.up = nn.ModuleList()
        for level in reversed(range(len(config.channels))):
            taken = [skips.pop() for _ in range(config.resnets_per_level + 1)]
            self.up.append(UpBlock(width, taken, level, config))
            width = config.channels[level]
        self.norm_out = nn.GroupNorm(config.norm_groups, first, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text_tokens: Tensor,
        pooled_text: Tensor,
        size_ids: Tensor,
        text_counts: Tensor | None = None,
        image_prompts: Sequence[ImagePrompt] = (),
        residuals: Sequence[Tensor] = (),
        perturbed: Sequence[int] = (),
        added: Tensor | None = None,
    ) -> Tensor:
        """Predict the noise in `latents`.

        latents: [B, in_channels, H, W], any H and W, scaled to unit variance. timestep: [] or [B], 0 to 1099,
        need not be whole. text_tokens: [B, S, text_dim]. pooled_text: [B, text_dim]. size_ids: [B, 6], in
        pixels: original height and width, crop top and left, target height and width. text_counts: None, or
        [B, S], how many equal tokens each text token stands for. image_prompts: one for each attached
        IP-Adapter. residuals: of ControlNets (controlnet.py), what to add to each skip and to the middle, as
        large as these. perturbed: none, or for each TransformerBlock of how many of the last rows the map of
        the self-attention is the identity. added: None, or [B, T], what a condition of your own adds to the
        time. Returns [B, out_channels, H, W].
        """
        time = self.embed_time(timestep.expand(latents.shape[0]))  # [B, T]
        time = time + self.added_embedding(pooled_text, size_ids, added)  # [B, T]
        context = self.context(text_tokens, text_counts, image_prompts)
        blocks = sum(isinstance(module, TransformerBlock) for module in self.modules())
        if perturbed and len(perturbed) != blocks:
            raise ValueError(f"perturbed: expected {blocks}, one a transformer block, got {len(perturbed)}")
        contexts = [context._replace(perturbed=rows) for rows in perturbed] or repeat(context)
        return self.denoise(latents, repeat(time), contexts, residuals=residuals)

    def denoise(
        self,
        latents: Tensor,
        times: Iterable[Tensor | Shift],
        contexts: Iterable[Context | KeysValues],
        copies: int = 1,
        residuals: Sequence[Tensor] = (),
    ) -> Tensor:
        """`forward` on what a run computes once.

        latents: [b, in_channels, H, W]. times: for each ResBlock in the order in which they run (down, mid,
        up) `embed_time` plus `added_embedding` [B, T], or what `shifts` made of it. contexts: likewise for
        each TransformerBlock a context, or what `read` made of it. copies: B / b, how often each latent
        serves; 2 under guidance. residuals: as in `forward`. Returns [B, out_channels, H, W].
        """
        times, contexts = iter(times), iter(contexts)
        x = self.conv_in(latents)
        if copies > 1:
            x = x.repeat(copies, 1, 1, 1)  # [B, C, H, W]
        skips, x = self.descend(x, times, contexts)
        if residuals:
            if len(residuals) != len(skips) + 1:
                raise ValueError(f"expected {len(skips) + 1} residuals, skips and mid, got {len(residuals)}")
            *skips, x = map(torch.add, [*skips, x], residuals)
        for level in self.up:
            x = level(x, skips, times, contexts)
        return self.conv_out(F.silu(self.norm_out(x)))
