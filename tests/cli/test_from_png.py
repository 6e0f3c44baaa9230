"""An image drawn again from its own metadata, bit for bit, whether the library or the command line made it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kolors_core import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    KolorsControlNet,
    KolorsControlNetPipeline,
    KolorsImg2ImgPipeline,
    KolorsInpaintPipeline,
    KolorsPAGPipeline,
    KolorsPipeline,
)
from kolors_core.adapters.lora import attach, save_adapters
from kolors_core.cli.from_png import arguments_of
from kolors_core.cli.generate import main
from kolors_core.image import load_image
from kolors_core.pipelines.png_metadata import save_png
from tests.support.pipelines import picture

pytestmark = pytest.mark.numerical

SIZE = {"height": 64, "width": 72, "num_inference_steps": 3}
START = {"num_inference_steps": 4, "strength": 0.6}
seed = torch.Generator().manual_seed


def generator(number: int, drawn: int = 0) -> torch.Generator:
    """A generator of this seed, from which some numbers were drawn."""
    own = torch.Generator().manual_seed(number)
    torch.randn(drawn, generator=own)
    return own


@pytest.fixture(scope="module")
def pipe() -> KolorsPipeline:
    pipe = KolorsPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def files(pipe: KolorsPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an image, a mask and two LoRAs."""
    folder = tmp_path_factory.mktemp("files")
    picture(3).save(folder / "start.png")
    picture(4).convert("L").point(lambda level: 255 * (level > 120)).save(folder / "mask.png")
    for i in range(2):
        adapter = attach(pipe.unet, rank=2)
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
        save_adapters({"unet": adapter}, folder / f"{i}.safetensors")
        adapter.detach()
    return folder


def again(made: Image.Image, folder: Path) -> tuple[Image.Image, list[str]]:
    """The image drawn again by the command line from its file, and what was said not to be known."""
    save_png(made, folder / "made.png")
    flags, unknown = arguments_of(folder / "made.png")
    assert main(["-o", str(folder / "again.png"), "--force", "-q", *flags]) == 0
    return Image.open(folder / "again.png"), unknown


def assert_again(made: Image.Image, folder: Path) -> None:
    drawn, unknown = again(made, folder)
    assert np.array_equal(np.asarray(made), np.asarray(drawn)), made.info
    assert not unknown


def euler(pipe: Any, files: Path) -> list[Image.Image]:
    pipe.scheduler = EulerDiscreteScheduler(use_karras_sigmas=True, timestep_spacing="trailing")
    return pipe("a ladybug", **SIZE, generator=generator(5)).images


def sde(pipe: Any, files: Path) -> list[Image.Image]:
    pipe.scheduler = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_order=1, final_sigmas_type="sigma_min"
    )
    return pipe("a cat", negative_prompt="-red", **SIZE, generator=generator(5), guidance_scale=3.25).images


def batch_of_one_generator(pipe: Any, files: Path) -> list[Image.Image]:
    given = {"generator": generator(5), "num_images_per_prompt": 2}
    return pipe(["a ladybug", "一只猫"], negative_prompt=["red", "blue"], **SIZE, **given).images[1:3]


def batch_of_several(pipe: Any, files: Path) -> list[Image.Image]:
    return pipe("a cat", **SIZE, generator=[generator(n) for n in (5, 3, 8)], num_images_per_prompt=3).images[2:]


def generator_in_use(pipe: Any, files: Path) -> list[Image.Image]:
    own, images = generator(5), []
    for _ in range(2):
        images += pipe("a cat", **SIZE, generator=own).images
    return images[1:]


def loras(pipe: Any, files: Path) -> list[Image.Image]:
    for i in range(2):
        pipe.load_lora_weights(files / f"{i}.safetensors", adapter_name=f"x{i}")
    pipe.set_adapters(["x0", "x1"], [0.3, {"unet": {"up": {"block_0": [0.1, 0.5]}, "mid": 0.7}}])
    return pipe("a cat", **SIZE, generator=generator(5), cross_attention_kwargs={"scale": 0.9}).images


def image_to_image(pipe: Any, files: Path) -> list[Image.Image]:
    own = KolorsImg2ImgPipeline.from_pipe(pipe)
    with Image.open(files / "start.png") as start:
        return own("a cat", start, **START, generator=generator(5), strength_map=load_image(files / "mask.png")).images


def inpainting(pipe: Any, files: Path) -> list[Image.Image]:
    own = KolorsInpaintPipeline.from_pipe(pipe)
    with Image.open(files / "start.png") as start, Image.open(files / "mask.png") as mask:
        return own("a cat", start, mask, **START, generator=generator(5)).images


def inpainting_a_region(pipe: Any, files: Path) -> list[Image.Image]:
    own = KolorsInpaintPipeline.from_pipe(pipe)
    start, mask = load_image(files / "start.png"), load_image(files / "mask.png")
    given = {"padding_mask_crop": 4, "height": 64, "width": 64, "paste_back": False}
    return own("a cat", start, mask, **START, **given, generator=generator(5)).images


def controlnet(pipe: Any, files: Path) -> list[Image.Image]:
    own = KolorsControlNetPipeline.from_pipe(pipe, controlnet=KolorsControlNet.from_pretrained("tiny"))
    given = {"controlnet_conditioning_scale": 0.35, "control_guidance_start": 1 / 3, "control_guidance_end": 0.9}
    edges = load_image(files / "mask.png")
    return own("a cat", edges, num_inference_steps=3, **given, generator=generator(5)).images


def perturbed_attention(pipe: Any, files: Path) -> list[Image.Image]:
    own = KolorsPAGPipeline.from_pipe(pipe, pag_applied_layers=["mid", "down.block_1"])
    own.enable_freeu(0.6, 0.4, 1.1, 1.2)
    return own("a cat", **SIZE, pag_scale=2.5, pag_adaptive_scale=0.01, generator=generator(5)).images


def guidance_modifiers(pipe: Any, files: Path) -> list[Image.Image]:
    from kolors_core.guidance import guided

    rule = partial(guided, rescale=0.7, interval=(0.1, 0.9))
    return pipe("a cat", **SIZE, guidance_rule=rule, generator=generator(5)).images


def conditions(pipe: Any, files: Path) -> list[Image.Image]:
    pipe.scheduler = EulerDiscreteScheduler()
    sizes = {"original_size": (512, 256), "crops_coords_top_left": (8, 4), "negative_target_size": (9, 9)}
    given = {"sigmas": [20.0, 5.5, 1.0, 0.0], "max_sequence_length": 16, "denoising_end": 0.9}
    return pipe("a cat", 64, 64, **sizes, **given, generator=generator(5)).images


CASES = [
    euler, sde, batch_of_one_generator, batch_of_several, generator_in_use, loras, image_to_image, inpainting,
    inpainting_a_region, controlnet, perturbed_attention, guidance_modifiers, conditions,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_an_image_of_the_library_is_drawn_again(
    case: Callable[[Any, Path], list[Image.Image]], pipe: KolorsPipeline, files: Path, tmp_path: Path
) -> None:
    own = KolorsPipeline.from_pipe(pipe)
    try:
        for made in case(own, files):
            assert_again(made, tmp_path)
    finally:
        own.unload_lora_weights()
        own.disable_freeu()
