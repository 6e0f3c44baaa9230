"""The command line: the reference's image from a folder, its description, and one-line errors."""

import json
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from kolors_core import (
    DPMSolverMultistepScheduler,
    KolorsControlNet,
    KolorsControlNetPipeline,
    KolorsImg2ImgPipeline,
    KolorsPipeline,
    canny,
)
from kolors_core.adapters.lora import attach, save_adapters
from kolors_core.cli.generate import main
from kolors_core.cli.options import parse_source_scale, with_revision
from kolors_core.pipelines.pag import perturbed
from kolors_core.pipelines.png_metadata import read_metadata
from tests.support.controlnets import write_controlnet
from tests.support.ip_adapters import write_adapter
from tests.support.parity import pair
from tests.support.pipelines import picture
from tests.support.processes import COMMAND, run_program

PROMPT = "一张瓢虫的照片，微距，高质量"


@pytest.mark.parametrize("sampler", ["dpmpp-2m-karras", "euler"])
def test_its_png_is_the_references(reference_folder: Path, tmp_path: Path, sampler: str) -> None:
    """A folder as published goes through the command line; no pixel differs by more than 1 of 255."""
    out = tmp_path / "out.png"
    arguments = [COMMAND, PROMPT, "--weights", str(reference_folder), "--variant", "fp16", "-o", str(out),
                 "--seed", "7", "--negative", "red cat", "--guidance", "6.5", "--steps", "10",
                 "--device", "cpu", "--sampler", sampler, "--height", "96", "--width", "128"]  # fmt: skip
    run = run_program(*arguments)
    assert run.returncode == 0, run.stderr
    assert "10/10" in run.stderr and "seed 7" in run.stderr

    pipe = diffusers.KolorsPipeline.from_pretrained(reference_folder, variant="fp16", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if sampler == "dpmpp-2m-karras":
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, use_karras_sigmas=True
        )
    expected = pipe(
        prompt=PROMPT, negative_prompt="red cat", guidance_scale=6.5, num_inference_steps=10, height=96,
        width=128, generator=torch.Generator().manual_seed(7),
    ).images[0]  # fmt: skip
    mine = np.asarray(Image.open(out)).astype(int)
    assert mine.shape == (96, 128, 3) and mine.std() > 5
    assert abs(mine - np.asarray(expected).astype(int)).max() <= 1


def draw(folder: Path, out: Path, *more: str) -> int:
    return main(["cat", "-w", str(folder), "-o", str(out), "--steps", "2", "--device", "cpu", "-q", *more])


def test_a_picture_tells_how_it_was_made(
    reference_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "new" / "cat.png"
    assert draw(reference_folder, out, "--seed", "5", "-n", "dog", "--guidance", "3.5", "--height", "64") == 0
    assert capsys.readouterr() == (f"{out}\n", ""), "quiet means: what was written, and nothing else"
    assert main(["--info", str(out)]) == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    fingerprint, scheduler = (json.loads(printed.pop(name)) for name in ("fingerprint", "scheduler"))
    assert fingerprint.keys() == {"text_encoder", "unet", "vae"} and scheduler["use_karras_sigmas"] is True
    assert printed == {
        "prompt": "cat", "negative_prompt": "dog", "seed": "5", "steps": "2", "guidance_scale": "3.5",
        "sampler": "DPMSolverMultistepScheduler(use_karras_sigmas=True)", "size": "128x64",
        "task": "KolorsPipeline", "model": str(reference_folder), "dtype": "float32", "device": "cpu",
        "threads": str(torch.get_num_threads()), "torch": torch.__version__, "software": "kolors_core 0.1.0",
    }  # fmt: skip


def test_a_seed_is_chosen_written_down_and_gives_the_picture_again(
    reference_folder: Path, tmp_path: Path
) -> None:
    assert draw(reference_folder, tmp_path / "a.png") == 0
    with Image.open(tmp_path / "a.png") as first:
        seed, pixels = first.info["seed"], np.asarray(first)
    assert draw(reference_folder, tmp_path / "b.png", "--seed", seed) == 0
    assert np.array_equal(pixels, np.asarray(Image.open(tmp_path / "b.png")))


def test_several_pictures_are_numbered_and_each_is_its_seeds(reference_folder: Path, tmp_path: Path) -> None:
    assert draw(reference_folder, tmp_path / "x.png", "--images", "2", "--seed", "3") == 0
    assert draw(reference_folder, tmp_path / "alone.png", "--seed", "4") == 0
    second = np.asarray(Image.open(tmp_path / "x-2.png")).astype(int)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.png", "x-1.png", "x-2.png"]
    assert abs(second - np.asarray(Image.open(tmp_path / "alone.png")).astype(int)).max() <= 1


def test_size_conditions_and_own_steps(reference_folder: Path, tmp_path: Path) -> None:
    sizes = ["--original-size", "512,256", "--crop", "8x4", "--target-size", "64,64",
             "--negative-crop", "1,1", "--negative-original-size", "99,99",
             "--negative-target-size", "9,9"]  # fmt: skip
    own = ["--sampler", "euler", "--sigmas", "20,5,1,0", "--max-tokens", "16", "--denoising-end", "1"]
    command = ["cat", "-w", str(reference_folder), "-o", str(tmp_path / "x.png"), "-q", "--device", "cpu"]
    assert main([*command, *sizes, *own]) == 0


@pytest.fixture(scope="module")
def guides(reference_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an image, an IP-Adapter with its image encoder, and a LoRA."""
    folder = tmp_path_factory.mktemp("guides")
    picture().save(folder / "cat.png")
    write_adapter(folder / "plus" / "ip_adapter.safetensors")
    pair("image_encoder", torch.float32)[1].save_pretrained(folder / "plus" / "image_encoder")
    unet = KolorsPipeline.from_pretrained(reference_folder).unet
    for i in range(2):
        adapter = attach(unet, rank=2)
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
        save_adapters({"unet": adapter}, folder / f"{i}.safetensors")
        adapter.detach()
    return folder


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


def test_pictures_and_adapters_do_what_they_do_in_the_pipeline(
    reference_folder: Path, guides: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--image", str(guides / "cat.png"), "--strength", "1", "--ip-image", str(guides / "cat.png"),
             "--ip-adapter", str(guides / "plus"), "--ip-scale", "0.5",
             "--lora", f"{guides}/0.safetensors:0.5", "--lora", f"{guides}/1.safetensors"]  # fmt: skip
    assert draw(reference_folder, tmp_path / "all.png", "--seed", "3", *flags) == 0
    assert capsys.readouterr() == (f"{tmp_path}/all.png\n", "")

    pipe = KolorsImg2ImgPipeline.from_pretrained(reference_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    for i in range(2):
        pipe.load_lora_weights(guides / f"{i}.safetensors", adapter_name=str(i))
    pipe.set_adapters(["0", "1"], [0.5, 1.0])
    pipe.load_ip_adapter(guides / "plus")
    pipe.set_ip_adapter_scale(0.5)
    with Image.open(guides / "cat.png") as start:
        expected = pipe(
            "cat", start, strength=1.0, num_inference_steps=2, ip_adapter_image=start,
            generator=torch.Generator().manual_seed(3),
        ).images[0]  # fmt: skip
    assert abs(pixels(tmp_path / "all.png") - np.asarray(expected).astype(int)).max() <= 1
    for i, left_out in enumerate((slice(2, 4), slice(4, 10), slice(10, 12), slice(12, 14))):
        fewer = [*flags[: left_out.start], *flags[left_out.stop :]]  # in turn strength, IP-Adapter, LoRAs
        steps = ["--steps", "4"] if i == 0 else []  # of which the default strength leaves one
        assert draw(reference_folder, tmp_path / f"{i}.png", "--seed", "3", *fewer, *steps) == 0
        assert abs(pixels(tmp_path / f"{i}.png") - pixels(tmp_path / "all.png")).max() > 1, left_out
    told = read_metadata(tmp_path / "all.png")
    assert (json.loads(told["start_image"])["file"], told["strength"]) == (f"{guides}/cat.png", "1.0")
    loras = [(lora["from"], lora["weight"]) for lora in json.loads(told["lora"])]
    assert loras == [(f"{guides}/0.safetensors", 0.5), (f"{guides}/1.safetensors", 1.0)]
    assert (told["ip_adapter"], told["ip_adapter_scale"]) == (f"{guides}/plus", "0.5")


def test_a_lora_tells_what_it_matched(
    reference_folder: Path, guides: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["cat", "-w", str(reference_folder), "--steps", "1", "-o", str(tmp_path / "x.png")]
    assert main([*command, "--device", "cpu", "--lora", str(guides / "0.safetensors")]) == 0
    assert "0.safetensors: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("C:/a.safetensors", ("C:/a.safetensors", 1.0)),
        ("C:/a.safetensors:-1", ("C:/a.safetensors", -1.0)),
        ("owner/name@refs/pr/4:2", ("owner/name@refs/pr/4", 2.0)),
    ],
)
def test_a_scale_stands_behind_the_last_colon(text: str, found: tuple[str, float]) -> None:
    assert parse_source_scale(text) == found


def test_a_revision_stands_behind_an_at(tmp_path: Path) -> None:
    assert with_revision("owner/name@refs/pr/4") == ("owner/name", "refs/pr/4")
    (tmp_path / "me@home").mkdir()
    assert with_revision(str(tmp_path / "me@home")) == (str(tmp_path / "me@home"), None)


def test_guidance_rules_and_freeu(reference_folder: Path, tmp_path: Path) -> None:
    """The image of a pipeline that was told the same, and a description that tells it again."""
    rule = ["--pag", "2", "--pag-layers", "mid", "up_blocks.1", "--pag-adaptive", "0.001",
            "--guidance-rescale", "0.5", "--guidance-interval", "0", "0.5"]  # fmt: skip
    freeu = ["--freeu", "0.6", "0.4", "1.1", "1.2"]
    assert draw(reference_folder, tmp_path / "a.png", "--seed", "3", *rule, *freeu) == 0
    told = read_metadata(tmp_path / "a.png")
    assert told["guidance"] == (
        "perturbed(pag_scale=2.0, pag_adaptive_scale=0.001, pag_applied_layers=['mid', 'up_blocks.1'], "
        "rescale=0.5, interval=(0.0, 0.5))"
    )
    assert told["freeu"] == "s1=0.6, s2=0.4, b1=1.1, b2=1.2"
    pipe = KolorsPipeline.from_pretrained(reference_folder)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    pipe.guided = partial(
        perturbed, pag_scale=2.0, pag_adaptive_scale=0.001, pag_applied_layers=["mid", "up_blocks.1"],
        rescale=0.5, interval=(0.0, 0.5),
    )  # fmt: skip
    pipe.enable_freeu(0.6, 0.4, 1.1, 1.2)
    image = pipe("cat", num_inference_steps=2, generator=torch.Generator().manual_seed(3)).images[0]
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(image))
    assert draw(reference_folder, tmp_path / "b.png", "--seed", "3", *freeu) == 0
    assert draw(reference_folder, tmp_path / "c.png", "--seed", "3", "--guidance-rescale", "1") == 0
    assert read_metadata(tmp_path / "c.png")["guidance"] == "guided(rescale=1.0)"
    assert len({pixels(tmp_path / f"{name}.png").tobytes() for name in "abc"}) == 3


def test_a_plan_counts_every_row(reference_folder: Path, capsys: pytest.CaptureFixture) -> None:
    """A late interval too: what the most expensive step needs."""
    plans = []
    for more in ([], ["--pag", "3"], ["--pag", "3", "--guidance-interval", "0.9", "1"]):
        assert main(["--plan", "-w", str(reference_folder), "--device", "cpu", "-q", *more]) == 0
        plans.append(capsys.readouterr().out)
    assert plans[0] != plans[1] == plans[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt: say what to draw"),
        (["cat", "-w", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["cat", "-w", "FOLDER", "--height", "100"], "height must be a positive multiple of 8, got 100"),
        (["cat", "-w", "FOLDER", "--steps", "-1"], "got -1"),
        (["cat", "-w", "FOLDER", "--steps", "5", "--sigmas", "1,0"], "--steps has no effect with"),
        (
            ["cat", "-o", "x.gif"],
            "--out must end in .png, .jpg, .jpeg, .webp or be -, got x.gif",
        ),
        (["cat", "-o", "-", "--images", "2"], "--out - takes one image, got --images 2"),
        (["cat", "-w", "FOLDER", "-o", "EXISTS.png"], "exists: choose another --out, or --force"),
        (["cat", "-w", "FOLDER", "--device", "toaster"], "expected a device of this machine"),
        (["cat", "-w", "no such folder", "--images", "0"], "--images must be a positive whole number"),
        (["cat", "-w", "no such folder", "--steps", "-1"], "--steps must be a positive whole number"),
        (["cat", "-w", "FOLDER", "--strength", "0.5"], "--strength has no effect without --image"),
        (["cat", "-w", "FOLDER", "--ip-image", "EXISTS.png"], "--ip-adapter, --ip-image and --ip-scale need"),
        (
            ["cat", "-w", "FOLDER", "--control", "canny"],
            "got 1 --control and 0 of --control-image and",
        ),
        (["cat", "-w", "FOLDER", "--canny", "EXISTS.png"], "got 0 --control and 1 of --control-image and"),
        (["cat", "-w", "FOLDER", "--control-end", "0.5"], "--control-end has no effect without --control"),
        (["cat", "-w", "FOLDER", "--ip-scale", "1"], "--ip-adapter, --ip-image and --ip-scale need"),
        (["cat", "-w", "FOLDER", "-o", "x.png", "--image", "EXISTS.png"], "EXISTS.png"),
        (["cat", "-w", "FOLDER", "--image", "no.png"], "no.png"),
        (["cat", "-w", "FOLDER", "--lora", "no.safetensors"], "no.safetensors"),
        (["cat", "-w", "FOLDER", "--pag", "0"], "pag_scale must be above 0, got 0.0"),
        (["cat", "-w", "FOLDER", "--pag-layers", "mid"], "have no effect without --pag"),
        (["cat", "-w", "FOLDER", "--pag-adaptive", "0.1"], "have no effect without --pag"),
        (
            ["cat", "-w", "FOLDER", "--pag", "3", "--pag-layers", "mid", "low"],
            "is named 'low'",
        ),
        (
            ["cat", "-w", "FOLDER", "--pag", "3", "--pag-adaptive", "-1"],
            "must be 0 or more, got -1.0",
        ),
        (["cat", "-w", "FOLDER", "--guidance-rescale", "7"], "rescale must be from 0 to 1, got 7.0"),
        (
            ["cat", "-w", "FOLDER", "--guidance-rescale", "0.7", "-g", "1"],
            "need --guidance above 1",
        ),
        (
            ["cat", "-w", "FOLDER", "--guidance-interval", "0.8", "0.2"],
            "must rise from 0 or more to 1",
        ),
        (["cat", "-w", "FOLDER", "--freeu", "-1", "1", "1", "1"], "s1 must be 0 or more, got -1.0"),
        (["--info", "FOLDER/model_index.json"], "not an image"),
        (["--info", "nothing.png"], "nothing.png"),
        (["cat", "--images", "257"], "--images must be at most 256, got 257: kolors batch draws more"),
        (["--plan", "--images", "100000"], "--images must be at most 256"),
        (["cat", "-o", "/proc/x.png"], "error: /proc/x.png: cannot be written: "),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, reference_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("EXISTS.png").write_bytes(b"mine")
    assert main([argument.replace("FOLDER", str(reference_folder)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1
    assert Path("EXISTS.png").read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1


def test_help_names_every_flag(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for flag in (
        "--weights",
        "--variant",
        "--negative",
        "--seed",
        "--sampler",
        "--guidance",
        "--info",
        "--dtype",
        "--image",
        "--strength",
        "--ip-adapter",
        "--lora",
        "--pag",
        "--guidance-rescale",
        "--guidance-interval",
        "--freeu",
    ):
        assert flag in shown


def test_controlnets_see_a_picture_and_the_edges_of_another(reference_folder: Path, tmp_path: Path) -> None:
    nets = [str(write_controlnet(tmp_path / str(seed), seed)) for seed in (20, 21)]
    picture(11, 64, 88).save(tmp_path / "depth.png")
    picture(12, 64, 88).save(tmp_path / "photo.png")
    files = [str(tmp_path / "depth.png"), str(tmp_path / "photo.png")]
    flags = ["--control", f"{nets[0]}:0.6", "--control", nets[1], "--control-image", files[0],
             "--canny", files[1], "--control-end", "0.5", "--seed", "3"]  # fmt: skip
    out = tmp_path / "out.png"
    assert draw(reference_folder, out, *flags) == 0
    told = read_metadata(out)
    assert json.loads(told["control"]) == nets
    assert json.loads(told["control_image"])[0]["file"] == f"{tmp_path}/depth.png"
    assert told["canny"] == f"{tmp_path}/photo.png"
    assert (told["control_scale"], told["control_steps"]) == ("0.6, 0.8", "0 to 0.5, 0 to 0.5")
    assert told["size"] == "88x64", "the control image's own"

    pipe = KolorsControlNetPipeline.from_pretrained(
        reference_folder, variant="fp16", controlnet=[KolorsControlNet.from_pretrained(net) for net in nets]
    )
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    images = [picture(11, 64, 88), canny(picture(12, 64, 88))]
    generator = [torch.Generator().manual_seed(3)]
    made = pipe("cat", images, num_inference_steps=2, control_guidance_end=0.5, generator=generator,
                controlnet_conditioning_scale=[0.6, 0.8]).images[0]  # fmt: skip
    assert np.array_equal(np.asarray(made), np.asarray(Image.open(out)))
    assert draw(reference_folder, tmp_path / "from.png", *flags, "--image", str(tmp_path / "photo.png"),
                "--strength", "1") == 0  # fmt: skip


def test_a_plan_of_a_run_with_a_controlnet(
    reference_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    net = str(write_controlnet(tmp_path / "net", 20))
    picture(11).save(tmp_path / "edges.png")
    plain = ["--plan", "-w", str(reference_folder), "--device", "cpu", "--variant", "fp16"]
    assert main(plain) == 0
    before = capsys.readouterr().out
    assert main([*plain, "--control", net, "--control-image", str(tmp_path / "edges.png")]) == 0
    after = capsys.readouterr().out
    weights = [
        float(line.split()[1]) for text in (before, after) for line in text.splitlines() if "unet" in line
    ]
    assert weights[0] < weights[1]
