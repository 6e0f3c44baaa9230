"""Pipelines with a scheduler of any name: the reference's latents, from noise, from an image, in parts."""

from typing import Any

import pytest
import torch
from torch import Tensor

import kolors_core
from kolors_core import KolorsControlNetPipeline, KolorsImg2ImgPipeline, KolorsInpaintPipeline
from kolors_core.schedulers import SCHEDULERS
from kolors_core.targets import EDM
from tests.pipelines.test_image_to_image import image_pair
from tests.support.controlnets import net_pair
from tests.support.pipelines import SMALL_PICTURE, WEAK, Pair, picture
from tests.support.reference_schedulers import reference_scheduler, use_exact_integrals
from tests.support.small import FLOAT32, relative_error

pytestmark = pytest.mark.numerical

# Of Kolors' target, and whose noise is the generator's.
NAMES = [
    name for name in SCHEDULERS if name != "DPMSolverSDEScheduler" and not name.startswith(("EDM", "Flow"))
]
TAKES_ETA = ("DDIMScheduler", "TCDScheduler")
STOCHASTIC = (
    *TAKES_ETA, "DDPMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
)  # fmt: skip


def choose(pair: Pair, name: str) -> None:
    """As a script writes it; LCM and TCD of the reference have no start but at their own timesteps."""
    ours, theirs = pair
    theirs.scheduler = reference_scheduler(name)
    ours.scheduler = kolors_core.EulerDiscreteScheduler()  # and not one of an earlier test, with its settings
    ours.scheduler = getattr(kolors_core, name).from_config(ours.scheduler.config)


def latents_of(pipe: Any, **arguments: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    given = {"prompt": "cat", "guidance_scale": WEAK, "generator": generator, "output_type": "latent"}
    return pipe(**given | SMALL_PICTURE | arguments).images


@pytest.mark.parametrize("name", NAMES)
def test_from_noise(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 where noise is drawn, which the reference draws in the model's dtype, ours in float32."""
    use_exact_integrals(monkeypatch)
    pair = request.getfixturevalue("float32" if name in STOCHASTIC else "float64")
    choose(pair, name)
    eta = {"eta": 0.6} if name in TAKES_ETA else {}
    mine, other = (latents_of(pipe, **eta) for pipe in pair)
    assert relative_error(mine, other) < (4 * FLOAT32 if name in STOCHASTIC else FLOAT32)
    if eta:
        assert relative_error(latents_of(pair[0]), mine) > 0.01, "without it there is less noise"


@pytest.mark.parametrize(
    "name", ["HeunDiscreteScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"]
)
def test_from_an_image(name: str, pipes: Pair) -> None:
    choose(pipes, name)
    start = {"image": picture(), "strength": 0.6}
    mine, other = (latents_of(pipe, **start) for pipe in image_pair(pipes))
    assert relative_error(mine, other) < FLOAT32


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "DDIMScheduler", "KDPM2DiscreteScheduler"])
def test_two_parts_are_the_whole(name: str, pipes: Pair) -> None:
    """Of methods that remember no step; the reference's of two evaluations are cut within a step."""
    choose(pipes, name)
    ours, again = pipes[0], KolorsImg2ImgPipeline.from_pipe(pipes[0])
    whole, part = latents_of(ours), latents_of(ours, denoising_end=0.5)
    rest = latents_of(again, image=part, denoising_start=0.5, height=None, width=None)
    assert relative_error(rest, whole) < FLOAT32 < relative_error(part, whole)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_inpainted_in_parts_and_with_a_controlnet(name: str, pipes: Pair) -> None:
    """Finite, also between a step's two evaluations; EDM's and flow's schedulers as of such a model."""
    choose((pipes[0], pipes[1]), name)
    mask = torch.zeros(1, 1, 64, 72)
    mask[..., 36:] = 1
    painted = latents_of(
        KolorsInpaintPipeline.from_pipe(pipes[0]), image=picture(), mask_image=mask, strength=0.6
    )
    assert painted.isfinite().all() and painted.std() > 0
    net = net_pair(20, torch.float64)[0]
    controlled = KolorsControlNetPipeline.from_pipe(pipes[0], controlnet=net)
    assert latents_of(controlled, image=picture(1), control_guidance_end=0.5).isfinite().all()


def test_a_callback_is_of_a_step(pipes: Pair) -> None:
    """Where the reference's is of each of its two evaluations."""
    choose(pipes, "HeunDiscreteScheduler")
    seen: list[int] = []
    latents_of(pipes[0], callback_on_step_end=lambda _pipe, i, _t, tensors: seen.append(i) or tensors)
    assert seen == [0, 1, 2, 3]


@pytest.mark.exact
def test_eta_of_a_scheduler_without_it_is_named(pipes: Pair, caplog: pytest.LogCaptureFixture) -> None:
    latents_of(pipes[0], eta=0.5, num_inference_steps=1)
    assert "eta has no effect with EulerDiscreteScheduler: DDIMScheduler and TCDScheduler" in caplog.text


def test_the_target_of_a_scheduler() -> None:
    assert SCHEDULERS["EDMEulerScheduler"](sigma_data=1.0).schedule(3).target == EDM(1.0)
    assert kolors_core.FlowMatchEulerDiscreteScheduler().target.scale(3.0) == 4.0
