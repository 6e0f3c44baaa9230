"""Calls that cannot fit are refused at once, by numbers, before memory is taken; those that fit are not."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from kolors_core import KolorsImg2ImgPipeline, KolorsInpaintPipeline, KolorsPipeline
from kolors_core.pipelines import memory_bounds
from kolors_core.pipelines.memory_plan import check_fits
from kolors_core.pipelines.stages import Task

SMALL = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "latent"}
MIB = 2**20


@pytest.fixture(scope="module")
def pipe() -> KolorsPipeline:
    pipe = KolorsPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def from_image(pipe: Task, **arguments: Any) -> Any:
    return KolorsImg2ImgPipeline.from_pipe(pipe)(image=Image.new("RGB", (64, 64)), strength=0.5, **arguments)


def inpainted(pipe: Task, **arguments: Any) -> Any:
    image, mask = Image.new("RGB", (64, 64)), Image.new("L", (64, 64), 255)
    return KolorsInpaintPipeline.from_pipe(pipe)(image=image, mask_image=mask, strength=0.9, **arguments)


TASKS: dict[str, Callable[..., Any]] = {
    "text": lambda pipe, **given: pipe(**given), "image": from_image, "mask": inpainted
}  # fmt: skip
ABSURD: list[dict[str, Any]] = [
    {"num_images_per_prompt": 2**24}, {"height": 2**24, "width": 2**24}, {"prompt": ["a cat"] * 10**6},
    {"height": 2**20, "width": 2**20, "output_type": "pil"},
    {"prompt": None, "prompt_embeds": torch.zeros(1, 1, 192).expand(10**9, 1, 192),
     "pooled_prompt_embeds": torch.zeros(1, 192).expand(10**9, 192)},
]  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("absurd", ABSURD, ids=lambda given: "-".join(given))
def test_what_cannot_fit_is_refused_before_anything_is_made(
    pipe: KolorsPipeline, task: str, absurd: dict[str, Any]
) -> None:
    begin = time.perf_counter()
    message = r"x .* pixels at once take over [\d,]+\.\d GiB, and cpu has [\d,]+\.\d GiB available: ask for"
    with pytest.raises(ValueError, match=message):
        TASKS[task](pipe, **SMALL | absurd)
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guidance_scale": True}, "guidance_scale must be a number, got True"),
        ({"guidance_scale": 10**400}, "guidance_scale must be a number, got 1000"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a positive whole number, got 0"),
        ({"num_images_per_prompt": True}, "num_images_per_prompt must be a positive whole number, got True"),
        ({"num_images_per_prompt": 10**9}, "num_images_per_prompt must be .* up to 16,777,216"),
        ({"height": 10**9}, "height must be a positive multiple of 8 up to 16,777,216"),
        ({"width": True}, "width must be a positive multiple of 8, got True"),
        ({"num_inference_steps": 10**9}, "the number of steps must be a whole number from 1 to 1099"),
        ({"num_inference_steps": True}, "the number of steps must be .*, got True"),
        ({"max_sequence_length": 10**9}, "max_sequence_length must be"),
    ],
)
def test_absurd_numbers_are_named_at_once(pipe: KolorsPipeline, given: dict[str, Any], message: str) -> None:
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        pipe(**SMALL | given)
    assert time.perf_counter() - begin < 1


def test_the_bound_is_below_what_is_allocated(pipe: KolorsPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call is refused if less than the bound is there, which in turn is less than the call takes."""
    given = SMALL | {"height": 128, "width": 128, "num_images_per_prompt": 4}
    bound = 4 * 16 * 16 * (2 * 64 * 4 + 4 * 4)  # of two rows of 64 features an image, and its noise
    taken: list[int] = []

    def note(_module: Any, _inputs: Any, x: Tensor) -> None:
        taken.append(x.nbytes)

    monkeypatch.setattr(memory_bounds, "LEAST_NEED", 0)
    monkeypatch.setattr(type(pipe), "_available_memory", lambda self: bound)
    handle = pipe.unet.down[0].resnets[0].conv1.register_forward_hook(note)
    try:
        pipe(**given)
    finally:
        handle.remove()
    assert 2 * taken[0] > bound, "the first layer's input and output alone take more"
    monkeypatch.setattr(type(pipe), "_available_memory", lambda self: bound - 1)
    with pytest.raises(ValueError, match=r"^4 x 128x128 pixels at once take over 0\.0 GiB"):
        pipe(**given)
    monkeypatch.setattr(type(pipe), "_available_memory", lambda self: None)
    pipe(**given)  # where it is not known, nothing is refused


def test_a_plan_that_does_not_fit_is_refused_with_what_would(
    pipe: KolorsPipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    needed = check_fits(pipe, 128, 128, num_images_per_prompt=4)
    assert needed.mode == "resident" and not capsys.readouterr().out
    weights = needed.resident - max(stage.work for stage in needed.stages.values())
    room = int((needed.resident - weights) * 2**30)
    monkeypatch.setattr(type(pipe), "_available_memory", lambda self: room + MIB)
    assert check_fits(pipe, 128, 128, num_images_per_prompt=4) == needed
    monkeypatch.setattr(type(pipe), "_available_memory", lambda self: room - MIB)
    message = (
        r"^4 images of 128x128 with guidance on cpu needs 0\.\d\d GiB \(all resident\), 0\.\d\d for the "
        r"work of the vae, and 0\.\d\d GiB can be had: enable_vae_tiling\(\).*; 3 in a call fit; smaller"
    )
    with pytest.raises(ValueError, match=message):
        check_fits(pipe, 128, 128, num_images_per_prompt=4)
    assert check_fits(pipe, 128, 128, num_images_per_prompt=3).run.startswith("3 images"), "as it was said"


def test_weights_that_are_not_loaded_are_planned_and_not_checked() -> None:
    with pytest.raises(ValueError, match="can only be planned"):
        check_fits(KolorsPipeline.from_pretrained("tiny", device="meta"))
