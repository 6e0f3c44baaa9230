"""Recorded steps on a device: never older than the networks, and none where they cost more than they save."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kolors_core.performance.cuda_graphs import CUDAGraphCache
from tests.support.device_places import SIZE, Models, Place, seeded
from tests.support.device_runs import draw, lora_state, noise
from tests.support.simulated_device import Device, any_device
from tests.support.simulated_streams import Graph
from tests.support.small import relative_error

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with any_device() as found:
        if found.name != "cuda":
            pytest.skip("graphs are CUDA's")
        yield found


@pytest.fixture(scope="module")
def at(device: Device, small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    models = Models.make(small_tokenizer, tmp_path_factory.mktemp("device"))
    return Place("resident", device.name, models)


def same(got: list[Tensor], expected: list[Tensor], device: Device) -> bool:
    """Whether two runs on the device agree: to the bit on a simulated one."""
    errors = [relative_error(a.cpu(), b.cpu()) for a, b in zip(got, expected, strict=True)]
    return max(errors) <= (0 if device.simulation else 1e-4)


def with_graphs(pipe: Any) -> Any:
    pipe._wrap_step = CUDAGraphCache()
    return pipe


def load(pipe: Any) -> None:
    pipe.load_lora_weights(lora_state(pipe))


def replace_a_layer(pipe: Any) -> None:
    layer = pipe.unet.mid.attentions[0].blocks[0].feed_forward.proj_in
    new = nn.Linear(layer.in_features, layer.out_features).to(layer.weight).requires_grad_(False)
    new.weight.copy_(noise(*new.weight.shape).to(layer.weight) / 8)
    new.bias.fill_(0.1)
    pipe.unet.mid.attentions[0].blocks[0].feed_forward.proj_in = new


def replace_values(pipe: Any) -> None:
    weight = pipe.unet.conv_out.weight
    weight.data = weight.data * 1.1


def replace_a_forward(pipe: Any) -> None:
    layer = pipe.unet.mid.resnets[1].conv2
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)


Change = Callable[[Any], object]
CHANGES: dict[str, tuple[Change | None, Change]] = {  # before the run, and after its first step
    "a LoRA is loaded": (None, load),
    "a LoRA is unloaded": (load, lambda pipe: pipe.unload_lora_weights()),
    "its strength changes": (load, lambda pipe: pipe.set_adapters(pipe.get_active_adapters(), 0.2)),
    "it is switched off": (load, lambda pipe: pipe.disable_lora()),
    "it is fused": (load, lambda pipe: pipe.fuse_lora()),
    "FreeU is switched on": (None, lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)),
    "a layer is replaced": (None, replace_a_layer),
    "a weight's memory is replaced": (None, replace_values),
    "a weight is written": (None, lambda pipe: pipe.unet.conv_out.weight.data.mul_(1.1)),
    "a forward is replaced": (None, replace_a_forward),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_callback_may_change_the_networks(change: str, at: Place, device: Device) -> None:
    before, after = CHANGES[change]

    def run(pipe: Any, after: Change) -> list[Tensor]:
        if before is not None:
            before(pipe)
        seen = list[Tensor]()

        def callback(pipe: Any, i: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            seen.append(tensors["latents"].clone())
            if i == 0:
                after(pipe)
            return {}

        pipe("cat", **SIZE, num_inference_steps=3, output_type="latent", generator=seeded(),
             callback_on_step_end=callback)  # fmt: skip
        return seen

    pipes = [at.put(at.pipe()) for _ in range(3)]
    unchanged, eager = run(pipes[0], lambda pipe: None), run(pipes[1], after)
    recorded = run(with_graphs(pipes[2]), after)
    assert same(recorded, eager, device)
    assert same(eager[:1], unchanged[:1], device) and not same(eager, unchanged, device)


def test_runs_of_one_shape_share_a_recording_and_all_share_a_pool(at: Place, device: Device) -> None:
    """Prompts of other lengths too: they are filled up to a multiple of 32 tokens."""
    prompts = ("a cat", "a small red cat", "一张照片 of the red ladybug", "the", "the cat " * 30)
    eager, pipe, first = at.put(at.pipe()), with_graphs(at.put(at.pipe())), len(Graph.recorded)
    for prompt in (*prompts, prompts[0]):
        got, expected = (draw(one, prompt=prompt, num_inference_steps=3) for one in (pipe, eager))
        assert same(got, expected, device)
    assert len(pipe._wrap_step.captured) == 2, "32 tokens, and more"
    if device.simulation is not None:
        pools, modes = zip(*Graph.recorded[first:], strict=True)
        assert len(pools) == 2 and len(set(pools)) == 1 and set(modes) == {"thread_local"}


def test_graphs_are_of_the_device_that_a_run_is_on(at: Place, device: Device) -> None:
    """Chosen on the CPU, moved there, and back: CUDA's recorder on CPU tensors would record nothing."""
    pipe, expected, eager = at.pipe(), draw(at.pipe()), draw(at.put(at.pipe()))
    pipe.compile("reduce-overhead")
    for model in (pipe.text_encoder, pipe.unet, pipe.vae):
        for module in model.modules():
            module._compiled_call_impl = None  # the blocks as they are: compiled code does not matter here
    pipe.to(device.name)
    resident = draw(pipe)
    assert len(pipe._wrap_step.captured) == 1, "compiled on the CPU, recorded on the device"
    assert same(resident, eager, device)
    pipe.to("cpu")
    assert not pipe._wrap_step.captured, "its memory is free again"
    assert all(torch.equal(a, b) for a, b in zip(draw(pipe), expected, strict=True))
    assert pipe._needs_alone() is None
    assert same(draw(pipe.to(device.name)), eager, device) and len(pipe._wrap_step.captured) == 1


@pytest.mark.parametrize("mode", ["model", "block"])
def test_nothing_is_recorded_under_offload(mode: str, at: Place, device: Device) -> None:
    """Weights are somewhere else in each run, so each would record its steps anew."""
    offloaded = Place(mode, at.device, at.models)
    pipe, expected = with_graphs(offloaded.put(at.pipe())), draw(at.put(at.pipe()))
    for _ in range(2):
        assert same(draw(pipe), expected, device)
    assert not pipe._wrap_step.captured
