"""ChatGLM3-6B as Kolors' text encoder: TokenBatch -> TextEmbedding.

Source: `ChatGLMModel` in diffusers' pipelines/kolors/text_encoder.py.
Shapes: B prompts, L tokens, C hidden width, H heads, G K/V groups, D head width, R rotated part of D.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.attention import attention, log_multiplicity_bias, split_heads
from kolors_core.config import ChatGLMConfig
from kolors_core.module import Model
from kolors_core.tokenizer import TokenBatch

Rotation = tuple[Tensor, Tensor]  # RoPE's cosines and sines, each [B, 1, L, R/2]


@dataclass(frozen=True)
class TextEmbedding:
    """Embedding of B prompts: tokens [B, L, C], pads included, and pooled [B, C], the last token's state."""

    tokens: Tensor
    pooled: Tensor
    counts: Tensor | None = None  # [B, L], each token's multiplicity (`TokenBatch.merge_padding`), 0 for none

    @classmethod
    def cat(cls, parts: Sequence["TextEmbedding"]) -> "TextEmbedding":
        """Concatenate embeddings; shorter ones are filled up on the left with tokens of count 0."""
        length = max(part.tokens.shape[1] for part in parts)
        is_uniform = all(part.counts is None and part.tokens.shape[1] == length for part in parts)
        filled = [part.fill(length) for part in parts]
        tokens, pooled, counts = zip(*((p.tokens, p.pooled, p.counts) for p in filled), strict=True)
        return cls(torch.cat(tokens), torch.cat(pooled), None if is_uniform else torch.cat(counts))

    def fill(self, length: int) -> "TextEmbedding":
        """Fill up on the left with tokens of count 0, which nothing attends to: tokens [B, length, C]."""
        missing, counts = length - self.tokens.shape[1], self.counts
        if counts is None:
            counts = self.tokens.new_ones(self.tokens.shape[:2], dtype=torch.float32)
        return TextEmbedding(F.pad(self.tokens, (0, 0, missing, 0)), self.pooled, F.pad(counts, (missing, 0)))

    @property
    def is_ragged(self) -> bool:
        """Whether the prompts have other numbers of tokens, as under masks."""
        return self.counts is not None and self.counts.sum(1).unique().numel() > 1

    def expand_padding(self) -> "TextEmbedding":
        """Repeat each token by its count, and drop the counts: [B, length, C]; ValueError if it is ragged."""
        if self.counts is None:
            return self
        if self.is_ragged:
            lengths = ", ".join(f"{length:g}" for length in self.counts.sum(1).tolist())
            raise ValueError(f"prompts of {lengths} tokens have no form without their masks")
        rows = zip(self.tokens, self.counts.long(), strict=True)
        return TextEmbedding(torch.stack([row.repeat_interleave(n, dim=0) for row, n in rows]), self.pooled)

    def to(self, device: torch.device | str) -> "TextEmbedding":
        """Move the embedding to another device."""
        counts = None if self.counts is None else self.counts.to(device)
        return TextEmbedding(self.tokens.to(device), self.pooled.to(device), counts)


class RMSNorm(nn.Module):
    """RMSNorm: x / sqrt(mean(x^2) + eps) * weight, with the mean in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., C] to [..., C], in its dtype."""
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return (self.weight * (x * torch.rsqrt(variance + self.eps))).to(x.dtype)


class Attention(nn.Module):
    """Self-attention with RoPE on the first half of each head; groups of query heads share a K/V head."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.heads, self.groups = config.heads, config.num_kv_heads
        self.widths = [heads * config.head_dim for heads in (self.heads, self.groups, self.groups)]
        self.to_qkv = nn.Linear(config.hidden_size, sum(self.widths))
        self.to_out = nn.Linear(self.widths[0], config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, allowed: Tensor, last_only: bool = False) -> Tensor:
        """Map x [B, L, C] to [B, L, C], or with last_only to the last position's [B, 1, C].

        allowed: see `attention_mask`, or the logit bias made of it.
        """
        q, k, v = self.to_qkv(x).split(self.widths, dim=-1)
        q = apply_rotary(split_heads(q, self.heads), *rotation)  # [B, H, L, D]
        k = apply_rotary(split_heads(k, self.groups), *rotation)  # [B, G, L, D]
        k = k.repeat_interleave(self.heads // self.groups, dim=1)  # [B, H, L, D]
        v = split_heads(v, self.groups).repeat_interleave(self.heads // self.groups, dim=1)  # [B, H, L, D]
        if last_only:
            q, allowed = q[:, :, -1:], allowed[:, :, -1:]
        return self.to_out(attention(q, k, v, allowed).transpose(1, 2).flatten(2))  # [B, L, C]


class FeedForward(nn.Module):
    """SwiGLU: silu(first half) * second half of one wide projection."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.proj_in = nn.Linear(config.hidden_size, 2 * config.feed_forward_size, bias=False)
        self.proj_out = nn.Linear(config.feed_forward_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., C] to [..., C]."""
        gate, value = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(F.silu(gate) * value)


class ChatGLMLayer(nn.Module):
    """Layer of a pre-norm transformer."""

    is_block = True

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, rotation: Rotation, allowed: Tensor, last_only: bool = False) -> Tensor:
        """Map x [B, L, C] to [B, L, C], or with last_only to [B, 1, C]; arguments as for `Attention`."""
        h = self.attention(self.attention_norm(x), rotation, allowed, last_only)
        x = (x[:, -1:] if last_only else x) + h
        return x + self.mlp(self.mlp_norm(x))


class ChatGLM(Model):
    """ChatGLM without the final norm and language-model head: Kolors reads the states before both."""

    reads_counts = True  # whether `TokenBatch.counts` are obeyed, so that pads may be merged

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ChatGLMLayer(config) for _ in range(config.layers)])

    def forward(self, batch: TokenBatch) -> TextEmbedding:
        """Encode tokens: `tokens` before the last layer, `pooled` from the last position after it."""
        x = self.embedding(batch.ids)  # [B, L, C]
        rotation = rotary_cos_sin(batch.positions, self.config.head_dim // 2, x.dtype)
        allowed = attention_mask(batch.mask)
        if batch.counts is not None:
            allowed = torch.where(allowed, log_multiplicity_bias(batch.counts, x.dtype), -torch.inf)
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, rotation, allowed)
        pooled = last(x, rotation, allowed, last_only=True)  # [B, 1, C]; the UNet reads nothing else of it
        return TextEmbedding(tokens=x, pooled=pooled[:, 0], counts=batch.counts)


def attention_mask(mask: Tensor) -> Tensor:
    """Build the attention mask [B, 1, L, L], True where a query (third axis) attends to a key (fourth).

    mask: [B, L]. A real token attends to the real tokens up to itself, a pad to all tokens: the published
    model was trained so, and the UNet reads the pads' states.
    """
    causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
    return ((causal & mask[:, None, :]) | ~mask[:, :, None])[:, None]  # [B, 1, L, L]


def rotary_cos_sin(positions: Tensor, width: int, dtype: torch.dtype) -> Rotation:
    """Compute RoPE's cosines and sines (https://arxiv.org/abs/2104.09864, eq. 15): two of [B, 1, L, R/2].

    positions: [B, L]; width: R, the rotated dimensions of a head. Computed in float32, then cast.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    angles = positions[:, None, :, None].float() * (1.0 / 10000.0**exponents)  # [B, 1, L, R/2]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighboring pairs of the first R dimensions of x [B, H, L, D] and keep the others."""
    rotated, kept = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    even, odd = rotated[..., 0::2], rotated[..., 1::2]  # [B, H, L, R/2]
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)  # [B, H, L, R/2, 2]
    return torch.cat([pairs.flatten(-2), kept], dim=-1)  # [B, H, L, D]
