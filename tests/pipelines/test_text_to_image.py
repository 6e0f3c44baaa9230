"""The whole pipeline against the reference, latents step by step; what every argument means and refuses."""

import inspect
import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import kolors_core
from kolors_core import DPMSolverMultistepScheduler, KolorsPipeline
from kolors_core.adapters.lora import TEXT_TARGETS, attach
from kolors_core.chatglm import ChatGLM
from kolors_core.performance.prompt_cache import PromptCache
from kolors_core.pipelines.png_metadata import read_metadata
from kolors_core.precompute import Savings
from kolors_core.unet import UNet
from tests.support.pipelines import (
    NO_SAVINGS,
    SMALL_PICTURE,
    SOLVERS,
    WEAK,
    Pair,
    assert_same_steps,
    embeddings,
    saving,
    steps_of,
    use_solver,
)
from tests.support.small import EXACT, FLOAT32, SMALL, relative_error


@pytest.mark.numerical
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(("solver", "changes"), SOLVERS, ids=["euler", "dpm", "sde"])
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_every_step_equals_the_reference(
    precision: str, solver: str, changes: dict, guidance_scale: float, request: pytest.FixtureRequest
) -> None:
    """With all savings; in float32 they round elsewhere, so that there the plain arithmetic is compared.

    There guidance is weak: a scale of 5 makes 4e-6 to 6e-6 of roundings, more or less by the CPU.
    """
    pair = request.getfixturevalue(precision)
    guidance_scale = min(guidance_scale, WEAK) if precision == "float32" else guidance_scale
    use_solver(pair, solver, changes)
    prompts = ["一张瓢虫的照片", "a photo of the red cat"]
    # In float64 both differ by what the reference's schedulers cast to float32; in float32 the VAE makes
    # 9e-6 in the images of 4e-6 in the latents: a four-hundredth of one of 255 steps.
    pictures = FLOAT32 if precision == "float64" else 4 * FLOAT32
    with saving(pair[0], Savings() if precision == "float64" else NO_SAVINGS):
        assert_same_steps(
            pair, FLOAT32, pictures, prompt=prompts, num_images_per_prompt=2, guidance_scale=guidance_scale
        )


@pytest.mark.parametrize("left_out", ["merge_padding", "precompute"])
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_savings_change_nothing(pipes: Pair, left_out: str, guidance_scale: float) -> None:
    """Each is switched off in turn: latents stay what they are to the last bits of float64."""
    ours = pipes[0]
    given = {"prompt": ["cat", "a photo of the red cat"], "guidance_scale": guidance_scale}
    if guidance_scale > 1:
        given["negative_prompt"] = ["一张瓢虫的照片", "的"]  # of other lengths than the prompts
    projected: list[int] = []  # tokens that go through the text projection
    hook = ours.unet.text_proj.register_forward_hook(lambda _, x, y: projected.append(y[..., 0].numel()))
    saved, few = steps_of(ours, **given), sum(projected)
    with saving(ours, replace(Savings(), **{left_out: False})):
        projected.clear()
        other, many = steps_of(ours, **given), sum(projected)
    hook.remove()
    assert all(relative_error(a, b) < EXACT for a, b in zip(saved, other, strict=True))
    assert many > 3 * few, "the switch does nothing"


def test_prompts_are_encoded_once(pipes: Pair) -> None:
    """Until the text encoder, a LoRA on it or the tokenizer is another."""
    ours = KolorsPipeline.from_pipe(pipes[0], text_encoder=deepcopy(pipes[0].text_encoder))
    ours.set_progress_bar_config(disable=True)
    ours.prompt_cache = PromptCache()
    runs: list[int] = []
    hook = ours.text_encoder.register_forward_hook(lambda *_: runs.append(1))

    def drawn(prompt: Any = "cat", **arguments: Any) -> tuple[int, torch.Tensor]:
        runs.clear()
        made = steps_of(ours, prompt=prompt, num_inference_steps=1, **arguments)[-1]
        return len(runs), made

    first, again = drawn(), drawn(seed=0)
    assert (first[0], again[0]) == (2, 0) and torch.equal(first[1], again[1])
    assert drawn("red")[0] == 1, "the empty negative prompt is known"
    assert drawn(guidance_scale=1.0)[0] == 0 and drawn(max_sequence_length=20)[0] == 2
    lora = attach(ours.text_encoder, rank=2, targets=TEXT_TARGETS)
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    runs.clear()
    adapted = drawn()
    assert adapted[0] == 2 and relative_error(adapted[1], first[1]) > 1e-6
    lora.set_scale(0.5)
    assert drawn()[0] == 2
    lora.detach()
    assert torch.equal(drawn()[1], first[1])
    with torch.no_grad():
        next(ours.text_encoder.parameters()).mul_(1.5)
    assert drawn()[0] == 2
    with saving(ours, replace(Savings(), cached_prompts=3)):
        drawn(["a", "b"])
        assert len(ours.prompt_cache.kept) == 3
    with saving(ours, NO_SAVINGS):
        assert drawn()[0] == drawn()[0] == 2 and not ours.prompt_cache.kept
    hook.remove()
    expected = drawn()[1]
    assert torch.equal(
        steps_of(pickle.loads(pickle.dumps(ours)), prompt="cat", num_inference_steps=1)[-1], expected
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"negative_prompt": "small cat"},
        {"negative_prompt": ""},
        {"original_size": (1024, 512), "crops_coords_top_left": (16, 8), "target_size": (640, 333)},
        {"original_size": (99, 98), "negative_original_size": (512, 256), "negative_target_size": (64, 32),
         "negative_crops_coords_top_left": (5, 7)},
        {"crops_coords_top_left": (16, 8)},
        {"timesteps": [1099, 500, 333, 20], "num_inference_steps": 50},
        {"sigmas": [25.0, 11.0, 2.5, 0.5, 0.0], "num_inference_steps": 50},
        {"height": 72, "width": 40},
        {"num_inference_steps": 12, "denoising_end": 0.7},
        {"num_inference_steps": 1},
    ],
    ids=lambda arguments: "-".join(arguments),
)  # fmt: skip
def test_arguments_mean_what_they_mean_in_the_reference(pipes: Pair, arguments: dict) -> None:
    assert_same_steps(pipes, prompt="a photo of the red cat", **arguments)


@pytest.mark.parametrize(("solver", "changes"), SOLVERS[:2], ids=["euler", "dpm"])
def test_denoising_end_gives_the_references_latents(pipes: Pair, solver: str, changes: dict) -> None:
    use_solver(pipes, solver, changes)
    arguments = {"prompt": "cat", "num_inference_steps": 10, "denoising_end": 0.6, "output_type": "latent"}
    mine, other = (steps_of(pipe, **arguments)[-1] for pipe in pipes)
    assert relative_error(mine, other) < FLOAT32


def test_given_latents_and_generators(pipes: Pair) -> None:
    for solver, changes in SOLVERS[:2]:
        use_solver(pipes, solver, changes)
        latents = torch.randn(1, 4, 8, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        assert_same_steps(pipes, prompt="cat", latents=latents)
    mine, other = (
        steps_of(pipe, prompt=["cat", "的"], generator=[torch.Generator().manual_seed(s) for s in (1, 2)])
        for pipe in pipes
    )
    assert relative_error(mine[-1], other[-1]) < FLOAT32


def test_embeddings_equal_the_reference_and_stand_in_for_prompts(pipes: Pair) -> None:
    ours, theirs = pipes
    arguments = {"prompt": ["cat", "一张照片"], "num_images_per_prompt": 2, "negative_prompt": ["red", ""]}
    with torch.no_grad():
        mine, other = ours.encode_prompt(**arguments), theirs.encode_prompt(**arguments)
    for a, b in zip(mine, other, strict=True):
        assert relative_error(a, b) < FLOAT32
    assert_same_steps(pipes, **embeddings(ours, "cat", negative_prompt="red"))


def test_output_types_and_return_dict(pipes: Pair) -> None:
    ours, theirs = pipes
    arguments: dict[str, Any] = {"prompt": "cat", **SMALL_PICTURE, "num_inference_steps": 2}

    def run(pipe: Any, **more: Any) -> Any:
        return pipe(**arguments, **more, generator=torch.Generator().manual_seed(0))

    pictures = run(ours).images
    assert pictures[0].size == (72, 64) and run(ours, return_dict=False)[0][0].size == (72, 64)
    assert run(ours)[0][0].size == (72, 64)
    expected = run(theirs, output_type="np").images
    assert abs(run(ours, output_type="np").images - expected).max() < FLOAT32
    assert run(ours, output_type="pt").images.shape == (1, 3, 64, 72)
    assert run(ours, output_type="latent").images.shape == (1, 4, 8, 9)


def test_parity_can_fail_and_names_the_module(float64: Pair) -> None:
    ours, theirs = float64
    use_solver(float64, *SOLVERS[0])
    norm = ours.unet.up[1].attentions[2].blocks[0].norm3
    arguments: dict[str, Any] = {"prompt": "cat", "num_inference_steps": 2}
    norm.eps = 1e-2
    try:
        named = r"first divergence: step 0, unet: up.1.attentions.2.blocks.0.norm3 \(up_blocks.1."
        with pytest.raises(AssertionError, match=named):
            assert_same_steps(float64, **arguments)
    finally:
        norm.eps = 1e-5


def test_the_signature_is_the_references() -> None:
    for name in ("__call__", "encode_prompt"):
        mine = inspect.signature(getattr(KolorsPipeline, name)).parameters
        other = inspect.signature(getattr(diffusers.KolorsPipeline, name)).parameters
        assert list(mine) == [*other, *(["extras"] if name == "__call__" else [])]
        for parameter in other.keys() - {"self", "prompt", "callback_on_step_end_tensor_inputs"}:
            assert mine[parameter].default == other[parameter].default, parameter


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt must be a string or a list of at least one string"),
        ({"prompt": 3}, "prompt must be a string or a list"),
        ({"prompt": None}, "give either prompt or prompt_embeds"),
        ({"height": 100}, "height must be a positive multiple of 8, got 100"),
        ({"width": -8}, "width must be a positive multiple of 8, got -8"),
        ({"width": 64.0}, "width must be a positive multiple of 8, got 64.0"),
        ({"num_inference_steps": -1}, "number of steps must be .* got -1"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a positive whole number, got 0"),
        ({"output_type": "jpg"}, "output_type must be of pil, np, pt, latent, got 'jpg'"),
        ({"cross_attention_kwargs": {"gligen": {}}}, "must be of ip_adapter_masks, scale, got 'gligen'"),
        ({"prompt": ["a", "b"], "negative_prompt": ["a", "b", "c"]}, "negative prompts must match"),
        ({"max_sequence_length": 257}, "max_sequence_length must be from 3 to 256, got 257"),
        ({"latents": torch.zeros(1, 4, 3, 3)}, r"latents must be a tensor \[1, 4, 8, 9\], got \[1"),
        ({"generator": [torch.Generator()] * 3}, "a list of 1, one for each image"),
        ({"original_size": (64,)}, "^original_size must be two whole numbers"),
        ({"negative_target_size": (64, 1.5)}, "negative_target_size must be two whole numbers"),
        ({"denoising_end": 2.0}, "denoising_end must be above 0 and at most 1, got 2.0"),
        ({"timesteps": [5, 3], "sigmas": [2.0, 0.0], "num_inference_steps": 50}, "exactly one of steps,"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a number, got inf"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number, got nan"),
        ({"guidance_scale": "5"}, "guidance_scale must be a number, got '5'"),
        ({"latents": [1.0]}, r"latents must be a tensor \[1, 4, 8, 9\], got list"),
        ({"target_size": (10**400, 8)}, r"^target_size must be two whole numbers.*got \(1000.*\.\.\.$"),
        ({"sigmas": [10**400, 0]}, r"^sigmas must be a list of numbers, got \[1000.*\.\.\.$"),
        ({"original_size": 64}, "^original_size must be two whole numbers of pixels, height first, got 64"),
        ({"crops_coords_top_left": (-1, 0)}, r"^crops_coords_top_left must be .* got \(-1, 0\)"),
        ({"denoising_end": "0.5"}, "denoising_end must be above 0 and at most 1, got '0.5'"),
        ({"generator": 7}, "expected one torch.Generator, or a list of 1"),
        ({"sigmas": 5.0, "num_inference_steps": 50}, "sigmas must be a list of numbers, got 5.0"),
        ({"prompt": "\ud800"}, r"prompt 0 is not valid Unicode text"),
        ({"prompt": None, "prompt_embeds": torch.zeros(0, 5, 64), "pooled_prompt_embeds": torch.zeros(0, 64)},
         r"prompt_embeds must be \[batch, tokens, 64\], got \[0"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "must be of latents, .* got 'noise'"),
        ({"prompt_embeds": torch.zeros(1, 5, 64)}, "pooled_prompt_embeds must be given together"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 5, 7), "pooled_prompt_embeds": torch.zeros(1, 7)},
         r"prompt_embeds must be \[batch, tokens, 64\], got \[1, 5, 7\]"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 5, 64), "pooled_prompt_embeds": torch.zeros(2, 64)},
         r"pooled_prompt_embeds must be \[1, 64\], got \[2, 64\]"),
        ({"prompt_embeds": torch.zeros(1, 5, 64), "pooled_prompt_embeds": torch.zeros(1, 64)}, "not both"),
        ({"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 256, 64),
          "negative_pooled_prompt_embeds": torch.zeros(1, 64)}, "or negative_prompt_embeds, not both"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_arguments_are_named(pipes: Pair, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        pipes[0](**({"prompt": "cat"} | SMALL_PICTURE | arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"callback_on_step_end": 5}, "callback_on_step_end must be a function, got int"),
        ({"callback_on_step_end": lambda *_: None}, "must return a dict of tensors, got NoneType"),
        (
            {"callback_on_step_end": lambda *_: {"latents": [1]}},
            "returned latents as list, expected a tensor",
        ),
        (
            {"prompt": None, "prompt_embeds": [1], "pooled_prompt_embeds": [1]},
            "prompt_embeds must be a torch.Tensor",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_arguments_of_another_type_are_named(pipes: Pair, arguments: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        pipes[0](**({"prompt": "cat"} | SMALL_PICTURE | arguments))


def test_whole_numbers_and_lists_may_be_numpys(pipes: Pair) -> None:
    sizes = {"height": np.int64(64), "width": np.int32(72), "original_size": (np.int64(64), np.int64(72))}
    plain = steps_of(pipes[0], prompt="cat", sigmas=[20.0, 5.0, 0.0], num_inference_steps=50)[-1]
    given = sizes | {"sigmas": np.array([20.0, 5.0, 0.0]), "num_inference_steps": 50}
    assert torch.equal(steps_of(pipes[0], prompt="cat", **given)[-1], plain)


def test_no_black_picture_is_made_of_what_is_not_finite(pipes: Pair) -> None:
    """The stage is named, its step and its precision."""
    ours = pipes[0]
    ours.prompt_cache.clear()
    for part, stage in (
        (ours.text_encoder.layers[0].mlp.proj_out, "the prompt's embeddings"),
        (ours.unet.conv_out, "the latents after step 1 of 4"),
        (ours.vae.decoder.conv_out, "the VAE's image"),
    ):
        kept = part.weight.detach().clone()
        part.weight.data[0] = float("nan")
        with pytest.raises(FloatingPointError, match=f"{stage} are not finite, computed in torch.float64"):
            ours("cat", **SMALL_PICTURE)
        part.weight.data.copy_(kept)
        ours.prompt_cache.clear()

    def spoil(pipe: Any, i: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * (float("inf") if i == 1 else 1)}

    with pytest.raises(FloatingPointError, match="the latents after step 3 of 4 are not finite"):
        ours("cat", callback_on_step_end=spoil, **SMALL_PICTURE)
    assert np.isfinite(steps_of(ours, prompt="cat")[-1]).all(), "it works again"


def test_models_that_do_not_fit_together_are_named(pipes: Pair) -> None:
    parts = pipes[0].components
    inpainting = UNet(replace(SMALL.unet, in_channels=9))
    other_text = ChatGLM(replace(SMALL.text_encoder, hidden_size=32))
    few_words = ChatGLM(replace(SMALL.text_encoder, vocab_size=100))
    for change, message in (
        ({"unet": inpainting}, "the UNet has 9 in and 4 out channels, expected the VAE's 4 for both"),
        ({"text_encoder": other_text}, "the text encoder is 32 wide, and the UNet reads 64"),
        ({"text_encoder": few_words}, "tokens, and the text encoder only 100"),
    ):
        with pytest.raises(ValueError, match=message):
            KolorsPipeline(**parts | change)
    with pytest.raises(TypeError, match="unet must be .* a denoiser like it or None, got torch"):
        KolorsPipeline(**parts | {"unet": torch.nn.Linear(1, 1)})


def test_without_a_text_encoder_embeddings_are_asked_for(reference_folder: Path, pipes: Pair) -> None:
    pipe = KolorsPipeline.from_pretrained(reference_folder, text_encoder=None, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="no text encoder or tokenizer: pass prompt_embeds"):
        pipe("cat")
    pictures = pipe(**embeddings(pipes[0], "cat"), **SMALL_PICTURE).images
    assert pictures[0].size == (72, 64)


# The reference's page, and the image's own description.


def test_the_pages_first_example_runs_with_its_import_line_changed(
    reference_folder: Path, tmp_path: Path
) -> None:
    pipe = KolorsPipeline.from_pretrained(str(reference_folder), torch_dtype=torch.float16, variant="fp16")
    pipe.to("cpu")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    image = pipe(
        prompt='一张瓢虫的照片，微距，变焦，高质量，电影，拿着一个木牌，写着"可图"',
        negative_prompt="",
        guidance_scale=6.5,
        num_inference_steps=25,
    ).images[0]
    image.save(tmp_path / "kolors_sample.png")
    facts = read_metadata(tmp_path / "kolors_sample.png")
    assert facts["prompt"].startswith("一张瓢虫的照片") and facts["steps"] == "25"
    assert facts["sampler"] == "DPMSolverMultistepScheduler(use_karras_sigmas=True)"
    assert (facts["guidance_scale"], facts["size"]) == ("6.5", "128x128")
    assert facts["software"] == f"kolors_core {kolors_core.__version__}"
    assert "seed" not in facts, "no generator was given"


def test_each_picture_has_its_own_prompt_and_seed(pipes: Pair) -> None:
    seeds = (1, 2, 3, 4)
    pictures = pipes[0](
        ["cat", "的"], negative_prompt="red", num_images_per_prompt=2, **SMALL_PICTURE,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images  # fmt: skip
    assert [picture.info["prompt"] for picture in pictures] == ["cat", "cat", "的", "的"]
    assert [picture.info["seed"] for picture in pictures] == ["1", "2", "3", "4"]
    assert {picture.info["negative_prompt"] for picture in pictures} == {"red"}


def test_progress_can_be_switched_off(pipes: Pair, capsys: pytest.CaptureFixture) -> None:
    ours, _ = pipes
    run: Callable[[], Any] = lambda: ours("cat", **SMALL_PICTURE)  # noqa: E731
    run()
    assert capsys.readouterr().err == ""
    ours.set_progress_bar_config()
    try:
        run()
    finally:
        ours.set_progress_bar_config(disable=True)
    assert "4/4" in capsys.readouterr().err
