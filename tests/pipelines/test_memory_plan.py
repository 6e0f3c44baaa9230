"""The plan: within a tenth of what is then allocated, as torch's own profiler counts it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from kolors_core import EulerDiscreteScheduler, KolorsImg2ImgPipeline, KolorsPipeline
from kolors_core.adapters.clip_vision import CLIPVision
from kolors_core.adapters.ip_adapter import IPAdapter, attach
from kolors_core.adapters.lora import attach as attach_lora
from kolors_core.attention import attention, attention_kernel
from kolors_core.chatglm import ChatGLM
from kolors_core.checkpoint import SkipInit
from kolors_core.cli.generate import main
from kolors_core.config import KOLORS, ChatGLMConfig, KolorsConfig, UNetConfig, VAEConfig
from kolors_core.performance.memory_tracker import MemoryTracker
from kolors_core.performance.quantize import model_bytes, quantize
from kolors_core.pipelines.memory_plan import Plan, plan
from kolors_core.precompute import Savings
from kolors_core.tokenizer import TokenBatch
from kolors_core.unet import TransformerBlock, UNet
from kolors_core.vae import VAE
from tests.support.ip_adapters import adapter_config
from tests.support.offloads import offloaded
from tests.support.small import SMALL_CLIP, randomise

GIB = 2**30
# Wide enough that a convolution's workspace and the weights of a block are of the size that they have in use.
MEDIUM = KolorsConfig(
    text_encoder=ChatGLMConfig(
        vocab_size=640, hidden_size=64, feed_forward_size=96, layers=3, heads=4, head_dim=16, num_kv_heads=2
    ),
    unet=UNetConfig(
        sample_size=16, channels=(64, 128, 192), heads=(1, 2, 3), depths=(0, 1, 1), resnets_per_level=1,
        text_dim=64, context_dim=96, size_dim=16,
    ),
    vae=VAEConfig(sample_size=128, channels=(32, 64, 64, 64), resnets_per_level=1),
)  # fmt: skip


class Words:
    """A tokenizer for which every prompt is as long as it may be, and another one."""

    size = 640

    def __call__(self, prompts: list[str], length: int) -> TokenBatch:
        ids = torch.tensor([[sum(map(ord, prompt))] * length for prompt in prompts])
        places = torch.arange(length).expand(len(prompts), -1)
        return TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), places)


def make(dtype: torch.dtype = torch.float32, config: KolorsConfig = MEDIUM, **more: Any) -> KolorsPipeline:
    """A pipeline with random weights that keeps no prompts."""
    models = {"text_encoder": ChatGLM(config.text_encoder), "unet": UNet(config.unet), "vae": VAE(config.vae)}
    for model in models.values():
        if not next(model.parameters()).is_meta:
            randomise(model)
        model.to(dtype).eval()
    scheduler = EulerDiscreteScheduler()
    pipe = KolorsPipeline(**models, tokenizer=Words(), scheduler=scheduler, **more)  # type: ignore[arg-type]
    pipe.set_progress_bar_config(disable=True)
    pipe.savings = Savings(cached_prompts=0)
    return pipe


def full_size() -> KolorsPipeline:
    """The released Kolors in float16, without weights."""
    with torch.device("meta"), SkipInit():
        pipe = make(torch.float16, KOLORS)
    pipe.vae.float()
    return pipe


def draw(pipe: KolorsPipeline, prompts: int = 1, **arguments: Any) -> Callable[[], Any]:
    """Three of fifty steps, and the image."""

    def stop(pipe: Any, i: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = i == 2
        return {}

    return lambda: pipe(
        ["cat", "dog", "owl"][:prompts], output_type="pt", generator=torch.Generator().manual_seed(0),
        callback_on_step_end=stop, **arguments,
    )  # fmt: skip


def measure(pipe: KolorsPipeline, run: Callable[[], Any]) -> dict[str, float]:
    """GiB of the most that is allocated in each stage, and under "all" in the run, beside what was before."""
    begin = pipe._enter_stage

    def begin_and_tell(stage: str | None = None) -> None:
        with record_function(f"stage {stage}"):
            pass
        begin(stage)

    pipe._enter_stage = begin_and_tell
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            run()
    finally:
        del pipe.__dict__["_enter_stage"]
    now, stage, most = 0, "None", dict[str, int]()
    result: Any = watched.profiler
    for event in sorted(result.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name().startswith("stage "):
            stage = event.name().removeprefix("stage ")
        elif event.name() == "[memory]":
            now += event.nbytes()
            most[stage] = max(most.get(stage, 0), now)
    return {name: count / GIB for name, count in (most | {"all": max(most.values())}).items()}


def compare(made: Plan, measured: dict[str, float], within: float = 0.1) -> None:
    for name, stage in made.stages.items():
        assert stage.work == pytest.approx(measured[name], rel=within), name


@pytest.fixture(scope="module")
def float32() -> KolorsPipeline:
    return make()


@pytest.fixture(scope="module")
def bfloat16() -> KolorsPipeline:
    return make(torch.bfloat16)


@pytest.fixture(scope="module")
def float64() -> KolorsPipeline:
    return make(torch.float64)


@pytest.mark.numerical
@pytest.mark.parametrize(
    ("precision", "height", "width", "prompts", "arguments"),
    [
        ("float32", 192, 128, 1, {}),
        ("float32", 128, 128, 2, {"guidance_scale": 1.0}),
        ("bfloat16", 128, 128, 2, {}),
        ("bfloat16", 64, 96, 1, {"guidance_scale": 1.0, "num_images_per_prompt": 3}),
        ("float64", 64, 96, 1, {}),  # which oneDNN computes on no CPU, as bfloat16 on older ones
    ],
)
def test_each_stage_takes_what_was_planned(
    precision: str, height: int, width: int, prompts: int, arguments: dict[str, Any],
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """Work, on top of the weights; the whole with all models there."""
    pipe = request.getfixturevalue(precision)
    made = plan(pipe, height, width, prompts, **arguments)
    assert capsys.readouterr().out == f"{made}\n"
    measured = measure(pipe, draw(pipe, prompts, height=height, width=width, **arguments))
    compare(made, measured)
    weights = sum(stage.weights for stage in made.stages.values())
    held = sum(p.nbytes for name in made.stages for p in getattr(pipe, name).parameters()) / GIB
    assert weights == pytest.approx(held, abs=1e-9)
    assert made.resident == pytest.approx(held + measured["all"], rel=0.1)


@pytest.mark.parametrize("by_block", [False, True], ids=["by_model", "by_block"])
def test_under_offload_weights_and_work_take_together_what_was_planned(
    float32: KolorsPipeline, by_block: bool
) -> None:
    with offloaded(float32, by_block):
        made = plan(float32, 128, 128)
        assert made.mode == ("by_block" if by_block else "by_model")
        draw(float32, height=128, width=128)()
        float32.offload.peak_bytes = 0
        measured = measure(float32, draw(float32, height=128, width=128))
        weights = float32.offload.peak_bytes / GIB
    assert getattr(made, made.mode) == pytest.approx(measured["all"], rel=0.1)
    assert weights < getattr(made, made.mode) < made.resident
    if by_block:
        for name, stage in made.stages.items():
            assert stage.by_block == pytest.approx(measured[name], rel=0.1), name
    assert made.by_block < made.by_model


def test_quantised_and_adapted_models_are_planned_as_they_are() -> None:
    """int8 weights are made whole in a layer, a LoRA adds its own, CLIP and the resampler are part of it."""
    pipe = make(image_encoder=CLIPVision(SMALL_CLIP).eval())
    before = model_bytes(pipe.unet) / GIB
    quantize(pipe.unet, 8)
    attach_lora(pipe.unet, rank=16)
    adapter = IPAdapter(adapter_config(MEDIUM.unet))
    randomise(adapter)
    attach(pipe.unet, adapter.eval())
    made = plan(pipe, 64, 64)
    guide = torch.rand(1, 3, SMALL_CLIP.image_size, SMALL_CLIP.image_size)
    measured = measure(pipe, draw(pipe, height=64, width=64, ip_adapter_image=[guide]))
    assert list(made.stages) == ["text_encoder", "image_encoder", "unet", "vae"]
    compare(made, measured)
    tensors = {id(t): t for m in (pipe.unet, adapter) for t in (*m.parameters(), *m.buffers())}
    assert made.stages["unet"].weights == sum(t.nbytes for t in tensors.values()) / GIB
    assert made.stages["unet"].weights < before
    pipe._image_encoder = None
    assert list(plan(pipe, 64, 64).stages) == ["text_encoder", "unet", "vae"]


def test_planning_changes_nothing(float32: KolorsPipeline) -> None:
    """No hook is called, no parameter moved, no random number drawn."""
    called, state = [], torch.get_rng_state()
    before = {name: (p, p.data_ptr()) for name, p in float32.unet.named_parameters()}
    handle = float32.unet.conv_in.register_forward_hook(lambda *_: called.append(1))
    plan(float32, 64, 64)
    handle.remove()
    assert not called and torch.equal(state, torch.get_rng_state())
    for name, parameter in float32.unet.named_parameters():
        assert before[name][0] is parameter and before[name][1] == parameter.data_ptr() != 0
    assert float32.offload.device is None and not float32.prompt_cache.kept


def test_a_changed_architecture_is_planned_as_it_stands(
    float32: KolorsPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that keeps a large tensor while it works, and one that asks for a value."""
    plain, forward = plan(float32, 64, 64), TransformerBlock.forward

    def keeps(self: TransformerBlock, x: Tensor, context: Any) -> Tensor:
        kept = x.new_empty(2**24)
        return forward(self, x, context) + kept[0]

    monkeypatch.setattr(TransformerBlock, "forward", keeps)
    made = plan(float32, 64, 64)
    assert made.stages["unet"].work - plain.stages["unet"].work == pytest.approx(2**26 / GIB, rel=0.2)
    assert made.stages["vae"].work == plain.stages["vae"].work
    monkeypatch.setattr(TransformerBlock, "forward", lambda self, x, context: x * x.sum().item())
    with pytest.raises(NotImplementedError, match="a plan has no values, and the model reads one of a"):
        plan(float32, 64, 64)


@pytest.mark.parametrize(
    ("device", "shape", "dtype", "scores"),
    [
        ("cuda", (1, 1, 4096, 512), torch.float32, 0),
        ("cpu", (1, 1, 4096, 512), torch.float32, 0),
        ("mps", (1, 1, 4096, 512), torch.float32, 2**26),
        ("mps", (2, 20, 4096, 64), torch.float16, 2**29),  # in chunks, of 2^28 elements at most
        ("cpu", (1, 1, 4096, 512), torch.bfloat16, 2**26),  # written out, before and after the softmax
    ],
)
@torch.no_grad()
def test_scores_count_where_a_kernel_has_them(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, scores: int
) -> None:
    """Fused they are nowhere; beside them there is the result, once more where chunks are put together."""
    q = torch.empty(shape, dtype=dtype, device="meta")
    with MemoryTracker(device) as tracker:
        out = attention(q, q, q)
    assert out.shape == q.shape
    rows = q.numel() // shape[-1] * 4  # logsumexp
    assert max(q.nbytes, 0.99 * scores) <= tracker.activations[None] <= scores + 2 * q.nbytes + rows
    with attention_kernel("matmul"), MemoryTracker(device) as tracker:
        attention(q, q, q)
    assert tracker.activations[None] > 2 * q[..., 0].numel() * shape[2] * dtype.itemsize


def test_the_released_model_is_planned_without_weights() -> None:
    """The figures of float16 with the VAE in float32; 17 GB that are not there."""
    pipe = full_size()
    made = plan(pipe, device="cuda")
    assert made.mode is None and made.run == "1 image of 1024x1024 with guidance on cuda"
    got = {name: (round(stage.weights, 2), round(stage.work, 2)) for name, stage in made.stages.items()}
    assert got == {"text_encoder": (11.13, 0.04), "unet": (4.8, 0.47), "vae": (0.31, 3.01)}
    ways = (made.resident, made.by_model, made.by_block)
    assert [round(way, 2) for way in ways] == [19.26, 11.17, 3.01]


def test_a_pipeline_on_the_meta_device_needs_configs_alone_and_says_so(
    reference_folder: Path, tmp_path: Path
) -> None:
    for file in reference_folder.rglob("*config.json"):
        copy = tmp_path / file.relative_to(reference_folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    (tmp_path / "model_index.json").write_bytes((reference_folder / "model_index.json").read_bytes())
    pipe = KolorsPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16, device="meta")
    assert (pipe.unet.conv_in.weight.dtype, pipe.vae.post_quant_conv.weight.dtype) == (
        torch.float16, torch.float32,
    )  # fmt: skip
    whole = KolorsPipeline.from_pretrained(reference_folder, torch_dtype=torch.float16)
    assert str(plan(pipe, 128, 64, 2)) == str(plan(whole, 128, 64, 2)).replace("  as it is now", "")
    said = "weights are not loaded"
    with pytest.raises(ValueError, match=said):
        pipe("cat")
    with pytest.raises(ValueError, match=said):
        KolorsImg2ImgPipeline.from_pipe(pipe)("cat", torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match=said):
        pipe.encode_prompt("cat")
    with pytest.raises(ValueError, match=said):
        pipe.to("cpu")
    assert plan(pipe.to(torch.float32), 64, 64).stages["unet"].weights > 0


def test_a_pipeline_without_text_encoder_has_no_such_stage(float32: KolorsPipeline) -> None:
    alone = KolorsPipeline.from_pipe(float32, text_encoder=None, tokenizer=None)
    made, whole = plan(alone, 64, 64), plan(float32, 64, 64)
    assert list(made.stages) == ["unet", "vae"]
    assert made.stages["unet"].work == pytest.approx(whole.stages["unet"].work, rel=1e-3)
    assert plan(KolorsImg2ImgPipeline.from_pipe(float32), 64, 64) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 100}, "height must be a positive multiple of 8, got 100"),
        ({"width": 0}, "width must be a positive multiple of 8, got 0"),
        ({"batch": 0}, "batch must be a positive whole number, got 0"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt must be a positive whole number, got 1.5"),
        ({"max_sequence_length": 300}, "max_sequence_length must be a whole number from 3 to 256, got 300"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number, got nan"),
        ({"device": "toaster"}, "expected a device of this machine"),
    ],
)
def test_errors_are_the_pipelines(float32: KolorsPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(float32, **arguments)


def test_the_command_line_prints_the_plan_and_makes_no_picture(
    reference_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["--plan", "-w", str(reference_folder), "--device", "cuda", "--height", "64", "--images", "2"]
    assert main([*command, "-g", "1", "--unet-bits", "4"]) == 0
    printed = capsys.readouterr().out
    pipe = KolorsPipeline.from_pretrained(reference_folder, torch_dtype=torch.float16, device="meta")
    quantize(pipe.unet, 4)
    made = plan(pipe, 64, num_images_per_prompt=2, guidance_scale=1.0, device="cuda")
    assert printed == f"{made}\n" and made.run == "2 images of 128x64 without guidance on cuda"
    assert main([*command, "--height", "100"]) == 2
    assert not list(tmp_path.iterdir())


def test_tiling_is_planned_as_it_is() -> None:
    """And read from the VAE at every plan. The VAE is the released one."""
    with torch.device("meta"), SkipInit():
        pipe = make(config=replace(MEDIUM, vae=KOLORS.vae))
    pipe.text_encoder = None
    whole = plan(pipe, 1024, 1024, device="cuda").stages["vae"].work
    pipe.enable_vae_tiling()
    assert plan(pipe, 1024, 1024, device="cuda").stages["vae"].work < whole / 4
