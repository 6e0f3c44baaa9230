"""Image to image against the reference, latents step by step; what its own arguments mean and refuse."""

import inspect
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import kolors_core
from kolors_core import DPMSolverMultistepScheduler, KolorsImg2ImgPipeline, KolorsPipeline
from tests.support.pipelines import SOLVERS, WEAK, Pair, embeddings, picture, steps_of, use_solver
from tests.support.small import FLOAT32, SMALL, relative_error
from weights_convert import TABLES


def image_pair(pair: Pair) -> tuple[KolorsImg2ImgPipeline, Any]:
    """Both libraries' image-to-image pipelines of the same models; the reference's own VAE is a copy, since
    it changes the dtype of its VAE and leaves it so."""
    ours, theirs = pair
    parts = {name: part for name, part in theirs.components.items() if name != "vae"}
    force_zeros = theirs.config.force_zeros_for_empty_prompt
    other = diffusers.KolorsImg2ImgPipeline(
        **parts, vae=deepcopy(theirs.vae), force_zeros_for_empty_prompt=force_zeros
    )
    other.set_progress_bar_config(disable=True)
    return KolorsImg2ImgPipeline.from_pipe(ours), other


def image_steps(pipe: Any, seeds: tuple[int, ...] = (), **arguments: Any) -> list[Tensor]:
    """Latents after each step, then the images; seeds: one generator for each image."""
    given = {"prompt": "cat", "image": picture(), "strength": 0.6, "num_inference_steps": 7}
    if seeds:
        given["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    return steps_of(pipe, **given | arguments)


def assert_same(pair: Pair, **arguments: Any) -> int:
    """Compare every step's latents and the decoded images; returns the number of steps.

    The reference's VAE always runs in float32, which makes 9e-6 in images of 4e-6 in latents.
    """
    mine, other = (image_steps(pipe, **arguments) for pipe in image_pair(pair))
    assert len(mine) == len(other) > 1
    for i, (a, b) in enumerate(zip(mine, other, strict=True)):
        assert relative_error(a, b) < (FLOAT32 if i < len(mine) - 1 else 4 * FLOAT32), i
    return len(mine) - 1


@pytest.mark.numerical
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(("solver", "changes"), SOLVERS, ids=["euler", "dpm", "sde"])
def test_every_step_equals_the_reference(
    precision: str, solver: str, changes: dict, request: pytest.FixtureRequest
) -> None:
    pair = request.getfixturevalue(precision)
    use_solver(pair, solver, changes)
    scale = WEAK if precision == "float32" else 5.0
    steps = assert_same(
        pair, prompt=["一张瓢虫的照片", "a red cat"], num_images_per_prompt=2, guidance_scale=scale
    )
    assert steps == 4, "int(7 * 0.6)"


@pytest.mark.parametrize(
    "arguments",
    [
        {"strength": 1.0},
        {"strength": 0.15},
        {"guidance_scale": 1.0},
        {"negative_prompt": "small cat", "original_size": (99, 98), "crops_coords_top_left": (3, 4)},
        {"timesteps": [900, 500, 333, 20], "num_inference_steps": 50},
        {"sigmas": [25.0, 11.0, 2.5, 0.5, 0.0], "num_inference_steps": 50},
        {"denoising_end": 0.8},
        {"denoising_start": 0.4, "strength": 0.3},
        {"denoising_start": 0.3, "denoising_end": 0.8, "strength": 0.3, "num_inference_steps": 12},
        {"seeds": (1, 2), "num_images_per_prompt": 2},
        {"image": [picture(0), picture(1)], "prompt": ["cat", "red"]},
        {"image": [picture(0), picture(1)], "num_images_per_prompt": 2},
        {"image": [picture(0), picture(1)], "num_images_per_prompt": 4, "num_inference_steps": 2},
        {"image": np.random.default_rng(0).random((64, 72, 3), dtype=np.float32)},
        {"image": torch.rand(2, 3, 64, 72, generator=torch.Generator().manual_seed(2)), "prompt": ["a", "b"]},
        {"image": torch.rand(1, 3, 64, 72, generator=torch.Generator().manual_seed(2)) * 2 - 1},
        {"image": torch.randn(1, 4, 8, 9, generator=torch.Generator().manual_seed(2))},
        {"image": [torch.ones(4, 8, 9), torch.zeros(4, 8, 9)], "prompt": ["a", "b"]},
        {"image": [torch.ones(1, 4, 8, 9), torch.zeros(1, 4, 8, 9)], "num_images_per_prompt": 2},
        {"image": torch.ones(4, 8, 9)},
        {"image": [picture(0), picture(1)], "num_images_per_prompt": 4, "seeds": (1, 2, 3, 4)},
        {"latents": torch.randn(1, 4, 8, 9, generator=torch.Generator().manual_seed(2)).double() * 9},
    ],
    ids=lambda arguments: "-".join(arguments),
)  # fmt: skip
def test_arguments_mean_what_they_mean_in_the_reference(float64: Pair, arguments: dict) -> None:
    takes_part = arguments.keys() & {"latents", "denoising_start", "denoising_end", "seeds"}
    for solver, changes in SOLVERS if takes_part else SOLVERS[:1]:  # the rest no sampler hears of
        use_solver(float64, solver, changes)
        assert_same(float64, **arguments)


def test_parity_can_fail(pipes: Pair) -> None:
    mine, other = image_pair(pipes)
    mine.vae.config = replace(mine.vae.config, scaling_factor=0.1301)
    try:
        a, b = image_steps(mine)[-2], image_steps(other)[-2]
    finally:
        mine.vae.config = SMALL.vae
    assert relative_error(a, b) > 10 * FLOAT32


def test_two_models_share_a_run(pipes: Pair) -> None:
    """The first part by text to image, the rest by image to image, on the latents: as one run."""
    ours, theirs = pipes
    whole = steps_of(ours, prompt="cat", num_inference_steps=10)[-2]
    for pipe, other in zip((ours, theirs), image_pair(pipes), strict=True):
        first = {"num_inference_steps": 10, "denoising_end": 0.6, "output_type": "latent"}
        half = steps_of(pipe, prompt="cat", **first)[-1]
        rest = image_steps(other, image=half, strength=0.3, num_inference_steps=10, denoising_start=0.6)
        assert relative_error(rest[-2], whole) < FLOAT32


def test_from_pipe_shares_every_module(pipes: Pair) -> None:
    ours, _ = pipes
    made = KolorsImg2ImgPipeline.from_pipe(ours)
    assert all(made.components[name] is part for name, part in ours.components.items())
    scheduler = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    changed = KolorsPipeline.from_pipe(made, scheduler=scheduler)
    assert changed.scheduler is scheduler and changed.unet is ours.unet and made.scheduler is ours.scheduler
    with pytest.raises(TypeError, match="expected a pipeline of kolors_core, got int"):
        KolorsPipeline.from_pipe(3)
    with pytest.raises(TypeError, match="'safety_checker' is no component; expected text_encoder, "):
        KolorsPipeline.from_pipe(ours, safety_checker=None)


def test_a_folder_written_by_the_reference_loads_and_back(reference_folder: Path, tmp_path: Path) -> None:
    pipe = KolorsImg2ImgPipeline.from_pretrained(reference_folder, variant="fp16")
    pipe.save_pretrained(tmp_path / "saved")
    theirs = diffusers.KolorsImg2ImgPipeline.from_pretrained(tmp_path / "saved")
    for name, tensor in theirs.vae.state_dict().items():
        assert torch.equal(tensor, pipe.vae.state_dict()[TABLES["vae"].to_ours(name)])


# Where the reference is wrong.


def test_height_and_width_resize_the_picture(pipes: Pair) -> None:
    """The reference ignores them, but for the size conditions."""
    mine, other = image_pair(pipes)
    large = {"image": picture(0, 130, 150), "height": 64, "width": 72}
    resized = picture(0, 130, 150).resize((72, 64), Image.Resampling.LANCZOS)
    a, b = image_steps(mine, **large), image_steps(other, image=resized)
    assert all(relative_error(x, y) < 4 * FLOAT32 for x, y in zip(a, b, strict=True))
    assert image_steps(other, **large)[-1].shape[-2:] == (128, 144)
    own = steps_of(mine, prompt="cat", image=picture(0, 45, 50), height=None, width=None)
    assert own[-1].shape[-2:] == (40, 48), "its own size, rounded down"


def test_size_conditions_are_those_of_the_picture(pipes: Pair) -> None:
    """Without height and width the reference says that every image is of the UNet's own size."""
    mine, other = image_pair(pipes)
    none = {"height": None, "width": None}
    a = image_steps(mine, **none)[-1]
    assert relative_error(a, image_steps(other)[-1]) < 4 * FLOAT32
    assert relative_error(a, image_steps(other, **none)[-1]) > 1e-4


def test_a_strength_that_leaves_no_step_is_named(pipes: Pair) -> None:
    mine, other = image_pair(pipes)
    with pytest.raises(ValueError, match="strength times steps must be at least 1, got 0.1 times 7"):
        image_steps(mine, strength=0.1)
    with pytest.raises((RuntimeError, IndexError, ValueError)) as caught:
        image_steps(other, strength=0.1)
    assert "strength" not in str(caught.value)


def test_the_vae_keeps_its_dtype(float32: Pair) -> None:
    """The reference leaves its VAE in the dtype of the prompt's embeddings."""
    use_solver(float32, "EulerDiscreteScheduler", {})
    mine, other = image_pair(float32)
    given = {k: v.to(torch.bfloat16) for k, v in embeddings(mine, "cat").items()}
    image_steps(mine, prompt=None, **given)
    assert mine.vae.post_quant_conv.weight.dtype == torch.float32
    other.prepare_latents(
        torch.zeros(1, 3, 16, 16),
        torch.tensor([500.0]),
        1,
        1,
        torch.bfloat16,
        torch.device("cpu"),
        None,
        False,
    )
    assert other.vae.dtype == torch.bfloat16


def test_unet_and_vae_may_differ_in_dtype(reference_folder: Path) -> None:
    """The reference crashes with a bfloat16 UNet and a float32 VAE."""
    dtypes = {"default": torch.bfloat16, "vae": torch.float32}
    mixed = KolorsImg2ImgPipeline.from_pretrained(reference_folder, torch_dtype=dtypes)
    mixed.set_progress_bar_config(disable=True)
    assert torch.isfinite(image_steps(mixed)[-1]).all()
    assert mixed.vae.post_quant_conv.weight.dtype == torch.float32


def test_one_picture_is_encoded_once(pipes: Pair) -> None:
    mine, encoded = KolorsImg2ImgPipeline.from_pipe(pipes[0]), []
    hook = mine.vae.encoder.register_forward_hook(lambda *_: encoded.append(1))
    image_steps(mine, num_images_per_prompt=3, seeds=(1, 2, 3))
    image_steps(mine, latents=torch.zeros(1, 4, 8, 9))
    hook.remove()
    assert len(encoded) == 1


def test_given_embeddings_work(pipes: Pair) -> None:
    """The reference loses the pooled ones, and crashes."""
    mine, other = image_pair(pipes)
    given = embeddings(mine, "cat")
    a = image_steps(mine, prompt=None, **given)[-1]
    assert relative_error(a, image_steps(other)[-1]) < 4 * FLOAT32
    with pytest.raises(AttributeError):
        image_steps(other, prompt=None, **given)


def test_each_prompt_keeps_its_picture(pipes: Pair) -> None:
    """With two prompts, images and images a prompt, the reference gives each prompt both images."""
    mine, other = image_pair(pipes)
    pair_of = {"prompt": ["cat", "red"], "image": [picture(0), picture(1)], "num_images_per_prompt": 2}
    a = image_steps(mine, **pair_of, seeds=(1, 2, 3, 4))[-1]
    for row, (prompt, image) in enumerate(zip(["cat", "cat", "red", "red"], [0, 0, 1, 1], strict=True)):
        alone = image_steps(other, prompt=prompt, image=picture(image), seeds=(row + 1,))[-1]
        assert relative_error(a[row : row + 1], alone) < 4 * FLOAT32


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": None}, "no image: expected the image to start from, or its latents"),
        ({"image": "cat.png"}, "image.* got .*str"),
        ({"strength": 1.5}, "strength must be above 0 and at most 1, got 1.5"),
        ({"strength": 0}, "strength must be above 0 and at most 1, got 0"),
        ({"strength": "0.5"}, "strength must be above 0 and at most 1, got '0.5'"),
        ({"denoising_start": 1.5, "strength": 0.3}, "denoising_start must be above 0 and at most 1, got 1.5"),
        ({"denoising_start": 0.999, "strength": 0.3}, "denoising_start 0.999 leaves none of the 7 steps"),
        ({"denoising_start": 0.6, "denoising_end": 0.5, "strength": 0.3}, "must be before denoising_end"),
        ({"height": 60}, "height must be a positive multiple of 8, got 60"),
        ({"image": [picture(0), picture(1), picture(2)], "num_images_per_prompt": 2}, "got 3"),
        ({"image": [picture(0), picture(1)]}, "expected .* images, got 2"),
        ({"image": [picture(0), picture(1, 32, 32)], "height": None}, "images of different sizes"),
        ({"image": torch.zeros(1, 4, 8, 8)}, "width of given latents is 64, and cannot become 72"),
        ({"latents": torch.zeros(1, 4, 3, 3)}, r"latents must be a tensor \[1, 4, 8, 9\], got \[1"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_arguments_are_named(pipes: Pair, arguments: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        image_steps(KolorsImg2ImgPipeline.from_pipe(pipes[0]), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "ours"), [("KolorsPipeline", []), ("KolorsImg2ImgPipeline", ["strength_map"])]
)
def test_the_signature_is_the_references(kind: str, ours: list[str]) -> None:
    """What is ours alone comes behind it."""
    mine, other = (
        inspect.signature(getattr(package, kind).__call__).parameters for package in (kolors_core, diffusers)
    )
    assert list(mine) == [*other, *ours, "extras"]
    for parameter in other.keys() - {"self", "prompt", "callback_on_step_end_tensor_inputs"}:
        assert mine[parameter].default == other[parameter].default, parameter


def test_a_picture_tells_how_it_was_made(pipes: Pair) -> None:
    pipe = KolorsImg2ImgPipeline.from_pipe(pipes[0])
    made = pipe("cat", picture(), strength=0.5, num_inference_steps=4).images[0]
    assert (made.info["steps"], made.info["strength"], made.info["size"]) == ("4", "0.5", "72x64")
