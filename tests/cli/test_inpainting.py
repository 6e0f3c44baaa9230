"""Inpainting and strength maps on the command line: the pipeline's images, and one-line errors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kolors_core import (
    DPMSolverMultistepScheduler,
    KolorsControlNet,
    KolorsImg2ImgPipeline,
    KolorsInpaintPipeline,
)
from kolors_core.cli.generate import main
from kolors_core.pipelines.png_metadata import read_metadata
from tests.support.controlnets import write_controlnet
from tests.support.inpainting import NINE, mask_of
from tests.support.pipelines import picture
from tests.support.reference_folder import reference_pipeline


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Path) -> Path:
    """An image, its mask, and a checkpoint with a UNet of 9 channels."""
    folder = tmp_path_factory.mktemp("files")
    picture().save(folder / "cat.png")
    mask_of().convert("RGB").save(folder / "mask.png")
    reference_pipeline(small_tokenizer, NINE).save_pretrained(folder / "nine")
    return folder


def draw(weights: Path, files: Path, out: Path, *more: str) -> np.ndarray:
    """What the command line makes, as pixels."""
    command = ["cat", "-w", str(weights), "--image", str(files / "cat.png"), "-o", str(out), "--seed", "3"]
    assert main([*command, "--steps", "4", "--device", "cpu", "-q", *more]) == 0
    with Image.open(out) as image:
        return np.asarray(image).astype(int)


def expected(kind: Any, weights: Path, nets: Any = None, **arguments: Any) -> np.ndarray:
    """What the pipeline makes of the same."""
    pipe = kind.from_pretrained(weights, controlnet=nets)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    made = pipe(
        "cat", picture(), num_inference_steps=4, guidance_scale=5.0, **arguments,
        generator=[torch.Generator().manual_seed(3)],
    ).images[0]  # fmt: skip
    return np.asarray(made).astype(int)


def test_masks_do_what_they_do_in_the_pipeline(files: Path, reference_folder: Path, tmp_path: Path) -> None:
    mask, outside = ["--mask", str(files / "mask.png")], np.asarray(mask_of()) == 0
    ways: list[tuple[list[str], dict[str, Any]]] = [
        ([], {}),
        (["--padding-mask-crop", "4", "--height", "64", "--width", "64"],
         {"padding_mask_crop": 4, "height": 64, "width": 64}),
        (["--no-paste-back", "--strength", "0.5"], {"paste_back": False, "strength": 0.5}),
    ]  # fmt: skip
    for weights in (files / "nine", reference_folder):
        for i, (flags, arguments) in enumerate(ways):
            made = draw(weights, files, tmp_path / f"{weights.name}{i}.png", *mask, *flags)
            other = expected(KolorsInpaintPipeline, weights, mask_image=mask_of(), **arguments)
            assert abs(made - other).max() <= 1
            changed = (made != np.asarray(picture())).any(-1)
            assert changed.any() and changed[outside].any() == ("--no-paste-back" in flags)
    told = read_metadata(tmp_path / "nine1.png")
    assert json.loads(told["mask_image"])["file"] == str(files / "mask.png")
    assert told["padding_mask_crop"] == "4"


def test_a_unet_that_reads_the_mask_takes_a_controlnet(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    net = write_controlnet(tmp_path / "net", 20)
    flags = ["--mask", str(files / "mask.png"), "--control", f"{net}:0.5"]
    flags += ["--control-image", str(files / "cat.png")]
    made = draw(files / "nine", files, tmp_path / "made.png", *flags)
    given = {"nets": KolorsControlNet.from_pretrained(net), "controlnet_conditioning_scale": 0.5}
    given |= {"control_image": picture(), "mask_image": mask_of()}
    assert abs(made - expected(KolorsInpaintPipeline, files / "nine", **given)).max() <= 1
    command = ["-w", str(files / "nine"), "--image", "x.png", "--plan", "--device", "cpu", *flags]
    assert main(command) == 0 and "unet" in capsys.readouterr().out


def test_a_strength_map_does_what_it_does_in_the_pipeline(
    files: Path, reference_folder: Path, tmp_path: Path
) -> None:
    flags = ["--strength-map", str(files / "mask.png"), "--strength", "1"]
    made = draw(reference_folder, files, tmp_path / "map.png", *flags)
    other = expected(KolorsImg2ImgPipeline, reference_folder, strength=1.0, strength_map=mask_of())
    assert abs(made - other).max() <= 1
    told = read_metadata(tmp_path / "map.png")
    assert json.loads(told["strength_map"])["file"] == str(files / "mask.png")
    assert abs(made - draw(reference_folder, files, tmp_path / "all.png", "--strength", "1")).max() > 1


def test_nine_channels_are_planned(files: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["-w", str(files / "nine"), "--image", "x.png", "--mask", "y.png", "--plan", "--device", "cpu"]
    assert main(flags) == 0 and "unet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mask", "m.png"], "--mask has no effect without --image"),
        (["--strength-map", "m.png"], "--strength-map has no effect without --image"),
        (["--image", "i.png", "--padding-mask-crop", "3"], "mask-crop has no effect without --mask"),
        (["--image", "i.png", "--no-paste-back"], "--no-paste-back has no effect without --mask"),
        (["--image", "i.png", "--mask", "m.png", "--strength-map", "m.png"], "exclude each other"),
        (["--image", "CAT", "--mask", "no.png"], "no.png: no such file"),
        (["--image", "CAT", "--mask", "CAT", "--padding-mask-crop", "-1"], "must be a whole number"),
        (["--image", "CAT", "--mask", "NINE/model_index.json"], "not an image"),
        (["--image", "CAT"], "one with a mask is for KolorsInpaintPipeline"),
    ],
)  # fmt: skip
def test_errors_are_one_line(
    flags: list[str], message: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = [
        flag.replace("CAT", str(files / "cat.png")).replace("NINE", str(files / "nine")) for flag in flags
    ]
    command = ["cat", "-w", str(files / "nine"), "-o", str(tmp_path / "x.png"), "-q", "--device", "cpu"]
    assert main([*command, *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "x.png").exists()
