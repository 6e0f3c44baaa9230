"""Another text encoder: bidirectional, as in https://arxiv.org/abs/1810.04805, with pads that no one reads.

All that a pipeline asks of it is `config.hidden_size`, the width that the denoiser reads, and a
`TextEmbedding`. Its counts are a mask: 0 for a pad, which no cross-attention then reads either.
Look at: tests/test_registry.py, which trains it jointly with a denoiser, draws, saves and reloads it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kolors_core.attention import attention, split_heads
from kolors_core.chatglm import TextEmbedding
from kolors_core.registry import register
from kolors_core.tokenizer import TokenBatch
from kolors_core.unet import sinusoid


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    hidden_size: int = 192
    vocab_size: int = 2048
    layers: int = 2
    heads: int = 4


class ReaderLayer(nn.Module):
    is_block = True

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width) for _ in range(2))
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (split_heads(project(h), self.heads) for project in (self.to_q, self.to_k, self.to_v))
        x = x + self.to_out(attention(q, k, v, mask[:, None, None]).transpose(1, 2).flatten(2))  # [B, L, C]
        return x + self.mlp(self.norm2(x))


class Reader(nn.Module):
    def __init__(self, config: ReaderConfig) -> None:
        super().__init__()
        self.config, width = config, config.hidden_size
        self.words = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList([ReaderLayer(width, config.heads) for _ in range(config.layers)])

    def forward(self, batch: TokenBatch) -> TextEmbedding:
        x = self.words(batch.ids)  # [B, L, C]
        x = x + sinusoid(batch.positions, x.shape[-1]).to(x.dtype)
        for layer in self.layers:
            x = layer(x, batch.mask)
        counts = batch.mask.float()
        pooled = torch.einsum("blc, bl -> bc", x, counts.to(x.dtype)) / counts.sum(1, keepdim=True).to(
            x.dtype
        )
        return TextEmbedding(x, pooled, counts)


register("text_encoder", "Reader", ReaderConfig, Reader)
