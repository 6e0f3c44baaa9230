"""Step cache: each mode against a run written out with the UNet's parts; in every pipeline, against the exact
one with an up path that reads in some steps what it had in an earlier one.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from kolors_core import KolorsImg2ImgPipeline, KolorsInpaintPipeline, KolorsPAGPipeline, KolorsPipeline
from kolors_core.conditioning import Conditioning
from kolors_core.guidance import guided
from kolors_core.performance.compile import compile_blocks
from kolors_core.performance.cuda_graphs import CUDAGraphCache
from kolors_core.performance.step_cache import CachedRun, StepCache, check_unet
from kolors_core.sampling import Denoiser
from kolors_core.schedulers import HeunDiscreteScheduler
from kolors_core.unet import TransformerBlock, UNet
from tests.performance.test_compile import Recorder
from tests.support.controlnets import net_pair
from tests.support.inpainting import Nine, mask_of
from tests.support.ip_adapters import Both, load_both
from tests.support.loras import ATTENTION, factors, peft_names
from tests.support.offloads import offloaded
from tests.support.parity import pair
from tests.support.pipelines import NO_SAVINGS, Pair, picture, saving, steps_of, use_solver
from tests.support.small import EXACT, SHALLOW, SMALL, relative_error
from tests.support.step_caches import SCALE, SCHEDULE, STEPS, WrittenOut, assert_same_run, rereading
from tests.test_unet import inputs


@pytest.fixture(scope="module")
def unet() -> UNet:
    made, _ = pair("unet", torch.float64)
    assert isinstance(made, UNet)
    return made


@pytest.fixture(scope="module")
def told() -> tuple[Conditioning, Conditioning, Tensor]:
    """Positive and negative conditions of two images, and noise."""
    given = inputs(4, 4, 5, torch.float64)
    tokens, pooled, ids = (given[name] for name in ("text_tokens", "pooled_text", "size_ids"))
    halves = (slice(2), slice(2, 4))
    positive, negative = (Conditioning(tokens[rows], pooled[rows], ids[rows]) for rows in halves)
    return positive, negative, given["latents"][:2]


def denoiser(unet: UNet, told: Any, scale: float = SCALE, **settings: Any) -> Denoiser:
    return StepCache(**settings).wrap_rule(guided)(unet, SCHEDULE, *told[:2], scale)


@pytest.mark.parametrize(("branch", "interval"), [(0, 2), (2, 3), (3, 6), (5, 2), (8, 3)])
@torch.no_grad()
def test_an_interval_is_the_written_out_run(unet: UNet, told: Any, branch: int, interval: int) -> None:
    expected = WrittenOut(unet, told, branch, is_full=lambda step, *_: step % interval == 0)
    assert_same_run(denoiser(unet, told, interval=interval, branch=branch), expected, told[2])
    assert expected.fulls == list(range(0, STEPS, interval))


@torch.no_grad()
def test_steps_around_a_center(unet: UNet, told: Any) -> None:
    expected = WrittenOut(unet, told, is_full=lambda step, *_: step in (0, 2, 3))
    assert_same_run(denoiser(unet, told, interval=2, center=0.5, power=2.0), expected, told[2])
    assert expected.fulls == [0, 2, 3]


@pytest.mark.parametrize("power", [1.0, 1.4, 3.0])
def test_steps_are_dense_around_the_center(power: float) -> None:
    """Section 3.3 of the paper: i = l^power + c of evenly spaced l, here of 50 steps with the center 15."""
    steps = sorted(StepCache(interval=5, center=0.3, power=power).full_steps(50))
    assert steps[0] == 0 and len(steps) <= 10 and steps[-1] < 50
    gaps = [b - a for a, b in zip(steps, [*steps[1:], 50], strict=True)]
    if power == 1.0:
        assert set(gaps) == {5}
    else:
        nearest = min(range(len(gaps)), key=lambda i: abs(steps[i] + gaps[i] / 2 - 15))
        assert gaps[nearest] == min(gaps) < 5 < gaps[-1] == max(gaps)


@pytest.mark.parametrize("threshold", [0.2, 0.5])
@torch.no_grad()
def test_a_threshold_is_the_written_out_run(unet: UNet, told: Any, threshold: float) -> None:
    def is_full(_step: int, skip: Tensor, last: Tensor) -> bool:
        return bool((skip - last).abs().sum() >= threshold * last.abs().sum())

    expected = WrittenOut(unet, told, is_full=is_full)
    assert_same_run(denoiser(unet, told, threshold=threshold), expected, told[2])
    assert 1 < len(expected.fulls) < STEPS


@pytest.mark.parametrize("scale", [SCALE, 1.0])
@torch.no_grad()
def test_a_gate_is_the_written_out_run(unet: UNet, told: Any, scale: float) -> None:
    expected = WrittenOut(unet, told, gate=3, scale=scale)
    assert_same_run(denoiser(unet, told, scale, gate=0.5), expected, told[2])
    assert expected.guided_steps == ([0, 1, 2] if scale > 1 else [])


@torch.no_grad()
def test_guidance_ends_by_interval_and_similarity(unet: UNet, told: Any) -> None:
    expected = WrittenOut(unet, told, is_guided=lambda step, _: 1 <= step < 4)
    assert_same_run(denoiser(unet, told, guidance_interval=(1 / 6, 4 / 6)), expected, told[2])
    cosines = list[float]()

    def is_guided(step: int, last: Tensor) -> bool:
        cosines.append(last.min().item())
        return not any(one > 0.5 for one in cosines)

    expected = WrittenOut(unet, told, is_guided=is_guided)
    assert_same_run(denoiser(unet, told, guidance_similarity=0.5), expected, told[2])
    assert 0 < len(expected.guided_steps) < STEPS, cosines
    run = CachedRun(StepCache(guidance_similarity=0.5), unet, SCHEDULE, 2, True, None)
    for other, is_similar in ((-1.0, False), (1.0, True)):  # the second image's halves; the first's are equal
        run.compare_halves(torch.tensor([1.0, 1.0, 1.0, other])[:, None])
        assert run.is_similar is is_similar


@torch.no_grad()
def test_all_together_is_the_written_out_run(unet: UNet, told: Any) -> None:
    settings: dict[str, Any] = {"interval": 3, "branch": 4, "gate": 5 / 6, "guidance_interval": (0.0, 1 / 3)}
    expected = WrittenOut(
        unet, told, 4, is_full=lambda step, *_: step % 3 == 0, is_guided=lambda step, _: step < 2, gate=5
    )
    assert_same_run(denoiser(unet, told, **settings), expected, told[2])
    assert expected.fulls == [0, 2, 3, 4] and expected.guided_steps == [0, 1]


Case = tuple[Any, dict[str, Any]]
GIVEN: dict[str, Any] = {
    "prompt": ["a cat", "small"], "num_inference_steps": 4, "height": 32, "width": 40,
    "output_type": "latent",
}  # fmt: skip


def run(pipe: Any, **arguments: Any) -> list[Tensor]:
    return steps_of(pipe, **GIVEN | arguments)[:-1]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 1 and all(relative_error(x, y) < EXACT for x, y in zip(a, b, strict=True))


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    """A pipeline of its own, and the arguments of a call."""
    name: str = request.param
    if name == "inpainting of 9 channels":
        nine: Nine = request.getfixturevalue("nine")
        made = KolorsInpaintPipeline.from_pipe(nine[0])
        return made, {"image": picture(1, 32, 40), "mask_image": mask_of(32, 40), "strength": 1.0}
    if name == "IP-Adapter with masks, LoRA and FreeU":
        both: Both = request.getfixturevalue("both")
        files: list[Path] = request.getfixturevalue("adapters")
        load_both(both, files[0])
        made, lora = both[0], factors(both[0].unet, "unet", ATTENTION)
        made.load_lora_weights(peft_names("unet", lora))
        made.enable_freeu(0.9, 0.8, 1.1, 1.2)
        mask = torch.zeros(1, 1, 32, 40, dtype=torch.float64)
        mask[..., 16:] = 1
        masks = {"ip_adapter_masks": [mask]}
        return made, {"ip_adapter_image": picture(3), "cross_attention_kwargs": masks}
    pipes: Pair = request.getfixturevalue("pipes")
    kinds: dict[str, Any] = {
        "image to image": KolorsImg2ImgPipeline, "perturbed attention": KolorsPAGPipeline,
    }  # fmt: skip
    kind = kinds.get(name, KolorsPipeline)
    solvers: dict[str, Any] = {
        "UniPC": ("UniPCMultistepScheduler", {}),
        "DPM++": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    }  # fmt: skip
    if name in solvers:
        use_solver(pipes, *solvers[name])
    if name == "ControlNet":
        net, _ = net_pair(20, torch.float64)
        controlled = {"control_image": picture(2, 32, 40), "control_guidance_end": 0.6}
        return kind.from_pipe(pipes[0], controlnet=net), controlled
    images = {"image": picture(1, 32, 40), "strength": 0.99}
    return kind.from_pipe(pipes[0]), images if name == "image to image" else {}


CASES = (
    "UniPC", "image to image", "inpainting of 9 channels", "perturbed attention", "ControlNet",
    "IP-Adapter with masks, LoRA and FreeU",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_every_pipeline_reuses_the_deep_part(case: Case) -> None:
    """Also in steps recorded as graphs, but for the deep part where image prompts have masks."""
    pipe, arguments = case
    with rereading(pipe.unet, lambda step: step % 2 == 0) as count:
        expected = run(pipe, **arguments)
    assert count[0] == len(expected)
    assert not same(run(pipe, **arguments), expected), "it has an effect"
    pipe.enable_step_cache(2)
    assert same(run(pipe, **arguments), expected)
    recorder = Recorder()
    pipe._wrap_step = CUDAGraphCache(recorder)
    assert same(run(pipe, **arguments), expected)
    # Three parts; with a ControlNet in the first half itself, and two parts with and without its residuals.
    assert recorder.count == (
        2 if "cross_attention_kwargs" in arguments else 6 if "control_image" in arguments else 3
    )


@pytest.mark.parametrize("case", ["DPM++", "perturbed attention", "ControlNet"], indirect=True)
def test_guidance_ends_in_every_pipeline(case: Case) -> None:
    """With a gate in the middle, steps after it equal those of another run only up to there."""
    pipe, arguments = case
    plain = run(pipe, **arguments)
    pipe.enable_step_cache(1, gate=0.5)
    gated = run(pipe, **arguments)
    assert same(gated[:2], plain[:2]) and relative_error(gated[2], plain[2]) > 1e-5
    recorder = Recorder()
    pipe._wrap_step = CUDAGraphCache(recorder)
    assert same(run(pipe, **arguments), gated)
    # Three parts before the gate and after it, and a ControlNet before it; not the step that keeps outputs.
    assert recorder.count == (7 if "control_image" in arguments else 6)
    pipe._wrap_step = None
    pipe.enable_step_cache(1, guidance_interval=(0.0, 0.5))
    ended = run(pipe, **arguments)
    assert same(ended[:2], plain[:2]) and not same(ended, gated)


def test_offloaded_blocks_are_not_taken_for_changed_ones(pipes: Pair) -> None:
    pipe = KolorsPipeline.from_pipe(pipes[0])
    pipe.enable_step_cache(2)
    expected = run(pipe)
    with offloaded(pipe, by_block=True):
        assert same(run(pipe), expected)


@torch.no_grad()
def test_compiled_blocks_record_and_keep_the_same(told: Any) -> None:
    plain, compiled = (pair("unet", torch.float64, SHALLOW)[0] for _ in range(2))
    blocks = nn.ModuleList(block for block in compiled.modules() if isinstance(block, TransformerBlock))
    assert compile_blocks(blocks, backend="eager") == 1
    plain_run, run = (denoiser(cast(UNet, net), told, interval=2, gate=0.5) for net in (plain, compiled))
    assert_same_run(run, plain_run, told[2])
    torch.compiler.reset()


def test_a_changed_unet_is_computed_whole(both: Both) -> None:
    """A callback loads a LoRA after the first of four steps; after another it changes the prompt."""
    pipe = both[0]
    lora = peft_names("unet", factors(pipe.unet, "unet", ATTENTION))

    def callback(own: Any, i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"])
        if i == 0:
            own.load_lora_weights(lora)
        return {"prompt_embeds": 2 * tensors["prompt_embeds"]} if i == 1 else {}

    given: dict[str, Any] = {
        "callback_on_step_end": callback, "guidance_scale": 5.0,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }  # fmt: skip
    runs: list[list[Tensor]] = []
    for is_cached in (False, True):
        seen: list[Tensor] = []
        runs.append(seen)
        if is_cached:
            pipe.enable_step_cache(4)
            pipe(**GIVEN | given, generator=torch.Generator().manual_seed(0))
        else:
            with rereading(pipe.unet, lambda step: step < 3):
                pipe(**GIVEN | given, generator=torch.Generator().manual_seed(0))
        pipe.unload_lora_weights()
    assert same(*runs)


def test_two_threads_draw_with_one_pipeline(pipes: Pair) -> None:
    """A whole call in another thread, after the first step of one."""
    pipe = KolorsPipeline.from_pipe(pipes[0])
    pipe.enable_step_cache(3, gate=0.75)
    alone = [run(pipe, prompt=prompt) for prompt in ("a cat", "small")]
    beside: list[list[Tensor]] = []

    def callback(_pipe: Any, i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"])
        if i == 0:
            with ThreadPoolExecutor(1) as thread:
                beside.append(thread.submit(run, pipe, prompt="small").result())
        return {}

    seen: list[Tensor] = []
    given = GIVEN | {"prompt": "a cat", "callback_on_step_end": callback}
    pipe(**given, generator=torch.Generator().manual_seed(0))
    assert all(map(torch.equal, seen, alone[0])) and all(map(torch.equal, beside[0], alone[1]))


@torch.no_grad()
def test_each_half_of_split_guidance_has_its_own(unet: UNet, told: Any) -> None:
    """Two denoisers, as in two processes; what needs both halves in one is refused."""
    sigmas, x = SCHEDULE.sigmas.tolist(), told[2]
    whole = denoiser(unet, told, interval=2)

    def half(k: int, unet: UNet, schedule: Any, *_: Any, **saved: Any) -> Denoiser:
        return guided(unet, schedule, told[1 - k], **saved)

    halves = [
        StepCache(interval=2).wrap_rule(partial(half, k))(unet, SCHEDULE, *told[:2], SCALE) for k in (0, 1)
    ]
    for sigma in sigmas[:2]:
        negative, positive = (one(x, sigma) for one in halves)
        assert relative_error(negative + SCALE * (positive - negative), whole(x, sigma)) < EXACT
    for name in ("gate", "guidance_similarity"):
        settings: dict[str, Any] = {name: 0.5}
        with pytest.raises(ValueError, match="has one half of the rows in this process: set neither gate"):
            StepCache(**settings).wrap_rule(partial(half, 0))(unet, SCHEDULE, *told[:2], SCALE)


@torch.no_grad()
def test_evaluations_at_one_noise_level_are_one_step(unet: UNet, told: Any) -> None:
    """Heun's method evaluates each level but the first twice; both are whole, or neither."""
    scheduler, fulls = HeunDiscreteScheduler(), []
    schedule = scheduler.schedule(3)
    rule = StepCache(interval=2).wrap_rule(guided)
    hook = unet.mid.register_forward_hook(lambda *_: fulls.append(len(levels)))
    levels: list[float] = []
    denoise = rule(unet, schedule, *told[:2], SCALE)
    scheduler.sampler(schedule, lambda: told[2])(
        lambda x, sigma: (levels.append(sigma), denoise(x, sigma))[1], told[2], schedule.sigmas
    )
    hook.remove()
    assert [levels.index(one) for one in levels] == [0, 1, 1, 3, 3] and fulls == [1, 4, 5]


def changed(unet: UNet, change: str) -> Any:
    copied = UNet(SMALL.unet)
    copied.load_state_dict(unet.state_dict())
    if change == "compiled":
        return torch.compile(copied, backend="eager")
    if change == "own encode":
        copied.__class__ = type("Own", (UNet,), {"encode": lambda *arguments: UNet.encode(*arguments)})
        return copied
    (copied if change == "hook on the UNet" else copied.up[1]).register_forward_hook(lambda *_: None)
    return copied


DIVIDED = [
    ("hook on the UNet", "no hooks, and not compiled whole"), ("hook on a level", "divides up.1, whose own"),
    ("compiled", r"pipe.compile\(\) compiles blocks"), ("own encode", "needs UNet's own forward"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error"), DIVIDED)
def test_what_cannot_be_divided_is_refused(unet: UNet, change: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        check_unet(changed(unet, change))


def test_what_cannot_be_cached_is_refused(pipes: Pair) -> None:
    pipe = KolorsPipeline.from_pipe(pipes[0])
    with pytest.raises(ValueError, match="branch must be a whole number from 0 to 8, got 9"):
        pipe.enable_step_cache(branch=9)
    assert pipe.step_cache is None
    pipe.enable_step_cache()
    with saving(pipe, NO_SAVINGS), pytest.raises(ValueError, match="needs Savings.precompute"):
        run(pipe)
    pipe.guided = lambda unet, schedule, positive, *_, **__: guided(unet, schedule, positive)
    with pytest.raises(ValueError, match="cannot reach the UNet: the rule .*lambda> uses no wrap_step"):
        run(pipe)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"interval": 0}, "interval must be a positive whole number, got 0"),
    ({"interval": 2, "branch": -1}, "branch must be a whole number"),
    ({"branch": 2}, "branch needs an interval or a threshold"),
    ({"interval": 2, "threshold": 0.1}, "one of them must be None"), ({"center": 0.5}, "center needs"),
    ({"interval": 2, "center": 1.5}, "center must be from 0 to 1, got 1.5"),
    ({"power": 0.5}, "power must be 1 or more"), ({"interval": 2, "power": 2.0}, "power needs a center"),
    ({"threshold": -1.0}, "threshold must be 0 or more"), ({"gate": 0}, "gate must be above 0"),
    ({"gate": float("nan")}, "gate must be a number"), ({"guidance_interval": (0.5, 0.2)}, "must rise"),
    ({"guidance_similarity": 1.1}, "guidance_similarity must be from -1 to 1"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "error"), WRONG)
def test_wrong_settings_are_named(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        StepCache(**settings)


def test_images_and_other_tasks_know_of_it(pipes: Pair) -> None:
    pipe = KolorsPipeline.from_pipe(pipes[0])
    plain = run(pipe, num_inference_steps=2)
    pipe.enable_step_cache(2, guidance_interval=(0.0, 0.5))
    other = KolorsImg2ImgPipeline.from_pipe(pipe)
    assert other.step_cache == pipe.step_cache
    image = pipe("a cat", num_inference_steps=2, height=32, width=32).images[0]
    assert image.info["step_cache"] == "interval=2, guidance_interval=(0.0, 0.5)"
    pipe.disable_step_cache()
    assert pipe.step_cache is None and other.step_cache is not None
    assert all(map(torch.equal, run(pipe, num_inference_steps=2), plain))
