"""Offload in every task: only the running models are on the accelerator, and images are the same."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kolors_core import KolorsImg2ImgPipeline, KolorsPipeline
from kolors_core.checkpoint import EMBEDDED, load_component
from kolors_core.devices import best_device, named_device
from kolors_core.performance.offload import bytes_of, tensors_of
from tests.support.ip_adapters import Both, guided_steps, load_both
from tests.support.loras import ATTENTION, CONV, LINEAR, TEXT, factors, peft_names, weights
from tests.support.offloads import ACCELERATOR, offloaded
from tests.support.pipelines import SMALL_PICTURE, Pair, picture, steps_of

MODES = pytest.mark.parametrize("by_block", [False, True], ids=["by_model", "by_block"])
Pipeline = KolorsPipeline | KolorsImg2ImgPipeline


@contextmanager
def watched(pipe: Pipeline) -> Iterator[list[set[str]]]:
    """Record, at each forward of a module, which models are on the accelerator."""
    names = ("text_encoder", "image_encoder", "unet", "vae")
    models: dict[str, nn.Module] = {name: getattr(pipe, name) for name in names}
    homes = {name: [p.data_ptr() for p in model.parameters()] for name, model in models.items()}
    seen = []
    with ExitStack() as stack:

        def follow(name: str, model: nn.Module) -> None:
            def note(*_: Any) -> None:
                there = {
                    other
                    for other, home in homes.items()
                    if [p.data_ptr() for p in models[other].parameters()] != home
                }
                assert name in there, f"{name} works on the CPU, beside {there} on the accelerator"
                seen.append(there)

            for part in model.modules():  # models are not always called as a whole
                if part is not pipe.unet:  # but a UNet with a hook is
                    stack.callback(part.register_forward_pre_hook(note).remove)

        for name, model in models.items():
            follow(name, model)
        yield seen


@contextmanager
def all_away(pipe: Pipeline) -> Iterator[set[str]]:
    """Fail if a module runs with its own parameters offloaded; record which have run."""
    worked = set[str]()
    with ExitStack() as stack:

        def follow(path: str, part: nn.Module) -> None:
            homes = [p.data_ptr() for p in part.parameters(recurse=False)]

            def note(*_: Any) -> None:
                here = zip(part.parameters(recurse=False), homes, strict=True)
                assert all(p.data_ptr() != home for p, home in here), f"{path} works on the CPU"
                worked.add(path)

            if homes:
                stack.callback(part.register_forward_pre_hook(note).remove)

        for name, models in pipe._models().items():
            for model in models:
                for path, part in model.named_modules():
                    follow(f"{name}.{path}", part)
        yield worked


def lora(pipe: Pipeline) -> dict[str, Tensor]:
    """A LoRA on every kind of layer."""
    made = peft_names("unet", factors(pipe.unet, "unet", (*ATTENTION, *LINEAR, *CONV)), "unet.")
    assert pipe.text_encoder is not None
    return made | peft_names(
        "text_encoder", factors(pipe.text_encoder, "text_encoder", TEXT), "text_encoder."
    )


@pytest.fixture
def ready(both: Both, adapters: list[Path]) -> KolorsPipeline:
    """A pipeline with CLIP and an IP-Adapter, which shares no model."""
    ours, _ = both
    load_both((ours,), adapters[0])
    ours.set_progress_bar_config(disable=True)
    ours.text_encoder, ours.vae = deepcopy(ours.text_encoder), deepcopy(ours.vae)
    return ours


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("kind", [KolorsPipeline, KolorsImg2ImgPipeline])
def test_only_the_model_at_work_is_on_the_accelerator(kind: type, ready: KolorsPipeline) -> None:
    """In image to image, the reference keeps the text encoder on the accelerator during the UNet's steps."""
    pipe, more = (
        kind.from_pipe(ready),
        {} if kind is KolorsPipeline else {"image": picture(), "strength": 1.0},
    )
    before = guided_steps(pipe, **more)
    pipe.prompt_cache.clear()  # a cached prompt would not load the text encoder
    with offloaded(pipe) as offload, watched(pipe) as seen:
        after = guided_steps(pipe, **more)
        assert pipe.device == ACCELERATOR and offload.bytes_on_device == 0
    assert equal(before, after)
    order = [next(iter(there)) for there in seen]
    assert all(len(there) == 1 for there in seen)
    stages = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert stages == ["vae"] * bool(more) + ["text_encoder", "image_encoder", "unet", "vae"]
    parts = {name: tuple((model, "") for model in models) for name, models in pipe._models().items()}
    assert offload.peak_bytes == max(map(bytes_of, parts.values())) == bytes_of(parts["unet"])


@pytest.mark.parametrize("kind", [KolorsPipeline, KolorsImg2ImgPipeline])
def test_blocks_come_and_go(kind: type, ready: KolorsPipeline) -> None:
    """At most two blocks are on the accelerator, also in a second run, when their order is known."""
    pipe, more = (
        kind.from_pipe(ready),
        {} if kind is KolorsPipeline else {"image": picture(), "strength": 1.0},
    )
    before = guided_steps(pipe, **more)
    for _ in range(2):
        pipe.prompt_cache.clear()
        with offloaded(pipe, by_block=True) as offload, all_away(pipe) as worked:
            assert equal(before, guided_steps(pipe, **more))
            assert len(worked) > 400
            sizes = sorted(map(bytes_of, offload._units.values()))
            assert sizes[-1] < offload.peak_bytes <= sum(sizes[-2:]) < sum(sizes) / 4
            assert pipe.device == ACCELERATOR and offload.bytes_on_device == 0


@MODES
def test_adapters_that_come_within_a_run(by_block: bool, ready: KolorsPipeline) -> None:
    """Attached before step 1, fused before step 3: weights written on the accelerator are kept."""
    pipe, own = ready, weights(ready.unet)

    def run() -> tuple[list[Tensor], dict[str, Tensor]]:
        latents = []

        def change(_pipe: Any, i: int, _t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            latents.append(tensors["latents"].clone())
            if i == 0:
                pipe.load_lora_weights(made)
            if i == 2:
                pipe.fuse_lora()
            return {}

        pictures = pipe(
            "cat", ip_adapter_image=picture(3), generator=torch.Generator().manual_seed(0), output_type="pt",
            callback_on_step_end=change, **SMALL_PICTURE,
        ).images  # fmt: skip
        fused = weights(pipe.unet)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        return [*latents, pictures], fused

    made = lora(pipe)
    plain = steps_of(pipe, prompt="cat", ip_adapter_image=picture(3))
    before, fused = run()
    assert not torch.equal(plain[1], before[1]), "the LoRA does nothing"
    with offloaded(pipe, by_block) as offload:
        after, fused_there = run()
        assert equal(before, after)
        assert equal(list(fused.values()), list(fused_there.values()))
        assert equal(list(own.values()), list(weights(pipe.unet).values()))
        assert offload.bytes_on_device == 0


@MODES
def test_adapters_that_come_between_runs(by_block: bool, ready: KolorsPipeline) -> None:
    """With a LoRA on both models, then without LoRA and IP-Adapter."""
    pipe, made = ready, lora(ready)

    def runs(pipe: KolorsPipeline) -> list[Tensor]:
        pipe.load_lora_weights(made)
        with_lora = guided_steps(pipe)
        pipe.unload_lora_weights()
        without = guided_steps(pipe)
        handle = pipe.unet.down[1].attentions[0].blocks[0].cross_attention.image_branches[0].handle
        pipe.unload_ip_adapter()
        plain = steps_of(pipe, prompt="cat", num_inference_steps=2)
        pipe.load_ip_adapter(
            {k: v for k, v in handle.adapter.state_dict().items()}, image_encoder_folder=None
        )
        return [*with_lora, *without, *plain]

    before = runs(pipe)
    with offloaded(pipe, by_block):
        assert equal(before, runs(pipe))


@MODES
def test_a_model_that_is_replaced(by_block: bool, pipes: Pair) -> None:
    """Also with models of another pipeline that are not shared."""
    pipe = KolorsPipeline.from_pipe(pipes[0])
    other = KolorsPipeline.from_pipe(pipe, unet=deepcopy(pipe.unet))
    with torch.no_grad():
        next(other.unet.parameters()).mul_(1.5)
    before, changed = steps_of(pipe, prompt="cat"), steps_of(other, prompt="cat")
    with offloaded(pipe, by_block) as offload:
        assert other.device == ACCELERATOR
        assert equal(changed, steps_of(other, prompt="cat")) and equal(before, steps_of(pipe, prompt="cat"))
        own, pipe.unet = pipe.unet, deepcopy(other.unet)
        assert equal(changed, steps_of(pipe, prompt="cat"))
        assert offload.peak_bytes <= bytes_of(((own, ""),))
        assert not any(part._forward_pre_hooks for part in own.modules())
        pipe.unet = own
        assert equal(before, steps_of(pipe, prompt="cat"))


@MODES
def test_what_is_copied_or_pickled_has_the_mode_and_its_own_weights(by_block: bool, pipes: Pair) -> None:
    pipe = KolorsPipeline.from_pipe(pipes[0])
    before = steps_of(pipe, prompt="cat")
    with offloaded(pipe, by_block) as offload:
        steps_of(pipe, prompt="cat")
        for copied in (pickle.loads(pickle.dumps(pipe)), deepcopy(pipe)):
            assert copied.device == ACCELERATOR and copied.offload is not offload
            assert copied.offload.by_block is by_block
            assert equal(before, steps_of(copied, prompt="cat"))
            assert copied.offload.peak_bytes > 0 == copied.offload.bytes_on_device == offload.bytes_on_device
            unet = copied.unet
            del copied  # without its pipeline, the model is not offloaded
            calls: list[int] = []
            unet.conv_in.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            unet.conv_in(torch.zeros(1, 4, 8, 8, dtype=torch.float64))
            assert calls


ENDINGS: dict[str, Callable[[Any], Any]] = {
    "to": lambda pipe: pipe.to("cpu"),
    "remove_all_hooks": lambda pipe: pipe.remove_all_hooks(),
    "enable_model_cpu_offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "enable_sequential_cpu_offload": lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
}


@MODES
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_mode_ends_without_a_trace(
    ending: str, by_block: bool, pipes: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """Also with weights on the accelerator, after prompts were encoded but no image generated."""
    pipe = KolorsPipeline.from_pipe(pipes[0])
    before = steps_of(pipe, prompt="cat")
    models = {name: listed[0] for name, listed in pipe._models().items()}
    state = {name: deepcopy(model.state_dict()) for name, model in models.items()}
    with offloaded(pipe, by_block) as offload:
        pipe.encode_prompt(f"not in the cache: {ending}, {by_block}")
        assert offload.bytes_on_device > 0
        ENDINGS[ending](pipe)
        assert offload.bytes_on_device == 0 and offload.device is None and pipe.device.index is None
        for name, model in models.items():
            assert not any(part._forward_pre_hooks for part in model.modules())
            assert all(torch.equal(t, state[name][key]) for key, t in model.state_dict().items())
        assert equal(before, steps_of(pipe, prompt="cat"))
        assert offload.peak_bytes > 0 == offload.bytes_on_device
    assert ("offload has no effect on a CPU" in caplog.text) is ending.startswith("enable")


@MODES
def test_another_precision_within_the_mode(by_block: bool, ready: KolorsPipeline) -> None:
    with offloaded(ready, by_block):
        ready.to(torch.float32)
        assert ready.device == ACCELERATOR
        after = guided_steps(ready)
    assert equal(guided_steps(ready), after) and after[0].dtype == torch.float32


def test_compiled_models_do_not_come_by_block(pipes: Pair) -> None:
    pipe = KolorsPipeline.from_pipe(pipes[0], unet=deepcopy(pipes[0].unet))
    with offloaded(pipe, by_block=True):
        pipe.unet.mid.attentions[0].blocks[0].compile(backend="eager")
        message = "unet cannot be offloaded block by block, it is compiled: use enable_model_cpu"
        with pytest.raises(ValueError, match=message):
            steps_of(pipe, prompt="cat")
        pipe.offload.start(ACCELERATOR, by_block=False)
        steps_of(pipe, prompt="cat")
    torch.compiler.reset()


@pytest.mark.parametrize("load", [
    lambda device: KolorsPipeline.from_pretrained("tiny", device=device),
    lambda device: load_component(EMBEDDED, "vae", device=device), named_device,
    lambda device: KolorsPipeline.from_pretrained("tiny").to(device),
])  # fmt: skip
def test_a_device_that_is_not_there_is_told_with_those_that_are(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And why: torch is built without it, or the machine has none; also for other names."""
    if best_device().type != "cpu":
        pytest.skip("this machine has an accelerator")
    here = "^expected a device of this machine, cpu, got "
    reasons = {
        "cuda": (torch.version, "cuda", None, r": this torch, \S+, is built without CUDA$"),
        "cuda:7": (torch.version, "cuda", "12.8", ": CUDA finds no GPU or no driver$"),
        "mps": (torch.backends.mps, "is_built", lambda: False, ": this torch is built without MPS$"),
        "mps:0": (torch.backends.mps, "is_built", lambda: True, ": MPS needs a Mac with Apple's GPU$"),
        "hpu": (torch.version, "cuda", None, "$"),
        "toaster": (torch.version, "cuda", None, "$"),
    }
    for name, (where, attribute, value, reason) in reasons.items():
        monkeypatch.setattr(where, attribute, value)
        with pytest.raises(ValueError, match=f"{here}{name!r}{reason}"):
            load(name)


def test_offload_on_a_machine_without_an_accelerator_changes_nothing(pipes: Pair) -> None:
    if best_device().type != "cpu":
        pytest.skip("this machine has an accelerator")
    pipe = KolorsPipeline.from_pipe(pipes[0])
    before = {key: t.data_ptr() for key, t in tensors_of(((pipe.unet, ""),)).items()}
    for enable in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
        enable()
        assert pipe.device == torch.device("cpu") and pipe.offload.device is None
        with pytest.raises(ValueError, match="expected a device of this machine, .* got 'cuda:3'"):
            enable(gpu_id=3)
        with pytest.raises(ValueError, match="give either gpu_id or device"):
            enable(gpu_id=0, device="cpu")
    assert before == {key: t.data_ptr() for key, t in tensors_of(((pipe.unet, ""),)).items()}
    assert not any(part._forward_pre_hooks for part in pipe.unet.modules())
