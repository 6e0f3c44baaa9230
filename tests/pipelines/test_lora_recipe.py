"""A LoRA of a few images: one call from a folder and a word to a file, a sheet and what was measured."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kolors_core.adapters.lora import attach
from kolors_core.pipelines.lora_recipe import LoRARecipe, measure, train_lora
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.training.trainer import TrainingConfig
from tests.support.lora_recipes import SIDE, shallow_pipe, write_five_images
from tests.support.offloads import offloaded

SETTINGS = TrainingConfig(
    steps=2, batch_size=2, learning_rate=0.05, warmup=0, weight_decay=0.0, max_tokens=16, save_every=1
)
QUICK = LoRARecipe(
    training=SETTINGS, rank=2, phrases=("a {x}", "{x}"), others=("cat", "apple"),
    unseen=("draw a {x}", "画{x}"), kept=("dog", "花", "car"), inference_steps=1,
)  # fmt: skip
CONSTANT = replace(QUICK, training=replace(SETTINGS, schedule="constant"))


@pytest.fixture(scope="module")
def pipe(small_tokenizer: Path) -> KolorsPipeline:
    return shallow_pipe(small_tokenizer)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_five_images(tmp_path / "images")


@pytest.fixture
def trained(pipe: KolorsPipeline, images: Path, tmp_path: Path) -> Path:
    file = tmp_path / "zorp.safetensors"
    train_lora(pipe, images, "zorp", file, QUICK, progress=False)
    return file


def draw(pipe: KolorsPipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipe("zorp", num_inference_steps=2, generator=generator, output_type="np")[0]


def test_five_images_and_a_word_make_a_file_and_a_sheet_and_leave_the_pipeline_as_it_was(
    pipe: KolorsPipeline, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, weights = draw(pipe), {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    capsys.readouterr()
    result = train_lora(pipe, images, "zorp", tmp_path / "zorp.safetensors", QUICK, progress=False)
    assert capsys.readouterr() == ("", "")
    assert len(result.losses) == 2 and str(result).startswith("zorp: in ")
    assert (result.effect.with_word, result.effect.others) == (2, 3)
    assert pipe.unet.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe.unet.state_dict().items())
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())
    assert np.array_equal(draw(pipe), before)

    pipe.load_lora_weights(result.file)
    try:
        assert np.abs(draw(pipe) - before).max() > 0.01
    finally:
        pipe.unload_lora_weights()
    assert result.sheet.width == 64 + 4 * (SIDE + 16)
    title = (result.sheet.height - 32 - 2 * (20 + 2 * SIDE + 20)) / 20
    assert title >= 1 and title == int(title), "whole lines of text above two rows of pairs"


def test_a_run_is_the_same_whatever_torch_drew_before(
    pipe: KolorsPipeline, images: Path, trained: Path, tmp_path: Path
) -> None:
    torch.rand(3)
    again = train_lora(pipe, images, "zorp", tmp_path / "again.safetensors", QUICK, progress=False)
    assert again.file.read_bytes() == trained.read_bytes()
    other = replace(QUICK, training=replace(SETTINGS, seed=1))
    another = train_lora(pipe, images, "zorp", tmp_path / "other.safetensors", other, progress=False)
    assert another.file.read_bytes() != trained.read_bytes()


def test_a_killed_run_goes_on_to_the_same_file_and_a_finished_one_says_so(
    pipe: KolorsPipeline, images: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, half = trained.read_bytes(), tmp_path / "half.safetensors"
    expected = train_lora(pipe, images, "zorp", tmp_path / "constant.safetensors", CONSTANT)
    train_lora(pipe, images, "zorp", half, replace(CONSTANT, training=replace(CONSTANT.training, steps=1)))
    half.unlink()
    times = [file.stat().st_mtime_ns for file in sorted((tmp_path / "half.run/others").iterdir())]
    with caplog.at_level(logging.WARNING, "kolors_core"):
        resumed = train_lora(pipe, images, "zorp", half, CONSTANT)
        assert half.read_bytes() == expected.file.read_bytes() and resumed.losses == expected.losses
        assert "state.safetensors: already at step 1 of 2" in caplog.messages[-1]
        again = [file.stat().st_mtime_ns for file in sorted((tmp_path / "half.run/others").iterdir())]
        assert len(times) == 3 and again == times, "the other things are not drawn again"
        train_lora(pipe, images, "zorp", trained, QUICK)
    assert trained.read_bytes() == whole and "already at step 2 of 2" in caplog.messages[-1]


def test_other_images_captions_or_settings_are_refused_unless_it_starts_anew(
    pipe: KolorsPipeline, images: Path, trained: Path
) -> None:
    (images / "2.txt").write_text("a zorp on a hill")
    with pytest.raises(ValueError, match=r"another run: captions: 1 of 7 are new, 1 of the 7 there are gone"):
        train_lora(pipe, images, "zorp", trained, QUICK, progress=False)
    (images / "2.txt").unlink()
    (images / "2.png").unlink()
    with pytest.raises(ValueError, match="another run: images: 0 of 6 are new, 1 of the 7 there are gone"):
        train_lora(pipe, images, "zorp", trained, QUICK, progress=False)
    with pytest.raises(ValueError, match="; captions: 4 of 6 are new, 5 of the 7 there are gone"):
        train_lora(pipe, images, "zap", trained, QUICK, progress=False)
    before = trained.read_bytes()
    train_lora(pipe, images, "zorp", trained, QUICK, resume="never", progress=False)
    assert trained.read_bytes() != before


def test_what_cannot_be_trained_is_refused_before_anything_is_drawn(
    pipe: KolorsPipeline, images: Path, tmp_path: Path
) -> None:
    file = tmp_path / "new" / "zorp.safetensors"

    def refused(message: str, word: str = "zorp", recipe: LoRARecipe = QUICK) -> None:
        with pytest.raises((ValueError, OSError), match=message):
            train_lora(pipe, images, word, file, recipe)
        assert not file.parent.exists()

    for word in ("", "x" * 41, "a\nb", 3):
        refused("word must be a text of 1 to 40 characters, got", word)  # type: ignore[arg-type]
    (images / "1.txt").write_text("a thing")
    refused("1.png: its caption 'a thing' lacks the word 'zorp'")
    (images / "1.txt").unlink()
    Image.new("RGB", (31, 64)).save(images / "1.png")
    refused("1.png: is 31x64, expected at least 32 pixels a side")
    for name in "123":
        (images / f"{name}.png").unlink()
    refused("images: expected at least 3 images, got 2")
    shutil.rmtree(images)
    refused("images: no such folder")
    attach(pipe.unet, 1).detach()
    adapter = attach(pipe.unet, 1)
    refused("an adapter named 'default' is attached already")
    adapter.detach()
    with offloaded(pipe):
        refused("this pipeline uses offload, which training cannot")
    file.parent.mkdir()
    file.touch()
    with pytest.raises(FileExistsError, match="zorp.safetensors exists already"):
        train_lora(pipe, images, "zorp", file, QUICK)


def test_a_recipe_names_a_bad_setting() -> None:
    for changes, message in (
        ({"others": ()}, r"others must be a tuple of texts, got \(\)"),
        ({"kept": "dog"}, "kept must be a tuple of texts, got 'dog'"),
        ({"unseen": ("draw it",)}, "a phrase must have {x} for the word, got 'draw it'"),
        ({"rank": 0}, "rank must be a positive whole number, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(QUICK, **changes)


def test_each_thing_is_asked_for_in_its_own_language() -> None:
    with_word, others = LoRARecipe().measured_prompts("zorp")
    assert with_word == [
        "please draw a zorp for me",
        "I would like to see a zorp",
        "请给我画zorp",
        "我想看zorp的图片",
    ]
    assert others[:2] == ["please draw a dog for me", "I would like to see a tiger"]
    assert others[6:8] == ["请给我画狮子", "我想看柠檬的图片"]


def test_the_effect_counts_nearest_images_and_gray_levels() -> None:
    """Of four images, two with the word: one came to show the subject; of the others one changed into it."""
    black, gray, white, light = (Image.new("RGB", (4, 4), (level,) * 3) for level in (0, 128, 255, 200))
    subject = torch.full((1, 3, 4, 4), 1.0)
    effect = measure([black, black, gray, black], [white, black, gray, light], 2, subject, -subject)
    assert (effect.shows_before, effect.shows_after, effect.others_showing, effect.others_kept) == (
        0,
        1,
        1,
        1,
    )
    assert effect.moved_with_word == pytest.approx(127.5)
    assert effect.moved_others == pytest.approx((0.0, 200.0))
    assert str(effect) == (
        "in 1 of 2 images with its word (0 before), in 1 of 2 without it; 1 of these 2 stayed what they were "
        "and moved by 100.0 gray levels (at most 200.0), those with the word by 127.5"
    )
