"""CLIP's image encoder: pixels [B, 3, 336, 336] -> hidden states [B, 577, 1024], which the IP-Adapter reads.

`preprocess_clip` turns images into pixels. The vision transformer of https://arxiv.org/abs/2103.00020.
Source: `CLIPVisionModelWithProjection` in transformers' models/clip/modeling_clip.py, `CLIPImageProcessorPil`
in its models/clip/image_processing_pil_clip.py.
Shapes: B images, S side in pixels, P patches, N = 1 + P tokens, C hidden width, H heads, D = C / H.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from kolors_core.attention import attention, split_heads
from kolors_core.checkpoint import ModelSpec
from kolors_core.config import TRANSFORMERS_IGNORED_FIELDS, ConfigReader, PublicConfig
from kolors_core.image import as_list, center_crop, flatten_alpha, pil_to_tensor
from kolors_core.module import Model

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT_RATIO = 100  # the longer side of an image by the shorter
_REQUIRED_VALUES: dict[str, Any] = {
    "model_type": "clip_vision_model", "hidden_act": "quick_gelu", "num_channels": 3,
}  # fmt: skip
_IGNORED_FIELDS = TRANSFORMERS_IGNORED_FIELDS | {"dropout", "initializer_factor", "initializer_range"}


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """Sizes of CLIP's image encoder; by default ViT-L/14 at 336 pixels, as in Kolors-IP-Adapter-Plus."""

    image_size: int = 336
    patch_size: int = 14
    hidden_size: int = 1024
    feed_forward_size: int = 4096
    layers: int = 24
    heads: int = 16
    projection_dim: int = 768
    norm_eps: float = 1e-5

    @property
    def tokens(self) -> int:
        """Length of the encoded image: the class token, then one token a patch."""
        return 1 + (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_public(cls, public: PublicConfig, where: str = "image_encoder/config.json") -> Self:
        """Read the config of transformers' `CLIPVisionModelWithProjection`, or of a whole CLIP. It must name
        every size: for a missing one, transformers would take that of another model (ViT-B/32).
        """
        if public.get("model_type") == "clip":
            public, where = public.get("vision_config") or {}, f"{where}: vision_config"
        if not isinstance(public, Mapping):
            raise ValueError(f"{where} is {public!r}, expected the fields of the image encoder")
        fields = ConfigReader(public, where)
        fields.require_fixed(_REQUIRED_VALUES)
        image_size = fields.integer("image_size", most=4096)
        config = cls(
            image_size=image_size, patch_size=fields.integer("patch_size", most=image_size),
            hidden_size=fields.integer("hidden_size"), feed_forward_size=fields.integer("intermediate_size"),
            layers=fields.integer("num_hidden_layers", most=1000),
            heads=fields.integer("num_attention_heads"), projection_dim=fields.integer("projection_dim"),
            norm_eps=fields.number("layer_norm_eps") if "layer_norm_eps" in public else cls.norm_eps,
        )  # fmt: skip
        fields.reject_unknown(_IGNORED_FIELDS)
        if config != cls() and replace(config, image_size=cls.image_size) == cls():
            fields.reject("image_size", image_size, "336: Kolors' adapters read CLIP ViT-L/14 at 336 pixels")
        if config.hidden_size % config.heads:
            fields.reject("hidden_size", config.hidden_size, f"a multiple of the {config.heads} heads")
        return config

    def to_public(self) -> dict[str, Any]:
        """Return the `config.json` that transformers' CLIPVisionModelWithProjection reads."""
        return {
            **_REQUIRED_VALUES, "architectures": ["CLIPVisionModelWithProjection"],
            "image_size": self.image_size, "patch_size": self.patch_size, "hidden_size": self.hidden_size,
            "intermediate_size": self.feed_forward_size, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "projection_dim": self.projection_dim,
            "layer_norm_eps": self.norm_eps,
        }  # fmt: skip


@dataclass(frozen=True)
class CLIPVisionOutput:
    """Output in transformers' names: image_embeds [B, projection_dim], last_hidden_state [B, N, C], unnormed;
    hidden_states None, or the first layer's input and every layer's output, [B, N, C] each.
    """

    image_embeds: Tensor
    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class Embedding(nn.Module):
    """Embedding of an image's patches, with a class token before them and positions added."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.side, width = config.image_size, config.hidden_size
        self.class_token = nn.Parameter(torch.zeros(width))
        self.patches = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.positions = nn.Embedding(config.tokens, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels [B, 3, S, S] to tokens [B, N, C]."""
        if pixels.ndim != 4 or pixels.shape[1:] != (3, self.side, self.side):
            raise ValueError(f"pixels must be [B, 3, {self.side}, {self.side}], got {list(pixels.shape)}")
        x = self.patches(pixels.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2)  # [B, P, C]
        x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], dim=1)  # [B, N, C]
        return x + self.positions.weight


class Attention(nn.Module):
    """Multi-head self-attention without a mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, N, C] to [B, N, C]."""
        q, k, v = (split_heads(to(x), self.heads) for to in (self.to_q, self.to_k, self.to_v))  # [B, H, N, D]
        return self.to_out(attention(q, k, v).transpose(1, 2).flatten(2))  # [B, N, C]


class FeedForward(nn.Module):
    """Feed-forward layer with x * sigmoid(1.702 x), the approximation of gelu that CLIP was trained with."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(width, inner_width), nn.Linear(inner_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, N, C] to [B, N, C]."""
        h = self.proj_in(x)
        return self.proj_out(h * torch.sigmoid(1.702 * h))


class CLIPLayer(nn.Module):
    """Pre-norm transformer layer."""

    is_block = True

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.norm_eps
        self.attention_norm, self.attention = nn.LayerNorm(width, eps=eps), Attention(width, config.heads)
        self.mlp_norm, self.mlp = nn.LayerNorm(width, eps=eps), FeedForward(width, config.feed_forward_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, N, C] to [B, N, C]."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class CLIPVision(Model):
    """CLIP's image encoder. Kolors reads `penultimate`; `forward` returns transformers' outputs."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.norm_in = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.layers = nn.ModuleList([CLIPLayer(config) for _ in range(config.layers)])
        self.norm_out = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> CLIPVisionOutput:
        """Encode pixel_values [B, 3, S, S], normalized. ValueError naming any other shape."""
        x = self.norm_in(self.embedding(pixel_values))  # [B, N, C]
        states = [x]
        for layer in self.layers:
            x = layer(x)
            if output_hidden_states:  # else each state is freed
                states.append(x)
        embeds = self.projection(self.norm_out(x[:, 0]))  # [B, projection_dim]
        return CLIPVisionOutput(embeds, x, tuple(states) if output_hidden_states else None)

    def penultimate(self, pixels: Tensor) -> Tensor:
        """Compute `hidden_states[-2]` [B, N, C], which the IP-Adapter reads, without the last layer."""
        x = self.norm_in(self.embedding(pixels))  # [B, N, C]
        for layer in self.layers[:-1]:
            x = layer(x)
        return x


def preprocess_clip(images: "Image | np.ndarray | Sequence[Image | np.ndarray]", size: int = 336) -> Tensor:
    """Crop images to the center square and normalize them for CLIP: [B, 3, size, size] float32.

    images: PIL images of any mode, transparency on white; arrays [H, W, 3] or [B, H, W, 3] of uint8 or in
    [0, 1]; or a list of them. ValueError for an aspect ratio above 100 or another array, or TypeError.
    """
    from PIL.Image import Resampling

    squares = []
    for image in map(_rgb, as_list(images)):
        short, long = sorted(image.size)
        if not 0 < long <= MAX_ASPECT_RATIO * short:
            expected = f"an image with sides of 1 to {MAX_ASPECT_RATIO} times each other"
            raise ValueError(f"expected {expected}, got {image.height} x {image.width}")
        length = int(size * long / short)
        target = (size, length) if image.width <= image.height else (length, size)
        squares.append(pil_to_tensor(center_crop(image.resize(target, Resampling.BICUBIC), (size, size))[0]))
    pixels = (torch.stack(squares).double() * (1 / 255)).float()  # [B, 3, size, size]
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))  # [3, 1, 1]
    return (pixels - mean) / std


def _rgb(image: Any) -> "Image":
    """Convert a PIL image, or an array [H, W, 3] of uint8 or in [0, 1], to an RGB image."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return flatten_alpha(image)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"expected a PIL image or an array, got {type(image).__name__}")
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"expected an array [H, W, 3] or [B, H, W, 3], got one of {list(image.shape)}")
    if image.dtype != np.uint8:
        if not np.issubdtype(image.dtype, np.floating) or not (image.min() >= 0 and image.max() <= 1):
            expected = "pixels of uint8, or floats in [0, 1]"
            raise ValueError(f"expected {expected}, got {image.dtype} up to {image.max():g}")
        image = (image * 255).round().astype(np.uint8)
    return Image.fromarray(image)


IMAGE_ENCODER = ModelSpec(CLIPVisionConfig, CLIPVision)  # for `checkpoint.load_component`
