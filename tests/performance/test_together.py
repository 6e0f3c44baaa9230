"""Features that are each tested alone, used together."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kolors_core.checkpoint import EMBEDDED
from kolors_core.performance.cuda_graphs import CUDAGraphCache
from kolors_core.performance.export import trace, vae_programs
from kolors_core.performance.model_version import ModelVersion
from kolors_core.performance.quantize import QuantizedLayer, quantize
from kolors_core.performance.step_cache import StepCache
from kolors_core.pipelines.single_file import open_model
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.precompute import Savings
from tests.performance.test_compile import Recorder


@pytest.fixture
def pipe() -> KolorsPipeline:
    pipe = KolorsPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def test_prompts_in_a_folder_are_of_the_product_too(tmp_path: Path) -> None:
    """Weights of 8 bits are the same in "w8a8", and what is computed with them is not."""

    def embedded(weight_format: Any, folder: Path | None) -> torch.Tensor:
        pipe = KolorsPipeline.from_pretrained("tiny", quantization={"text_encoder": weight_format})
        pipe.savings = Savings(prompt_folder=folder)
        return pipe.encode_prompt("a red apple", do_classifier_free_guidance=False)[0]

    first, second = embedded(8, tmp_path), embedded("w8a8", tmp_path)
    assert not torch.equal(first, second) and torch.equal(second, embedded("w8a8", None))


def test_a_step_cache_is_described_by_the_call_that_makes_it(pipe: KolorsPipeline) -> None:
    for settings in ({"gate": 0.4}, {"threshold": 0.4}, {"interval": 2, "guidance_interval": (0.0, 0.6)}):
        given: dict[str, Any] = {"interval": None} | settings
        pipe.enable_step_cache(**given)
        made = pipe.step_cache
        assert made is not None and made == StepCache(**given)
        eval(f"pipe.enable_step_cache({made.describe()})")
        assert pipe.step_cache == made
    with pytest.raises(ValueError, match="a step cache needs interval, threshold, gate, guidance_interval"):
        pipe.enable_step_cache(None)


def test_graphs_of_a_step_cache_serve_two_sizes_in_turn(pipe: KolorsPipeline) -> None:
    recorder = Recorder()
    pipe._wrap_step = CUDAGraphCache(recorder)
    pipe.enable_step_cache(2, gate=0.5)
    counts = []
    for size in (64, 72, 64, 72):
        pipe("a cat", num_inference_steps=4, height=size, width=size, output_type="latent")
        counts.append(recorder.count)
    assert counts[1] == counts[3] > counts[0] > 0


def test_a_quantized_weight_that_is_written_to_is_a_change(pipe: KolorsPipeline) -> None:
    quantize(pipe.unet, 8)
    version = ModelVersion(pipe.unet)
    first = version.read()
    assert version.read() == first
    next(layer for layer in pipe.unet.modules() if isinstance(layer, QuantizedLayer)).scale.mul_(2)
    assert version.read() != first


def test_a_tiled_vae_is_exported_whole(pipe: KolorsPipeline) -> None:
    pipe.enable_vae_tiling()
    program = trace(vae_programs(pipe.vae)["vae_decoder"]).module()
    latents = torch.randn(1, 4, 33, 34, generator=torch.Generator().manual_seed(1))
    (image,) = program(latents)
    assert image.shape == (1, 3, 264, 272)


def test_tiles_and_split_rows_are_switched_off_in_any_order(pipe: KolorsPipeline) -> None:
    pipe.enable_vae_tiling()
    pipe.disable_row_split()
    assert pipe.vae.run_coder.use_tiling
    pipe.disable_vae_tiling()
    pipe.disable_row_split()
    pipe.disable_vae_slicing()


def test_a_quantized_folder_gives_a_whole_file_its_sizes(tmp_path: Path) -> None:
    pipe = KolorsPipeline.from_pretrained("tiny", quantization={"unet": "fp8"})
    pipe.save_pretrained(tmp_path / "small")
    file = next((EMBEDDED / "unet").glob("*.safetensors"))
    unet = open_model(file, "unet", config=tmp_path / "small")
    loaded = KolorsPipeline.from_pretrained(tmp_path / "small", unet=unet)
    assert not any(isinstance(layer, QuantizedLayer) for layer in loaded.unet.modules())
