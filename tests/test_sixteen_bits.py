"""Images of more than 8 bits: at every entry the same as in 8; masks whose shape is in their alpha."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from kolors_core import (
    IPAdapterMaskProcessor,
    KolorsControlNet,
    KolorsControlNetPipeline,
    KolorsImg2ImgPipeline,
    KolorsInpaintPipeline,
    KolorsPipeline,
    canny,
    load_image,
)
from kolors_core.adapters.clip_vision import CLIPVision, preprocess_clip
from kolors_core.cli.generate import main
from kolors_core.pipelines.masks import load_mask, resize_to_fit, to_gray
from kolors_core.training.data import Example, load_pixels
from tests.support.images import DEEP, deepened
from tests.support.small import SMALL_CLIP

RAMP = Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1)))
FLAT = Image.new("RGB", (64, 64), (9, 200, 40))
MASK = Image.new("L", (64, 64))
MASK.paste(255, (32, 32, 64, 64))
LOSSLESS = dict(num_inference_steps=2, guidance_scale=1.0, output_type="pt")


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    text = KolorsPipeline.from_pretrained("tiny")
    text.set_progress_bar_config(disable=True)
    net = KolorsControlNet.from_pretrained("tiny")
    seeing = KolorsPipeline.from_pipe(text, image_encoder=CLIPVision(SMALL_CLIP))
    size = SMALL_CLIP.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return {
        "image": KolorsImg2ImgPipeline.from_pipe(text), "inpaint": KolorsInpaintPipeline.from_pipe(text),
        "control": KolorsControlNetPipeline.from_pipe(text, controlnet=net), "clip": seeing,
        "their clip": KolorsPipeline.from_pipe(seeing, feature_extractor=processor),
        "inpaint control": KolorsInpaintPipeline.from_pipe(text, controlnet=net),
    }  # fmt: skip


def run(pipe: Any, *images: Any, **more: Any) -> torch.Tensor:
    return pipe("a ladybug", *images, generator=torch.Generator().manual_seed(0), **LOSSLESS | more).images


def from_file(read: Callable[[Path], Any]) -> Callable[[Any, Image.Image, Path], Any]:
    def way(pipes: Any, image: Image.Image, folder: Path) -> Any:
        image.save(folder / "image.tif")
        return read(folder / "image.tif")

    return way


CROP = dict(height=64, width=64, padding_mask_crop=4)
ENTRIES: dict[str, Callable[[Any, Image.Image, Path], Any]] = {
    "img2img image": lambda pipes, x, _: run(pipes["image"], x, strength=1.0),
    "strength_map": lambda pipes, x, _: run(pipes["image"], FLAT, strength=1.0, strength_map=x),
    "inpaint image": lambda pipes, x, _: run(pipes["inpaint"], x, MASK),
    "mask_image": lambda pipes, x, _: run(pipes["inpaint"], FLAT, x),
    "image and mask to be cropped": lambda pipes, x, _: run(pipes["inpaint"], x, x, **CROP),
    "control_image to be cropped":
        lambda pipes, x, _: run(pipes["inpaint control"], FLAT, MASK, control_image=x, **CROP),
    "control_image": lambda pipes, x, _: run(pipes["control"], x),
    "canny": lambda pipes, x, _: canny(x, 4, 8),
    "ip_adapter_image, face_image":
        lambda pipes, x, _: pipes["clip"]._pixels([x], pipes["clip"].image_encoder),
    "the same by the reference's processor":
        lambda pipes, x, _: pipes["their clip"]._pixels(x, pipes["clip"].image_encoder),
    "preprocess_clip": lambda pipes, x, _: preprocess_clip(x, 28),
    "IPAdapterMaskProcessor": lambda pipes, x, _: IPAdapterMaskProcessor().preprocess(x),
    "load_image": from_file(load_image),
    "load_mask": from_file(lambda file: load_mask(str(file), "mask_image")),
    "training data": from_file(lambda file: load_pixels(Example(file, ("",), 64, 64), (32, 64))[0]),
}  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
def test_more_bits_are_the_same_image_at_every_entry(entry: str, pipes: Any, tmp_path: Path) -> None:
    way = ENTRIES[entry]
    expected, white = (np.asarray(way(pipes, x, tmp_path)) for x in (RAMP, Image.new("L", (64, 64), 255)))
    for kind in DEEP:
        found = np.asarray(way(pipes, deepened(RAMP, kind), tmp_path))
        assert np.array_equal(found, expected) and not np.array_equal(found, white), kind


def test_the_command_line_reads_them_too(tmp_path: Path) -> None:
    drawn = []
    for kind in (None, "I;16"):
        (RAMP if kind is None else deepened(RAMP, kind)).save(tmp_path / "ramp.png")
        out = str(tmp_path / f"{kind}.png")
        given = ["--image", str(tmp_path / "ramp.png"), "--mask", str(tmp_path / "ramp.png"), "--steps", "2"]
        assert main(["a cat", *given, "--seed", "1", "-g", "1", "--device", "cpu", "-q", "-o", out]) == 0
        drawn.append(np.asarray(Image.open(out)))
    assert np.array_equal(*drawn)


def hole(color: tuple[int, ...], mode: str = "RGBA") -> Image.Image:
    """One color, transparent in a corner."""
    image = Image.new(mode, (64, 64), (*color, 255))
    image.paste((*color, 0), (32, 32, 64, 64))
    return image


@pytest.mark.parametrize(
    "kind", ["mask_image", "strength_map", "a mask of an IP-Adapter", "mask_image of a file"]
)
def test_a_mask_whose_shape_is_its_alpha_is_said_once(
    kind: str, pipes: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ways: dict[str, Callable[[Image.Image], object]] = {
        "mask_image": lambda mask: run(pipes["inpaint"], FLAT, mask),
        "strength_map": lambda mask: run(pipes["image"], FLAT, strength=1.0, strength_map=mask),
        "a mask of an IP-Adapter": lambda mask: IPAdapterMaskProcessor().preprocess(mask),
        "mask_image of a file": lambda mask: (mask.save(tmp_path / "m.png"),
                                              load_mask(str(tmp_path / "m.png"), kind)),
    }  # fmt: skip
    for mask in (hole((255, 255, 255)), hole((255,), "LA")):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "kolors_core"):
            ways[kind](mask)
        (line,) = [text for text in caplog.messages if "alpha" in text]
        assert line.startswith(
            f"{kind}: its gray is the same everywhere and its shape is in its alpha, which is not read"
        )
        assert "give image.getchannel('A'), or ImageOps.invert of it" in line
    caplog.clear()
    for mask in (MASK.convert("RGBA"), MASK, Image.new("RGBA", (64, 64), "white")):
        ways[kind](mask)
    assert "alpha" not in caplog.text, "a mask of gray, and one that is opaque everywhere"


def test_what_is_said_to_do_makes_the_mask() -> None:
    assert torch.equal(
        to_gray(hole((0, 0, 0)).getchannel("A"), (64, 64), [(64, 64)]),
        1 - to_gray(MASK, (64, 64), [(64, 64)]),
    )


def test_a_resize_that_would_fill_the_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="100000 x 100000 .*10,000,000,000 pixels, expected at most"):
        resize_to_fit(FLAT, (8, 100_000), covers=True)
