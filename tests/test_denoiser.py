"""A denoiser of another architecture in the UNet's place: wherever the UNet's own layers are not needed it
computes the same in every way of running it, and what needs them refuses it by name."""

import gc
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from kolors_core import KolorsPipeline, record_attention
from kolors_core.adapters import lora
from kolors_core.adapters.controlnet import ControlNet, ControlNetConfig
from kolors_core.conditioning import Conditioning
from kolors_core.guidance import guided
from kolors_core.module import find_blocks, first_weight
from kolors_core.performance.cuda_graphs import CUDAGraphCache
from kolors_core.performance.export import unet_programs
from kolors_core.performance.quantize import quantize
from kolors_core.performance.row_split import RowSplit
from kolors_core.pipelines import text_prompts
from kolors_core.pipelines.memory_plan import plan
from kolors_core.pipelines.pag import perturbed
from kolors_core.pipelines.quantization_report import quantize as quantize_pipeline
from kolors_core.schedule import Schedule
from kolors_core.schedulers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from kolors_core.unet import UNet
from tests.examples.models.dit import DiT, DiTConfig
from tests.performance.test_compile import Recorder
from tests.support.own_models import SIZE, drawn, make_dit, own_pipeline
from tests.support.simulated_device import any_device
from tests.support.small import EXACT, SHALLOW, SMALL, randomise, relative_error


@pytest.fixture(scope="module")
def base() -> KolorsPipeline:
    return KolorsPipeline.from_pretrained("tiny")


@pytest.mark.device
def test_it_draws_the_same_on_a_device_offloaded_and_recorded(
    base: KolorsPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_prompts, "fills_on", lambda device: True)  # on the CPU too: the same sums
    expected, pipe = drawn(own_pipeline(base)), deepcopy(own_pipeline(base))
    with any_device() as device:
        pipe.to(device.name)
        same = partial(assert_close, expected, is_exact=device.simulation is not None)
        same(drawn(pipe))
        if device.name == "cuda":
            pipe._wrap_step = CUDAGraphCache()
            drawn(pipe, "a blue car")
            same(drawn(pipe))
            assert len(pipe._wrap_step.captured) == 1
            pipe._wrap_step = None
        pipe.enable_model_cpu_offload(device=device.name)
        same(drawn(pipe))
        pipe.enable_sequential_cpu_offload(device=device.name)
        same(drawn(pipe))
        assert pipe.offload.peak_bytes < sum(p.nbytes for p in pipe.unet.parameters())
        pipe.to("cpu")
        same(drawn(pipe))
        del pipe  # while the device is there, whose streams it has
        gc.collect()


def assert_close(expected: Tensor, got: Tensor, is_exact: bool) -> None:
    assert relative_error(got.cpu().double(), expected.double()) <= (0 if is_exact else 5e-3)


def test_a_recorded_step_reads_each_runs_own_text(base: KolorsPipeline) -> None:
    pipe, recorder = own_pipeline(base), Recorder()
    expected = [drawn(pipe, prompt) for prompt in ("a red apple", "a blue car")]
    pipe._wrap_step = CUDAGraphCache(recorder)
    for _ in range(2):
        for prompt, latents in zip(("a red apple", "a blue car"), expected, strict=True):
            assert torch.equal(drawn(pipe, prompt), latents)
    assert recorder.count == 1
    with torch.no_grad():
        pipe.unet.out.weight.mul_(2)
    assert not torch.equal(drawn(pipe), expected[0]) and recorder.count == 1  # read by the replay


def test_it_is_compiled_by_blocks(base: KolorsPipeline) -> None:
    pipe = deepcopy(own_pipeline(base))
    expected = drawn(pipe)
    pipe.compile(backend="eager")
    assert torch.equal(drawn(pipe), expected)
    calls = [block._compiled_call_impl for block in pipe.unet.blocks]
    assert all(calls) and calls[0].func is calls[1].func  # type: ignore[union-attr]
    assert not pipe.unet._compiled_call_impl


@pytest.mark.parametrize("weight_format", [8, 4, "fp8"])
def test_it_is_quantized_saved_and_loaded(weight_format: Any, base: KolorsPipeline, tmp_path: Path) -> None:
    pipe = own_pipeline(base)
    expected = drawn(pipe)
    quantize(pipe.unet, weight_format)
    assert pipe.unet.blocks[0].to_q.weight_format == weight_format and isinstance(pipe.unet.out, nn.Linear)
    latents = drawn(pipe)
    assert 0 < relative_error(latents, expected) < (0.5 if weight_format == 4 else 0.1)
    pipe.save_pretrained(tmp_path / "own")
    again = KolorsPipeline.from_pretrained(tmp_path / "own")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(drawn(again), latents)


def test_it_is_quantized_while_loading_and_reported(base: KolorsPipeline, tmp_path: Path) -> None:
    pipe = own_pipeline(base)
    pipe.save_pretrained(tmp_path / "own")
    formats = {"unet": 8, "text_encoder": 8}
    read = KolorsPipeline.from_pretrained(tmp_path / "own", quantization=formats)
    report = quantize_pipeline(pipe, **formats)
    assert torch.equal(read.unet.blocks[1].to_q.quantized, pipe.unet.blocks[1].to_q.quantized)
    assert report.noise.cosine > 0.99


def test_a_lora_attaches_and_its_file_has_the_models_own_names(base: KolorsPipeline) -> None:
    pipe = own_pipeline(base)
    expected, handle = drawn(pipe), lora.attach(pipe.unet, 2, generator=torch.Generator().manual_seed(0))
    for parameter in handle.parameters():
        parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    latents, state = drawn(pipe), handle.public_state("unet")
    assert len(state) == 2 * 4 * 2 and "unet.blocks.0.to_q.lora_A.weight" in state
    handle.detach()
    assert torch.equal(drawn(pipe), expected)
    report = pipe.load_lora_weights(state)
    assert not report.unmatched and relative_error(drawn(pipe), latents) < 1e-5
    pipe.fuse_lora()
    assert relative_error(drawn(pipe), latents) < 1e-4 and relative_error(latents, expected) > 1e-2
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(drawn(pipe), expected)


def test_its_memory_is_planned(base: KolorsPipeline) -> None:
    pipe = own_pipeline(base)
    found = plan(pipe, is_printed=False, **SIZE)
    weights = sum(parameter.nbytes for parameter in pipe.unet.parameters())
    assert found.stages["unet"].weights == pytest.approx(weights / 2**30)
    assert 0 < found.stages["unet"].work < plan(pipe, 64, 96, is_printed=False).stages["unet"].work


def control_net(pipe: KolorsPipeline) -> ControlNet:
    return ControlNet(ControlNetConfig(**vars(SMALL.unet), conditioning_widths=(4, 4, 8, 8)))


def recorded(pipe: KolorsPipeline) -> None:
    with record_attention(pipe.unet, "*"):
        pass


def in_rows(pipe: KolorsPipeline) -> None:
    pipe.row_split = object.__new__(RowSplit)
    drawn(pipe)


def controlled(pipe: KolorsPipeline) -> None:
    pipe.controlnet = control_net(pipe)
    drawn(pipe, control_image=Image.new("RGB", (48, 32)))


NEEDS_UNET: dict[str, tuple[Callable[[Any], object], str]] = {
    "a step cache": (lambda pipe: pipe.enable_step_cache(), "a step cache"),
    "row split": (in_rows, "a row split"),
    "FreeU": (lambda pipe: pipe.enable_freeu(1, 1, 1, 1), "FreeU"),
    "fused kernels": (lambda pipe: pipe.enable_fused_kernels(), "running fused kernels"),
    "fused projections": (lambda pipe: pipe.fuse_qkv_projections(), "fusing projections"),
    "ControlNet": (controlled, "a ControlNet"),
    "a ControlNet from it": (lambda pipe: ControlNet.from_unet(pipe.unet), "a ControlNet"),
    "IP-Adapter": (lambda pipe: pipe.load_ip_adapter("tiny"), "an IP-Adapter"),
    "PAG": (lambda pipe: drawn(pipe, guidance_rule=partial(perturbed, pag_scale=3.0)), "perturbed-attention"),
    "export": (lambda pipe: unet_programs(pipe.unet), "exporting the UNet's programs"),
}  # fmt: skip


@pytest.mark.parametrize("feature", NEEDS_UNET)
def test_what_needs_the_unets_layers_refuses_it_by_name(feature: str, base: KolorsPipeline) -> None:
    use, name = NEEDS_UNET[feature]
    with pytest.raises(TypeError, match=rf"{name}.* needs kolors_core's UNet, and the denoiser is a DiT"):
        use(own_pipeline(base))


def test_maps_words_and_files_refuse_it_by_name(base: KolorsPipeline, tmp_path: Path) -> None:
    pipe = own_pipeline(base)
    with pytest.raises(TypeError, match="expected a UNet or a ControlNet, such as pipe.unet, got DiT"):
        recorded(pipe)
    with pytest.raises(TypeError, match="learned words need kolors_core's ChatGLM, .* is a Reader"):
        pipe.load_textual_inversion(torch.zeros(192), token="x")
    with pytest.raises(ValueError, match="is a (DiT|Reader), which single files have no names for"):
        pipe.save_single_file(tmp_path / "own.safetensors")
    pipe.disable_freeu()
    assert "DiT, " in repr(pipe) and pipe.freeu is None
    added = Conditioning(torch.zeros(1, 3, 192), torch.zeros(1, 192), torch.zeros(1, 6), added=torch.zeros(1))
    with pytest.raises(TypeError, match="`Conditioning.added` needs kolors_core's UNet"):
        guided(pipe.unet, pipe.scheduler.schedule(4), added)


class Unmarked(DiT):
    def __init__(self) -> None:
        super().__init__(DiTConfig())
        for block in self.blocks:
            block.is_block = False  # type: ignore[assignment]


class WithRoot(DiT):
    def __init__(self) -> None:
        super().__init__(DiTConfig())
        self.scale = nn.Parameter(torch.ones(1))


def test_blocks_that_are_not_marked_are_asked_for(base: KolorsPipeline) -> None:
    pipe, how = own_pipeline(base, unet=Unmarked()), "set is_block = True in the class of the layers"
    with pytest.raises(ValueError, match=f"this Unmarked has no blocks to compile: {how}"):
        pipe.compile(backend="eager")
    assert not any(module._compiled_call_impl for module in pipe.text_encoder.modules())
    with pytest.raises(ValueError, match="got a Unmarked: it has no transformers to quantize, and no blocks"):
        quantize(pipe.unet, 8)
    with any_device() as device:
        with pytest.raises(ValueError, match=f"this Unmarked has no blocks to offload one by one: {how}"):
            pipe.enable_sequential_cpu_offload(device=device.name)
        pipe.unet = WithRoot()
        with pytest.raises(ValueError, match="this WithRoot has scale beside its blocks, .* into a submod"):
            pipe.enable_sequential_cpu_offload(device=device.name)
    assert len(find_blocks(pipe.unet, "count")) == 2
    with pytest.raises(ValueError, match="this Identity has no floating-point weights"):
        first_weight(nn.Identity())


def test_what_is_no_denoiser_is_refused_with_what_it_lacks(base: KolorsPipeline) -> None:
    pipe = own_pipeline(base)
    with pytest.raises(
        TypeError, match="a denoiser like it or None, got .*Linear: its config has no sample_size"
    ):
        pipe.unet = nn.Linear(2, 2)
    narrow = make_dit()
    narrow.forward = lambda latents, timestep, text_tokens: latents
    with pytest.raises(
        TypeError, match="its forward is called with latents, .*, and has too many positional"
    ):
        pipe.unet = narrow
    with pytest.raises(TypeError, match="a denoiser like it or None, got str"):
        pipe.unet = "unet"
    with pytest.raises(ValueError, match="the text encoder is 192 wide, and the UNet reads 64"):
        own_pipeline(base, unet=DiT(DiTConfig(text_dim=64)))


def conditions(dtype: torch.dtype, width: int) -> tuple[Conditioning, Conditioning]:
    draw = torch.Generator().manual_seed(3)
    positive, negative = (
        Conditioning(
            torch.randn(2, 5, width, generator=draw, dtype=dtype),
            torch.randn(2, width, generator=draw, dtype=dtype), torch.full((2, 6), 32.0),
            torch.tensor([[0.0, 1, 1, 1, 4], [1, 1, 1, 1, 1]]),
        )
        for _ in range(2)
    )  # fmt: skip
    return positive, negative


@pytest.mark.numerical
@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
@pytest.mark.parametrize("kind", ["UNet", "DiT"])
def test_a_sigma_for_each_image_is_each_image_alone(kind: str, prediction_type: str) -> None:
    net: Any = UNet(SHALLOW.unet) if kind == "UNet" else DiT(DiTConfig(text_dim=64))
    randomise(net)
    net = net.double().eval().requires_grad_(False)
    halves = conditions(torch.float64, 64)
    schedule = DPMSolverMultistepScheduler(prediction_type=prediction_type).schedule(6)
    x = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sigmas = torch.tensor([7.25, schedule.sigmas[4].item()], dtype=torch.float64)
    for precompute in (True, False):
        denoise = guided(net, schedule, *halves, 3.0, precompute=precompute)
        together = denoise(x, sigmas)
        for i, sigma in enumerate(sigmas.tolist()):
            assert relative_error(together[i], denoise(x, sigma)[i]) < EXACT
        assert torch.equal(denoise(x, sigmas[:, None, None, None]), together)
        assert torch.equal(denoise(x, torch.tensor(7.25)), denoise(x, 7.25))
    x.requires_grad_()
    (slope,) = torch.autograd.grad(denoise(x, sigmas).sum(), x)
    assert slope.isfinite().all() and slope.any()


class Dropping(DiT):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.drop = nn.Dropout(0.5)

    def forward(self, latents: Tensor, *given: Any, **more: Any) -> Tensor:
        return super().forward(self.drop(latents), *given, **more)


def test_dropout_while_drawing_is_named(base: KolorsPipeline, caplog: pytest.LogCaptureFixture) -> None:
    net = Dropping(DiTConfig(width=32))
    pipe = own_pipeline(base, unet=net)
    drawn(pipe)
    assert caplog.messages == ["the Dropping draws in training mode, with its drop: call its eval() before"]
    net.eval()
    drawn(pipe)
    net.train().drop.p = 0.0
    drawn(pipe)
    assert len(caplog.messages) == 1


def test_one_sigma_is_asked_for_where_it_must_be_one() -> None:
    net, (positive, negative) = make_dit(), conditions(torch.float32, 192)
    schedule: Schedule = EulerDiscreteScheduler().schedule(8)
    denoise = guided(net, schedule, positive, negative, 3.0, interval=(0.2, 0.8))
    with pytest.raises(ValueError, match="a guidance interval takes one sigma for all images"):
        denoise(torch.zeros(2, 4, 4, 6), torch.tensor([1.0, 2.0]))


def test_a_sampler_of_ones_own_draws_the_calls_noise(base: KolorsPipeline) -> None:
    """Its noise is that of the call's generator, after the noise that the run begins with."""
    seen: list[Tensor] = []

    def noisy(denoise: Any, x: Tensor, sigmas: Tensor, on_step: Any = None, *, noise: Any) -> Tensor:
        seen.extend([x, noise(), noise()])
        return x

    def quiet(denoise: Any, x: Tensor, sigmas: Tensor, on_step: Any = None, *, noise: Any = None) -> Tensor:
        assert noise is None  # a default is kept: `dpmpp_2m` stays deterministic
        return x

    pipe = own_pipeline(base)
    pipe.sampler = noisy
    drawn(pipe)
    draw = torch.Generator().manual_seed(0)
    first, *later = (torch.randn(1, 4, 4, 6, generator=draw) for _ in range(3))
    scale = pipe.scheduler.schedule(2).init_noise_sigma
    assert torch.equal(seen[0], first * scale) and all(map(torch.equal, seen[1:], later))
    pipe.sampler = quiet
    drawn(pipe)
