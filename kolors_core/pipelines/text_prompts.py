"""Prompt embeddings: encoded or given, and the negative ones for guidance.

Source: `encode_prompt` of diffusers' pipelines/kolors/pipeline_kolors.py.
Shapes: B images (prompts times images per prompt), S text tokens.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kolors_core.chatglm import TextEmbedding
from kolors_core.module import reads_counts
from kolors_core.pipelines.base import Components
from kolors_core.validation import check_int

Prompt = str | Sequence[str]

MAX_TOKENS = 256
FILLED = 32  # a multiple of it are the tokens of merged prompts on an accelerator
logger = logging.getLogger("kolors_core")


def embed_prompts(
    pipe: Components, prompt: Prompt | None, is_guided: bool, negative_prompt: Prompt | None,
    prompt_embeds: Tensor | None, pooled_prompt_embeds: Tensor | None, negative_prompt_embeds: Tensor | None,
    negative_pooled_prompt_embeds: Tensor | None, max_sequence_length: int, *,
    prompt_attention_mask: Tensor | None = None, negative_prompt_attention_mask: Tensor | None = None,
) -> tuple[TextEmbedding, TextEmbedding | None]:  # fmt: skip
    """Encode prompts, or check given embeddings and their masks, and under guidance the negative ones too.

    No negative prompt is the encoded empty one, or zeros if the checkpoint says
    `force_zeros_for_empty_prompt`; a single one serves all prompts. Both may have other numbers of tokens.
    Raises ValueError naming what was given twice, not at all, or does not fit.
    """
    pipe._check_loaded()
    text, negative = check_prompts(
        pipe, prompt, negative_prompt, prompt_embeds, pooled_prompt_embeds, negative_prompt_embeds,
        negative_pooled_prompt_embeds, prompt_attention_mask, negative_prompt_attention_mask,
    )  # fmt: skip
    if text is not None and max_sequence_length != MAX_TOKENS:
        logger.warning("max_sequence_length has no effect on given prompt_embeds")
    length = max_sequence_length if text is None else min(max(text.tokens.shape[1], 3), MAX_TOKENS)
    if text is None:
        text = _encode(pipe, "prompt", prompt, max_sequence_length)
    if not is_guided:
        return text, None
    if negative is None and negative_prompt is None and pipe.force_zeros_for_empty_prompt:
        negative = TextEmbedding(torch.zeros_like(text.tokens), torch.zeros_like(text.pooled), text.counts)
    elif negative is None:
        wanted = "" if negative_prompt is None else negative_prompt
        negative = _encode(pipe, "negative_prompt", wanted, length)
    return text, _matched(negative, text)


def check_prompts(
    pipe: Components, prompt: Prompt | None, negative_prompt: Prompt | None, prompt_embeds: Tensor | None,
    pooled_prompt_embeds: Tensor | None, negative_prompt_embeds: Tensor | None,
    negative_pooled_prompt_embeds: Tensor | None, prompt_attention_mask: Tensor | None = None,
    negative_prompt_attention_mask: Tensor | None = None,
) -> tuple[TextEmbedding | None, TextEmbedding | None]:  # fmt: skip
    """Return given embeddings, None for prompts. ValueError naming what is given twice or does not fit."""
    encoder: Any = pipe.text_encoder
    width = encoder.config.hidden_size if pipe.unet is None else pipe.unet.config.text_dim
    masks = prompt_attention_mask, negative_prompt_attention_mask
    text = _given("", prompt_embeds, pooled_prompt_embeds, masks[0], width)
    negative = _given("negative_", negative_prompt_embeds, negative_pooled_prompt_embeds, masks[1], width)
    if (prompt is None) == (text is None):
        raise ValueError("give either prompt or prompt_embeds, not both and not neither")
    if negative_prompt is not None and negative is not None:
        raise ValueError("give either negative_prompt or negative_prompt_embeds, not both")
    return text, negative


def _encode(pipe: Components, name: str, prompt: Prompt | None, max_length: int) -> TextEmbedding:
    if pipe.text_encoder is None or pipe.tokenizer is None:
        raise ValueError("there is no text encoder or tokenizer: pass prompt_embeds in place of prompts")
    prompt = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompt, list | tuple) or not prompt or not all(isinstance(p, str) for p in prompt):
        raise ValueError(f"{name} must be a string or a list of at least one string, got {prompt!r}")
    if not 2 < check_int("max_sequence_length", max_length) <= MAX_TOKENS:
        raise ValueError(f"max_sequence_length must be from 3 to {MAX_TOKENS}, got {max_length!r}")
    tokens = pipe.tokenizer(prompt, max_length, **pipe._placeholder_words())
    is_merged = pipe.savings.merge_padding and reads_counts(pipe.text_encoder)
    return pipe._run_text_encoder(tokens.merge_padding() if is_merged else tokens)


def _given(
    prefix: str, tokens: Tensor | None, pooled: Tensor | None, mask: Tensor | None, width: int
) -> TextEmbedding | None:
    """Check embeddings that replace a prompt, and their mask; None if there are none."""
    if tokens is None and pooled is None:
        if mask is not None:
            raise ValueError(f"{prefix}prompt_attention_mask has no effect without {prefix}prompt_embeds")
        return None
    for name, tensor in (("prompt_embeds", tokens), ("pooled_prompt_embeds", pooled)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{prefix}{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{prefix}{name} must be floats, got {tensor.dtype}")
    if tokens is None or pooled is None:
        raise ValueError(f"{prefix}prompt_embeds and {prefix}pooled_prompt_embeds must be given together")
    if tokens.ndim != 3 or tokens.shape[-1] != width or not len(tokens):
        raise ValueError(f"{prefix}prompt_embeds must be [batch, tokens, {width}], got {list(tokens.shape)}")
    if list(pooled.shape) != (wanted := [len(tokens), width]):
        raise ValueError(f"{prefix}pooled_prompt_embeds must be {wanted}, got {list(pooled.shape)}")
    return TextEmbedding(tokens, pooled, None if mask is None else _counts(prefix, mask, tokens))


def _counts(prefix: str, mask: Any, tokens: Tensor) -> Tensor:
    """Convert a mask to counts, float32 [B, S]; ValueError for what is none."""
    name, wanted = f"{prefix}prompt_attention_mask", [*tokens.shape[:2]]
    if not isinstance(mask, Tensor) or [*mask.shape] != wanted:
        got = [*mask.shape] if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name} must be a tensor {wanted}, got {got}")
    counts = mask.to(tokens.device, torch.float32)
    if not (counts.isfinite().all() and (counts >= 0).all() and (counts > 0).any(1).all()):
        raise ValueError(f"{name} must have 0 for tokens that are not read, 1 for others, and some of these")
    return counts


def repeat_text(text: TextEmbedding, copies: int, device: torch.device) -> TextEmbedding:
    """Move embeddings to a device and repeat each for its images."""

    def repeated(part: Tensor) -> Tensor:
        return part.to(device).repeat_interleave(copies, dim=0)

    counts = None if text.counts is None else repeated(text.counts)
    return TextEmbedding(repeated(text.tokens), repeated(text.pooled), counts)


def fills_on(device: torch.device) -> bool:
    """Return whether prompts are filled up there: where kernels are planned or recorded for each length."""
    return device.type not in ("cpu", "meta")


def fill_tokens(text: TextEmbedding, device: torch.device) -> TextEmbedding:
    """Fill up merged tokens to one of the lengths 32, 64, ..., 256, for a run on a device.

    cuDNN plans attention for each length (25 ms), a CUDA graph is of one length, and CUDA's kernels copy a
    bias of another alignment in every call.
    """
    if text.counts is None or not fills_on(device):
        return text
    return text.fill(math.ceil(text.tokens.shape[1] / FILLED) * FILLED)


def _matched(negative: TextEmbedding, positive: TextEmbedding) -> TextEmbedding:
    """Expand a single negative embedding to all prompts; ValueError if widths or numbers differ otherwise."""
    count = len(positive.tokens)
    if len(negative.tokens) == 1:  # a view: the plan of memory counts no copy
        counts = None if negative.counts is None else negative.counts.expand(count, -1)
        tokens, pooled = negative.tokens.expand(count, -1, -1), negative.pooled.expand(count, -1)
        negative = TextEmbedding(tokens, pooled, counts)
    got, wanted = ([len(text.tokens), text.tokens.shape[-1]] for text in (negative, positive))
    if got != wanted:
        what = "the negative prompts must match the prompts in number and width"
        raise ValueError(f"{what}: expected {wanted}, got {got}")
    return negative
