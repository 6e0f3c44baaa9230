"""DiT of equal FLOPs: a transformer of patches of 2x2 latents in place of the UNet.

Source: https://arxiv.org/abs/2212.09748, adaLN-Zero blocks; the text comes by cross-attention as in
https://arxiv.org/abs/2310.00426. Its width and depth give it TINY's FLOPs at 64x64.
Shapes: N patches, C channels, S text tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ablate.change import Change
from kolors_core.attention import log_multiplicity_bias
from kolors_core.config import UNetConfig
from kolors_core.context import Context
from kolors_core.unet import Attention, TimestepEmbedding, sinusoid

PATCH, DEPTH = 2, 8


class Block(nn.Module):
    """Block of attentions to patches and text and an MLP; the time shifts, scales and gates it."""

    is_block = True

    def __init__(self, width: int, text_dim: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.self_attention = Attention(width, width, heads)
        self.cross_attention = Attention(width, text_dim, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        for linear in (self.modulation, self.cross_attention.to_out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, time: Tensor, text: Context) -> Tensor:
        """Map x [B, N, C]."""
        a, b, gate, c, d, gate_of_mlp = self.modulation(F.silu(time))[:, None].chunk(6, -1)  # [B, 1, C]
        h = self.norm(x) * (1 + a) + b
        x = x + gate * self.self_attention(h, Context(h))
        x = x + self.cross_attention(self.norm(x), text)
        return x + gate_of_mlp * self.mlp(self.norm(x) * (1 + c) + d)


class DiT(nn.Module):
    """DiT called as `UNet.forward` is, twice as wide as the UNet's second level."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config, width = config, 2 * config.channels[1]
        self.conv_in = nn.Conv2d(config.in_channels, width, PATCH, stride=PATCH)
        self.places = nn.Parameter(0.02 * torch.randn((config.sample_size // PATCH) ** 2, width))
        self.time_embedding = TimestepEmbedding(config.size_dim, width)
        self.add_embedding = TimestepEmbedding(config.text_dim + 6 * config.size_dim, width)
        self.text_proj = nn.Linear(config.text_dim, config.context_dim)
        self.blocks = nn.ModuleList(Block(width, config.context_dim, width // 32) for _ in range(DEPTH))
        self.modulation = nn.Linear(width, 2 * width)
        self.conv_out = nn.ConvTranspose2d(width, config.out_channels, PATCH, stride=PATCH)
        for layer in (self.modulation, self.conv_out):
            nn.init.zeros_(layer.weight)

    def forward(
        self, latents: Tensor, timestep: Tensor, text_tokens: Tensor, pooled_text: Tensor, size_ids: Tensor,
        text_counts: Tensor | None = None, residuals: tuple[Tensor, ...] = (),
    ) -> Tensor:  # fmt: skip
        """Predict as `UNet.forward` does: [B, 4, H, W], of the config's size."""
        sizes = sinusoid(size_ids, self.config.size_dim).flatten(1)
        time = self.time_embedding(sinusoid(timestep, self.config.size_dim))
        time = time + self.add_embedding(torch.cat([pooled_text, sizes], dim=-1))  # [B, C]
        bias = None if text_counts is None else log_multiplicity_bias(text_counts, text_tokens.dtype)
        text = Context(self.text_proj(text_tokens), bias, ())
        x = self.conv_in(latents)  # [B, C, H/2, W/2]
        size = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2) + self.places  # [B, N, C]
        for block in self.blocks:
            x = block(x, time, text)
        shift, scale = self.modulation(F.silu(time))[:, None].chunk(2, -1)
        x = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        return self.conv_out(x.transpose(1, 2).unflatten(2, size))


CHANGE = Change(denoiser=DiT)
