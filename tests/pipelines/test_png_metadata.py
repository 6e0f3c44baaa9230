"""Metadata of a PNG: what pipelines say of an image is true. Drawing it again: tests/cli/test_from_png.py."""

import json
import os
import tracemalloc
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kolors_core import DPMSolverMultistepScheduler, KolorsImg2ImgPipeline, KolorsPipeline
from kolors_core.adapters.ip_adapter import IPAdapter, attach
from kolors_core.adapters.lora import attach as attach_lora
from kolors_core.checkpoint import EMBEDDED
from kolors_core.pipelines.fingerprint import fingerprint
from kolors_core.pipelines.png_metadata import attach_metadata, read_metadata, save_png
from kolors_core.pipelines.seeds import numbers_drawn, seeded_generator
from tests.support.bombs import chunk, png
from tests.support.images import noise_image
from tests.support.ip_adapters import adapter_config
from tests.support.small import randomise

SIZE = {"height": 64, "width": 64, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe() -> KolorsPipeline:
    pipe = KolorsPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def facts(pipe: KolorsPipeline, **arguments: Any) -> dict[str, str]:
    """The metadata of the last image of a call."""
    given: dict[str, Any] = {"prompt": "a cat", "generator": seeded_generator(5), **SIZE} | arguments
    return pipe(**given).images[-1].info


def test_numbers_of_any_type_are_numbers(pipe: KolorsPipeline) -> None:
    """As they are given, not "cannot be known", the hash of an array, or a tensor's repr."""
    own = KolorsImg2ImgPipeline.from_pipe(pipe)
    own.set_progress_bar_config(disable=True)
    numbers = (np.float32(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2))
    for number, side in zip(numbers, (np.int64(9), np.int32(9), torch.tensor(9), 9), strict=True):
        found = own(
            "a cat", noise_image(), number, num_inference_steps=2, target_size=(side, 8),
        ).images[0].info  # fmt: skip
        assert (found["strength"], found["size_conditions"]) == ("0.5", '{"target_size": [9, 8]}')


def test_metadata_come_back_from_the_file(tmp_path: Path) -> None:
    image, metadata = noise_image(), {"prompt": "一张瓢虫的照片", "seed": 7}
    attach_metadata(image, metadata)
    save_png(image, tmp_path / "new" / "a.png")
    assert (
        image.info == read_metadata(tmp_path / "new" / "a.png") == {"prompt": "一张瓢虫的照片", "seed": "7"}
    )


def test_what_is_no_png_is_named_in_one_line(tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("not an image")
    with pytest.raises(ValueError, match="text.png: not an image"):
        read_metadata(text)
    noise_image().save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="a.jpg: expected a PNG, got JPEG"):
        read_metadata(tmp_path / "a.jpg")


def test_a_seed_is_said_only_where_it_makes_the_image_alone(pipe: KolorsPipeline) -> None:
    """Not of a batch's generator, nor of one in use, whose state is said where it can be known."""
    assert facts(pipe)["seed"] == "5"
    batch = facts(pipe, num_images_per_prompt=2)
    assert "seed" not in batch and (batch["batch_seed"], batch["image"]) == ("5", "2 of 2")
    used = facts(pipe, generator=seeded_generator(5, 99))
    assert "seed" not in used and "99 numbers had been drawn since its seed 5" in used["noise"]
    far = seeded_generator(5)
    torch.randn(3, generator=far)  # which keeps half of a pair of normal numbers
    assert "some numbers had been drawn" in facts(pipe, generator=far)["noise"]
    twice = facts(pipe, generator=[far := seeded_generator(5), far], num_images_per_prompt=2)
    assert "seed" not in twice
    assert "seed" not in (alone := facts(pipe, generator=None)) and "cannot be known" in alone["noise"]


@pytest.mark.parametrize("drawn", [0, 1, 623, 624, 625, 1248, 70_001])
def test_numbers_drawn_are_counted_and_drawn_again(drawn: int) -> None:
    generator = seeded_generator(7, drawn)
    assert numbers_drawn(generator) == drawn
    noise = [torch.randn(4, 4, 8, 8, generator=one) for one in (generator, seeded_generator(7, drawn))]
    assert torch.equal(*noise) and numbers_drawn(generator) == drawn + 1024


def test_fingerprints_are_of_the_weights_alone(pipe: KolorsPipeline) -> None:
    """The same from any file, in any dtype that holds them and with adapters; another for another weight."""
    unet = KolorsPipeline.from_pretrained(EMBEDDED).unet
    before = fingerprint(unet)
    assert before == fingerprint(pipe.unet) == fingerprint(unet.half()) == fingerprint(unet.float())
    adapter = attach_lora(unet, rank=2)
    assert fingerprint(unet) == before
    adapter.detach()
    with torch.no_grad():
        unet.conv_out.bias += 1
    assert fingerprint(unet) != before


def test_loras_are_said_with_what_acts(pipe: KolorsPipeline) -> None:
    """Weights by component and block; not what is disabled or inactive; what is fused is said to be."""
    state = {}
    for name in ("mid_block.attentions.0", "up_blocks.0.attentions.1"):
        path = f"unet.{name}.transformer_blocks.0.attn1.to_q"
        width = 160
        state |= {
            f"{path}.lora_A.weight": torch.ones(2, width),
            f"{path}.lora_B.weight": torch.ones(width, 2),
        }
    pipe.load_lora_weights(state, adapter_name="toy")
    pipe.load_lora_weights(state, adapter_name="other")
    try:
        pipe.set_adapters("toy", 0.25)
        (lora,) = json.loads(facts(pipe)["lora"])
        assert (lora["name"], lora["weight"], lora["from"]) == ("toy", 0.25, None)
        assert facts(pipe, cross_attention_kwargs={"scale": 0.5})["lora_scale"] == "0.5"
        pipe.set_adapters(["toy", "other"], [{"unet": {"mid": 0.5}}, 2.0])
        weights = {lora["name"]: lora["weight"] for lora in json.loads(facts(pipe)["lora"])}
        assert weights == {"toy": {"unet": {"mid": 0.5}}, "other": 2.0}
        pipe.disable_lora()
        assert "lora" not in facts(pipe)
        pipe.enable_lora()
        pipe.set_adapters("toy", 0.25)
        pipe.fuse_lora()
        (lora,) = json.loads(facts(pipe)["lora"])
        assert lora["fused"] is True
        pipe.unfuse_lora()
    finally:
        pipe.unload_lora_weights()
    assert "lora" not in facts(pipe)


def test_ip_adapter_scales_are_said_by_block(pipe: KolorsPipeline) -> None:
    adapter = IPAdapter(adapter_config(pipe.unet.config))
    randomise(adapter, 1)
    handle = attach(pipe.unet, adapter)
    embeds = {"ip_adapter_image_embeds": [torch.zeros(2, 1, 3, 64)]}
    try:
        assert facts(pipe, **embeds)["ip_adapter_scale"] == "1.0"
        pipe.set_ip_adapter_scale({"up": {"block_0": [0.0, 0.5]}})
        assert json.loads(facts(pipe, **embeds)["ip_adapter_scale"]) == {"up": {"block_0": [0.0, 0.5]}}
    finally:
        handle.detach()


def test_what_cannot_be_kept_is_said(pipe: KolorsPipeline) -> None:
    """Given noise, embeddings and functions; own timesteps and sizes are kept as numbers."""
    told = facts(pipe, latents=torch.zeros(1, 4, 8, 8), callback_on_step_end=lambda *_: {})
    assert json.loads(told["latents"])["tensor"] == [1, 4, 8, 8]
    assert "cannot be known" in told["callback_on_step_end"]
    told = facts(pipe, sigmas=[5.0, 1.0, 0.0], num_inference_steps=50, original_size=(99, 88))
    assert told["sigmas"] == "[5.0, 1.0, 0.0]" and told["steps"] == "2"
    assert json.loads(told["size_conditions"]) == {"original_size": [99, 88]}


def test_models_scheduler_and_machine_are_said(pipe: KolorsPipeline) -> None:
    own = KolorsPipeline.from_pipe(pipe)
    own.scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", euler_at_final=True)
    told = facts(own)
    assert json.loads(told["scheduler"]) == own.scheduler.to_public()
    assert (told["model"], told["dtype"], told["device"]) == ("tiny", "float32", "cpu")
    assert (told["torch"], told["software"]) == (torch.__version__, "kolors_core 0.1.0")
    assert json.loads(told["fingerprint"])["unet"] == fingerprint(pipe.unet)


def test_a_hub_commit_is_said(tmp_path: Path) -> None:
    """As the hub's cache has it in a folder's path."""
    commit = "0123456789" * 4
    folder = tmp_path / "models--a--b" / "snapshots" / commit
    folder.parent.mkdir(parents=True)
    folder.symlink_to(EMBEDDED)
    pipe = KolorsPipeline.from_pretrained(folder)
    assert pipe.revision == commit
    assert KolorsPipeline.from_pretrained(EMBEDDED).revision is None


def test_an_image_that_is_given_is_known_by_its_pixels_and_file(pipe: KolorsPipeline, tmp_path: Path) -> None:
    from kolors_core import KolorsImg2ImgPipeline
    from kolors_core.image import load_image

    noise_image().save(tmp_path / "a.png")
    own, found = KolorsImg2ImgPipeline.from_pipe(pipe), []
    with Image.open(tmp_path / "a.png") as opened:
        for start in (opened, load_image(tmp_path / "a.png"), noise_image()):
            told = facts(own, image=start, strength=1.0)
            found.append(json.loads(told["start_image"]))
    assert len({one["sha256"] for one in found}) == 1
    assert [one.get("file") for one in found] == [str(tmp_path / "a.png")] * 2 + [None]


def text(kind: bytes, value: bytes) -> bytes:
    return chunk(kind, {b"tEXt": b"a\0", b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0"}[kind] + value)


ZEROS = zlib.compress(bytes(2**24))
HOSTILE = {
    "a bomb of pixels": (png(30_000, 30_000), "900,000,000 pixels, expected at most 89,478,485"),
    "compressed text": (png(4, 1, text(b"zTXt", ZEROS)), "Decompressed data too large"),
    "compressed text, any language": (png(4, 1, text(b"iTXt", ZEROS)), "Decompressed data too large"),
    "plain text": (png(4, 1, text(b"tEXt", b"a" * 2**23)), "8,388,609 letters of text, expected at most 4"),
    "many texts": (png(4, 1, *[text(b"zTXt", zlib.compress(bytes(2**20 - 9)))] * 99), "Too much memory used"),
    "cut short": (png(40, 40)[:45], "truncated"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_would_fill_the_memory_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    file = tmp_path / "a.png"
    file.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"^{file}: .*{message}") as caught:
        read_metadata(file)
    assert tracemalloc.get_traced_memory()[1] < 2**27 and "\n" not in str(caught.value)
    tracemalloc.stop()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png: not a file"):
        read_metadata(tmp_path / "a.png")
