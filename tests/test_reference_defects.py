"""Where the reference is wrong in text to image: it fails, or ignores what it is told, and ours does not."""

from pathlib import Path

import pytest
import torch

from kolors_core import KolorsPipeline
from tests.support.pipelines import Pair, embeddings, make_pair, steps_of
from tests.support.small import FLOAT32, relative_error

pytestmark = pytest.mark.numerical


def test_max_sequence_length_is_obeyed(pipes: Pair) -> None:
    """The reference checks it and then encodes 256 tokens."""
    ours, theirs = pipes
    assert ours.encode_prompt("cat", max_sequence_length=20)[0].shape[1] == 20
    mine, other = (steps_of(pipe, prompt="cat", max_sequence_length=20)[-1] for pipe in pipes)
    assert relative_error(mine, other) > 1e-3
    with torch.no_grad():
        parts = theirs.encode_prompt("cat", max_sequence_length=20)
    names = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    other = steps_of(theirs, **dict(zip(names, parts, strict=True)))[-1]
    assert relative_error(mine, other) < FLOAT32


def test_force_zeros_without_a_negative_prompt(small_tokenizer: Path) -> None:
    """The reference crashes: it has no pooled zeros."""
    ours, theirs = make_pair(small_tokenizer, torch.float64, force_zeros=True)
    with pytest.raises(AttributeError):
        steps_of(theirs, prompt="cat")
    given = embeddings(ours, "cat")
    assert not given["negative_prompt_embeds"].any() and not given["negative_pooled_prompt_embeds"].any()
    assert relative_error(steps_of(ours, prompt="cat")[-1], steps_of(theirs, **given)[-1]) < FLOAT32
    assert relative_error(steps_of(ours, prompt="cat", negative_prompt="")[-1],
                          steps_of(theirs, prompt="cat", negative_prompt="")[-1]) < FLOAT32  # fmt: skip


def test_given_embeddings_with_several_images_a_prompt(pipes: Pair) -> None:
    """The reference repeats the pooled ones only, and crashes."""
    ours, theirs = pipes
    given = embeddings(ours, ["cat", "red"])
    with pytest.raises(RuntimeError):
        steps_of(theirs, **given, num_images_per_prompt=2)
    mine = steps_of(ours, **given, num_images_per_prompt=2)[-1]
    assert (
        relative_error(mine, steps_of(theirs, prompt=["cat", "red"], num_images_per_prompt=2)[-1]) < FLOAT32
    )


def test_negative_sizes_reach_the_negative_rows(pipes: Pair) -> None:
    """The reference repeats the pair of rows, so with two prompts half of the ids are in the wrong rows."""
    ours, theirs = pipes
    sizes = {"negative_original_size": (512, 256), "negative_target_size": (64, 32)}
    latents = torch.randn(2, 4, 8, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mine = steps_of(ours, prompt=["cat", "red"], latents=latents, **sizes)[-1]
    for row, prompt in enumerate(["cat", "red"]):
        alone = steps_of(theirs, prompt=prompt, latents=latents[row : row + 1], **sizes)[-1]
        assert relative_error(mine[row : row + 1], alone) < FLOAT32
    assert relative_error(mine, steps_of(theirs, prompt=["cat", "red"], latents=latents, **sizes)[-1]) > 1e-4


def test_a_single_negative_size_is_not_ignored(pipes: Pair) -> None:
    ours, theirs = pipes
    one = steps_of(ours, prompt="cat", negative_original_size=(512, 256))[-1]
    both = {"negative_original_size": (512, 256), "negative_target_size": (64, 72)}
    assert relative_error(one, steps_of(theirs, prompt="cat", **both)[-1]) < FLOAT32


def test_unet_and_vae_may_differ_in_dtype(reference_folder: Path) -> None:
    """The reference crashes with a bfloat16 UNet and a float32 VAE."""
    dtypes = {"default": torch.bfloat16, "vae": torch.float32}
    mixed = KolorsPipeline.from_pretrained(reference_folder, torch_dtype=dtypes)
    mixed.set_progress_bar_config(disable=True)
    assert mixed.unet.conv_in.weight.dtype == torch.bfloat16
    assert mixed.vae.post_quant_conv.weight.dtype == torch.float32
    assert torch.isfinite(steps_of(mixed, prompt="cat")[-1]).all()


def test_the_vae_never_runs_in_float16(reference_folder: Path) -> None:
    pipe = KolorsPipeline.from_pretrained(reference_folder, torch_dtype=torch.float16, variant="fp16")
    assert (pipe.dtype, pipe.vae.post_quant_conv.weight.dtype) == (torch.float16, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    half = steps_of(pipe, prompt="cat")[-1]
    pipe.to(torch.float32)
    assert relative_error(half, steps_of(pipe, prompt="cat")[-1]) < 0.05
    assert pipe.to("cpu", torch.float16).vae.post_quant_conv.weight.dtype == torch.float32
