"""Several threads on one pipeline: each call has its own state, and what cannot be shared is refused."""

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kolors_core import EulerDiscreteScheduler, KolorsImg2ImgPipeline, KolorsPAGPipeline, KolorsPipeline
from kolors_core.chatglm import ChatGLM
from kolors_core.performance.cuda_graphs import CUDAGraphCache
from kolors_core.tokenizer import Tokenizer
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.loras import ATTENTION, factors, peft_names
from tests.support.offloads import offloaded
from tests.support.small import SMALL, randomise

JOBS = [("a cat", 1, 5.0), ("a red apple", 2, 1.0), ("一张瓢虫的照片", 3, 9.0), ("", 4, 0.0)]


@pytest.fixture(scope="module")
def pipe(small_tokenizer: Path) -> KolorsPipeline:
    made = {"text_encoder": ChatGLM(SMALL.text_encoder), "unet": UNet(SMALL.unet), "vae": VAE(SMALL.vae)}
    for seed, model in enumerate(made.values()):
        randomise(model.eval(), seed)
    pipe = KolorsPipeline(**made, tokenizer=Tokenizer(small_tokenizer), scheduler=EulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: KolorsPipeline, prompt: str, seed: int, scale: float, **arguments: Any) -> Tensor:
    given = {"height": 32, "width": 40, "num_inference_steps": 3, "output_type": "pt"} | arguments
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, guidance_scale=scale, generator=generator, **given)[0]


def in_a_thread(call: Callable[[], Any]) -> Any:
    """What a call returns or raises in a thread of its own."""
    box: list[Any] = []

    def run() -> None:
        try:
            box.append(call())
        except Exception as error:
            box.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return box[0]


def beside(pipe: KolorsPipeline, other: Callable[[], Any], **arguments: Any) -> tuple[Tensor, Any]:
    """The first job, in whose second step another call begins and ends in another thread; and its result."""
    seen: list[Any] = []

    def callback(_pipe: Any, i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i == 1:
            seen.append(in_a_thread(other))
        return tensors

    return draw(pipe, *JOBS[0], callback_on_step_end=callback, **arguments), seen[0]


def test_threads_that_begin_together_draw_what_each_draws_alone(pipe: KolorsPipeline) -> None:
    alone = [draw(pipe, *job) for job in JOBS]
    gate, got = threading.Barrier(len(JOBS)), [torch.empty(0)] * len(JOBS)

    def work(k: int) -> None:
        gate.wait()
        for _ in range(3):
            got[k] = draw(pipe, *JOBS[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(JOBS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, got, alone))


@pytest.mark.parametrize("task", [KolorsPipeline, KolorsPAGPipeline])
def test_a_call_beside_a_callback_leaves_it_alone(task: type[KolorsPipeline], pipe: KolorsPipeline) -> None:
    """Also of another task with the same models, whose guidance rule is its own."""
    other = task.from_pipe(pipe)
    wanted = draw(pipe, *JOBS[0]), draw(other, *JOBS[1])
    got = beside(pipe, lambda: draw(other, *JOBS[1]))
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_a_callback_reaches_its_own_call(pipe: KolorsPipeline) -> None:
    """Guidance ended, and the call interrupted, in one thread; the other's call goes on."""

    def end_guidance(own: Any, i: int, _t: Any, _tensors: Any) -> dict[str, Any]:
        own._guidance_scale = 0.0
        own._interrupt = i == 1
        return {}

    wanted = draw(pipe, *JOBS[0]), draw(pipe, *JOBS[2], callback_on_step_end=end_guidance)
    assert not torch.equal(draw(pipe, *JOBS[2]), wanted[1]), "the callback has an effect"
    got = beside(pipe, lambda: draw(pipe, *JOBS[2], callback_on_step_end=end_guidance))
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_from_outside_all_calls_are_interrupted(pipe: KolorsPipeline) -> None:
    steps: list[int] = []

    def callback(_pipe: Any, i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(i)
        in_a_thread(pipe.interrupt)
        return tensors

    draw(pipe, *JOBS[0], callback_on_step_end=callback)
    assert steps == [0] and pipe.interrupt
    draw(pipe, *JOBS[0])
    assert not pipe.interrupt and pipe.num_timesteps == 3 and pipe.guidance_scale == 5.0


def test_offload_and_graphs_are_not_shared(pipe: KolorsPipeline) -> None:
    wanted, refused = draw(pipe, *JOBS[0]), "drawing in another thread, and {} cannot be shared"
    other = KolorsImg2ImgPipeline.from_pipe(pipe)
    with offloaded(pipe):
        got, error = beside(
            pipe, lambda: other("a cat", torch.zeros(1, 4, 4, 5), generator=torch.Generator())
        )
    assert torch.equal(got, wanted)
    assert isinstance(error, RuntimeError) and refused.format("offload") in str(error)
    pipe._wrap_step = CUDAGraphCache(lambda run: (lambda: None, run()))
    try:
        error = beside(pipe, lambda: draw(pipe, *JOBS[1]))[1]
    finally:
        pipe._wrap_step = None
    assert isinstance(error, RuntimeError) and refused.format("a CUDA graph") in str(error)
    assert torch.equal(draw(pipe, *JOBS[0]), wanted), "and works again afterwards"


def test_a_lora_scale_of_one_call_is_not_shared(pipe: KolorsPipeline) -> None:
    pipe.load_lora_weights(peft_names("unet", factors(pipe.unet, "unet", ATTENTION)))
    scaled = {"cross_attention_kwargs": {"scale": 0.5}}
    try:
        wanted, plain = draw(pipe, *JOBS[0], **scaled), draw(pipe, *JOBS[0])
        got, error = beside(pipe, lambda: draw(pipe, *JOBS[1]), **scaled)
        assert torch.equal(got, wanted) and not torch.equal(wanted, plain)
        assert isinstance(error, RuntimeError) and "a LoRA scale of its own" in str(error)
        got, error = beside(pipe, lambda: draw(pipe, *JOBS[1], **scaled))
        assert torch.equal(got, plain), "the other call is refused, and changes nothing"
        assert isinstance(error, RuntimeError) and "a LoRA scale of its own" in str(error)
    finally:
        pipe.unload_lora_weights()


def test_a_copy_has_no_calls(pipe: KolorsPipeline) -> None:
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert other.runs is not pipe.runs
        assert torch.equal(draw(other, *JOBS[0]), draw(pipe, *JOBS[0]))
