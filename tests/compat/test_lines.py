"""Lines that users of the reference write for Kolors, run by both libraries with the import names replaced.

Where a line yields an image or a tensor both agree: to 5e-6, or one gray level.
"""

import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
from diffusers.pipelines.kolors.pipeline_kolors import retrieve_timesteps
from diffusers.pipelines.kolors.pipeline_kolors_img2img import retrieve_latents
from diffusers.utils import load_image, make_image_grid
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import kolors_core
from kolors_core.compat import pipelines, utils
from tests.support.loras import ATTENTION, factors
from tests.support.pipelines import picture
from tests.support.small import FLOAT32, relative_error

# In their order: all lines share models, and the reference's keep some of what a line does to them.
pytestmark = [pytest.mark.numerical, pytest.mark.random_order(disabled=True)]
FILE = Path(__file__).parents[1] / "support" / "user_lines.txt"
LINES = [part.partition("\n")[::2] for part in FILE.read_text().split("\n# ")[1:]]  # (name, code)
# The names that a script imports: here and there.
NAMES = (
    "KolorsPipeline", "KolorsImg2ImgPipeline", "KolorsPAGPipeline", "DiffusionPipeline", "AutoencoderKL",
    "AutoPipelineForText2Image", "AutoPipelineForImage2Image", "UNet2DConditionModel",
    "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler",
    "UniPCMultistepScheduler", "DDIMScheduler",
)  # fmt: skip
THEIRS: dict[str, Any] = {name: getattr(diffusers, name) for name in NAMES} | {
    "ChatGLMModel": ChatGLMModel, "ChatGLMTokenizer": ChatGLMTokenizer, "load_image": load_image,
    "make_image_grid": make_image_grid, "VaeImageProcessor": VaeImageProcessor,
    "retrieve_timesteps": retrieve_timesteps, "retrieve_latents": retrieve_latents,
    "randn_tensor": randn_tensor,
}  # fmt: skip
ELSEWHERE = {"randn_tensor": utils, "retrieve_timesteps": pipelines, "retrieve_latents": pipelines}
OURS: dict[str, Any] = {name: getattr(ELSEWHERE.get(name, kolors_core), name) for name in THEIRS}


def call(**changes: Any) -> dict[str, Any]:
    """Arguments of a call of two steps."""
    sizes = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    return sizes | {"generator": seed(), "guidance_scale": 2.0} | changes


def small() -> dict[str, Any]:
    """The same for image to image: latents, since there the reference's VAE runs in float32."""
    return call(num_inference_steps=4, output_type="latent")


def seed() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(7)


class Library:
    """One library: its names, and a pipeline of the checkpoint whose models all lines share."""

    def __init__(self, names: Mapping[str, Any], folder: Path) -> None:
        self.names = names
        self.pipe = names["KolorsPipeline"].from_pretrained(folder, variant="fp16", torch_dtype=torch.float64)

    def run(self, code: str, given: Mapping[str, Any]) -> Any:
        """Run a line with pipelines of its own; return what it leaves in `out`."""
        scope: dict[str, Any] = dict(self.names) | dict(given)
        config = self.pipe.scheduler.config
        for name, kind in (("pipe", "KolorsPipeline"), ("img2img", "KolorsImg2ImgPipeline")):
            if name == "img2img" and name not in code:
                continue
            scheduler = self.names["EulerDiscreteScheduler"].from_config(config)
            made = self.names[kind](**{**self.pipe.components, "scheduler": scheduler})
            made.set_progress_bar_config(disable=True)
            scope[name] = made
        scope["draw"] = partial(draw, scope["pipe"])
        exec(compile(code, "<a line>", "exec"), scope)
        return scope.get("out")


def draw(pipe: Any, **changes: Any) -> Any:
    arguments = {"prompt": "cat"} | call() | changes
    return pipe(**arguments).images


@pytest.fixture(scope="module")
def libraries(reference_folder: Path) -> Iterator[tuple[Library, Library]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Library(OURS, reference_folder), Library(THEIRS, reference_folder)


@pytest.fixture(scope="module")
def lora(libraries: tuple[Library, Library], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA in diffusers' names, of each third layer."""
    file = tmp_path_factory.mktemp("lora") / "pytorch_lora_weights.safetensors"
    state = {}
    for name, one in [*factors(libraries[0].pipe.unet, "unet", ATTENTION).items()][::3]:
        state |= {f"unet.{name}.lora_A.weight": one.down, f"unet.{name}.lora_B.weight": one.up}
    save_file(state, file)
    return file


def assert_agree(mine: Any, other: Any) -> None:
    """Images to a gray level, tensors to 5e-6, all else equal."""
    if isinstance(other, Image.Image):
        assert isinstance(mine, Image.Image) and mine.size == other.size
        assert np.abs(np.asarray(mine, int) - np.asarray(other, int)).max() <= 1
    elif isinstance(other, Tensor | np.ndarray):
        a, b = torch.as_tensor(mine), torch.as_tensor(other)
        assert a.shape == b.shape and a.is_floating_point() == b.is_floating_point()
        assert relative_error(a.double(), b.double()) < FLOAT32
    elif isinstance(other, list | tuple):
        assert isinstance(mine, list | tuple) and len(mine) == len(other)
        for one, another in zip(mine, other, strict=True):
            assert_agree(one, another)
    elif isinstance(other, float):
        assert mine == pytest.approx(other, rel=1e-6)
    else:
        assert mine == other


@pytest.mark.parametrize(("name", "code"), LINES, ids=[name for name, _ in LINES])
def test_a_line_of_a_script_runs_and_agrees(
    name: str, code: str, libraries: tuple[Library, Library], lora: Path, adapters: list[Path],
    reference_folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    given: dict[str, Any] = {
        "FOLDER": reference_folder, "LORA": lora, "IP": adapters[0].parent, "torch": torch, "np": np,
        "image": picture(3, 32, 32), "call": call, "small": small, "seed": seed, "Path": Path,
        "deepcopy": deepcopy,
        "EMBEDS": torch.ones(2, 1, 17, 64, dtype=torch.float64),
        "UNET_LORA": {name.removeprefix("unet."): tensor for name, tensor in load_file(lora).items()},
    }  # fmt: skip
    results = []
    for side, library in zip(("ours", "theirs"), libraries, strict=True):
        (place := tmp_path / side).mkdir()
        results.append(library.run(code, given | {"TMP": place}))
    assert_agree(*results)


def test_there_are_enough_lines() -> None:
    assert len({name for name, _ in LINES}) == len(LINES) >= 120


def test_a_wrong_result_fails() -> None:
    one = torch.ones(3)
    for mine, other in (
        (one, one * 1.00002), ([1], [2]), ("a", "b"), (one, torch.ones(4)), (picture(1), picture(2)),
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            assert_agree(mine, other)
