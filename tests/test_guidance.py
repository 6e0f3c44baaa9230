"""Guidance on a UNet that somebody has changed: what they changed is what runs.

Rescaled noise and guidance in an interval, against loops written out with the reference's parts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from kolors_core import KolorsImg2ImgPipeline, KolorsPipeline, SDXLCFGCutoffCallback
from kolors_core.adapters.ip_adapter import cross_attentions
from kolors_core.conditioning import Conditioning
from kolors_core.guidance import SigmaInterval, guided, interval_sigmas
from kolors_core.pipelines.pag import perturbed
from kolors_core.sampling import dpmpp_2m
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.unet import UNet
from tests.support.parity import pair
from tests.support.pipelines import NO_SAVINGS, SOLVERS, Pair, picture, saving, steps_of, use_solver
from tests.support.small import EXACT, FLOAT32, SHALLOW, relative_error
from tests.support.versions import traces_whole
from tests.test_unet import inputs


class Doubling(UNet):
    """A UNet whose forward is another."""

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        return 2 * super().forward(*arguments, **named)


def subclassed(unet: UNet) -> UNet:
    changed = Doubling(SHALLOW.unet).to(torch.float64)
    changed.load_state_dict(unet.state_dict())
    return changed


def patched(unet: UNet) -> UNet:
    plain = unet.forward
    unet.forward = lambda *arguments: 2 * plain(*arguments)
    return unet


def hooked(unet: UNet) -> UNet:
    unet.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    return unet


def compiled(unet: UNet) -> Any:
    return torch.compile(hooked(unet), backend="eager")


@pytest.mark.parametrize("change", [subclassed, patched, hooked, compiled])
@torch.no_grad()
def test_a_changed_unet_is_called_as_a_whole(change: Callable[[UNet], UNet]) -> None:
    unet, _ = pair("unet", torch.float64, SHALLOW)
    assert isinstance(unet, UNet)
    given = inputs(1, 8, 8, torch.float64)
    told = Conditioning(given["text_tokens"], given["pooled_text"], given["size_ids"])
    schedule = EulerDiscreteScheduler().schedule(3)
    x, sigma = given["latents"], schedule.sigmas[1].item()
    plain = guided(unet, schedule, told)(x, sigma)
    assert relative_error(guided(unet, schedule, told, precompute=False)(x, sigma), plain) < EXACT
    changed = guided(change(unet), schedule, told)(x, sigma)
    assert relative_error(x - changed, 2 * (x - plain)) < EXACT
    torch.compiler.reset()


@pytest.mark.numerical
@torch.no_grad()
def test_equal_rows_are_read_once_and_latents_not_doubled() -> None:
    """Two images of each of two prompts with one negative prompt: three texts, four latents, eight rows."""
    unet, _ = pair("unet", torch.float64)
    assert isinstance(unet, UNet)
    given = inputs(3, 8, 8, torch.float64)
    latents = inputs(4, 8, 8, torch.float64)["latents"]
    parts = (given["text_tokens"], given["pooled_text"], given["size_ids"])
    positive = Conditioning(*(part[[0, 0, 1, 1]] for part in parts))
    negative = Conditioning(*(part[[2, 2, 2, 2]] for part in parts))
    schedule = EulerDiscreteScheduler().schedule(3)
    rows: dict[str, int] = {}
    layers = {"to_k": next(iter(cross_attentions(unet).values())).to_k, "conv_in": unet.conv_in}
    hooks = [
        layer.register_forward_hook(lambda _, given, __, name=name: rows.update({name: len(given[0])}))
        for name, layer in layers.items()
    ]
    sigma = schedule.sigmas[1].item()
    once, always = (
        guided(unet, schedule, positive, negative, 5.0, precompute=precompute)(latents, sigma)
        for precompute in (False, True)
    )
    assert relative_error(once, always) < EXACT
    assert rows == {"to_k": 3, "conv_in": 4}
    for hook in hooks:
        hook.remove()


@traces_whole
@torch.no_grad()
def test_a_sampler_step_compiles_whole() -> None:
    """UNet, guidance and the solver's arithmetic of two steps are one graph."""
    unet, _ = pair("unet", torch.float64, SHALLOW)
    assert isinstance(unet, UNet)
    given = inputs(2, 8, 8, torch.float64)
    told = [
        Conditioning(*(given[name][i : i + 1] for name in ("text_tokens", "pooled_text", "size_ids")))
        for i in range(2)
    ]
    schedule = EulerDiscreteScheduler().schedule(3)
    denoise, sigmas = guided(unet, schedule, *told, 5.0), schedule.sigmas.tolist()[:3]

    def steps(x: Tensor) -> Tensor:
        return dpmpp_2m(denoise, x, sigmas)

    x = given["latents"][:1]
    compiled = torch.compile(steps, backend="eager", fullgraph=True)
    assert relative_error(compiled(x), steps(x)) < EXACT
    torch.compiler.reset()


Guide = Callable[[int, Tensor, Tensor], Tensor]  # (step, unconditional noise, conditional noise) -> noise
PROMPTS = ["cat", "a small red ladybug"]


@torch.no_grad()
def written_out(theirs: Any, noise: Tensor, guide: Guide) -> list[Tensor]:
    """The latents after each of 4 steps, by the reference's models and scheduler in a loop of our own."""
    told, untold, pooled, unpooled = theirs.encode_prompt(PROMPTS)
    sizes = theirs._get_add_time_ids((64, 72), (0, 0), (64, 72), noise.dtype, pooled.shape[-1])
    given = {"text_embeds": torch.cat([unpooled, pooled]), "time_ids": sizes.expand(4, -1)}
    theirs.scheduler.set_timesteps(4)
    x, after = noise * theirs.scheduler.init_noise_sigma, []
    for i, t in enumerate(theirs.scheduler.timesteps):
        scaled = theirs.scheduler.scale_model_input(torch.cat([x, x]), t)
        both = theirs.unet(scaled, t, torch.cat([untold, told]), added_cond_kwargs=given).sample
        x = theirs.scheduler.step(guide(i, *both.chunk(2)), t, x).prev_sample
        after.append(x)
    return after


def starting_noise() -> Tensor:
    return torch.randn(2, 4, 8, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def assert_same_with(pair_: Pair, rule: Callable[..., Any], guide: Guide) -> list[Tensor]:
    """Ours under a rule against the loop, step by step; returns ours."""
    ours, theirs = KolorsPipeline.from_pipe(pair_[0]), pair_[1]
    ours.guided, noise = rule, starting_noise()
    mine = steps_of(ours, prompt=PROMPTS, latents=noise)[:-1]
    expected = written_out(theirs, noise, guide)
    assert len(mine) == len(expected) == 4
    for a, b in zip(mine, expected, strict=True):
        assert relative_error(a, b) < FLOAT32
    return mine


@pytest.mark.numerical
@pytest.mark.parametrize(("solver", "changes"), SOLVERS[:2], ids=["euler", "dpm"])
@pytest.mark.parametrize("part", [0.7, 1.0])
def test_rescaled_noise_equals_the_reference(float64: Pair, solver: str, changes: dict, part: float) -> None:
    use_solver(float64, solver, changes)

    def guide(_i: int, unconditional: Tensor, conditional: Tensor) -> Tensor:
        noise = unconditional + 5.0 * (conditional - unconditional)
        return rescale_noise_cfg(noise, conditional, guidance_rescale=part)

    mine = assert_same_with(float64, partial(guided, rescale=part), guide)
    other = KolorsPipeline.from_pipe(float64[0])
    other.guided = partial(guided, rescale=part - 0.01)
    near = steps_of(other, prompt=PROMPTS, latents=starting_noise())
    assert relative_error(near[3], mine[3]) > 10 * FLOAT32, "so small a difference shows"


@pytest.mark.numerical
@pytest.mark.parametrize("interval", [(0.25, 0.75), SigmaInterval(1.0, 9.0)], ids=["steps", "sigmas"])
@pytest.mark.parametrize(("solver", "changes"), SOLVERS[:2], ids=["euler", "dpm"])
def test_guidance_in_an_interval_equals_a_loop(
    float64: Pair, solver: str, changes: dict, interval: Any
) -> None:
    use_solver(float64, solver, changes)
    sigmas = float64[0].scheduler.schedule(4).sigmas.tolist()
    inside = [1.0 < sigma <= 9.0 if isinstance(interval, SigmaInterval) else i in (1, 2) for i, sigma in
              enumerate(sigmas[:4])]  # fmt: skip
    assert 0 < sum(inside) < 4

    def guide(i: int, unconditional: Tensor, conditional: Tensor) -> Tensor:
        noise = unconditional + 5.0 * (conditional - unconditional)
        return rescale_noise_cfg(noise, conditional, 0.3) if inside[i] else conditional

    mine = assert_same_with(float64, partial(guided, interval=interval, rescale=0.3), guide)
    everywhere = steps_of(float64[0], prompt=PROMPTS, latents=starting_noise())
    assert relative_error(mine[3], everywhere[3]) > 1e-3


def test_a_step_is_inside_by_its_part_or_its_sigma() -> None:
    schedule = EulerDiscreteScheduler().schedule(10)
    sigmas = schedule.sigmas.tolist()
    assert interval_sigmas((0.0, 1.0), schedule) == (0.0, sigmas[0])
    assert interval_sigmas((0.2, 0.8), schedule) == (sigmas[8], sigmas[2])
    assert interval_sigmas((0.57, 0.98), schedule) == (0.0, sigmas[6]), "the nearest steps"
    assert interval_sigmas([0.5, 1], schedule) == (0.0, sigmas[5])  # type: ignore[arg-type]
    assert interval_sigmas(SigmaInterval(0.28, 5.42), schedule) == (0.28, 5.42)
    part = schedule.last_steps(0.5)
    assert interval_sigmas((0.0, 0.4), part) == (sigmas[7], sigmas[5]), "of the steps that are done"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rescale": 1.5}, "rescale must be from 0 to 1, got 1.5"),
        ({"rescale": -0.1}, "rescale must be from 0 to 1, got -0.1"),
        ({"rescale": float("nan")}, "rescale must be a number, got nan"),
        ({"rescale": None}, "rescale must be a number, got None"),
        ({"interval": (0.8, 0.2)}, "interval must rise from 0 or more to 1 at most, got 0.8 to 0.2"),
        ({"interval": (0.2, 0.2)}, "must rise from 0 or more to 1 at most, got 0.2 to 0.2"),
        ({"interval": (0.2, 1.2)}, "must rise from 0 or more to 1 at most, got 0.2 to 1.2"),
        ({"interval": SigmaInterval(-1.0, 2.0)}, "must rise from 0 or more, got -1.0 to 2.0"),
        ({"interval": 0.5}, "must be two numbers, got 0.5"),
        ({"interval": (0.1, 0.5, 0.9)}, "must be two numbers"),
        ({"interval": (0.1, "x")}, "an end of the guidance interval must be a number, got 'x'"),
        ({"interval": (0.3, 0.4)}, "the guidance interval \\(0.3, 0.4\\) has none of the 3 steps"),
        ({"interval": SigmaInterval(100.0, 200.0)}, "has none of the 3 steps"),
    ],
)
@pytest.mark.parametrize("rule", [guided, perturbed])
def test_bad_values_are_named_before_the_first_step(
    pipes: Pair, rule: Callable[..., Any], options: dict, message: str
) -> None:
    ours, steps = KolorsPipeline.from_pipe(pipes[0]), []
    ours.guided = partial(rule, **options)
    with pytest.raises(ValueError, match=message):
        ours("cat", 64, 64, 3, callback_on_step_end=lambda *step: steps.append(step) or {})
    assert not steps


@pytest.mark.numerical
def test_outside_of_the_interval_the_negative_half_is_not_computed(pipes: Pair) -> None:
    ours = KolorsPipeline.from_pipe(pipes[0])
    rows: list[int] = []
    hook = ours.unet.mid.register_forward_hook(lambda _module, _given, output: rows.append(len(output)))
    try:
        for rule, wanted in ((guided, [1, 2, 2, 1]), (perturbed, [1, 3, 3, 1])):
            ours.guided = partial(rule, interval=(0.25, 0.75))
            rows.clear()
            steps_of(ours, prompt="cat")
            assert rows == wanted
    finally:
        hook.remove()


@pytest.mark.numerical
@pytest.mark.parametrize("rule", [guided, perturbed])
def test_what_saves_does_not_change_them(pipes: Pair, rule: Callable[..., Any]) -> None:
    ours = KolorsPipeline.from_pipe(pipes[0])
    ours.guided = partial(rule, rescale=0.5, interval=(0.0, 0.5))
    mine = steps_of(ours, prompt=PROMPTS)
    with saving(ours, NO_SAVINGS):
        plain = steps_of(ours, prompt=PROMPTS)
    assert all(relative_error(a, b) < EXACT for a, b in zip(mine, plain, strict=True))


@pytest.mark.numerical
def test_perturbed_noise_is_rescaled_to_the_conditional(pipes: Pair) -> None:
    """In a step, by hand, from x0 without rescaling and x0 of the conditional alone."""
    unet, schedule = pipes[0].unet, pipes[0].scheduler.schedule(3)
    given = inputs(2, 8, 8, torch.float64)
    told = [
        Conditioning(*(given[name][i : i + 1] for name in ("text_tokens", "pooled_text", "size_ids")))
        for i in range(2)
    ]
    x, sigma = given["latents"][:1], schedule.sigmas[1].item()
    with torch.no_grad():
        plain, half = (perturbed(unet, schedule, *told, 5.0, rescale=part)(x, sigma) for part in (0.0, 0.5))
        alone = guided(unet, schedule, told[0])(x, sigma)
    expected = rescale_noise_cfg(x - plain, x - alone, 0.5)
    assert relative_error(x - half, expected) < EXACT


def test_a_callback_that_ends_guidance_ends_rescaling_and_interval(pipes: Pair) -> None:
    """As one that has guidance until there and none afterwards, by the interval alone."""
    ours, cutoff = KolorsPipeline.from_pipe(pipes[0]), SDXLCFGCutoffCallback(cutoff_step_index=1)
    given: dict[str, Any] = {"prompt": "cat", "output_type": "latent", "height": 64, "width": 72}
    ends = []
    for interval, callback in (((0.0, 1.0), cutoff), ((0.0, 0.5), None)):
        ours.guided = partial(guided, rescale=0.5, interval=interval)
        more = {} if callback is None else {"callback_on_step_end": callback}
        generator = torch.Generator().manual_seed(0)
        ends.append(ours(**given, num_inference_steps=4, generator=generator, **more).images)
    assert relative_error(*ends) < EXACT


@pytest.mark.numerical
def test_image_to_image_takes_them(pipes: Pair) -> None:
    ours = KolorsImg2ImgPipeline.from_pipe(pipes[0])
    plain = steps_of(ours, prompt="cat", image=picture(), strength=1.0)
    ours.guided = partial(guided, interval=(0.5, 1.0))
    mine = steps_of(ours, prompt="cat", image=picture(), strength=1.0)
    alone = KolorsImg2ImgPipeline.from_pipe(pipes[0])
    unguided = steps_of(alone, prompt="cat", image=picture(), strength=1.0, guidance_scale=1.0)
    for i in range(2):
        assert relative_error(mine[i], unguided[i]) < EXACT
    assert relative_error(mine[2], unguided[2]) > 1e-4 < relative_error(mine[2], plain[2])


def test_the_description_tells_the_rule(pipes: Pair) -> None:
    ours = KolorsPipeline.from_pipe(pipes[0])
    ours.guided = partial(guided, rescale=0.7, interval=(0.0, 0.5))
    assert ours("cat", 64, 64, 2).images[0].info["guidance"] == "guided(rescale=0.7, interval=(0.0, 0.5))"
    assert "guidance" not in pipes[0]("cat", 64, 64, 1).images[0].info
