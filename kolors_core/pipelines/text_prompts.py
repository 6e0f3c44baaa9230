"""Prompts as conditions: encoded, or given as embeddings; and the negative ones that guidance needs.

Source: `encode_prompt` of diffusers' pipelines/kolors/pipeline_kolors.py.
Shapes: B images (prompts times images per prompt), S text tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kolors_core.adapters.textual_inversion import TextualInversion, words_of
from kolors_core.chatglm import TextEmbedding
from kolors_core.devices import named_device, plain
from kolors_core.pipelines.base import Components
from kolors_core.validation import check_int

Prompt = str | Sequence[str]

MAX_TOKENS = 256


class PromptMethods(Components, TextualInversion):
    """A pipeline that reads prompts."""

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: Prompt | None = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Prompt | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        max_sequence_length: int = MAX_TOKENS,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Prompts as embeddings, repeated for each image: prompt by prompt, image by image.

        Returns prompt and negative embeddings [B, S, text_dim], then both pooled ones [B, text_dim]; the
        negative ones are None without guidance. Errors as in `embed_prompts`.
        """
        text, negative = embed_prompts(
            self, prompt, do_classifier_free_guidance, negative_prompt, prompt_embeds, pooled_prompt_embeds,
            negative_prompt_embeds, negative_pooled_prompt_embeds, max_sequence_length,
        )  # fmt: skip
        text, negative = text.expand_padding(), None if negative is None else negative.expand_padding()
        device = self.device if device is None else named_device(str(device))
        num_images_per_prompt = check_int("num_images_per_prompt", num_images_per_prompt)

        def repeated(tensor: Tensor) -> Tensor:
            return tensor.to(device).repeat_interleave(num_images_per_prompt, dim=0)

        if negative is None:
            return repeated(text.tokens), None, repeated(text.pooled), None
        negatives = repeated(negative.tokens), repeated(negative.pooled)
        return repeated(text.tokens), negatives[0], repeated(text.pooled), negatives[1]


def embed_prompts(
    pipe: PromptMethods,
    prompt: Prompt | None,
    is_guided: bool,
    negative_prompt: Prompt | None,
    prompt_embeds: Tensor | None,
    pooled_prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None,
    negative_pooled_prompt_embeds: Tensor | None,
    max_sequence_length: int,
) -> tuple[TextEmbedding, TextEmbedding | None]:
    """Return an embedding for each prompt, encoded or given, and under guidance the negative ones.

    No negative prompt is the encoded empty one, or zeros if the checkpoint says
    `force_zeros_for_empty_prompt`; a single one serves all prompts. Raises ValueError naming what was
    given twice, not at all, or does not fit.
    """
    pipe._check_loaded()
    width = pipe.unet.config.text_dim
    text = _given("", prompt_embeds, pooled_prompt_embeds, width)
    negative = _given("negative_", negative_prompt_embeds, negative_pooled_prompt_embeds, width)
    if (prompt is None) == (text is None):
        raise ValueError("give either prompt or prompt_embeds, not both and not neither")
    if text is not None and max_sequence_length != MAX_TOKENS:
        raise ValueError("max_sequence_length has no effect on given prompt_embeds")
    if negative_prompt is not None and negative is not None:
        raise ValueError("give either negative_prompt or negative_prompt_embeds, not both")
    if text is None:
        text = _encode(pipe, "prompt", prompt, max_sequence_length)
    if not is_guided:
        return text, None
    if negative is None and negative_prompt is None and pipe.force_zeros_for_empty_prompt:
        zeros = torch.zeros_like(text.tokens), torch.zeros_like(text.pooled)
        negative = TextEmbedding(*zeros, text.counts)
    elif negative is None:
        wanted = "" if negative_prompt is None else negative_prompt
        negative = _encode(pipe, "negative_prompt", wanted, text.length)
    return text, _matched(negative, text)


def _encode(pipe: PromptMethods, name: str, prompt: Prompt | None, max_length: int) -> TextEmbedding:
    if pipe.text_encoder is None or pipe.tokenizer is None:
        raise ValueError("there is no text encoder or tokenizer: pass prompt_embeds in place of prompts")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"{name} must be a string or a list of at least one string, got {prompt!r}")
    if not 2 < check_int("max_sequence_length", max_length) <= MAX_TOKENS:
        raise ValueError(f"max_sequence_length must be from 3 to {MAX_TOKENS}, got {max_length!r}")
    words = {"words": words} if (words := words_of(plain(pipe.text_encoder))) else {}
    tokens = pipe.tokenizer(prompts, max_length, **words)
    return pipe._run_text_encoder(tokens.merge_padding() if pipe.savings.merge_padding else tokens)


def _given(prefix: str, tokens: Tensor | None, pooled: Tensor | None, width: int) -> TextEmbedding | None:
    """Embeddings given in place of a prompt, checked; None if none are."""
    if tokens is None and pooled is None:
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
    return TextEmbedding(tokens, pooled)


def _matched(negative: TextEmbedding, positive: TextEmbedding) -> TextEmbedding:
    """The negative embedding for as many prompts as the positive: a single one serves all."""
    count = len(positive.tokens)
    if len(negative.tokens) == 1:
        counts = None if negative.counts is None else negative.counts.expand(count, -1)
        tokens, pooled = negative.tokens.expand(count, -1, -1), negative.pooled.expand(count, -1)
        negative = TextEmbedding(tokens, pooled, counts)
    width = positive.tokens.shape[-1]
    got, wanted = ([len(text.tokens), text.length, width] for text in (negative, positive))
    if got != wanted:
        raise ValueError(f"the negative prompts must match the prompts: expected {wanted}, got {got}")
    return negative
