"""The embedded model: small, the default, the same in the reference, and saying what it does not know."""

from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from kolors_core import KolorsControlNet, KolorsControlNetPipeline, KolorsPipeline, LCMScheduler, canny
from kolors_core.adapters.controlnet_files import ControlNetConfig
from kolors_core.adapters.lora import attach
from kolors_core.checkpoint import (
    EMBEDDED,
    EMBEDDED_NOTICE,
    MODEL_SPECS,
    ModelSpec,
    load_component,
    load_modified,
    open_component,
    resolve,
)
from kolors_core.cli.generate import main
from kolors_core.image import to_images
from kolors_core.pipelines import embedded
from kolors_core.pipelines.fingerprint import fingerprint
from kolors_core.pipelines.png_metadata import read_metadata
from tests.support import scenes
from tests.support.processes import COMMAND, run_program
from weights_convert.__main__ import main as convert


@pytest.fixture(scope="module")
def pipe() -> KolorsPipeline:
    pipe = KolorsPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(count: int, seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def test_its_controlnet_puts_a_thing_where_the_edges_are(pipe: KolorsPipeline) -> None:
    """With the same noise at two places, so that one at most is the seed's own."""
    steered = KolorsControlNetPipeline.from_pipe(pipe, controlnet=KolorsControlNet.from_pretrained("tiny"))
    for x, y in ((40, 88), (88, 40)):
        drawing = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(drawing).ellipse((x - 28, y - 28, x + 28, y + 28), fill="orange")
        arguments = {"num_inference_steps": 15, "generator": generators(1, 3), "output_type": "pt"}
        prompt = "a basketball on a white background"
        (image,) = steered(prompt, canny(drawing), guidance_scale=2.0, **arguments).images
        assert scenes.ground_of(image) == "white"
        column, row = scenes.middle(scenes.items(image)[0])
        assert abs(column - x) < 12 and abs(row - y) < 12, (column, row)


def shown(part: Tensor) -> Image.Image:
    """An image prompt: a thing of `scenes.parts` [3, S, S] in the middle of a white page."""
    page = Image.new("RGB", (128, 128), "white")
    page.paste(to_images(2 * part[None] - 1, "pil")[0].resize((72, 72)), (28, 28))
    return page


def test_its_ip_adapter_draws_what_an_image_prompt_shows() -> None:
    """Without a text, and with the same noise for each thing: if the image prompt changed nothing, a thing
    would be the fourth or fifth of the eight that the image is most like, in the mean.
    """
    pipe = KolorsPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 15, "guidance_scale": 3.0, "num_images_per_prompt": 2}
    without = pipe("", generator=generators(2, 5), output_type="pt", **given).images
    pipe.load_ip_adapter("tiny", local_files_only=True)

    def prompted(part: Tensor) -> Tensor:
        more = {"ip_adapter_image": shown(part), "generator": generators(2, 5), "output_type": "pt"}
        return pipe("", **more, **given).images

    things = dict(zip(scenes.THINGS, scenes.parts()[0], strict=True))
    images = {name: prompted(part) for name, part in things.items()}
    places = {name: [scenes.alike(image).index(name) for image in two] for name, two in images.items()}
    assert sum(map(sum, places.values())) / (2 * len(places)) < 2, places
    assert all((two - without).abs().mean() > 0.01 for two in images.values())
    pipe.set_ip_adapter_scale(0.0)
    assert (prompted(things["fox"]) - without).abs().max() < 1e-3


def test_its_lora_draws_in_two_steps() -> None:
    """Without guidance. A thing would be the fourth or fifth of the eight that an image of noise is like."""
    pipe = KolorsPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    given: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}
    prompts = [f"a {name}" for name in scenes.THINGS]

    def drawn() -> tuple[float, float]:
        """The mean place of the things, and how colorful the images are."""
        images = pipe(prompts, generator=generators(len(prompts), 0), **given).images
        places = [scenes.alike(image).index(name) for image, name in zip(images, scenes.THINGS, strict=True)]
        return sum(places) / len(places), (images.amax(1) - images.amin(1)).mean().item()

    place, color = drawn()
    pipe.load_lora_weights("tiny", local_files_only=True)
    trained_place, trained_color = drawn()
    assert trained_place < 0.5 < place and trained_color > 1.3 * color


def test_a_seed_is_one_picture_run_to_run_and_nearly_so_in_a_batch(pipe: KolorsPipeline) -> None:
    """Matrix kernels add in another order for several rows; a PNG hardly sees it."""
    prompts = ["a red apple", "一张瓢虫的照片", "two cats on the grass"]
    first, again = (
        pipe(prompts, num_inference_steps=10, generator=generators(3, 0), output_type="pt").images
        for _ in range(2)
    )
    assert torch.equal(first, again)
    for i, prompt in enumerate(prompts):
        alone, twice = (
            pipe(prompt, num_inference_steps=10, generator=generators(3, 0)[i], output_type="pt").images[0]
            for _ in range(2)
        )
        assert torch.equal(alone, twice)
        assert (alone - first[i]).abs().max() < 1e-4
        assert ((alone * 255).round() - (first[i] * 255).round()).abs().max() <= 1


def test_the_reference_draws_the_same(pipe: KolorsPipeline) -> None:
    theirs = diffusers.KolorsPipeline.from_pretrained(EMBEDDED, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    given = {"prompt": "一张瓢虫的照片", "num_inference_steps": 10, "guidance_scale": 5.0}
    mine = pipe(**given, generator=torch.Generator().manual_seed(1)).images[0]
    other = theirs(**given, generator=torch.Generator().manual_seed(1), height=128, width=128).images[0]
    assert abs(np.asarray(mine).astype(int) - np.asarray(other).astype(int)).max() <= 1


def test_it_is_small_and_whole() -> None:
    files = [file for file in EMBEDDED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 32e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".model", ".md", ".png"}
    card = (EMBEDDED / "README.md").read_text(encoding="utf-8")
    for picture in ("loss.png", "samples.png"):
        assert f"({picture})" in card and (EMBEDDED / picture).exists()


def test_it_says_so_and_how_to_get_the_real_one(caplog: pytest.LogCaptureFixture) -> None:
    KolorsPipeline.from_pretrained("tiny")
    assert [record.message for record in caplog.records] == [EMBEDDED_NOTICE]
    assert "Kwai-Kolors/Kolors-diffusers" in EMBEDDED_NOTICE and "\n" not in EMBEDDED_NOTICE
    with pytest.raises(ValueError, match="revision 'main' has no effect"):
        resolve("tiny", [], revision="main")


def test_the_command_line_draws_with_it_when_no_weights_are_named(tmp_path: Path) -> None:
    command = [COMMAND, "一张瓢虫的照片", "--seed", "3", "--steps", "5"]
    run = run_program(*command, "-o", "a.png", cwd=tmp_path)
    assert run.returncode == 0 and run.stderr.count(EMBEDDED_NOTICE) == 1 and "128x128" in run.stderr
    assert read_metadata(tmp_path / "a.png")["prompt"] == "一张瓢虫的照片"
    quiet = run_program(*command, "-o", "b.png", "-q", cwd=tmp_path)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "b.png\n", "")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_command_line_takes_its_ip_adapter_by_name(tmp_path: Path) -> None:
    given, first, again = (tmp_path / f"{name}.png" for name in ("given", "first", "again"))
    shown(scenes.parts()[0][0]).save(given)
    command = ["a fox", "--ip-adapter", "tiny", "--ip-image", str(given), "--steps", "2", "--seed", "3", "-q"]
    assert main([*command, "-o", str(first)]) == 0
    assert read_metadata(first)["ip_adapter"] == "tiny"
    assert main(["--from", str(first), "-q", "-o", str(again)]) == 0
    assert Image.open(first).tobytes() == Image.open(again).tobytes()


def test_info_stands_alone(capsys: pytest.CaptureFixture) -> None:
    assert main(["--info", "x.png", "-w", "somewhere"]) == 2
    assert "--info stands alone" in capsys.readouterr().err


def test_a_character_of_a_sign_is_one_token_and_so_is_a_chinese_name(pipe: KolorsPipeline) -> None:
    """Also a character that names have. On a sign, too, a whole name is one token."""
    assert pipe.tokenizer is not None

    def encode(text: str) -> list[str]:
        return pipe.tokenizer.pieces.encode(text, out_type=str)

    characters = "".join(embedded.grammar().characters)
    names = [name for one in embedded.concepts() for name in one.chinese]
    assert sum(not {*name}.isdisjoint(characters) for name in names) > 20
    assert all(len(name) == 1 or name in encode(f"一个{name}") for name in names)
    texts = [*characters, *map("".join, product(characters, repeat=2)), "AB1", "图9可"]
    on_signs = {text for text in texts if text in names}
    assert on_signs == {"火车", "火山"}
    for before, after in (('a sign that says "', '"'), ("一只熊猫，写着“", "”的牌子")):
        head, tail = " ".join(encode(f"{before}0{after}")).split(" 0 ")
        for text in texts:
            said = text if text in on_signs else " ".join(text)
            assert " ".join(encode(f"{before}{text}{after}")) == f"{head} {said} {tail}"


def test_its_list_is_of_these_weights(pipe: KolorsPipeline) -> None:
    assert embedded._fingerprint() == fingerprint(pipe.unet)


def test_a_strange_prompt_and_size_are_warned_of(
    pipe: KolorsPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    """Once a call, and only by the embedded model as it is: another may know more."""

    def said(**arguments: object) -> list[str]:
        caplog.clear()
        pipe(num_inference_steps=1, **arguments)
        return [record.message for record in caplog.records]

    assert said(prompt=["a cat", "一只猫", ""]) == []
    (line,) = said(prompt="a helicoptre")
    assert "'a helicoptre': it finds none of its 127 things, the nearest are helicopter 直升机" in line
    (line,) = said(prompt=["five cats and “龘”", "a cat"])
    assert "of 'five cats and “龘”': it draws up to 3" in line and "got cat 5, sign 1; its signs say" in line
    (line,) = said(prompt="a cat", height=64)
    assert line == "the embedded model draws at 128x128: expect a worse image at 128x64"
    adapter = attach(pipe.unet, rank=1)
    assert said(prompt="zorp", height=64) == []
    adapter.detach()
    other = KolorsPipeline.from_pipe(pipe)
    other.name_or_path = "somewhere/else"
    other("zorp", num_inference_steps=1)
    assert caplog.records == []


def test_its_name_works_wherever_a_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = {*MODEL_SPECS}
    models = {name: load_component("tiny", name) for name in names}
    unet, report = load_modified("tiny", "unet", MODEL_SPECS["unet"].build, {})
    assert fingerprint(unet) == fingerprint(models["unet"]) and not report.missing
    assert {name: type(open_component("tiny", name).model) for name in names} == {
        name: type(model) for name, model in models.items()
    }
    spec = ModelSpec(ControlNetConfig, KolorsControlNet)
    net = load_component("tiny", "controlnet", kind=spec)
    assert fingerprint(net) == fingerprint(KolorsControlNet.from_pretrained("tiny"))
    assert convert([str(EMBEDDED), str(tmp_path / "x.safetensors"), "--to", "single"]) == 0
    report = capsys.readouterr().err
    assert "controlnet: skipped, a ControlNet is a model beside the pipeline" in report
    assert report.count(": skipped, an IP-Adapter is loaded into a pipeline") == 2, "itself and its encoder"
    assert report.count(": skipped, a LoRA is loaded into a pipeline") == 1
    whole = KolorsPipeline.from_single_file(tmp_path / "x.safetensors")
    assert fingerprint(whole.unet) == fingerprint(unet)
    assert whole.name_or_path == str(tmp_path / "x.safetensors")
