"""Bidirectional text encoder: ChatGLM's layers, each token attending to all tokens of the prompt.

Source: https://arxiv.org/abs/1810.04805; text-to-image models read T5's encoder so
(https://arxiv.org/abs/2205.11487). Same parameters and FLOPs as the causal one.
"""

import torch

from benchmarks.ablate.change import Change
from kolors_core.attention import log_multiplicity_bias
from kolors_core.chatglm import ChatGLM, TextEmbedding, rotary_cos_sin
from kolors_core.tokenizer import TokenBatch


class Bidirectional(ChatGLM):
    """ChatGLM without the causal mask; pads still attend to all."""

    def forward(self, batch: TokenBatch) -> TextEmbedding:
        """Encode tokens as `ChatGLM` does."""
        x = self.embedding(batch.ids)  # [B, L, C]
        rotation = rotary_cos_sin(batch.positions, self.config.head_dim // 2, x.dtype)
        allowed = (batch.mask[:, None, :] | ~batch.mask[:, :, None])[:, None]  # [B, 1, L, L]
        if batch.counts is not None:
            allowed = torch.where(allowed, log_multiplicity_bias(batch.counts, x.dtype), -torch.inf)
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, rotation, allowed)
        return TextEmbedding(x, last(x, rotation, allowed, last_only=True)[:, 0], batch.counts)


CHANGE = Change(text_encoder=Bidirectional)
