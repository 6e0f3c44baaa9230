"""Where models are: only the one at work on the accelerator, in every task."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kolors_core import KolorsImg2ImgPipeline, KolorsPipeline
from kolors_core.placement import best_device
from tests.ip_adapters import Both, guided_steps, load_both
from tests.pipelines import Pair, picture

ACCELERATOR = torch.device("cpu", 0)  # the CPU under another name: a stand-in where there is no accelerator


@contextmanager
def watched(pipe: KolorsPipeline | KolorsImg2ImgPipeline) -> Iterator[list[set[str]]]:
    """Notes, whenever a part of a model works, which models were moved to the accelerator and not back."""
    there, seen = set[str](), list[set[str]]()
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:

        def follow(name: str, model: nn.Module) -> None:
            move = model.to

            def to(place: Any) -> nn.Module:
                (there.add if place == ACCELERATOR else there.discard)(name)
                return move(place)

            def note(*_: Any) -> None:
                assert name in there, f"{name} works on the CPU, beside {there} on the accelerator"
                seen.append(set(there))

            patch.setattr(model, "to", to)
            for part in model.modules():  # models are not always called as a whole
                stack.callback(part.register_forward_pre_hook(note).remove)

        for name in ("text_encoder", "image_encoder", "unet", "vae"):
            follow(name, getattr(pipe, name))
        yield seen


@pytest.mark.parametrize("kind", [KolorsPipeline, KolorsImg2ImgPipeline])
def test_only_the_model_at_work_is_on_the_accelerator(kind: type, both: Both, adapters: list[Path]) -> None:
    """The reference keeps the text encoder there beside the UNet in image to image."""
    ours, _ = both
    load_both((ours,), adapters[0])
    pipe, more = kind.from_pipe(ours), {} if kind is KolorsPipeline else {"image": picture(), "strength": 1.0}
    before = guided_steps(pipe, **more)
    pipe._offload = ACCELERATOR
    pipe.prompt_cache.clear()  # a known prompt would leave the text encoder where it is
    with watched(pipe) as seen:
        after = guided_steps(pipe, **more)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    order = [next(iter(there)) for there in seen]
    assert all(len(there) == 1 for there in seen)
    stages = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert stages == ["vae"] * bool(more) + ["text_encoder", "image_encoder", "unet", "vae"]
    assert pipe.device == ACCELERATOR


def test_offload_on_a_machine_without_an_accelerator_changes_nothing(pipes: Pair) -> None:
    if best_device().type != "cpu":
        pytest.skip("this machine has an accelerator")
    pipe = KolorsPipeline.from_pipe(pipes[0])
    pipe.enable_model_cpu_offload()
    assert pipe.device == torch.device("cpu") and pipe._offload is None
    with pytest.raises(ValueError, match="wanted a device of this machine, .* got 'cuda:3'"):
        pipe.enable_model_cpu_offload(gpu_id=3)
    with pytest.raises(ValueError, match="give either gpu_id or device"):
        pipe.enable_model_cpu_offload(gpu_id=0, device="cpu")
