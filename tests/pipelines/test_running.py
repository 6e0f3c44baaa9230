"""Runs that end early: interrupted, or by an exception at any operation; then all works as before."""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from itertools import chain
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kolors_core import KolorsImg2ImgPipeline, KolorsPipeline
from kolors_core.devices import move_models
from tests.support.offloads import ACCELERATOR, offloaded
from tests.support.pipelines import NO_SAVINGS, picture

SMALL = {"height": 64, "width": 72, "num_inference_steps": 3, "output_type": "pt"}


class Fails(TorchDispatchMode):
    """Raises at the n-th operation of torch, and at some after it; counts them."""

    def __init__(self, at: int | None, error: type[BaseException], times: int = 1) -> None:
        super().__init__()
        self.at, self.error, self.times, self.count = at, error, times, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.at is not None and self.at <= self.count < self.at + self.times:
            raise self.error("at operation", self.count)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def pipe() -> KolorsPipeline:
    pipe = KolorsPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, seed: int = 0, **arguments: Any) -> Tensor:
    given = SMALL | {"prompt": "a red apple", "generator": torch.Generator().manual_seed(seed)} | arguments
    return pipe(**given).images


def places(pipe: KolorsPipeline) -> list[tuple[Any, ...]]:
    """Of every tensor of the models: its device, dtype, data and whether a hook is on its module."""
    models = (pipe.text_encoder, pipe.unet, pipe.vae)
    tensors = chain.from_iterable(chain(m.parameters(), m.buffers()) for m in models if m is not None)
    return [(str(t.device), t.dtype, t.data_ptr(), t.requires_grad) for t in tensors]


@contextmanager
def tiled(pipe: KolorsPipeline) -> Iterator[None]:
    pipe.enable_vae_tiling(tile_sample_min_size=32)
    try:
        yield
    finally:
        pipe.disable_vae_tiling()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("way", ["plain", "offload", "by block", "tiled", "image"])
def test_after_an_exception_at_any_operation_all_is_as_before(
    pipe: KolorsPipeline, way: str, error: type[BaseException]
) -> None:
    ways: dict[str, Callable[[], Any]] = {
        "offload": lambda: offloaded(pipe), "by block": lambda: offloaded(pipe, by_block=True),
        "tiled": lambda: tiled(pipe),
    }  # fmt: skip
    task, given = pipe, {}
    if way == "image":
        task, given = KolorsImg2ImgPipeline.from_pipe(pipe), {"image": picture(), "strength": 0.7}
    kept, pipe.savings = pipe.savings, NO_SAVINGS
    before = places(pipe)
    with ways.get(way, nullcontext)():
        wanted = draw(task, **given)
        with Fails(None, error) as counter:
            draw(task, **given)
        generator = torch.Generator().manual_seed(1)
        # Offload learns from runs, and may save operations in later ones.
        random = torch.randint(1, int(0.97 * counter.count), (4,), generator=generator).tolist()
        for at in (1, *random):
            with pytest.raises(error), Fails(at, error):
                draw(task, **given)
            assert pipe.offload.running is None and pipe.offload.bytes_on_device == 0, at
            if pipe.offload.device is not None:
                assert pipe.device == ACCELERATOR
            assert [place[:2] for place in places(pipe)] == [place[:2] for place in before], at
            assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        assert torch.equal(draw(task, **given), wanted), "it draws the same"
    pipe.savings = kept
    assert places(pipe) == before or way in ("offload", "by block")


def take(size: int) -> None:
    torch.empty(size)


@pytest.mark.parametrize(
    "fill",
    [lambda: take(2**50), lambda: np.empty(2**50), lambda: bytearray(2**60)],
    ids=["torch", "numpy", "python"],
)
@pytest.mark.parametrize("by_block", [None, False, True])
def test_lack_of_memory_on_a_cpu_is_as_on_an_accelerator(
    pipe: KolorsPipeline, fill: Callable[[], Any], by_block: bool | None
) -> None:
    """The allocators' own errors; also without a class of its own, and by whatever class it is caught."""
    seen = []

    def callback(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(ref(tensors["latents"]))
        fill()
        return {}

    before, wanted = places(pipe), draw(pipe)
    message = r"^not enough memory on cpu\S*; what helps: fewer images in a call, .*enable_vae_tiling\(\)"
    with nullcontext() if by_block is None else offloaded(pipe, by_block=by_block):
        for kind in (torch.OutOfMemoryError, MemoryError, RuntimeError):
            with pytest.raises(kind, match=message) as caught:
                draw(pipe, callback_on_step_end=callback)
            gc.collect()
            assert "\n" not in str(caught.value) and seen[-1]() is None, "what the call held is free"
            assert pipe.offload.running is None and pipe.offload.bytes_on_device == 0
        assert torch.equal(draw(pipe), wanted)
    assert [place[:2] for place in places(pipe)] == [place[:2] for place in before]


def test_another_error_is_no_lack_of_memory(pipe: KolorsPipeline) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("a size does not match")

    with pytest.raises(RuntimeError, match="^a size does not match$") as caught:
        draw(pipe, callback_on_step_end=fails)
    assert type(caught.value) is RuntimeError


@pytest.mark.parametrize("by_block", [False, True])
def test_after_a_second_interrupt_the_next_run_is_whole(pipe: KolorsPipeline, by_block: bool) -> None:
    """The second comes while the first sends the models home, some of which then stay until the next run."""
    with offloaded(pipe, by_block=by_block):
        wanted, left = draw(pipe), 0
        with Fails(None, KeyboardInterrupt) as counter:
            draw(pipe)
        for at in torch.linspace(1, 0.95 * counter.count, 8).int().tolist():
            with pytest.raises(KeyboardInterrupt), Fails(at, KeyboardInterrupt, times=2):
                draw(pipe)
            left += pipe.offload.bytes_on_device
            assert torch.equal(draw(pipe), wanted) and pipe.offload.bytes_on_device == 0, at
    assert left or not by_block, "some second interrupt met the way home"


def test_what_a_run_held_is_free_although_its_traceback_is_kept(pipe: KolorsPipeline) -> None:
    """An interactive session keeps the last exception, and by it every frame's tensors."""
    seen = []

    def stop(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(ref(tensors["latents"]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        draw(pipe, callback_on_step_end=stop)
    gc.collect()
    assert caught.value.__traceback__ is not None and seen[0]() is None


def test_an_interrupt_ends_the_run_after_its_step(pipe: KolorsPipeline) -> None:
    """From a callback, and from another thread; and no callback is needed for it to be seen."""
    steps = []

    def stop(pipe: Any, i: int, _t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(i)
        if i == 1:
            thread = threading.Thread(target=pipe.interrupt)
            thread.start()
            thread.join()
        return tensors

    early = draw(pipe, num_inference_steps=5, callback_on_step_end=stop)
    assert steps == [0, 1] and pipe.interrupt and "not" not in repr(pipe.interrupt)
    assert early.shape == (1, 3, 64, 72)
    whole = draw(pipe, num_inference_steps=5)
    assert not pipe.interrupt and not torch.equal(early, whole), "the next run is whole"

    guided, calls = pipe.guided, []

    def counted(*arguments: Any, **named: Any) -> Any:
        denoise = guided(*arguments, **named)

        def interrupting(x: Tensor, sigma: float) -> Tensor:
            calls.append(sigma)
            if len(calls) == 2:
                pipe.interrupt()
            return denoise(x, sigma)

        return interrupting

    pipe.guided = counted
    try:
        assert torch.equal(draw(pipe, num_inference_steps=5), early)
    finally:
        pipe.guided = guided
    assert len(calls) == 2


class Full(torch.nn.Linear):
    """A layer for which there is no room."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise torch.OutOfMemoryError("no room")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_are_moved_together_or_not_at_all(pipe: KolorsPipeline, dtype: torch.dtype) -> None:
    """Not one bit is rounded, of parameters and of buffers."""
    before, values = places(pipe), deepcopy(pipe.unet.state_dict())
    pipe.vae.full = Full(1, 1)
    pipe.unet.register_buffer("table", table := torch.rand(3))
    try:
        with pytest.raises(torch.OutOfMemoryError):
            pipe.to(dtype)
        assert pipe.unet.table is table
    finally:
        del pipe.vae.full, pipe.unet.table
    assert [place[:2] for place in places(pipe)] == [place[:2] for place in before]
    assert all(torch.equal(tensor, values[name]) for name, tensor in pipe.unet.state_dict().items())
    layer = torch.nn.Linear(2, 2)
    move_models([(layer, torch.float64)])
    assert layer.weight.dtype == torch.float64


def test_an_argument_that_no_task_has_is_named(pipe: KolorsPipeline) -> None:
    with pytest.raises(TypeError, match="'promt' is no argument of KolorsPipeline, did you mean prompt"):
        pipe("a red apple", promt="a red apple")  # type: ignore[call-arg]
