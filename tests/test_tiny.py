"""The embedded model: small, the default, drawing what is asked for, and the reference agrees."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from kolors_core import KolorsControlNet, KolorsControlNetPipeline, KolorsPipeline, canny
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
from kolors_core.pipelines import embedded
from kolors_core.pipelines.fingerprint import fingerprint
from kolors_core.pipelines.png_metadata import read_metadata
from tests.support.processes import COMMAND, run_program
from weights_convert.__main__ import main as convert

# A strip of eight training images, 32 pixels each, in the order of these names.
STRIP = Path(__file__).parent / "support" / "emoji.png"
NAMES = {
    "ladybug": "瓢虫", "panda": "熊猫", "rocket": "火箭", "sunflower": "向日葵", "banana": "香蕉",
    "frog": "青蛙", "fire truck": "消防车", "snowman": "雪人",
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe() -> KolorsPipeline:
    pipe = KolorsPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(count: int, seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def known() -> torch.Tensor:
    """The eight images: [8, 3, 32, 32] in [0, 1]."""
    strip = torch.from_numpy(np.array(Image.open(STRIP).convert("RGB"))).permute(2, 0, 1) / 255
    return torch.stack(strip.split(32, dim=2))


@pytest.mark.parametrize(
    ("phrase", "language", "seed"),
    [("please draw a {x} for me", 0, 10), ("请给我画{x}", 1, 20), ("your photo of one small {x}", 0, 30)],
)
def test_it_draws_what_is_asked_for(pipe: KolorsPipeline, phrase: str, language: int, seed: int) -> None:
    """In phrasings that it was not trained on, whatever the seed."""
    prompts = [phrase.format(x=pair[language]) for pair in NAMES.items()]
    images = pipe(prompts, num_inference_steps=12, generator=generators(8, seed), output_type="pt").images
    assert images.shape == (8, 3, 128, 128)
    small = F.avg_pool2d(images, 4)
    found = torch.cdist(small.flatten(1), known().flatten(1)).argmin(1).tolist()
    assert found == list(range(8)), [list(NAMES)[i] for i in found]


def test_its_controlnet_puts_a_thing_where_the_edges_are(pipe: KolorsPipeline) -> None:
    steered = KolorsControlNetPipeline.from_pipe(pipe, controlnet=KolorsControlNet.from_pretrained("tiny"))
    for x, y in ((40, 88), (88, 40)):
        drawing = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(drawing).ellipse((x - 28, y - 28, x + 28, y + 28), fill="orange")
        arguments = {"num_inference_steps": 15, "generator": generators(1, 3), "output_type": "pt"}
        made = steered("a basketball", canny(drawing), guidance_scale=2.0, **arguments).images
        ink = (1 - made.amin(dim=1)[0]).clamp(min=0.2) - 0.2  # [128, 128]
        places = torch.arange(128.0)
        found = (ink.sum(0) @ places / ink.sum()).item(), (ink.sum(1) @ places / ink.sum()).item()
        assert abs(found[0] - x) < 10 and abs(found[1] - y) < 10, found


def test_a_seed_is_one_picture_run_to_run_and_nearly_so_in_a_batch(pipe: KolorsPipeline) -> None:
    """Matrix kernels add in another order for several rows; a PNG hardly sees it."""
    prompts = ["a red apple", "一张瓢虫的照片", "a cat"]
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


def test_without_the_words_it_draws_something_else(pipe: KolorsPipeline) -> None:
    images = pipe([""] * 8, num_inference_steps=10, generator=generators(8, 10), output_type="pt").images
    found = torch.cdist(F.avg_pool2d(images, 4).flatten(1), known().flatten(1)).argmin(1).tolist()
    assert found != list(range(8))


def test_the_reference_draws_the_same(pipe: KolorsPipeline) -> None:
    theirs = diffusers.KolorsPipeline.from_pretrained(EMBEDDED, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    given = {"prompt": "一张瓢虫的照片", "num_inference_steps": 10, "guidance_scale": 5.0}
    mine = pipe(**given, generator=torch.Generator().manual_seed(1)).images[0]
    other = theirs(**given, generator=torch.Generator().manual_seed(1), height=128, width=128).images[0]
    assert abs(np.asarray(mine).astype(int) - np.asarray(other).astype(int)).max() <= 1


def test_it_is_small_and_whole() -> None:
    files = [file for file in EMBEDDED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 30e6
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


def test_info_stands_alone(capsys: pytest.CaptureFixture) -> None:
    assert main(["--info", "x.png", "-w", "somewhere"]) == 2
    assert "--info stands alone" in capsys.readouterr().err


def test_it_says_what_it_knows(pipe: KolorsPipeline) -> None:
    """The list is in both languages, and is of these weights."""
    found = embedded.concepts()
    assert len({one.emoji for one in found}) == len(found) == 194
    assert all(one.english and one.chinese for one in found)
    assert str(embedded.nearest("瓢虫")[0]) == "🐞 ladybug, ladybird, lady beetle; 瓢虫"
    assert embedded._fingerprint() == fingerprint(pipe.unet)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [("a photo of two Foxes!", "fox"), ("一张狐狸的照片", "fox"), ("ice cream, please", "ice cream")],
)
def test_a_known_thing_is_found_in_a_prompt(prompt: str, name: str) -> None:
    assert name in [one.english[0] for one in embedded.named_in(prompt)]


@pytest.mark.parametrize(
    ("prompt", "near"), [("a helicoptre", "helicopter"), ("a tree", "pine tree"), ("章", "octopus")]
)
def test_the_nearest_things_have_similar_names(prompt: str, near: str) -> None:
    assert not embedded.named_in(prompt)
    assert near in [one.english[0] for one in embedded.nearest(prompt)]


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
    assert "knows nothing in 'a helicoptre'; nearest of its 194 things: helicopter 直升机" in line
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
    assert "controlnet: skipped, a ControlNet is a model beside the pipeline" in capsys.readouterr().err
    whole = KolorsPipeline.from_single_file(tmp_path / "x.safetensors")
    assert fingerprint(whole.unet) == fingerprint(unet)
    assert whole.name_or_path == str(tmp_path / "x.safetensors")
