"""Features that are each tested alone, used together."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.export import Dim

from kolors_core.checkpoint import EMBEDDED
from kolors_core.context import Context
from kolors_core.performance.cuda_graphs import CUDAGraphCache
from kolors_core.performance.export import trace, vae_programs
from kolors_core.performance.fuse_projections import FusedAttention, fuse_projections, joint_weight
from kolors_core.performance.fused_kernels import fuse_kernels
from kolors_core.performance.half_precision_vae import HalfPrecisionDecoder
from kolors_core.performance.model_version import ModelVersion
from kolors_core.performance.quantize import QuantizedLayer, quantize
from kolors_core.performance.row_split import Ranks, RowSplit, check_splits, set_coder, split_rows
from kolors_core.performance.step_cache import StepCache
from kolors_core.pipelines.memory_plan import plan
from kolors_core.pipelines.single_file import open_model
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.precompute import Savings
from kolors_core.unet import TransformerBlock, UNet
from tests.performance.test_compile import Recorder
from tests.support.device_places import SIZE, Models, Place, seeded
from tests.support.device_runs import RUNS, draw
from tests.support.simulated_device import Device, any_device
from tests.support.small import EXACT, SHALLOW, randomise, relative_error
from tests.test_unet import inputs


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


@pytest.fixture(scope="module")
def models(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models.make(small_tokenizer, tmp_path_factory.mktemp("together"))


@pytest.fixture
def device() -> Iterator[Device]:
    with any_device() as found:
        if found.name == "mps":
            pytest.skip("MPS has no float64")
        yield found


class Plain(Place):
    """In float64."""

    def pipe(self, kind: Any = None, **changes: Any) -> Any:
        return super().pipe(kind, **changes).to(torch.float64)


class Fused(Plain):
    """With fused kernels and projections."""

    @torch.no_grad()
    def pipe(self, kind: Any = None, **changes: Any) -> Any:
        pipe = super().pipe(kind, **changes)
        fuse(pipe)
        for net in (pipe.unet, *pipe._attached_models()):
            assert joint_weight(net.mid.attentions[0].blocks[0].self_attention) is not None
        return pipe


def fuse(pipe: Any) -> None:
    pipe.enable_fused_kernels()
    pipe.fuse_qkv_projections()


def unfuse(pipe: Any) -> None:
    pipe.disable_fused_kernels()
    pipe.unfuse_qkv_projections()


def assert_near(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    pairs = zip(got, expected, strict=True)
    assert max(relative_error(one.cpu().double(), other.cpu().double()) for one, other in pairs) < EXACT


@pytest.mark.parametrize(
    "name",
    ["two controls", "PAG", "image_prompts", "lora", "freeu", "quantized", "cached_steps", "inspected"],
)
def test_fused_models_draw_the_same(name: str, models: Models) -> None:
    assert_near(RUNS[name](Fused("cpu", "cpu", models)), RUNS[name](Plain("cpu", "cpu", models)))


@pytest.mark.device
def test_fused_models_draw_the_same_on_a_device(models: Models, device: Device) -> None:
    expected = RUNS["cached_steps"](Plain("cpu", device.name, models))
    assert_near(RUNS["cached_steps"](Fused("block", device.name, models)), expected)


@pytest.mark.device
@pytest.mark.parametrize("mode", ["resident", "model", "block"])
def test_models_are_fused_and_unfused_between_two_steps(mode: str, models: Models, device: Device) -> None:
    """A resident pipeline's recordings are of the moment's layers."""
    at = Plain(mode, device.name, models)

    def run(changes: dict[int, Any]) -> list[torch.Tensor]:
        pipe, seen = at.put(at.pipe()), list[torch.Tensor]()
        pipe._wrap_step = CUDAGraphCache()

        def callback(pipe: Any, i: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            seen.append(tensors["latents"].clone())
            changes.get(i, lambda pipe: None)(pipe)
            return {}

        pipe("cat", **SIZE, num_inference_steps=3, output_type="latent", generator=seeded(),
             callback_on_step_end=callback)  # fmt: skip
        assert len(pipe._wrap_step.captured) == (1 + len(changes) if mode == "resident" else 0)
        return seen

    assert_near(run({0: fuse, 1: unfuse}), run({}))


@pytest.mark.device
def test_a_half_precision_decoder_on_a_device(models: Models, device: Device) -> None:
    """Weights that are offloaded block by block are not converted."""

    def image(mode: str, dtype: torch.dtype | None) -> torch.Tensor:
        at = Place(mode, device.name, models)
        pipe = at.pipe()
        pipe.vae.run_coder = HalfPrecisionDecoder(dtype=dtype, errors={torch.float16: 0.0})
        return draw(at.put(pipe), num_inference_steps=1)[-1].cpu()

    half, whole = image("resident", torch.float16), image("resident", None)
    assert 0 < relative_error(half, whole) < 0.05
    assert torch.equal(image("model", torch.float16), half)
    assert torch.equal(image("block", torch.float16), whole)


def test_files_plans_and_descriptions_are_those_of_the_plain_models(models: Models, tmp_path: Path) -> None:
    pipe = Place("cpu", "cpu", models).pipe()

    def outside() -> Any:
        pipe.save_pretrained(tmp_path / "saved")
        files = {file.name: file.read_bytes() for file in sorted((tmp_path / "saved").rglob("*.*"))}
        return files, plan(pipe, 32, 40, is_printed=False), repr(pipe)

    plain = outside()
    fuse(pipe)
    pipe.enable_vae_half_precision()
    draw(pipe, num_inference_steps=1)
    assert outside() == plain


@torch.no_grad()
def test_a_fused_block_is_exported_as_torchs_operators() -> None:
    unet = UNet(SHALLOW.unet).eval()
    fuse_kernels(unet)
    fuse_projections(unet)
    block: Any = next(part for part in unet.modules() if isinstance(part, TransformerBlock))

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return self.block(x, Context(text))

    def given(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(1, count, 64, generator=seeded()), torch.randn(1, 3, 48, generator=seeded(1))

    sizes = {"x": {1: Dim("N", min=1)}, "text": {}}
    program = torch.export.export(Call(), given(5), dynamic_shapes=sizes, strict=False)
    assert relative_error(program.module()(*given(8)), Call()(*given(8))) < 5e-6


class Alone(Ranks):
    """A process without neighbors."""

    def _send_and_receive(self, pairs: Any) -> None:
        assert not pairs


@torch.no_grad()
def test_rows_of_fused_models_are_split_and_a_half_precision_decoder_is_refused(pipe: KolorsPipeline) -> None:
    unet = UNet(SHALLOW.unet).double().eval()
    randomise(unet)
    given = inputs(2, 6, 4)
    expected = unet(**given)
    fuse_kernels(unet)
    fuse_projections(unet)
    check_splits(unet)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        split = RowSplit(Alone())
        with split._replaced(unet, split_rows(6, 2, 1)):
            assert relative_error(unet(**given), expected) < EXACT
        norms = sum(isinstance(part, nn.GroupNorm) for part in unet.modules())
        attentions = sum(isinstance(part, FusedAttention) for part in unet.modules())
        assert (split.ranks.calls["statistics"], split.ranks.calls["keys and values"]) == (norms, attentions)
        pipe.enable_vae_half_precision()
        with pytest.raises(TypeError, match=r"run_coder is vae.call, got HalfPrecisionDecoder\(limit=1"):
            pipe.enable_row_split()
        pipe.disable_vae_half_precision()
        set_coder(pipe.vae, split)
        with pytest.raises(TypeError, match=r"half precision is for a VAE .*, got SplitCoder\("):
            pipe.enable_vae_half_precision()
    finally:
        dist.destroy_process_group()
