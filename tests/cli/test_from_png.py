"""An image drawn again from its own metadata, bit for bit, made by the library or the command line."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

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
from kolors_core.checkpoint import EMBEDDED
from kolors_core.cli.from_png import arguments_of
from kolors_core.cli.generate import main
from kolors_core.image import load_image
from kolors_core.pipelines.png_metadata import attach_metadata, save_png
from kolors_core.pipelines.provenance import describe_call
from kolors_core.pipelines.request import PipelineInputs
from tests.support.pipelines import picture

pytestmark = pytest.mark.numerical

SIZE = {"height": 64, "width": 72, "num_inference_steps": 3}
START = {"num_inference_steps": 4, "strength": 0.6}


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
    return pipe("a cat", **SIZE, generator=[generator(n) for n in (5, 3, 8)], num_images_per_prompt=3).images[
        2:
    ]


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
        return own(
            "a cat", start, **START, generator=generator(5), strength_map=load_image(files / "mask.png")
        ).images


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
    given = {
        "controlnet_conditioning_scale": 0.35,
        "control_guidance_start": 1 / 3,
        "control_guidance_end": 0.9,
    }
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


def test_an_image_of_the_command_line_is_drawn_again(files: Path, tmp_path: Path) -> None:
    """Its flags come back from the file, also those that the library does not have."""
    flags = ["a red cat", "--seed", "4", "--steps", "2", "--height", "64", "--width", "64", "-q"]
    more = ["--lora", f"{files}/0.safetensors:0.4", "--control", "tiny:0.5", "--canny", f"{files}/start.png",
            "--control-end", "0.75", "--unet-bits", "8", "--sampler", "dpmpp-2m-sde", "--dtype", "float32",
            "--images", "2", "--image", f"{files}/start.png", "--strength", "1", "--vae-tiling"]  # fmt: skip
    assert main([*flags, *more, "-o", str(tmp_path / "x.png")]) == 0
    for i in (1, 2):
        made = Image.open(tmp_path / f"x-{i}.png")
        found, unknown = arguments_of(tmp_path / f"x-{i}.png")
        assert main([*found[:-2], "-o", str(tmp_path / f"again{i}.png"), "-q", *found[-2:]]) == 0
        again = Image.open(tmp_path / f"again{i}.png")
        assert np.array_equal(np.asarray(made), np.asarray(again)) and not unknown
        same = {key: value for key, value in again.info.items() if key not in ("batch", "image", "quantized")}
        assert same.items() <= made.info.items()


def test_a_controlnet_of_one_file_is_its_folders_and_loaded_again(files: Path, tmp_path: Path) -> None:
    flags = ["a cat", "--seed", "4", "--steps", "1", "--height", "64", "--width", "64", "-q", "--canny"]
    net, made = EMBEDDED / "controlnet", []
    for i, source in enumerate((net, net / "diffusion_pytorch_model.safetensors")):
        out = tmp_path / f"{i}.png"
        assert main([*flags, f"{files}/start.png", "--control", f"{source}:0.6", "-o", str(out)]) == 0
        made.append(Image.open(out))
    found, unknown = arguments_of(tmp_path / "1.png")
    assert main(["-o", str(tmp_path / "again.png"), "-q", *found]) == 0 and not unknown
    made.append(Image.open(tmp_path / "again.png"))
    assert all(np.array_equal(np.asarray(made[0]), np.asarray(image)) for image in made)


@pytest.mark.exact
def test_transparency_that_changes_an_image_prompt_is_said(
    pipe: KolorsPipeline, files: Path, tmp_path: Path
) -> None:
    """An image prompt is seen on white, and a file is read without its alpha; 16 bits change nothing."""
    levels = np.arange(60 * 70, dtype=np.uint16).reshape(60, 70) * 15
    Image.fromarray(levels).save(tmp_path / "deep.png")
    picture(3).save(tmp_path / "plain.png")
    clear = picture(3).convert("RGBA")
    clear.putalpha(picture(4).convert("L"))
    clear.save(tmp_path / "clear.png")
    made = pipe("a cat", **SIZE, generator=generator(1)).images[0]
    known = {}
    for name in ("deep", "plain", "clear"):
        with Image.open(tmp_path / f"{name}.png") as image:
            inputs = PipelineInputs(prompt="a cat", ip_adapter_image=image)
            known[name] = describe_call(inputs)["ip_adapter_image"]
    for name, fact in known.items():
        attach_metadata(made, made.info | {"ip_adapter_image": fact})
        save_png(made, tmp_path / "made.png")
        said = [f"the image prompt, {tmp_path}/clear.png, has changed, or was given with transparency"]
        assert arguments_of(tmp_path / "made.png")[1] == (said if name == "clear" else [])


def test_a_lora_that_fits_in_part_is_loaded_again(pipe: KolorsPipeline, files: Path, tmp_path: Path) -> None:
    rest = {f"lora_te2_text_projection.lora_{part}.weight": torch.ones(2, 2) for part in ("down", "up")}
    save_file(_lora(files) | rest, tmp_path / "part.safetensors")
    own = KolorsPipeline.from_pipe(pipe)
    own.load_lora_weights(tmp_path / "part.safetensors", allow_partial=True)
    try:
        made = own("a cat", **SIZE, generator=generator(1)).images[0]
    finally:
        own.unload_lora_weights()
    assert_again(made, tmp_path)


def test_another_seed_is_another_image_of_it(pipe: KolorsPipeline, tmp_path: Path) -> None:
    """A seed that is given takes the place of the batch."""
    made = pipe("a cat", **SIZE, generator=generator(5), num_images_per_prompt=2).images[1]
    save_png(made, tmp_path / "made.png")
    flags, _ = arguments_of(tmp_path / "made.png")
    assert main(["-o", str(tmp_path / "9.png"), "--seed", "9", "-q", *flags]) == 0
    expected = pipe("a cat", **SIZE, generator=generator(9)).images[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "9.png")), np.asarray(expected))


@pytest.mark.exact
def test_what_is_not_known_is_said(pipe: KolorsPipeline, files: Path, tmp_path: Path) -> None:
    """Each input that an image cannot hold is a sentence, and an image that is needed is asked for."""
    own = KolorsImg2ImgPipeline.from_pipe(pipe)
    own.load_lora_weights({**_lora(files)}, adapter_name="toy")
    own.sampler = _sampler
    try:
        made = own("a cat", picture(9), **START, callback_on_step_end=lambda *_: {}).images[0]
    finally:
        own.unload_lora_weights()
    made.info |= {"model": "unknown: built by hand", "bits": '{"unet": "mixed"}'}
    attach_metadata(made, made.info)
    save_png(made, tmp_path / "made.png")
    flags, unknown = arguments_of(tmp_path / "made.png")
    assert unknown == [
        "no name of the model is known: give --weights",
        "the unet's layers were quantized to several formats",
        "the LoRA toy was given as tensors, and its file is not known: give --lora",
        "the image to start from is known by its pixels' hash only: give --image",
        "the sampler was an own function, _sampler",
        "callback_on_step_end was given, and is not in the image",
        "the noise is of torch's global generator, whose state cannot be known",
    ]  # fmt: skip
    assert main(["-o", str(tmp_path / "x.png"), "-q", *flags]) == 2, "an input is missing"


def _sampler(denoise: Any, x: torch.Tensor, sigmas: Any, on_step: Any = None) -> torch.Tensor:
    return denoise(x, float(sigmas[0]))


def _lora(files: Path) -> dict[str, torch.Tensor]:
    return load_file(files / "0.safetensors")


@pytest.mark.exact
def test_a_changed_input_is_said(
    pipe: KolorsPipeline, files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another image under the name, another LoRA, other weights, another version of torch."""
    for name in ("start.png", "1.safetensors"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    own = KolorsImg2ImgPipeline.from_pipe(pipe)
    own.load_lora_weights(tmp_path / "1.safetensors")
    try:
        made = own("a cat", load_image(tmp_path / "start.png"), **START, generator=generator(1)).images[0]
    finally:
        own.unload_lora_weights()
    facts = json.loads(made.info["fingerprint"]) | {"vae": "0123456789abcdef"}
    attach_metadata(made, made.info | {"torch": "1.0", "fingerprint": json.dumps(facts)})
    save_png(made, tmp_path / "made.png")
    picture(8).save(tmp_path / "start.png")
    (tmp_path / "1.safetensors").write_bytes((files / "0.safetensors").read_bytes())
    flags, unknown = arguments_of(tmp_path / "made.png")
    assert unknown == [f"the image to start from, {tmp_path}/start.png, has changed"]
    caplog.clear()
    assert main(["-o", str(tmp_path / "x.png"), *flags]) == 0
    said = "\n".join(record.message for record in caplog.records)
    for part in (
        "the vae is another than the image's",
        "the LoRAs are others",
        f"torch is {torch.__version__}, and was 1.0",
    ):
        assert part in said, said
    assert "the unet is another" not in said


@pytest.mark.exact
def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    picture().save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="plain.png: does not say how it was made"):
        arguments_of(tmp_path / "plain.png")
    scheduler = json.dumps(EulerDiscreteScheduler().to_public())
    facts = {
        "software": "x", "scheduler": scheduler, "model": "tiny", "dtype": "float32", "device": "cpu",
        "steps": "2", "size": "64x64", "sampler": "x", "prompt": "cat", "fingerprint": "{}",
        "guidance": "guided",
    }  # fmt: skip
    batch = {"image": 1, "num_images_per_prompt": 2, "generators": {"seed": 5}}
    faults = [
        {"lora": "[{]"}, {"lora": '[{"name": 1}]'}, {"scheduler": "{}"}, {"scheduler": "[" * 9999},
        {"guidance": "__import__('os').abort()"}, {"guidance": "guided(scale=open('x'))"},
        {"size": "1"}, {"control_steps": "x"}, {"guidance": "-" * 9999}, {"fingerprint": "null"},
        {"freeu": "s1=--force, s2=--out=/x.png"}, {"guidance": "perturbed(pag_applied_layers=['--force'])"},
        *({"batch": json.dumps(batch | {name: value})} for name, value in (
            ("image", 3), ("image", -1), ("generators", {"seed": 2**70}), ("generators", [{"seed": "x"}]),
            ("generators", {"seed": 5, "drawn": 10**15}), ("num_images_per_prompt", 10**12),
        )),
    ]  # fmt: skip
    for fault in faults:
        damaged = picture()
        attach_metadata(damaged, facts | fault)
        save_png(damaged, tmp_path / "damaged.png")
        if fault.get("guidance", "").startswith("__"):
            assert "the guidance rule was an own function" in arguments_of(tmp_path / "damaged.png")[1][0]
            continue
        with pytest.raises(ValueError, match="damaged.png: its metadata are damaged") as caught:
            arguments_of(tmp_path / "damaged.png")
        assert "\n" not in str(caught.value), fault
    assert main(["cat", "-o", str(tmp_path / "x.png"), "--exactly", str(tmp_path / "damaged.png")]) == 2


@pytest.mark.exact
def test_no_address_in_an_image_is_fetched_and_no_text_reaches_the_terminal(tmp_path: Path) -> None:
    """An image from a stranger names an address and has control characters in its texts."""
    made = picture()
    facts = {
        "software": "x", "model": "unknown", "dtype": "float32", "device": "\x1b[31mmars",
        "scheduler": json.dumps(EulerDiscreteScheduler().to_public()),
        "steps": "2", "size": "64x64", "sampler": "x", "prompt": "cat", "seed": "1", "fingerprint": "{}",
        "start_image": json.dumps({"file": "http://127.0.0.1:9/x.png", "sha256": "0"}),
        "control_image": json.dumps([{"sha256": "0"}]), "canny": "http://127.0.0.1:9/x.png",
    }  # fmt: skip
    attach_metadata(made, facts)
    save_png(made, tmp_path / "made.png")
    flags, unknown = arguments_of(tmp_path / "made.png")
    assert not [flag for flag in flags if flag.startswith(("--image", "--canny"))]
    assert "the image of --canny is at an address, which is not fetched" in unknown
    assert "the image to start from is known by its pixels' hash only: give --image" in unknown
    assert r"it was drawn on \x1b[31mmars, which rounds otherwise" in unknown
