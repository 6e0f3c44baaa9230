"""Fixtures that several test files share: a tokenizer, and small checkpoints written by the reference."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kolors_core import KolorsInpaintPipeline
from tests.support.inpainting import NINE, Nine
from tests.support.ip_adapters import Both, load_both, with_image_encoder, write_adapter
from tests.support.parity import pair, reference_clip
from tests.support.pipelines import SOLVERS, Pair, make_pair, use_solver
from tests.support.published import MARK, TOKENIZER, published_file, write_stand_in
from tests.support.reference_folder import train_tokenizer, write
from tests.support.small import SMALL_CLIP, randomise
from weights_convert.folder_to_single_file import to_single


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of a few hundred pieces, trained here."""
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(
    scope="session",
    params=["stand-in", *([pytest.param("real", marks=MARK)] if published_file(TOKENIZER) else [])],
)
def chatglm_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with ChatGLM3's ids: the stand-in, and the real one in KOLORS_TEST_DATA."""
    if request.param == "stand-in":
        return write_stand_in(tmp_path_factory.mktemp("chatglm") / "tokenizer.model")
    file = published_file(TOKENIZER)
    assert file is not None
    return file


@pytest.fixture(scope="session")
def reference_folder(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Path) -> Path:
    """A whole checkpoint as published: float16 variant, sharded, small sizes, random weights."""
    folder = tmp_path_factory.mktemp("checkpoint") / "kolors"
    write(folder, small_tokenizer)
    return folder


@pytest.fixture(scope="session")
def float32(small_tokenizer: Path) -> Pair:
    """Both pipelines in float32."""
    return make_pair(small_tokenizer, torch.float32)


@pytest.fixture(scope="session")
def float64(small_tokenizer: Path) -> Pair:
    """Both pipelines in float64."""
    return make_pair(small_tokenizer, torch.float64)


@pytest.fixture
def pipes(float64: Pair) -> Pair:
    """Both in float64, with Euler."""
    use_solver(float64, "EulerDiscreteScheduler", {})
    return float64


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of two IP-Adapters, each alone in its folder."""
    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(folder / str(seed) / "ip_adapter.safetensors", seed) for seed in (0, 1)]


@pytest.fixture
def both(pipes: Pair) -> Both:
    """Both pipelines with CLIP and UNets of their own, in float64, with Euler; no adapter yet."""
    return with_image_encoder(pipes, torch.float64)


@pytest.fixture(scope="module")
def loaded(float64: Pair, adapters: list[Path]) -> Iterator[Both]:
    """The same with the first adapter."""
    use_solver(float64, *SOLVERS[0])
    made = with_image_encoder(float64, torch.float64)
    load_both(made, adapters[0])
    yield made


@pytest.fixture(scope="session")
def whole_folder(reference_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published layout, written by the reference, with an image encoder."""
    place = tmp_path_factory.mktemp("single") / "kolors"
    shutil.copytree(reference_folder, place)
    clip = reference_clip(SMALL_CLIP)
    randomise(clip)
    clip.half().save_pretrained(place / "image_encoder", variant="fp16")
    index = json.loads((place / "model_index.json").read_text())
    index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
    (place / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return place


@pytest.fixture(scope="session")
def whole_file(whole_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in one file."""
    file = tmp_path_factory.mktemp("single") / "kolors.safetensors"
    to_single(whole_folder, file)
    return file


@pytest.fixture(scope="module")
def nine(float64: Pair) -> Nine:
    """Ours with a UNet of 9 channels, and the reference's UNet with the same random weights."""
    unet, other = pair("unet", torch.float64, NINE)
    made = KolorsInpaintPipeline.from_pipe(float64[0], unet=unet)
    made.set_progress_bar_config(disable=True)
    return made, other
