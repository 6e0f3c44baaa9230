"""CLIP's image encoder: pixels [B, 3, 336, 336] -> hidden states [B, 577, 1024], which the IP-Adapter reads.

Pixels come from `kolors_core.image.clip_pixels`. The vision transformer of https://arxiv.org/abs/2103.00020.
Source: `CLIPVisionModelWithProjection` in transformers' models/clip/modeling_clip.py.
Shapes: B images, S side in pixels, P patches, N = 1 + P tokens, C hidden width, H heads, D = C / H.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kolors_core.attention import attention, split_heads
from kolors_core.checkpoint import Kind
from kolors_core.config import CLIPVisionConfig
from kolors_core.module import Module


@dataclass(frozen=True)
class CLIPVisionOutput:
    """Named as in transformers: image_embeds [B, projection_dim]; last_hidden_state [B, N, C], unnormed.

    hidden_states: None, or what enters the first layer and what leaves each, [B, N, C] every one.
    """

    image_embeds: Tensor
    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class Embedding(Module):
    """The image cut into patches, a class token before them; each token gets its position added."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.side, width = config.image_size, config.hidden_size
        self.class_token = nn.Parameter(torch.zeros(width))
        self.patches = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.positions = nn.Embedding(config.tokens, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [B, 3, S, S]. Returns [B, N, C]."""
        if pixels.ndim != 4 or pixels.shape[1:] != (3, self.side, self.side):
            raise ValueError(f"pixels must be [B, 3, {self.side}, {self.side}], got {list(pixels.shape)}")
        x = self.patches(pixels.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2)  # [B, P, C]
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)  # [B, N, C]
        return x + self.positions.weight


class Attention(Module):
    """Multi-head self-attention: every token sees every other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        projected = (self.to_q(x), self.to_k(x), self.to_v(x))
        q, k, v = (split_heads(each, self.heads) for each in projected)  # [B, H, N, D]
        return self.to_out(attention(q, k, v).transpose(1, 2).flatten(2))  # [B, N, C]


class FeedForward(Module):
    """Two linears around x * sigmoid(1.702 x), the quick stand-in for gelu that CLIP was trained with."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width, inner_width)
        self.proj_out = nn.Linear(inner_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        h = self.proj_in(x)
        return self.proj_out(h * torch.sigmoid(1.702 * h))


class Layer(Module):
    """One pre-norm transformer layer."""

    is_block = True

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.attention = Attention(width, config.heads)
        self.mlp_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = FeedForward(width, config.feed_forward_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class CLIPVision(Module):
    """The encoder. Kolors reads `penultimate`; `forward` gives all that transformers' class does."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.norm_in = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.layers)])
        self.norm_out = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> CLIPVisionOutput:
        """pixel_values: [B, 3, S, S], normalised. ValueError naming the shape if it is another."""
        x = self.norm_in(self.embedding(pixel_values))  # [B, N, C]
        states = [x]
        for layer in self.layers:
            x = layer(x)
            if output_hidden_states:
                states.append(x)
        embeds = self.projection(self.norm_out(x[:, 0]))  # [B, projection_dim]
        return CLIPVisionOutput(embeds, x, tuple(states) if output_hidden_states else None)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.projection.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.projection.weight.dtype

    def penultimate(self, pixels: Tensor) -> Tensor:
        """`hidden_states[-2]` [B, N, C], all that the IP-Adapter reads: the last layer is not computed."""
        x = self.norm_in(self.embedding(pixels))  # [B, N, C]
        for layer in self.layers[:-1]:
            x = layer(x)
        return x


# How `checkpoint.load_component` builds an image encoder.
IMAGE_ENCODER = Kind(CLIPVisionConfig, CLIPVision)
