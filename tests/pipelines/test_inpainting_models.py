"""A UNet that reads a mask: loaded and saved, told apart, and told `extra` in every way of running."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from kolors_core import KolorsImg2ImgPipeline, KolorsInpaintPipeline, KolorsPipeline, SDXLCFGCutoffCallback
from kolors_core.conditioning import Conditioning
from kolors_core.config import KOLORS, UNetConfig
from kolors_core.guidance import guided
from kolors_core.loading import check
from kolors_core.performance.cuda_graphs import CUDAGraphCache
from kolors_core.pipelines.memory_plan import plan
from kolors_core.pipelines.quantization_report import quantize
from kolors_core.sampling import euler
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.unet import UNet
from tests.performance.test_compile import Recorder
from tests.support.inpainting import NINE, Nine, mask_of
from tests.support.parity import pair
from tests.support.pipelines import NO_SAVINGS, Pair, picture, saving, steps_of
from tests.support.reference_folder import reference_pipeline
from tests.support.small import EXACT, SHALLOW, relative_error
from tests.support.versions import traces_whole
from tests.test_unet import inputs
from weights_convert import TABLES
from weights_convert.safetensors_files import Tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Path) -> Path:
    """A checkpoint with a UNet of 9 channels, as the reference saves it: float16 variant, sharded."""
    made = tmp_path_factory.mktemp("inpainting") / "kolors"
    pipe = reference_pipeline(small_tokenizer, NINE).to(torch.float16)
    pipe.save_pretrained(made, variant="fp16", max_shard_size="1MB")
    return made


def test_a_folder_of_the_reference_loads_and_back(folder: Path, tmp_path: Path) -> None:
    pipe = KolorsInpaintPipeline.from_pretrained(folder)
    assert pipe.unet.config.in_channels == 9
    pipe.set_progress_bar_config(disable=True)
    assert pipe("cat", picture(), mask_of(), num_inference_steps=2).images[0].size == (72, 64)
    pipe.save_pretrained(tmp_path / "saved")
    assert '"_class_name": "KolorsInpaintPipeline"' in (tmp_path / "saved" / "model_index.json").read_text()
    theirs = diffusers.KolorsPipeline.from_pretrained(tmp_path / "saved")
    again = KolorsInpaintPipeline.from_pretrained(tmp_path / "saved")
    for name, tensor in theirs.unet.state_dict().items():
        own = TABLES["unet"].to_ours(name)
        assert torch.equal(tensor, pipe.unet.state_dict()[own])
        assert torch.equal(tensor, again.unet.state_dict()[own])


def test_only_inpainting_takes_nine_channels(folder: Path, pipes: Pair, nine: Nine) -> None:
    for kind in (KolorsPipeline, KolorsImg2ImgPipeline):
        with pytest.raises(
            ValueError, match="9 in and 4 out .* one with a mask is for KolorsInpaintPipeline"
        ):
            kind.from_pretrained(folder)
        with pytest.raises(
            ValueError, match="9 in and 4 out .* one with a mask is for KolorsInpaintPipeline"
        ):
            kind.from_pipe(nine[0])
    made = KolorsInpaintPipeline.from_pipe(pipes[0])
    assert made.unet is pipes[0].unet and KolorsPipeline.from_pipe(made).unet is made.unet
    with pytest.raises(ValueError, match="8 in and 4 out channels, expected the VAE's 4 for both, or 9 in"):
        KolorsInpaintPipeline.from_pipe(pipes[0], unet=UNet(replace(NINE.unet, in_channels=8)))


def test_at_full_size_only_the_first_layer_differs() -> None:
    config = replace(KOLORS.unet, in_channels=9)
    assert UNetConfig.from_public(config.to_public()) == config
    with torch.device("meta"):
        large, plain = UNet(config), UNet(KOLORS.unet)
        theirs = diffusers.UNet2DConditionModel.from_config(config.to_public())
    source = Tensors(dict(theirs.state_dict()), "the reference's")
    assert len(check(large, source, "unet")) == len(large.state_dict()) == 1682
    shapes = [{name: t.shape for name, t in model.state_dict().items()} for model in (large, plain)]
    assert {name for name in shapes[0] if shapes[0][name] != shapes[1][name]} == {"conv_in.weight"}
    assert shapes[0]["conv_in.weight"] == (320, 9, 3, 3)
    assert sum(t.numel() for t in large.state_dict().values()) == 2_579_458_820 + 320 * 5 * 9


# What `guided` is told.


@pytest.fixture
def told() -> tuple[UNet, tuple[Conditioning, Conditioning], Tensor]:
    """A UNet of 9 channels, conditions of two images, the halves' extra not the same, and latents."""
    unet, _ = pair("unet", torch.float64, replace(SHALLOW, unet=replace(SHALLOW.unet, in_channels=9)))
    assert isinstance(unet, UNet)
    given = inputs(4, 8, 8, torch.float64)
    extra = torch.randn(4, 5, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parts = [given[name] for name in ("text_tokens", "pooled_text", "size_ids")]
    halves = tuple(
        Conditioning(*(p[rows] for p in parts), extra=extra[rows]) for rows in (slice(2), slice(2, 4))
    )
    return unet, halves, given["latents"][:2, :4]


def written_out(unet: UNet, halves: Any, x: Tensor, sigma: float, timestep: float, scale: float) -> Tensor:
    """Guidance in four calls of the plain UNet."""
    scaled, time = x / (sigma**2 + 1) ** 0.5, torch.tensor(timestep)
    positive, negative = (
        unet(torch.cat([scaled, half.extra], 1), time, half.text_tokens, half.pooled_text, half.size_ids)
        for half in halves
    )
    return x - sigma * (negative + scale * (positive - negative))


@torch.no_grad()
def test_extra_stands_behind_the_scaled_latents(told: Any) -> None:
    """With and without what is read once, with recorded graphs, and with the halves computed apart."""
    unet, halves, x = told
    schedule = EulerDiscreteScheduler().schedule(4)
    sigma, timestep = schedule.sigmas[1].item(), schedule.timesteps[1].item()
    expected = written_out(unet, halves, x, sigma, timestep, 5.0)
    recorder = Recorder()
    ways: list[dict[str, Any]] = [{}, {"precompute": False}, {"wrap_step": CUDAGraphCache(recorder)}]
    for options in ways:
        assert relative_error(guided(unet, schedule, *halves, 5.0, **options)(x, sigma), expected) < EXACT
    assert recorder.count == 1
    apart = [guided(unet, schedule, half)(x, sigma) for half in halves]
    assert relative_error(apart[1] + 5.0 * (apart[0] - apart[1]), expected) < EXACT, "split guidance"
    other = [halves[0], replace(halves[1], extra=halves[0].extra)]
    assert relative_error(guided(unet, schedule, *other, 5.0)(x, sigma), expected) > 1e-3
    with pytest.raises(ValueError, match="1 of 2 conditions have `extra`, expected all or none"):
        guided(unet, schedule, halves[0], replace(halves[1], extra=None), 5.0)


@traces_whole
@torch.no_grad()
def test_a_step_with_extra_compiles_whole(told: Any) -> None:
    unet, halves, x = told
    schedule = EulerDiscreteScheduler().schedule(3)
    denoise, sigmas = guided(unet, schedule, *halves, 5.0), schedule.sigmas.tolist()[:2]

    def step(x: Tensor) -> Tensor:
        return euler(denoise, x, sigmas)

    compiled: Callable[[Tensor], Tensor] = torch.compile(step, backend="eager", fullgraph=True)
    assert relative_error(compiled(x), step(x)) < EXACT
    torch.compiler.reset()


def repaint(nine: Nine, **arguments: Any) -> list[Tensor]:
    given = {"prompt": ["cat", "red"], "image": picture(), "mask_image": mask_of(), "num_inference_steps": 5}
    return steps_of(nine[0], **given | {"height": None, "width": None} | arguments)


def test_savings_change_nothing(nine: Nine) -> None:
    plain = repaint(nine)
    with saving(nine[0], NO_SAVINGS):
        always = repaint(nine)
    assert all(relative_error(a, b) < 1e-8 for a, b in zip(plain, always, strict=True))


def test_extra_outlives_what_a_callback_replaces(nine: Nine) -> None:
    """Guidance ends after the second step: the rest is as of a run without it from there."""
    pipe = nine[0]
    found: list[Tensor] = []

    def cut(pipe: Any, i: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        found.append(tensors.pop("latents"))
        return SDXLCFGCutoffCallback(None, 1)(pipe, i, timestep, tensors)

    names = ("latents", "prompt_embeds", "add_text_embeds", "add_time_ids")
    pipe(
        ["cat", "red"], picture(), mask_of(), num_inference_steps=5, output_type="latent",
        generator=torch.Generator().manual_seed(0), callback_on_step_end=cut,
        callback_on_step_end_tensor_inputs=names,
    )  # fmt: skip
    whole = repaint(nine)
    assert relative_error(found[1], whole[1]) < 1e-8 and relative_error(found[2], whole[2]) > 1e-3
    assert torch.isfinite(found[-1]).all()


def test_it_is_planned_and_quantised(folder: Path, capsys: pytest.CaptureFixture) -> None:
    for device in ("meta", "cpu"):
        pipe = KolorsInpaintPipeline.from_pretrained(folder, device=device)
        planned = plan(pipe, 64, 72)
        assert planned.stages["unet"].work > 0
    plain = plan(KolorsPipeline.from_pipe(pipe, unet=UNet(replace(NINE.unet, in_channels=4))), 64, 72)
    assert plain.stages["unet"].weights < planned.stages["unet"].weights
    report = quantize(pipe, unet=8)
    assert report.unet is not None and 0 < report.noise.error < 0.1


def test_the_signature_is_the_references() -> None:
    """SDXL's, which the community's pipeline for Kolors has too, without what Kolors has no use for."""
    mine = inspect.signature(KolorsInpaintPipeline.__call__).parameters
    other = inspect.signature(diffusers.StableDiffusionXLInpaintPipeline.__call__).parameters
    useless = {
        "prompt_2", "negative_prompt_2", "guidance_rescale", "aesthetic_score", "negative_aesthetic_score",
        "clip_skip", "kwargs",
    }  # fmt: skip
    shared = [name for name in other if name not in useless]
    assert sorted(mine) == sorted([*shared, "max_sequence_length", "paste_back", "extras"])
    assert list(mine)[:18] == shared[:18]
    for name in set(shared) - {"self", "prompt", "callback_on_step_end_tensor_inputs"}:
        assert mine[name].default == other[name].default, name
