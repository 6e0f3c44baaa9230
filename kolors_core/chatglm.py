"""ChatGLM3-6B as Kolors' text encoder: TokenBatch -> TextEmbedding.

Source: `ChatGLMModel` in diffusers' pipelines/kolors/text_encoder.py.
Shapes: B prompts, L tokens, C hidden width, H heads, G K/V groups, D head width, R rotated part of D.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.attention import attention, log_multiplicity_bias
from kolors_core.config import ChatGLMConfig
from kolors_core.tokenizer import TokenBatch


@dataclass(frozen=True)
class TextEmbedding:
    """tokens [B, L, C], pads included, for cross-attention; pooled [B, C], the last token's state.

    counts: None, or [B, L], how often each token stands (see `TokenBatch.merge_padding`); 0 is never.
    """

    tokens: Tensor
    pooled: Tensor
    counts: Tensor | None = None

    @classmethod
    def cat(cls, parts: Sequence["TextEmbedding"]) -> "TextEmbedding":
        """Embeddings one after another; shorter ones are filled up on the left with tokens of count 0."""
        length = max(part.tokens.shape[1] for part in parts)
        pooled = torch.cat([part.pooled for part in parts])
        if all(part.counts is None and part.tokens.shape[1] == length for part in parts):
            return cls(torch.cat([part.tokens for part in parts]), pooled)
        tokens, counts = [], []
        for part in parts:
            ones = part.tokens.new_ones(part.tokens.shape[:2], dtype=torch.float32)
            missing = length - part.tokens.shape[1]
            tokens.append(F.pad(part.tokens, (0, 0, missing, 0)))
            counts.append(F.pad(ones if part.counts is None else part.counts, (missing, 0)))
        return cls(torch.cat(tokens), pooled, torch.cat(counts))

    @property
    def length(self) -> int:
        """Tokens of a prompt, counted as often as each stands."""
        return self.tokens.shape[1] if self.counts is None else int(self.counts[0].sum())

    def expand_padding(self) -> "TextEmbedding":
        """Each token as often as it stands, and no counts: [B, length, C]."""
        if self.counts is None:
            return self
        rows = zip(self.tokens, self.counts.long(), strict=True)
        return TextEmbedding(torch.stack([row.repeat_interleave(n, dim=0) for row, n in rows]), self.pooled)

    def to(self, device: torch.device | str) -> "TextEmbedding":
        """The same embedding on another device."""
        counts = None if self.counts is None else self.counts.to(device)
        return TextEmbedding(self.tokens.to(device), self.pooled.to(device), counts)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, with the mean taken in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C], in the dtype of x."""
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return (self.weight * (x * torch.rsqrt(variance + self.eps))).to(x.dtype)


class Attention(nn.Module):
    """Self-attention, rotary on the first half of each head; groups of query heads share a K/V head."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = config.heads, config.num_kv_heads, config.head_dim
        self.widths = [self.heads * self.head_dim, self.groups * self.head_dim, self.groups * self.head_dim]
        self.to_qkv = nn.Linear(config.hidden_size, sum(self.widths))
        self.to_out = nn.Linear(self.widths[0], config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], allowed: Tensor, last_only: bool = False
    ) -> Tensor:
        """x: [B, L, C]; rotation: two of [B, 1, L, R/2]; allowed: see `attention_mask`.

        Returns [B, L, C], or with last_only what is at the last position, [B, 1, C].
        """
        q, k, v = self.to_qkv(x).split(self.widths, dim=-1)
        q = apply_rotary(
            q.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2), *rotation
        )  # [B, H, L, D]
        k = apply_rotary(
            k.unflatten(-1, (self.groups, self.head_dim)).transpose(1, 2), *rotation
        )  # [B, G, L, D]
        v = v.unflatten(-1, (self.groups, self.head_dim)).transpose(1, 2)  # [B, G, L, D]
        k = k.repeat_interleave(self.heads // self.groups, dim=1)  # [B, H, L, D]
        v = v.repeat_interleave(self.heads // self.groups, dim=1)  # [B, H, L, D]
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
        """[..., C] -> [..., C]."""
        gate, value = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(F.silu(gate) * value)


class ChatGLMLayer(nn.Module):
    """One pre-norm transformer layer."""

    is_block = True

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], allowed: Tensor, last_only: bool = False
    ) -> Tensor:
        """Arguments as for the attention; last_only: the last position [B, 1, C] alone."""
        h = self.attention(self.attention_norm(x), rotation, allowed, last_only)
        x = (x[:, -1:] if last_only else x) + h
        return x + self.mlp(self.mlp_norm(x))


class ChatGLM(nn.Module):
    """The encoder. It has no final norm and no language-model head: Kolors reads the states before both."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ChatGLMLayer(config) for _ in range(config.layers)])

    def forward(self, batch: TokenBatch) -> TextEmbedding:
        """tokens are the states before the last layer, pooled the last position's state after it."""
        x = self.embedding(batch.ids)  # [B, L, C]
        rotation = rotary_cos_sin(batch.positions, self.config.head_dim // 2, x.dtype)
        allowed = attention_mask(batch.mask)
        if batch.counts is not None:
            allowed = torch.where(allowed, log_multiplicity_bias(batch.counts, x.dtype), -torch.inf)
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, rotation, allowed)
        # Nothing else of the last layer is read.
        pooled = last(x, rotation, allowed, last_only=True)  # [B, 1, C]
        return TextEmbedding(tokens=x, pooled=pooled[:, 0], counts=batch.counts)


def attention_mask(mask: Tensor) -> Tensor:
    """Who may attend to whom: [B, 1, L, L], True where the query (third axis) sees the key (fourth).

    mask: [B, L]. A real token sees the real tokens up to itself. A pad sees everything, pads and later tokens
    too: so the published model was trained, and the UNet reads the pad rows.
    """
    causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
    return ((causal & mask[:, None, :]) | ~mask[:, :, None])[:, None]  # [B, 1, L, L]


def rotary_cos_sin(
    positions: Tensor, width: int, dtype: torch.dtype, base: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE (https://arxiv.org/abs/2104.09864, eq. 15), in float32, then cast.

    positions: [B, L]; width: R, how many of a head's dimensions turn. Returns two tensors [B, 1, L, R/2].
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    angles = positions[:, None, :, None].float() * (1.0 / base**exponents)  # [B, 1, L, R/2]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the neighbouring pairs of the first R dimensions of x [B, H, L, D]; the others pass through."""
    turned, kept = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    even, odd = turned[..., 0::2], turned[..., 1::2]  # [B, H, L, R/2]
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)  # [B, H, L, R/2, 2]
    return torch.cat([pairs.flatten(-2), kept], dim=-1)  # [B, H, L, D]
