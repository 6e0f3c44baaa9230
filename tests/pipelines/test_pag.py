"""Perturbed-attention guidance against the reference, latents step by step; what it takes and leaves."""

import inspect
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from kolors_core import KolorsImg2ImgPipeline, KolorsPAGPipeline, KolorsPipeline, SDXLCFGCutoffCallback
from kolors_core.adapters import lora as loras
from kolors_core.conditioning import Conditioning
from kolors_core.config import KolorsConfig
from kolors_core.guidance import guided
from kolors_core.performance.compile import compile_blocks
from kolors_core.performance.cuda_graphs import CUDAGraphCache
from kolors_core.pipelines.memory_plan import plan
from kolors_core.pipelines.pag import perturbed, perturbed_layers
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.unet import Attention, UNet
from tests.performance.test_compile import Recorder
from tests.support.ip_adapters import Both
from tests.support.parity import pair
from tests.support.pipelines import (
    NO_SAVINGS,
    SOLVERS,
    Pair,
    assert_same_steps,
    picture,
    saving,
    steps_of,
    use_solver,
)
from tests.support.small import EXACT, FLOAT32, SHALLOW, relative_error
from tests.test_unet import inputs

LAYERS: list[Any] = [
    "mid",
    ["down_blocks.1.attentions.0", "up_blocks.0"],
    "up_blocks.(0|1).attentions.1",
    ["down", "mid", "up"],
    ["down_blocks.2.attentions.1.transformer_blocks.1"],
]
TWO: dict[str, Any] = {"prompt": ["一张瓢虫的照片", "a red cat"], "num_images_per_prompt": 2}


def pag_pair(pair: Pair | Both, layers: Any = "mid") -> tuple[KolorsPAGPipeline, Any]:
    """Both libraries' pipelines of the same models."""
    ours, theirs = pair
    other = diffusers.KolorsPAGPipeline(
        **theirs.components, pag_applied_layers=layers,
        force_zeros_for_empty_prompt=theirs.config.force_zeros_for_empty_prompt,
    )  # fmt: skip
    other.set_progress_bar_config(disable=True)
    return KolorsPAGPipeline.from_pipe(ours, pag_applied_layers=layers), other


@pytest.mark.numerical
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0], ids=["cfg", "alone"])
@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_every_step_equals_the_reference(pipes: Pair, layers: Any, guidance_scale: float) -> None:
    assert_same_steps(pag_pair(pipes, layers), prompt="cat", guidance_scale=guidance_scale)


@pytest.mark.numerical
@pytest.mark.parametrize(("solver", "changes"), SOLVERS, ids=["euler", "dpm", "sde"])
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0], ids=["cfg", "alone"])
def test_every_sampler_and_several_prompts(
    float64: Pair, solver: str, changes: dict, guidance_scale: float
) -> None:
    use_solver(float64, solver, changes)
    assert_same_steps(pag_pair(float64), **TWO, guidance_scale=guidance_scale, pag_scale=2.0)


def test_without_savings_too(pipes: Pair) -> None:
    made = pag_pair(pipes, "up_blocks.1")
    with saving(made[0], NO_SAVINGS):
        assert_same_steps(made, prompt="cat", negative_prompt="red")


def test_parity_can_fail(pipes: Pair) -> None:
    ours, theirs = pag_pair(pipes)
    ours.set_pag_applied_layers("up_blocks.0")
    assert relative_error(steps_of(ours, prompt="cat")[0], steps_of(theirs, prompt="cat")[0]) > 100 * FLOAT32
    ours.set_pag_applied_layers("mid")
    near = steps_of(ours, prompt="cat", pag_scale=3.01)[-2]
    assert relative_error(near, steps_of(theirs, prompt="cat")[-2]) > 10 * FLOAT32


@pytest.mark.numerical
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0], ids=["cfg", "alone"])
def test_the_adaptive_scale_counts_the_schedules_own_steps(pipes: Pair, guidance_scale: float) -> None:
    """The reference takes off adaptive * (1000 - t), ours adaptive * (1100 - t): 100 * adaptive more.

    So at t = 1079 the reference's scale is above what was asked for.
    """
    ours, theirs = pag_pair(pipes)
    scale, adaptive = 3.0, 0.004
    theirs._pag_scale, theirs._pag_adaptive_scale = scale, adaptive
    assert theirs._get_pag_scale(1079) > scale
    given = {"prompt": "cat", "guidance_scale": guidance_scale, "pag_adaptive_scale": adaptive}
    mine = steps_of(ours, pag_scale=scale, **given)
    other = steps_of(theirs, pag_scale=scale - 100 * adaptive, **given)
    assert all(relative_error(a, b) < FLOAT32 for a, b in zip(mine, other, strict=True))
    assert relative_error(mine[0], steps_of(theirs, pag_scale=scale, **given)[0]) > 1e-4
    strong = {**given, "pag_adaptive_scale": 0.01, "pag_scale": 3.0}  # nothing is left of it at t = 551
    plain = KolorsPipeline.from_pipe(ours)
    last = steps_of(ours, **strong, timesteps=[551, 276, 1], num_inference_steps=50)
    del strong["pag_scale"], strong["pag_adaptive_scale"]
    expected = steps_of(plain, **strong, timesteps=[551, 276, 1], num_inference_steps=50)
    assert all(relative_error(a, b) < EXACT for a, b in zip(last, expected, strict=True))


@pytest.mark.numerical
@torch.no_grad()
def test_only_the_perturbed_rows_of_the_named_layers_see_nothing() -> None:
    """Where the map is the identity, a pixel's output depends on its own values only."""
    unet, _ = pair("unet", torch.float64)
    assert isinstance(unet, UNet)
    layer = next(module for module in unet.modules() if isinstance(module, Attention))
    x = torch.randn(3, 6, layer.to_q.in_features, generator=torch.Generator().manual_seed(0)).double()
    from kolors_core.context import Context

    plain, mixed = layer(x, Context(x)), layer(x, Context(x), 1)
    assert relative_error(mixed[:2], plain[:2]) < EXACT  # of two rows, not three, at a time
    assert relative_error(mixed[2], layer.to_out(layer.to_v(x[2]))) < EXACT
    assert relative_error(mixed[2], plain[2]) > 0.01


def test_layer_names_mean_the_references_layers() -> None:
    """Of the released model; and the documentation's spelling, which the reference itself no longer finds."""
    with torch.device("meta"):
        unet = UNet(KolorsConfig().unet)
    counts = {
        "mid": 10, "down": 24, "up": 36, "attn1": 70, "down.block_2": 20, "down.block_1.attentions_0": 2,
        "up.block_0.attentions_1": 10, "up_blocks.(0|1).attentions.1": 12, "transformer_blocks.9.": 6,
    }  # fmt: skip
    assert {name: sum(perturbed_layers(unet, name)) for name in counts} == counts
    assert sum(perturbed_layers(unet, ["mid", "attn1"])) == 70
    assert perturbed_layers(unet, ("mid",)) == [False] * 24 + [True] * 10 + [False] * 36


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [("down.block_2", "down_blocks.2"), ("up.block_0.attentions_1", "up_blocks.0.attentions.1")],
)
def test_the_documentations_names_work(pipes: Pair, mine: str, theirs: str) -> None:
    ours, other = pag_pair(pipes, theirs)
    expected = steps_of(other, prompt="cat")[-1]
    ours.set_pag_applied_layers(mine)
    assert relative_error(steps_of(ours, prompt="cat")[-1], expected) < FLOAT32
    other.set_pag_applied_layers(mine)
    with pytest.raises(ValueError, match="Cannot find PAG layer"):
        steps_of(other, prompt="cat")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("middle", "no self-attention is named 'middle'; they are in down_blocks.1.attentions.0, "),
        (["mid", "down_blocks.0"], "no self-attention is named 'down_blocks.0'"),
        ("up.block_2", "no self-attention is named 'up.block_2'"),
        ("mid(", "the layer name 'mid\\(' is no regular expression"),
        ([], "no layers to perturb"),
        ("", "must be a name or several, got \\[''\\]"),
        ([3], "must be a name or several, got \\[3\\]"),
        (None, "must be a name or several, got None"),
    ],
)
def test_what_is_no_layer_is_named(pipes: Pair, layers: Any, message: str) -> None:
    ours = KolorsPAGPipeline.from_pipe(pipes[0])
    with pytest.raises((ValueError, TypeError), match=message):
        ours.set_pag_applied_layers(layers)
    assert ours.pag_applied_layers == ["mid"], "what was there stays"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pag_scale": -1.0}, "pag_scale must be above 0, got -1.0"),
        ({"pag_scale": float("nan")}, "pag_scale must be a number, got nan"),
        ({"pag_scale": "3"}, "pag_scale must be a number, got '3'"),
        ({"pag_adaptive_scale": -0.1}, "pag_adaptive_scale must be 0 or more, got -0.1"),
    ],
)
def test_arguments_that_cannot_be_are_named(pipes: Pair, arguments: dict, message: str) -> None:
    ours = KolorsPAGPipeline.from_pipe(pipes[0])
    with pytest.raises(ValueError, match=message):
        steps_of(ours, prompt="cat", **arguments)
    assert ours.guided is guided


def test_scale_0_is_the_plain_pipeline(pipes: Pair) -> None:
    ours = KolorsPAGPipeline.from_pipe(pipes[0])
    plain = steps_of(pipes[0], prompt="cat")
    assert all(
        torch.equal(a, b) for a, b in zip(steps_of(ours, prompt="cat", pag_scale=0), plain, strict=True)
    )
    assert relative_error(steps_of(ours, prompt="cat")[0], plain[0]) > 1e-3


def test_the_models_are_as_before_also_after_an_error(pipes: Pair) -> None:
    """The reference's UNet stays perturbed after an error in a step: the next plain run fails."""

    def fail(*_: Any) -> dict:
        raise RuntimeError("enough")

    ours, theirs = pag_pair((pipes[0], deepcopy(pipes[1])))
    plain = KolorsPipeline.from_pipe(ours)
    before, state = steps_of(plain, prompt="cat"), {k: v.clone() for k, v in ours.unet.state_dict().items()}
    steps_of(ours, prompt="cat")
    for pipe in (ours, theirs):
        with pytest.raises(RuntimeError, match="enough"):
            pipe(prompt="cat", height=64, width=64, num_inference_steps=2, callback_on_step_end=fail)
    assert ours.guided is guided
    assert all(torch.equal(a, b) for a, b in zip(steps_of(plain, prompt="cat"), before, strict=True))
    assert all(torch.equal(ours.unet.state_dict()[name], tensor) for name, tensor in state.items())
    assert type(next(iter(theirs.unet.attn_processors.values()))).__name__.startswith("AttnProcessor")
    assert any("PAG" in type(one).__name__ for one in theirs.unet.attn_processors.values())


def test_its_signature_is_the_references(pipes: Pair) -> None:
    mine, theirs = (
        inspect.signature(kind.__call__).parameters
        for kind in (KolorsPAGPipeline, diffusers.KolorsPAGPipeline)
    )
    assert list(mine) == [*theirs, "extras"]
    for name, parameter in theirs.items():
        theirs_is, parameter = parameter.default, mine[name]
        assert parameter.default == (tuple(theirs_is) if isinstance(theirs_is, list) else theirs_is), name


def test_layers_are_given_where_it_is_made(pipes: Pair, reference_folder: Path) -> None:
    made = KolorsPAGPipeline.from_pretrained(reference_folder, pag_applied_layers=["up", "mid"])
    assert made.pag_applied_layers == ["up", "mid"]
    assert KolorsPAGPipeline.from_pretrained(reference_folder).pag_applied_layers == ["mid"]
    for pipe in (made, KolorsImg2ImgPipeline.from_pipe(made)):
        assert KolorsPAGPipeline.from_pipe(pipe).pag_applied_layers == ["up", "mid"], "also through a task"
    assert KolorsPAGPipeline.from_pipe(made, pag_applied_layers="down").pag_applied_layers == ["down"]
    assert KolorsPAGPipeline(**pipes[0].components, pag_applied_layers="up").pag_applied_layers == ["up"]
    with pytest.raises(ValueError, match="no self-attention is named 'nowhere'"):
        KolorsPAGPipeline(**pipes[0].components, pag_applied_layers="nowhere")


def test_another_rule_is_not_lost_in_silence(pipes: Pair) -> None:
    ours = KolorsPAGPipeline.from_pipe(pipes[0])
    ours.guided = partial(guided, rescale=0.5)
    with pytest.raises(ValueError, match="pipe.guided is another rule already"):
        steps_of(ours, prompt="cat")
    steps_of(ours, prompt="cat", pag_scale=0)


def test_image_to_image_takes_the_rule(pipes: Pair) -> None:
    """At strength 1 from gray, where the reference has no such pipeline: as text to image from that noise."""
    ours = KolorsImg2ImgPipeline.from_pipe(pipes[0])
    ours.guided = partial(perturbed, pag_scale=2.0, pag_applied_layers=["up.block_0"])
    schedule = ours.scheduler.schedule(4)
    noise = torch.randn(1, 4, 8, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sigma = schedule.sigmas[0].item()
    mine = steps_of(
        ours, prompt="cat", image=torch.zeros(1, 4, 8, 9), strength=1.0,
        latents=noise * schedule.init_noise_sigma / (sigma**2 + 1) ** (0.5 if _preserves(ours) else 0),
    )  # fmt: skip
    text = KolorsPAGPipeline.from_pipe(pipes[0], pag_applied_layers=["up.block_0"])
    expected = steps_of(text, prompt="cat", latents=noise, pag_scale=2.0)
    assert all(relative_error(a, b) < EXACT for a, b in zip(mine, expected, strict=True))
    ours.guided = guided
    assert relative_error(steps_of(ours, prompt="cat", image=picture())[-1], mine[-1]) > 1e-3


def _preserves(pipe: Any) -> bool:
    return pipe.scheduler.latent_scale(1.0) > 1


@pytest.mark.numerical
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0], ids=["cfg", "alone"])
def test_with_an_ip_adapter(loaded: Both, guidance_scale: float) -> None:
    """The reference takes no image here, but the embeddings of one without the axis of several."""
    ours, theirs = pag_pair(loaded, ["mid", "up_blocks.1"])
    given: dict[str, Any] = {"prompt": "cat", "guidance_scale": guidance_scale}
    with pytest.raises(TypeError):
        steps_of(theirs, **given, ip_adapter_image=picture(3))
    with torch.no_grad():
        embeds = loaded[0].prepare_ip_adapter_image_embeds(
            picture(3), None, do_classifier_free_guidance=guidance_scale > 1
        )
    mine = steps_of(ours, **given, ip_adapter_image=picture(3))
    other = steps_of(theirs, ip_adapter_image_embeds=[embed[:, 0] for embed in embeds], **given)
    assert all(relative_error(a, b) < FLOAT32 for a, b in zip(mine, other, strict=True))


@pytest.mark.numerical
def test_with_a_lora(pipes: Pair) -> None:
    """As with the LoRA's weights written into the UNet, where the reference cannot load one (it crashes)."""
    ours, theirs = pag_pair((KolorsPipeline.from_pipe(pipes[0], unet=deepcopy(pipes[0].unet)), pipes[1]))
    plain = steps_of(ours, prompt="cat")
    handle = loras.attach(ours.unet, rank=2)
    for i, parameter in enumerate(handle.parameters()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    mine = steps_of(ours, prompt="cat")
    assert relative_error(mine[0], plain[0]) > 1e-4
    loras.fuse(ours.unet, [handle.name])
    assert all(relative_error(a, b) < EXACT for a, b in zip(mine, steps_of(ours, prompt="cat"), strict=True))


@torch.no_grad()
def halves() -> tuple[UNet, Conditioning, Conditioning, Tensor]:
    unet, _ = pair("unet", torch.float64, SHALLOW)
    assert isinstance(unet, UNet)
    given = inputs(2, 8, 8, torch.float64)
    told = [
        Conditioning(*(given[name][i : i + 1] for name in ("text_tokens", "pooled_text", "size_ids")))
        for i in range(2)
    ]
    return unet, told[0], told[1], given["latents"][:1]


@pytest.fixture
def compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


@torch.no_grad()
def test_compiled_hooked_and_recorded_models(compiler: None) -> None:
    """Compiled by block, as a whole, behind a hook, and as recorded steps, which know the layers apart."""
    unet, positive, negative, x = halves()
    schedule = EulerDiscreteScheduler().schedule(3)
    sigma, recorder = schedule.sigmas[1].item(), Recorder()
    graphs = CUDAGraphCache(recorder)
    mids, ups = (
        partial(perturbed, schedule=schedule, positive=positive, negative=negative, scale=5.0,
                pag_applied_layers=layers)
        for layers in ("mid", "up")
    )  # fmt: skip
    expected, other = mids(unet)(x, sigma), ups(unet)(x, sigma)
    assert relative_error(other, expected) > 1e-4
    for _ in range(2):
        assert torch.equal(mids(unet, wrap_step=graphs)(x, sigma), expected)
        assert torch.equal(ups(unet, wrap_step=graphs)(x, sigma), other)
    assert recorder.count == 2
    whole: Any = torch.compile(unet, backend="eager")
    assert relative_error(mids(whole)(x, sigma), expected) < EXACT
    handle = unet.register_forward_hook(lambda _module, _inputs, output: output)
    assert relative_error(mids(unet)(x, sigma), expected) < EXACT
    handle.remove()
    compile_blocks(unet, backend="eager")
    for rule, wanted in ((mids, expected), (ups, other)):
        assert relative_error(rule(unet)(x, sigma), wanted) < EXACT


@pytest.mark.parametrize("pag", [True, False])
def test_guidance_that_a_callback_ends(pipes: Pair, pag: bool) -> None:
    """From then on the perturbed half alone guides."""
    ours = KolorsPAGPipeline.from_pipe(pipes[0])
    seen: list[float] = []
    cutoff = SDXLCFGCutoffCallback(cutoff_step_index=1)

    def spy(pipe: Any, i: int, t: Tensor, tensors: dict) -> dict:
        answer = cutoff(pipe, i, t, tensors)
        seen.append(pipe.guidance_scale)
        return answer

    scale = {"pag_scale": 3.0 if pag else 0.0}
    names = list(cutoff.tensor_inputs)
    end = ours(
        "cat", 64, 72, 4, generator=torch.Generator().manual_seed(0), callback_on_step_end=spy,
        callback_on_step_end_tensor_inputs=names, output_type="latent", **scale,
    ).images  # fmt: skip
    assert seen == [5.0, 0.0, 0.0, 0.0]
    first = steps_of(ours, prompt="cat", **scale)
    assert relative_error(end, first[-2]) > 1e-3
    rest = KolorsImg2ImgPipeline.from_pipe(ours)
    rest.guided = partial(perturbed, pag_scale=3.0) if pag else guided
    times = ours.scheduler.schedule(4).timesteps.tolist()[2:]
    last = steps_of(
        rest, prompt="cat", image=torch.zeros(1, 4, 8, 9), latents=first[1], strength=1.0, timesteps=times,
        num_inference_steps=50, guidance_scale=1.0,
    )[-2]  # fmt: skip
    assert relative_error(end, last) < FLOAT32


def test_the_description_and_the_plan_know_it(reference_folder: Path, capsys: pytest.CaptureFixture) -> None:
    ours = KolorsPAGPipeline.from_pretrained(reference_folder)
    ours.set_progress_bar_config(disable=True)
    image = ours("cat", 64, 64, 1).images[0]
    assert image.info["guidance"] == (
        "perturbed(pag_scale=3.0, pag_adaptive_scale=0.0, pag_applied_layers=['mid'])"
    )
    assert "guidance" not in ours("cat", 64, 64, 1, pag_scale=0).images[0].info
    with_pag, without = (plan(ours, 256, 256, pag_scale=scale).stages["unet"].work for scale in (3.0, 0.0))
    assert 1.2 * without < with_pag < 1.6 * without
    assert ours.guided is guided
