"""IP-Adapter-Plus (https://arxiv.org/abs/2308.06721): image prompts for the denoiser, in addition to text.

A resampler turns an image's CLIP states into 16 tokens; in each cross-attention of the UNet a branch with its
own key and value projections attends to them: attention(q, k, v) + scale * attention(q, k_image, v_image).
`attach` adds the branches to a UNet and returns a handle; `.detach()` restores the UNet.
Source: `IPAdapterPlusImageProjection` in diffusers' models/embeddings.py, `IPAdapterAttnProcessor2_0` in its
models/attention_processor.py, and `Resampler` of the original repository.
Shapes: B batch, I images an adapter, Q queries (16), C width, P patches of an image (577).
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from kolors_core.adapters.block_scales import BlockScale, block_scales
from kolors_core.adapters.clip_vision import CLIPVision
from kolors_core.attention import attention, split_heads
from kolors_core.context import ImageKeysValues, ImagePrompt, ResizedMasks
from kolors_core.denoiser import require_unet
from kolors_core.devices import unwrap_compiled
from kolors_core.module import all_or_nothing
from kolors_core.unet import Attention, UNet


@dataclass(frozen=True, kw_only=True)
class IPAdapterConfig:
    """Sizes of Kolors-IP-Adapter-Plus. image_dim: of CLIP. cross_attention_widths: in the file's order."""

    image_dim: int = 1024
    width: int = 2048
    queries: int = 16
    heads: int = 12
    head_dim: int = 64
    feed_forward_size: int = 8192
    layers: int = 4
    context_dim: int = 2048
    cross_attention_widths: tuple[int, ...] = (640,) * 4 + (1280,) * 50 + (640,) * 6 + (1280,) * 10

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], where: str) -> Self:
        """Infer sizes from shapes by our names, as the file has no config. ValueError for another adapter."""
        try:
            queries, width = shapes["resampler.latents"][1:]
            keys = (n for n in shapes if n.startswith("branches.") and n.endswith(".to_k.weight"))
            branches = sorted((int(name.split(".")[1]), shapes[name][0]) for name in keys)
            return cls(
                image_dim=shapes["resampler.proj_in.weight"][1], width=width, queries=queries,
                heads=shapes["resampler.layers.0.attention.to_q.weight"][0] // cls.head_dim,
                feed_forward_size=shapes["resampler.layers.0.feed_forward.proj_in.weight"][0],
                layers=len({name.split(".")[2] for name in shapes if name.startswith("resampler.layers.")}),
                context_dim=shapes["resampler.proj_out.weight"][0],
                cross_attention_widths=tuple(size for _, size in branches),
            )  # fmt: skip
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(f"{where}: not the shapes of an IP-Adapter: {error}") from None


class ResamplerAttention(nn.Module):
    """Attention from the queries to the image's states and the queries; keys and values in one tensor."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.heads, inner = config.heads, config.heads * config.head_dim
        self.norm_image, self.norm_latents = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.to_q = nn.Linear(config.width, inner, bias=False)
        self.to_kv = nn.Linear(config.width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, config.width, bias=False)

    def forward(self, latents: Tensor, image: Tensor) -> Tensor:
        """Map latents [B, Q, C] and image [B, P, C] to [B, Q, C]."""
        latents = self.norm_latents(latents)
        context = torch.cat([self.norm_image(image), latents], dim=1)  # [B, P + Q, C]
        k, v = self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (split_heads(t, self.heads) for t in (self.to_q(latents), k, v))  # [B, heads, .., head_dim]
        return self.to_out(attention(q, k, v).transpose(1, 2).flatten(2))  # [B, Q, C]


class ResamplerLayer(nn.Module):
    """Residual attention and feed-forward layer."""

    is_block = True

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        width, inner_width = config.width, config.feed_forward_size
        self.attention = ResamplerAttention(config)
        self.feed_forward = nn.Sequential(OrderedDict(
            norm=nn.LayerNorm(width), proj_in=nn.Linear(width, inner_width, bias=False), gelu=nn.GELU(),
            proj_out=nn.Linear(inner_width, width, bias=False),
        ))  # fmt: skip

    def forward(self, latents: Tensor, image: Tensor) -> Tensor:
        """Map latents [B, Q, C] and image [B, P, C] to [B, Q, C]."""
        latents = latents + self.attention(latents, image)
        return latents + self.feed_forward(latents)


class Resampler(nn.Module):
    """Resampler from an image's CLIP states to a few tokens of the width of the UNet's text context."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(1, config.queries, config.width))
        self.proj_in = nn.Linear(config.image_dim, config.width)
        self.layers = nn.ModuleList([ResamplerLayer(config) for _ in range(config.layers)])
        self.proj_out = nn.Linear(config.width, config.context_dim)
        self.norm_out = nn.LayerNorm(config.context_dim)
        nn.init.normal_(self.latents, std=config.width**-0.5)

    def forward(self, states: Tensor) -> Tensor:
        """Map states [B, P, image_dim], CLIP's last but one, to tokens [B, Q, context_dim]."""
        image, latents = self.proj_in(states), self.latents.expand(states.shape[0], -1, -1)  # [B, P or Q, C]
        for layer in self.layers:
            latents = layer(latents, image)
        return self.norm_out(self.proj_out(latents))


class ImageCrossAttention(nn.Module):
    """Branch of a cross-attention that adds images to text. scale: a number or, with masks, one for each."""

    is_adapter = True

    def __init__(self, width: int, context_dim: int) -> None:
        super().__init__()
        self.to_k, self.to_v = (nn.Linear(context_dim, width, bias=False) for _ in range(2))
        self.scale: float | Sequence[float] = 1.0
        self.handle: AttachedAdapter | None = None  # of its adapter, while attached

    def state_key(self) -> tuple[str, ...]:
        """Return the scale, see kolors_core/module.py."""
        return (str(self.scale),)

    def project_kv(self, image: ImagePrompt, heads: int) -> ImageKeysValues:
        """Project tokens [B, I, Q, context_dim] to keys and values, of all images together without masks."""
        tokens, masks = image
        parts = [tokens.flatten(1, 2)] if masks is None else tokens.unbind(1)  # each [B, I * Q or Q, C]
        pairs = ((self.to_k(part), self.to_v(part)) for part in parts)
        return ImageKeysValues(tuple((split_heads(k, heads), split_heads(v, heads)) for k, v in pairs), masks)

    def forward(self, h: Tensor, q: Tensor, images: ImageKeysValues) -> Tensor:
        """Add attention to images to h [B, heads, N, C/heads], the attention to text; at scale 0 return h.

        q: the queries, shaped as h. images: with masks None or [1 or B, I, N].
        """
        count, masks, scale = len(images.keys_values), images.masks, self.scale
        assert not isinstance(masks, ResizedMasks), "masks must have the feature map's size"
        if masks is None:
            if not isinstance(scale, int | float):
                raise ValueError(f"a scale for each image, {list(scale)}, needs masks")
            return h if scale == 0 else h + scale * attention(q, *images.keys_values[0])
        scales = [scale] * count if isinstance(scale, int | float) else scale
        if masks.shape[1] != count or len(scales) != count:
            got = f"{masks.shape[1]} masks and {len(scales)} scales"
            raise ValueError(f"expected a mask and a scale for each of the {count} images, got {got}")
        for i, (scale, (k, v)) in enumerate(zip(scales, images.keys_values, strict=True)):
            if scale != 0:
                h = h + scale * (attention(q, k, v) * masks[:, i, None, :, None].to(h.dtype))
        return h


def cross_attentions(unet: UNet) -> dict[str, Attention]:
    """List the UNet's cross-attentions by path, in the order of the adapter's file: down, up, mid.

    TypeError for another denoiser.
    """
    require_unet(unet, "an IP-Adapter")
    levels: list[tuple[str, Any]] = [(f"down.{i}", level) for i, level in enumerate(unet.down)]
    levels += [(f"up.{i}", level) for i, level in enumerate(unet.up)] + [("mid", unet.mid)]
    return {
        f"{path}.attentions.{i}.blocks.{j}.cross_attention": block.cross_attention for path, level in levels
        for i, transformer in enumerate(level.attentions) for j, block in enumerate(transformer.blocks)
    }  # fmt: skip


class ImagePromptAdapter(nn.Module):
    """Resampler and the branches that read its tokens, numbered as in the file: 1, 3, ..."""

    def __init__(self, config: IPAdapterConfig, resampler: nn.Module) -> None:
        super().__init__()
        self.config, self.resampler = config, resampler
        branches = [ImageCrossAttention(width, config.context_dim) for width in config.cross_attention_widths]
        self.branches = nn.ModuleDict({str(2 * i + 1): branch for i, branch in enumerate(branches)})

    def check_fits(self, unet: UNet) -> None:
        """Raise ValueError if the adapter is for a UNet of another shape."""
        expected, context = list(self.config.cross_attention_widths), self.config.context_dim
        widths = [attention.to_q.in_features for attention in cross_attentions(unet).values()]
        if expected != widths or context != unet.config.context_dim:
            got = f"{len(expected)} attentions {sorted(set(expected))} wide, of context {context}"
            have = f"{len(widths)}, {sorted(set(widths))} wide, of context {unet.config.context_dim}"
            raise ValueError(f"the IP-Adapter is for {got}; the UNet has {have}")


class IPAdapter(ImagePromptAdapter):
    """IP-Adapter-Plus."""

    resampler: Resampler

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__(config, Resampler(config))

    def tokens(self, states: Tensor) -> Tensor:
        """Resample CLIP's states of images [B, I, P, image_dim] to tokens [B, I, Q, context_dim]."""
        width, got = self.config.image_dim, list(states.shape)
        if states.ndim != 4 or states.shape[-1] != width:
            raise ValueError(f"expected image embeddings [batch, images, patches, {width}], got {got}")
        states = states.to(self.resampler.proj_in.weight.dtype)
        return self.resampler(states.flatten(0, 1)).unflatten(0, states.shape[:2])  # [B, I, Q, context_dim]


@dataclass(eq=False, repr=False)
class AttachedAdapter:
    """Handle of an attached adapter. all_branches: by the path of their cross-attention.

    encoder: the image encoder that was loaded with the adapter, for all users of the UNet, or None.
    """

    unet: UNet
    adapter: ImagePromptAdapter
    all_branches: dict[str, ImageCrossAttention]
    encoder: CLIPVision | None
    source: str | None = None  # the file, folder or repository that it was loaded from

    def __repr__(self) -> str:
        """Return the kind of adapter, its source, and its number of branches."""
        source = f" from {self.source}" if self.source else ""
        return f"<{type(self.adapter).__name__}{source} on {len(self.branches)} cross-attentions>"

    def __post_init__(self) -> None:
        for branch in self.all_branches.values():
            branch.handle = self

    @property
    def branches(self) -> dict[str, ImageCrossAttention]:
        """The branches by path; none once they are detached."""
        return {path: branch for path, branch in self.all_branches.items() if branch.handle is self}

    def to_unet_device(self) -> None:
        """Move the resampler, which is not part of the UNet, to the device and dtype of the branches."""
        self.adapter.resampler.to(next(iter(self.branches.values())).to_k.weight)

    def set_scale(self, scale: BlockScale) -> None:
        """Set a number, or a mapping by block as in `block_scales`, where a block left out gets 0."""
        self.set_scales(self.scales(scale))

    def scales(self, scale: BlockScale) -> dict[str, Any]:
        """Expand a scale to one of each branch by its path; it is checked but not set."""
        scales = block_scales(scale, self.unet, default=0.0)
        return {path: scales[path.partition(".blocks.")[0]] for path in self.branches}

    def set_scales(self, scales: Mapping[str, Any]) -> None:
        """Set the scale of each branch, by its path."""
        with all_or_nothing(self.unet):
            for path, branch in self.branches.items():
                branch.scale = scales[path]

    def detach(self) -> None:
        """Remove the branches: the UNet is what it was, bit for bit."""
        with all_or_nothing(self.unet):
            for path, branch in self.branches.items():
                owner = cast(Attention, self.unet.get_submodule(path))
                owner.image_branches = nn.ModuleList(b for b in owner.image_branches if b is not branch)
                branch.handle = None


def attached(unet: UNet | None) -> list[AttachedAdapter]:
    """List the handles of a UNet's adapters, in the order in which it takes their images."""
    is_unet = isinstance(unwrap_compiled(unet), UNet)
    first: Any = None if unet is None or not is_unet else next(iter(cross_attentions(unet).values()), None)
    return [] if first is None else [branch.handle for branch in first.image_branches]


def attach(
    unet: UNet, adapter: ImagePromptAdapter, encoder: CLIPVision | None = None, source: str | None = None
) -> AttachedAdapter:
    """Add an adapter's branches after earlier ones. ValueError, and nothing attached, if it does not fit."""
    adapter.check_fits(unet)
    attentions = cross_attentions(unet)
    branches: dict[str, Any] = dict(zip(attentions, adapter.branches.values(), strict=True))
    with all_or_nothing(unet):
        for path, branch in branches.items():
            attentions[path].image_branches.append(branch)
        return AttachedAdapter(unet, adapter, branches, encoder, source)
