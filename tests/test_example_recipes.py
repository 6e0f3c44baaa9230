"""The scripts of examples/recipes: each trains by the same trainer, and what it saves is read again."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kolors_core import KolorsControlNet, KolorsInpaintPipeline, KolorsPipeline
from kolors_core.adapters.textual_inversion import vectors_of
from tests.support.images import noise_image

FOLDER = Path(__file__).parent / "examples" / "recipes"
NAMES = sorted(file.stem for file in FOLDER.glob("*.py"))
MOST_LINES = 32
SETTINGS = re.compile(r"steps=[\d_]+, batch_size=\d+, learning_rate=[\d.e-]+")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for i in range(2):
        noise_image("RGB", 64, 64, seed=i).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text("a zorp")
    return tmp_path


def script(name: str) -> str:
    """Return a script with settings for a test: images of 64x64, two steps of two, from the first on."""
    code = (FOLDER / f"{name}.py").read_text()
    assert len(code.splitlines()) <= MOST_LINES and "buckets(128)" in code
    code, count = SETTINGS.subn("steps=2, batch_size=2, learning_rate=1e-3, warmup=0", code)
    assert count == 1
    code = code.replace("range(100)", "range(2)").replace('("a dog", ', '("a dog", 64, 64, 2, ')
    return code.replace("buckets(128)", "buckets(64)").replace(".fit()", ".fit(progress=False)")


def drawn(pipe: Any, **given: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    named = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "pt", "generator": seed}
    return pipe("a zorp", **named | given).images


Found = tuple[Tensor, Tensor, Tensor]  # of the script, read from its file, and before


def of_lora(names: dict[str, Any], file: str = "lora.safetensors") -> Found:
    before = drawn(again := KolorsPipeline.from_pretrained("tiny"))
    again.load_lora_weights(file)
    return drawn(names["pipe"]), drawn(again), before


def of_word(names: dict[str, Any]) -> Found:
    again = KolorsPipeline.from_pretrained("tiny")
    again.load_textual_inversion("zorp.safetensors")
    assert torch.equal(drawn(names["pipe"]), drawn(again))
    own, other = (vectors_of(pipe.text_encoder)["zorp"] for pipe in (names["pipe"], again))
    return own, other, names["first"]


def of_net(names: dict[str, Any]) -> Found:
    own, again = names["net"].state_dict(), KolorsControlNet.from_pretrained("canny").state_dict()
    assert own.keys() == again.keys() and all(torch.equal(own[name], again[name]) for name in own)
    last = "image_embedding.conv_out.weight"
    return own[last], again[last], torch.zeros_like(own[last])


def of_masks(names: dict[str, Any]) -> Found:
    image, mask = noise_image("RGB", 64, 64), noise_image("L", 64, 64)
    again = KolorsInpaintPipeline.from_pretrained("inpainting")
    pair = (drawn(pipe, image=image, mask_image=mask, strength=1.0) for pipe in (names["pipe"], again))
    assert torch.equal(*pair)
    own, other = (pipe.unet.conv_in.weight[:, 4:] for pipe in (names["pipe"], again))
    return own, other, torch.zeros_like(own)


def of_all(names: dict[str, Any], folder: str = "full") -> Found:
    first, again = (KolorsPipeline.from_pretrained(folder) for folder in ("tiny", folder))
    return drawn(names["pipe"]), drawn(again), drawn(first)


def of_subject(names: dict[str, Any]) -> Found:
    captions = [example.captions for example in names["examples"]]
    assert captions == [("a zorp",)] * 2 + [("a dog",)] * 2
    return of_all(names, "dreambooth")


READ: dict[str, Callable[[dict[str, Any]], Found]] = {
    "lora": of_lora, "words": of_word, "controlnet": of_net, "inpainting": of_masks, "full": of_all,
    "few_steps": partial(of_lora, file="lcm.safetensors"), "dreambooth": of_subject,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_and_what_it_saves_is_read_again(name: str, place: Path) -> None:
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        exec(compile(script(name), f"{name}.py", "exec"), names)
    own, again, before = READ[name](names)
    assert torch.equal(own, again) and not torch.equal(own, before)
