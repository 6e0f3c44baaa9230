"""Old line, new line: the tables of compat/README.md, each row of which is run."""

import inspect
import logging
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

import kolors_core
from kolors_core import CLIPVisionModelWithProjection, KolorsControlNet, KolorsPipeline, KolorsPipelineOutput
from kolors_core.adapters.ip_adapter import attached
from kolors_core.adapters.lora import TEXT_TARGETS, attach, save_adapters
from kolors_core.checkpoint import EMBEDDED
from kolors_core.cli.train_lora import parser as train_lora_parser
from kolors_core.performance.quantize import is_quantized
from kolors_core.targets import TARGETS
from kolors_core.training.config import ParameterGroup, TrainingConfig
from kolors_core.training.data import Batches, buckets
from kolors_core.training.trainer import Trainer
from tests.support.face_ids import FACE, face_config, write_face
from tests.support.images import noise_image
from tests.support.small import FLOAT32, relative_error

PAGE = EMBEDDED.parent / "compat" / "README.md"
SECTION = PAGE.read_text().partition("## Old line, new line\n")[2].partition("\n## ")[0]
CELLS = [line.removeprefix("| ").split(" | ") for line in SECTION.splitlines() if line.startswith("| `")]
ROWS = [(old.split("`")[1], new.rstrip(" |")) for old, new in CELLS]
REAL = re.compile("from (diffusers|transformers)")  # what is installed here; Kwai's repository is not
IDS = [old for old, _ in ROWS]
OTHERS = (
    "DeepCacheSDHelper", "PeftModel", "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline", "StableDiffusionXLPipeline", "apply_group_offloading",
    "load_attn_procs", "load_ip_adapter_faceid_plus", "process_canny_condition", "set_face_fidelity_scale",
)  # fmt: skip


def code_of(cell: str) -> str:
    """Return the code with which a cell begins; "" for a line that has gone."""
    return "" if cell.startswith("nothing") else cell.split("`")[1]


def stop(pipe: KolorsPipeline, step: int, timestep: Any, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    pipe.interrupt()
    return tensors


class OneStep(KolorsPipeline):
    """Pipeline whose calls end after a step."""

    def __call__(self, *inputs: Any, **named: Any) -> KolorsPipelineOutput:
        self.set_progress_bar_config(disable=True)
        return super().__call__(*inputs, **{"callback_on_step_end": stop} | named)


def bound(function: Callable[..., Any]) -> Callable[..., inspect.BoundArguments]:
    """Return what binds arguments to a function, in its place."""
    return inspect.signature(function).bind


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    pipe = KolorsPipeline.from_pretrained("tiny")
    return {
        name: part for name, part in pipe.components.items() if name not in ("controlnet", "image_encoder")
    }


@pytest.fixture(scope="module")
def files(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Adapters of a face and of the text encoder."""
    place = tmp_path_factory.mktemp("files")
    adapter = attach(models["text_encoder"], rank=2, targets=TEXT_TARGETS)
    save_adapters({"text_encoder": adapter}, place / "text.safetensors")
    adapter.detach()
    config = replace(face_config(models["unet"].config), image_dim=96)
    write_face(place / "face.safetensors", config)
    return {"TEXT_LORA": place / "text.safetensors", "FACE": place / "face.safetensors"}


@pytest.fixture
def same_logs() -> Iterator[None]:
    """Undo what lines do to the loggers of both libraries."""
    ours, theirs = logging.getLogger("kolors_core"), diffusers.utils.logging
    levels = ours.level, theirs.get_verbosity()
    yield
    ours.setLevel(levels[0])
    theirs.set_verbosity(levels[1])


@pytest.fixture
def scope(
    models: dict[str, Any],
    files: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    same_logs: None,
) -> dict[str, Any]:
    """What the lines name: a pipeline of the embedded model with CLIP, adapters' files, images."""
    monkeypatch.chdir(tmp_path)
    clip = CLIPVisionModelWithProjection.from_pretrained(EMBEDDED / "ip_adapter" / "image_encoder")
    parts: dict[str, Any] = models | {
        name: deepcopy(models[name]) for name in ("unet", "text_encoder", "vae")
    }
    pipe = OneStep(**parts, image_encoder=clip)
    first = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return files | {
        "DIR": EMBEDDED, "IP": EMBEDDED / "ip_adapter", "KolorsPipeline": KolorsPipeline, "np": np,
        "FILE": EMBEDDED / "unet" / "diffusion_pytorch_model.safetensors", "torch": torch, "pipe": pipe,
        "LORA": EMBEDDED / "lora" / "pytorch_lora_weights.safetensors", "parts": parts, "f": stop,
        "net": KolorsControlNet.from_pretrained("tiny"), "prompt": "a red apple", "config": object(),
        "CLIP": EMBEDDED / "ip_adapter" / "image_encoder",
        "CLIPVisionModelWithProjection": CLIPVisionModelWithProjection,
        "image": noise_image("RGB", 64, 64), "crop": noise_image("RGB", 64, 64), "scheduler": pipe.scheduler,
        "embeds": FACE["face_embeds"].float(), "latents": first, "noise": first.flip(0), "timesteps": [5],
        "TrainingConfig": TrainingConfig, "ParameterGroup": ParameterGroup, "Trainer": bound(Trainer),
        "Batches": bound(Batches), "buckets": buckets, "examples": [], "loss": None, "data": None,
        "log": print, "draw": print,
    }  # fmt: skip


@pytest.mark.parametrize(("old", "new"), ROWS, ids=IDS)
def test_the_old_line_is_not_here_and_the_new_one_runs(old: str, new: str, scope: dict[str, Any]) -> None:
    if REAL.match(old):
        exec(compile(old, "<old>", "exec"), scope)
    elif not old.startswith("--"):
        with pytest.raises(
            (AttributeError, FileNotFoundError, ImportError, NameError, TypeError, ValueError)
        ):
            exec(compile(old, "<old>", "exec"), scope)
    code = code_of(new)
    if code.startswith("kolors "):
        words = shlex.split(code)
        assert words[1] == "train-lora"
        train_lora_parser().parse_args(words[2:])  # ends the process, and so the test, at an unknown flag
        return
    if "face" in code:
        scope["pipe"].load_ip_adapter_face_id(scope["FACE"])
    exec("from kolors_core import *", scope)
    exec(compile(code, "<new>", "exec"), scope)


def test_what_the_lines_do(scope: dict[str, Any]) -> None:
    """That they did something, where a line that does nothing would pass."""
    pipe = scope["pipe"]
    new = {old: code_of(cell) for old, cell in ROWS}
    lora = next(code for old, code in new.items() if "load_attn_procs" in old)
    exec(lora, scope)
    exec(new["PeftModel.from_pretrained(pipe.text_encoder, TEXT_LORA)"], scope)
    assert pipe.get_list_adapters().keys() == {"unet", "text_encoder"}
    exec(next(code for code in new.values() if "load_ip_adapter(" in code), scope)
    exec(next(code for code in new.values() if "load_ip_adapter_face_id(" in code), scope)
    assert len(attached(pipe.unet)) == 2
    exec(f"made = {new['KolorsPipeline.from_pretrained(DIR, quantization_config=config)']}", scope)
    assert is_quantized(scope["made"].unet) and not is_quantized(scope["made"].text_encoder)


def test_the_velocity_is_the_references() -> None:
    theirs: Any = DDPMScheduler(
        num_train_timesteps=1100, beta_start=0.00085, beta_end=0.014, beta_schedule="scaled_linear"
    )
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    timesteps = torch.tensor([5, 300, 1099])
    sigmas = KolorsPipeline.from_pretrained("tiny", device="meta").scheduler.training_sigmas()[timesteps]
    mine = TARGETS["v_prediction"].output(latents, noise, sigmas[:, None, None, None].float())
    assert relative_error(mine, theirs.get_velocity(latents, noise, timesteps)) < FLOAT32


def test_names_of_others_are_in_old_lines_alone() -> None:
    """Of scripts, and of packages that are no part of the tests."""
    new = " ".join(code_of(cell) for _, cell in ROWS)
    for name in OTHERS:
        assert name in " ".join(IDS) and name not in new and not hasattr(kolors_core, name)


def test_the_tables_are_read() -> None:
    assert len(ROWS) == SECTION.count("\n| ") - 3 and len(ROWS) > 35 and len({*IDS}) == len(IDS)
