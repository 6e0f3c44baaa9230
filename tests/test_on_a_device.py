"""Every task and feature on a device: equal to the CPU, resident and offloaded.

On CUDA or MPS where there is one, else on a simulated device, whose results are the CPU's bit for bit.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kolors_core
from kolors_core import chatglm, unet
from kolors_core.adapters.controlnet import ImageEmbedding
from kolors_core.performance.offload import TransferStream
from kolors_core.pipelines import inpainting, text_prompts
from kolors_core.sampling import euler
from kolors_core.schedulers import SCHEDULERS
from tests.support.device_places import SIZE, Models, Place, seeded
from tests.support.device_runs import RESIDENT, RUNS, lora_state
from tests.support.simulated_device import Device, any_device, simulates
from tests.support.simulated_streams import Copy
from tests.support.small import relative_error

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with any_device() as found:
        yield found


@pytest.fixture(scope="module")
def models(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models.make(small_tokenizer, tmp_path_factory.mktemp("device"))


def assert_same(got: list[Tensor], expected: list[Tensor], is_exact: bool, what: str) -> None:
    """Bit for bit, or within what kernels of two devices differ by: a level of 8-bit images is 4e-3."""
    assert len(got) == len(expected) > 0
    for i, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert torch.isfinite(one).all(), f"{what}: tensor {i} of {len(got)}"
        error = relative_error(one.detach().cpu().double(), other.detach().cpu().double())
        assert error <= (0 if is_exact else 5e-3), f"{what}: tensor {i} of {len(got)} differs by {error:.1e}"


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_everywhere(
    name: str, device: Device, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts are filled up on the CPU too, as on a device: it changes the order of sums."""
    monkeypatch.setattr(text_prompts, "fills_on", lambda device: True)
    lost = Copy.lost
    expected = RUNS[name](Place("cpu", device.name, models))
    resident = RUNS[name](Place("resident", device.name, models))
    assert_same(resident, expected, device.simulation is not None, "resident, against the CPU")
    for mode in () if name in RESIDENT else ("model", "block"):
        offloaded = RUNS[name](Place(mode, device.name, models))
        assert_same(offloaded, resident, True, f"offload by {mode}, against resident")
    assert Copy.lost == lost, "memory was freed while it was written"


def on_the_cpu(module: Any, name: str, argument: int | str) -> Callable[[pytest.MonkeyPatch], None]:
    """A fault: a function's argument, by its place or name, is left on the CPU."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        plain = getattr(module, name)

        def faulty(*given: Any, **named: Any) -> Any:
            arguments = {**dict(enumerate(given)), **named}
            arguments[argument] = arguments[argument].cpu()
            return plain(*(arguments[i] for i in range(len(given))), **{key: arguments[key] for key in named})

        patch.setattr(module, name, faulty)

    return plant


def sigmas_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    """A fault: a sampler that computes with the schedule's table as it is."""

    def sampler(denoise: Any, x: Tensor, sigmas: Tensor, on_step: Any = None) -> Tensor:
        for i in range(len(sigmas) - 1):
            x = x * sigmas[i : i + 1] / sigmas[i : i + 1]
        return euler(denoise, x, sigmas, on_step)

    patch.setattr(kolors_core.EulerDiscreteScheduler, "sampler", lambda *_, **__: sampler)


FAULTS = {
    "a mask": ("text of two lengths", on_the_cpu(chatglm, "attention_mask", 0)),
    "RoPE's angles": ("text, unguided", on_the_cpu(chatglm, "rotary_cos_sin", 0)),
    "a logit bias": ("text of two lengths", on_the_cpu(unet, "log_multiplicity_bias", 0)),
    "a sinusoid": ("text, unguided", on_the_cpu(unet, "sinusoid", 0)),
    "a table of sigmas": ("text, unguided", sigmas_on_the_cpu),
    "a control image": ("control", on_the_cpu(ImageEmbedding, "forward", 1)),
    "an image's mask": ("inpaint", on_the_cpu(inpainting, "preserve_masked_latents", "strength")),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tensor_left_on_the_cpu_is_caught(
    fault: str, device: Device, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, plant = FAULTS[fault]
    plant(monkeypatch)
    with pytest.raises(RuntimeError, match="same device|should be the same|Expected .* device"):
        RUNS[name](Place("resident", device.name, models))


@simulates
@pytest.mark.parametrize("mode", ["model", "block"])
def test_weights_used_before_they_have_come_are_caught(
    mode: str, device: Device, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransferStream, "wait", lambda self, event: None)
    with pytest.raises(FloatingPointError, match="are not finite"):
        RUNS["text, unguided"](Place(mode, device.name, models))


@simulates
def test_training_is_the_same_on_a_device() -> None:
    """Three steps of a LoRA, checkpointed blocks, averages and saving; and one with a tensor left behind."""
    command = [sys.executable, "-m", "tests.support.train_on_device"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loss, gradients, weights, fault = run.stdout.splitlines()
    assert float(loss) == float(gradients) == float(weights) == 0
    assert fault.startswith("Expected all tensors to be on the same device")


# They draw noise on the CPU so often in a step, and copy it.
DRAWS = {
    "EulerAncestralDiscreteScheduler": 1, "KDPM2AncestralDiscreteScheduler": 1, "DPMSolverSDEScheduler": 2,
    "DDPMScheduler": 1, "LCMScheduler": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def pipes(device: Device, models: Models) -> tuple[Any, Any]:
    """A pipeline on the CPU and one on the device, which know the prompt."""
    at = Place("resident", device.name, models)
    both = at.pipe(), at.put(at.pipe())
    for pipe in both:
        latents(pipe, 1)
    return both


def latents(pipe: Any, steps: int) -> Tensor:
    return pipe("a cat", num_inference_steps=steps, output_type="latent", generator=seeded(), **SIZE).images


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_is_the_same_and_a_step_waits_for_nothing(
    name: str, device: Device, pipes: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host stays ahead of the device: as many waits in 2 steps as in 3, but for noise."""
    monkeypatch.setattr(text_prompts, "fills_on", lambda device: True)
    for pipe in pipes:
        pipe.scheduler = SCHEDULERS[name]()
    got = list[Tensor]()
    counts = [count_waits(device, lambda n=n: got.append(latents(pipes[1], n))) for n in (2, 3)]
    assert_same(got[:1], [latents(pipes[0], 2)], device.simulation is not None, name)
    if device.simulation is not None:
        assert counts[1] - counts[0] == DRAWS.get(name, 0)


@simulates
@pytest.mark.parametrize("name", ["plain", "FreeU", "LoRA", "PAG"])
def test_a_step_with_adapters_waits_for_nothing(name: str, device: Device, models: Models) -> None:
    at = Place("resident", device.name, models)
    pipe = at.pipe(kolors_core.KolorsPAGPipeline if name == "PAG" else None)
    if name == "FreeU":
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    elif name == "LoRA":
        pipe.load_lora_weights(lora_state(pipe))
    at.put(pipe)
    latents(pipe, 1)  # encodes the prompt
    counts = [count_waits(device, lambda steps=steps: latents(pipe, steps)) for steps in (2, 3)]
    assert counts[0] == counts[1] < 24


def count_waits(device: Device, call: Callable[[], object]) -> int:
    """How often the host waits for a simulated device in a call."""
    before = 0 if device.simulation is None else len(device.simulation.synchronized)
    call()
    return 0 if device.simulation is None else len(device.simulation.synchronized) - before
