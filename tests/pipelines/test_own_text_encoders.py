"""Text encoders of one's own, whose counts are masks, and given embeddings with masks beside them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kolors_core import KolorsPipeline
from kolors_core.chatglm import TextEmbedding
from tests.support.own_models import SIZE, drawn, make_reader, own_pipeline
from tests.support.small import relative_error


@pytest.fixture(scope="module")
def base() -> KolorsPipeline:
    return KolorsPipeline.from_pretrained("tiny")


@pytest.fixture
def pipe(base: KolorsPipeline) -> KolorsPipeline:
    return own_pipeline(base, unet=base.unet)


def embeddings(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, 9, 192] and pooled [B, 192] at random, and a mask of which the last of a row are 1."""
    draw, most = torch.Generator().manual_seed(seed), 9
    tokens, pooled = (torch.randn(len(lengths), *shape, generator=draw) for shape in ((most, 192), (192,)))
    return tokens, pooled, torch.tensor([[i >= most - n for i in range(most)] for n in lengths])


def test_pads_are_not_read(pipe: KolorsPipeline) -> None:
    """A prompt alone, beside a longer one and with fewer pads is the same, whatever a pad's state is."""
    assert pipe.tokenizer is not None
    alone = drawn(pipe)
    pair = drawn(
        pipe, ["a red apple", "a big red apple and a small blue car"], generator=[seeded(), seeded()]
    )
    assert relative_error(pair[0], alone[0]) < 1e-5
    assert relative_error(drawn(pipe, max_sequence_length=40), alone) < 1e-5
    plain = type(pipe.text_encoder).forward

    def disturbed(self: Any, batch: Any) -> TextEmbedding:
        text = plain(self, batch)
        return TextEmbedding(text.tokens + 7 * ~batch.mask[..., None], text.pooled, text.counts)

    encoder = make_reader()
    encoder.forward = disturbed.__get__(encoder)
    assert torch.equal(drawn(own_pipeline(pipe, unet=pipe.unet, text_encoder=encoder)), alone)
    assert relative_error(drawn(pipe, "a blue car"), alone) > 1e-2


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_it_needs_no_more_of_a_config_than_its_width(base: KolorsPipeline) -> None:
    encoder = make_reader()
    encoder.config = type("Width", (), {"hidden_size": 192})()
    expected = drawn(own_pipeline(base, unet=base.unet))
    assert torch.equal(drawn(own_pipeline(base, unet=base.unet, text_encoder=encoder)), expected)
    encoder.config = type("None", (), {})()
    with pytest.raises(TypeError, match="with the width config.hidden_size, or None, got .*Reader"):
        own_pipeline(base, unet=base.unet, text_encoder=encoder)


def test_a_masks_prompts_are_cached_by_their_tokens(pipe: KolorsPipeline) -> None:
    first, known = drawn(pipe), len(pipe.prompt_cache.kept)
    assert torch.equal(drawn(pipe), first) and len(pipe.prompt_cache.kept) == known
    with torch.no_grad():
        pipe.text_encoder.words.weight.mul_(2)
    assert not torch.equal(drawn(pipe), first)


def given(positive: tuple[Any, ...], negative: tuple[Tensor, ...]) -> dict[str, Any]:
    named = dict(
        zip(("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"), positive, strict=False)
    )
    of_negative = (
        "negative_prompt_embeds",
        "negative_pooled_prompt_embeds",
        "negative_prompt_attention_mask",
    )
    return named | dict(zip(of_negative, negative, strict=False))


def test_a_mask_beside_embeddings_is_the_same_as_the_tokens_cut_off(pipe: KolorsPipeline) -> None:
    tokens, pooled, mask = embeddings(4)
    other, other_pooled, other_mask = embeddings(7, seed=1)
    masked = drawn(pipe, None, **given((tokens, pooled, mask), (other, other_pooled, other_mask)))
    cut = drawn(pipe, None, **given((tokens[:, -4:], pooled), (other[:, -7:], other_pooled)))
    assert relative_error(masked, cut) < 1e-5
    whole = drawn(pipe, None, **given((tokens, pooled), (other, other_pooled)))
    assert relative_error(masked, whole) > 1e-3
    twice = torch.cat([tokens[:, -4:], tokens[:, -1:]], dim=1)
    counted = torch.tensor([[1.0, 1.0, 1.0, 2.0]])
    counts = drawn(pipe, None, **given((tokens[:, -4:], pooled, counted), (other[:, -7:], other_pooled)))
    repeated = drawn(pipe, None, **given((twice, pooled), (other[:, -7:], other_pooled)))
    assert relative_error(counts, repeated) < 1e-5
    text = {"num_inference_steps": 1, "output_type": "pil"}
    image = drawn(pipe, None, **text, **given((tokens, pooled, mask), (other, other_pooled, other_mask)))[0]
    assert "tensor" in image.info["prompt_attention_mask"]


def test_a_negative_prompt_of_another_length_may_stand_beside_given_embeddings(pipe: KolorsPipeline) -> None:
    tokens, pooled, mask = embeddings(4, 9)
    named = {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled, "prompt_attention_mask": mask}
    latents = drawn(pipe, None, negative_prompt="a big red apple and a small blue car", **named)
    assert latents.shape[0] == 2 and latents.isfinite().all()


def test_a_callback_sees_ragged_prompts_and_keeps_their_masks(pipe: KolorsPipeline) -> None:
    named = given(embeddings(4, 9), embeddings(7, 5, seed=1))
    names = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    expected = drawn(pipe, None, **named)

    def same(pipe: Any, i: int, t: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": tensors["prompt_embeds"].clone()}

    assert relative_error(drawn(pipe, None, callback_on_step_end=same, **names, **named), expected) < 1e-5


def test_what_has_no_form_without_masks_says_so(pipe: KolorsPipeline) -> None:
    with pytest.raises(ValueError, match="prompts of 5, .* tokens have no form without their masks"):
        pipe.encode_prompt(["a red apple", "a big red apple and a small blue car"])
    tokens, _, pooled, _ = pipe.encode_prompt("a red apple", do_classifier_free_guidance=False)
    assert tokens.shape[1] == 5 and pooled.shape == (1, 192)  # without pads, which nothing reads


TOKENS, POOLED, MASK = embeddings(4)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt_attention_mask": MASK}, "prompt_attention_mask has no effect without prompt_embeds"),
    (
        given((TOKENS, POOLED, MASK[:, :3]), ()),
        r"prompt_attention_mask must be a tensor \[1, 9\], got \[1, 3\]",
    ),
    (given((TOKENS, POOLED, MASK & False), ()), "must have 0 for tokens that are not read, 1 for others"),
    (given((TOKENS, POOLED, -MASK.float()), ()), "must have 0 for tokens that are not read"),
    (given((TOKENS, POOLED, [[1]]), ()), r"prompt_attention_mask must be a tensor \[1, 9\], got list"),  # type: ignore[arg-type]
    (
        given((TOKENS, POOLED), embeddings(4, 4)[:2]),
        r"in number and width: expected \[1, 192\], got \[2, 192\]",
    ),
]


@pytest.mark.parametrize(("arguments", "found"), WRONG)
def test_a_mask_that_is_none_is_an_error(arguments: dict[str, Any], found: str, pipe: KolorsPipeline) -> None:
    prompt = None if "prompt_embeds" in arguments else "a red apple"
    with pytest.raises(ValueError, match=found):
        pipe(prompt, num_inference_steps=1, **SIZE, **arguments)
