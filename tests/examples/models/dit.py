"""Another denoiser: a diffusion transformer (https://arxiv.org/abs/2212.09748) that reads text in context.

Text and patches are one sequence (https://arxiv.org/abs/2403.03206, without its separate weights). All that
a pipeline asks of it is `config` with four sizes, this forward, and `is_block` on what repeats.
Look at: tests/test_registry.py, which trains, draws, saves and reloads it; tests/test_denoiser.py, the rest.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.attention import attention, log_multiplicity_bias, split_heads
from kolors_core.registry import register
from kolors_core.unet import sinusoid


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    sample_size: int = 16  # of latents where a call gives no size
    in_channels: int = 4
    out_channels: int = 4
    text_dim: int = 192  # of text tokens and of the pooled text
    width: int = 64
    depth: int = 2
    heads: int = 4


class DiTBlock(nn.Module):
    is_block = True

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.modulation = heads, nn.Linear(width, 6 * width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, time: Tensor, bias: Tensor | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(time))[:, None].chunk(6, dim=-1)
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = (split_heads(project(h), self.heads) for project in (self.to_q, self.to_k, self.to_v))
        x = x + gate1 * self.to_out(attention(q, k, v, bias).transpose(1, 2).flatten(2))  # [B, S + N, C]
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.patches = nn.Conv2d(config.in_channels, width, 2, stride=2)
        self.text, self.pooled = (nn.Linear(config.text_dim, width) for _ in range(2))
        self.time, self.place = (nn.Linear(width, width) for _ in range(2))
        self.blocks = nn.ModuleList([DiTBlock(width, config.heads) for _ in range(config.depth)])
        self.out = nn.Linear(width, 4 * config.out_channels)

    def forward(
        self, latents: Tensor, timestep: Tensor, text_tokens: Tensor, pooled_text: Tensor, size_ids: Tensor,
        text_counts: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        x, width = self.patches(latents), self.config.width  # [B, C, h, w]
        rows, columns = (torch.arange(side, device=x.device) for side in x.shape[2:])
        place = torch.cartesian_prod(rows, columns)  # [N, 2]
        place = self.place(sinusoid(place, width // 2).flatten(1).to(x.dtype))  # [N, C]
        time = self.time(sinusoid(timestep, width).to(x.dtype)) + self.pooled(pooled_text)  # [B, C]
        h = torch.cat([self.text(text_tokens), x.flatten(2).mT + place], dim=1)  # [B, S + N, C]
        bias = None if text_counts is None else log_multiplicity_bias(text_counts, x.dtype)
        bias = None if bias is None else F.pad(bias, (0, len(place)))  # [B, 1, 1, S + N]
        for block in self.blocks:
            h = block(h, time, bias)
        h = self.out(h[:, text_tokens.shape[1] :]).mT.unflatten(2, x.shape[2:])  # [B, 4 * out, h, w]
        return F.pixel_shuffle(h, 2)  # [B, out, H, W]


register("unet", "DiT", DiTConfig, DiT)
