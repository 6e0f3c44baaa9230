"""Wrong input to what is public: one line that names the argument, what came and what was expected; nothing
changes, and nothing is written."""

import http.server
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kolors_core import (
    CLIPVisionModelWithProjection,
    EulerDiscreteScheduler,
    IPAdapterMaskProcessor,
    KolorsImg2ImgPipeline,
    KolorsPipeline,
    SDXLCFGCutoffCallback,
    load_image_embeds,
    save_image_embeds,
)
from kolors_core.adapters.lora import attach, save_adapters
from kolors_core.config import UNetConfig
from kolors_core.image import to_images
from kolors_core.pipelines.memory_plan import plan
from kolors_core.pipelines.png_metadata import read_metadata, save_png
from kolors_core.pipelines.single_file import load_model
from kolors_core.precompute import Savings
from kolors_core.tokenizer import Tokenizer
from kolors_core.training.data import Batches, buckets, read_folder
from kolors_core.training.trainer import TrainingConfig
from kolors_core.validation import check_float, check_fraction, check_int
from tests.support.processes import run_program

SHORT = {"prompt": "cat", "num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
NAN, PICTURE, ZEROS = float("nan"), Image.new("RGB", (64, 64)), torch.zeros(1, 4, 8, 8)
DEVICE = "expected a device of this machine"
Wrong = tuple[Callable[[Any], Any], type[Exception], str]


@pytest.fixture(scope="module")
def pipe() -> Iterator[Any]:
    made = KolorsPipeline.from_pretrained("tiny")
    made.set_progress_bar_config(disable=True)
    yield made


def call(**changes: Any) -> Callable[[Any], Any]:
    return lambda pipe: pipe(**SHORT | changes)


def from_image(image: Any, **more: Any) -> Callable[[Any], Any]:
    given = {"prompt": "cat", "image": image, "output_type": "latent"} | more
    return lambda pipe: KolorsImg2ImgPipeline.from_pipe(pipe)(**given)


def returning(name: str, value: Any) -> Callable[[Any], Any]:
    return call(callback_on_step_end=lambda *_: {name: value})


def setting(name: str, value: Any) -> Callable[[Any], Any]:
    return lambda pipe: setattr(pipe, name, value)


CALLS: list[Wrong] = [
    (call(height=10**30), ValueError, "height must be a positive multiple of 8 up to 16,777,216"),
    (call(timesteps="92", num_inference_steps=50), ValueError, "timesteps must be a list of numbers"),
    (call(timesteps=[True], num_inference_steps=50), ValueError, "timesteps must be a list of numbers"),
    (call(negative_prompt=torch.zeros(2)), ValueError, "negative_prompt must be a string"),
    (call(negative_crops_coords_top_left=3), ValueError, "negative_crops_coords_top_left must be two whole"),
    (call(latents=ZEROS.long()), ValueError, "latents must be floats, got torch.int64"),
    (call(latents=ZEROS.to(torch.complex64)), ValueError, "latents must be floats, got torch.complex64"),
    (call(prompt=None, prompt_embeds=torch.ones(1, 9, 192).long()), ValueError, "prompt_embeds must be fl"),
    (returning("prompt_embeds", torch.zeros(2, 5, 3)), ValueError, r"prompt_embeds \[2, 5, 3\].*192\]"),
    (returning("add_time_ids", torch.zeros(2, 3)), ValueError, r"add_time_ids \[2, 3\] of .*expected floats"),
    (from_image([]), ValueError, "expected at least one image, got none"),
    (from_image(torch.zeros(0, 4, 8, 8)), ValueError, "latents as image must be some floats"),
    (from_image(torch.zeros(4, 8, 8).long()), ValueError, "latents as image must be some floats"),
    (from_image(np.zeros((8, 8, 3), object)), ValueError, "pixels of uint8, uint16 or floats, got object"),
    (from_image(PICTURE, denoising_start=0.5, denoising_end="x"), ValueError, "denoising_end must be"),
    (setting("scheduler", "euler"), TypeError, "scheduler must be kolors_core's Scheduler or None, got str"),
    (setting("unet", torch.nn.Linear(1, 1)), TypeError, "unet must be .* a denoiser like it or None, got t"),
    (setting("text_encoder", 3), TypeError, "text_encoder must be a module like .*, got int"),
    (setting("tokenizer", "x"), TypeError, "tokenizer must be like .* Tokenizer or None, got str"),
    (setting("feature_extractor", 3), TypeError, "feature_extractor must be a function or None, got int"),
    (setting("guided", None), TypeError, "guided must be a function"),
    (setting("savings", None), TypeError, "savings must be a precompute.Savings"),
    (lambda pipe: pipe.to(torch.device("meta")), ValueError, f"{DEVICE}.*'meta'"),
    (lambda pipe: pipe.to(3), ValueError, DEVICE),
    (lambda pipe: pipe.to(torch.float64, torch.int8), TypeError, "a floating torch.dtype, got torch.int8"),
    (lambda pipe: pipe.encode_prompt("cat", device="nope"), ValueError, f"{DEVICE}.*'nope'"),
    (lambda pipe: plan(pipe, 64, 64, device="cuda:x"), ValueError, "expected a device such as .*'cuda:x'"),
    (lambda pipe: pipe.load_ip_adapter(3), TypeError, "the IP-Adapter must be a path, got 3"),
    (lambda pipe: pipe.load_textual_inversion({"word": 3}), ValueError, "word is int, expected a tensor"),
    (lambda pipe: pipe.load_textual_inversion([]), ValueError, "got no file"),
    (lambda pipe: pipe.load_textual_inversion({}, 3), ValueError, "got the token 3"),
    (lambda pipe: pipe.unload_textual_inversion(3), TypeError, "tokens must be a word"),
    (lambda pipe: pipe.load_lora_weights({}, 3), ValueError, "adapter's name must be some printable.*got 3"),
    (lambda pipe: pipe.load_lora_weights({}, weight_name="x"), ValueError, "weight_name has no effect on"),
    (lambda pipe: attach(pipe.unet, 1.5), ValueError, "rank must be a positive whole number, got 1.5"),  # pyright: ignore
    (lambda pipe: attach(pipe.unet, 2, targets="to_q"), TypeError, "targets must be a list"),
    (lambda pipe: attach(pipe.unet, 2, alpha=NAN), ValueError, "alpha must be a number, got nan"),
    (lambda pipe: pipe.save_pretrained(None), TypeError, "save_directory must be a path, got None"),
    (lambda pipe: pipe.save_single_file(3), TypeError, "file must be a path, got 3"),
    (lambda pipe: pipe.save_lora_weights("x", 3), TypeError, "unet_lora_layers .* must be dicts"),
    (lambda pipe: pipe.tokenizer(["x"], "y"), ValueError, "max_length must be a positive whole .*'y'"),
    (lambda pipe: pipe.tokenizer(3), ValueError, "expected a list of at least one prompt, got 3"),
]  # fmt: skip

ANY: Any = None
ALONE: list[Wrong] = [
    (lambda _: KolorsPipeline.from_pretrained(device="nope"), ValueError, f"{DEVICE}.*'nope'"),
    (lambda _: KolorsPipeline.from_pretrained(device=ANY), ValueError, f"{DEVICE}.*'None'"),
    (lambda _: KolorsPipeline.from_pretrained("x" * 5000), FileNotFoundError, "no such folder"),
    (lambda _: KolorsPipeline.from_pretrained("a/b", revision=3), TypeError, "revision must be a string"),  # pyright: ignore
    (lambda _: KolorsPipeline.from_pretrained("a/b", token=3), TypeError, "token must be .*, got int"),  # pyright: ignore
    (lambda _: KolorsPipeline.from_single_file(ANY), TypeError, "must be a path, got None"),
    (lambda _: CLIPVisionModelWithProjection.from_pretrained(ANY), TypeError, "folder or hub repository"),
    (lambda _: load_model("x.safetensors", "unet", device="nope"), ValueError, DEVICE),
    (lambda _: Tokenizer(ANY), TypeError, "the tokenizer must be a path, got None"),
    (lambda _: load_image_embeds(ANY), TypeError, "file must be a path, got None"),
    (lambda _: read_metadata(ANY), TypeError, "path must be a path, got None"),
    (lambda _: save_png(PICTURE, ANY), TypeError, "path must be a path, got None"),
    (lambda _: save_image_embeds([3], "x"), TypeError, "embeds must be a list of tensors"),  # pyright: ignore
    (lambda _: to_images(ZEROS, "jpg"), ValueError, "output_type must be one of pil, np, pt, got 'jpg'"),
    (lambda _: IPAdapterMaskProcessor().preprocess(PICTURE, 64, ANY or 6.5), ValueError, "width must be"),
    (lambda _: EulerDiscreteScheduler.from_config(ANY), TypeError, "expected a scheduler's config"),
    (lambda _: UNetConfig.from_public(ANY), TypeError, "expected the fields of a config, got None"),
    (lambda _: SDXLCFGCutoffCallback(ANY or "x"), ValueError, "cutoff_step_ratio must be a number, got 'x'"),
    (lambda _: SDXLCFGCutoffCallback(0.5, -1), ValueError, "cutoff_step_index must be .*got -1"),
    (lambda _: Savings(cached_prompts=-1), ValueError, "cached_prompts must be .*got -1"),
    (lambda _: TrainingConfig(steps=ANY), ValueError, "steps must be a positive whole number, got None"),
    (lambda _: TrainingConfig(steps=1, learning_rate=NAN), ValueError, "learning_rate must be .*got nan"),
    (lambda _: TrainingConfig(steps=1, ema_decay=2), ValueError, "ema_decay must be from 0 to 1, got 2"),
    (lambda _: buckets(512, 0), ValueError, "step must be a positive whole number, got 0"),
    (lambda _: Batches([], [(64, 64)], 1, 0), ValueError, "no images"),
    (lambda _: read_folder(ANY), TypeError, "folder must be a path, got None"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "kind", "message"), CALLS + ALONE)
def test_it_is_refused_in_one_line_and_nothing_changes(
    pipe: Any, wrong: Callable, kind: type[Exception], message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    before = dict(vars(pipe))
    with pytest.raises(kind, match=message) as caught:
        wrong(pipe)
    assert "\n" not in str(caught.value)
    run = {"_guidance_scale", "_num_timesteps", "_interrupt"}
    assert {k: v for k, v in vars(pipe).items() if k not in run and v is not before[k]} == {}
    assert (pipe.device.type, pipe.dtype, pipe.get_list_adapters()) == ("cpu", torch.float32, {})
    assert not list(tmp_path.iterdir())


def test_numbers_of_any_library_are_numbers(pipe: Any) -> None:
    assert (check_int("n", np.int64(8), 8), check_float("x", np.float32(0.5))) == (8, 0.5)
    pipe.enable_freeu(np.float32(0.6), 0.4, 1, np.float64(1.2))
    pipe.disable_freeu()
    assert len(from_image(PICTURE, strength=np.float32(0.5), num_inference_steps=4)(pipe).images) == 1


@pytest.mark.parametrize("value", [10**400, -(10**400), np.float64("nan"), np.float32(0), True, 1j])
def test_a_fraction_of_any_size_is_told_from_others(value: object) -> None:
    with pytest.raises(ValueError, match="part must be above 0 and at most 1, got"):
        check_fraction("part", value)


def test_files_are_written_over_only_when_asked(pipe: Any, tmp_path: Path) -> None:
    adapter = attach(pipe.unet, 1)
    for save in (
        lambda file, **more: save_image_embeds([ZEROS], file, **more),
        lambda file, **more: save_adapters({"unet": adapter}, file, **more),
    ):
        file = tmp_path / "old.safetensors"
        file.write_bytes(b"old")
        with pytest.raises(FileExistsError, match="old.safetensors exists already"):
            save(file)
        assert file.read_bytes() == b"old"
        save(file, overwrite=True)
        assert file.read_bytes() != b"old"
    adapter.detach()


def test_a_training_folder_s_damage_is_told_by_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"a\.txt: "):
        read_folder(tmp_path)
    (tmp_path / "a.txt").write_text("cat")
    with pytest.raises(ValueError, match=r"a\.png: not an image"):
        read_folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": null}')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1: text must be a caption"):
        read_folder(tmp_path)


class Refusing(http.server.BaseHTTPRequestHandler):
    """A hub that knows nobody."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("end", ["", "\\n"], ids=["whole", "with a line break"])
def test_a_token_is_never_shown(end: str) -> None:
    program = f"""
from kolors_core import KolorsPipeline
KolorsPipeline.from_pretrained("made-up/repository", token="hf_SECRETSECRET{end}")
"""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
        run = run_program(program, env=os.environ | place)
        server.shutdown()
    last = run.stderr.strip().splitlines()[-1]
    assert "token has" in last if end else "made-up/repository: cannot be had" in last
    assert "SECRET" not in run.stdout + run.stderr
