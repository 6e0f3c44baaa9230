"""Step callbacks: they see what the reference shows, and what they change takes effect as there."""

from typing import Any

import diffusers
import pytest
import torch
from diffusers.callbacks import SDXLCFGCutoffCallback as ReferenceCutoff
from torch import Tensor

from kolors_core import SDXLCFGCutoffCallback
from kolors_core.pipelines.denoising_loop import TENSOR_NAMES
from tests.support.pipelines import SMALL_PICTURE, SOLVERS, Pair, use_solver
from tests.support.small import FLOAT32, relative_error

Tensors = dict[str, Tensor]


def run(pipe: Any, callback: Any, names: tuple[str, ...] = ("latents",), **arguments: Any) -> Tensor:
    given = {"prompt": "cat", "output_type": "latent"} | SMALL_PICTURE | arguments
    return pipe(
        **given, generator=torch.Generator().manual_seed(0), callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=list(names),
    ).images  # fmt: skip


@pytest.mark.parametrize(("solver", "changes"), SOLVERS[:2], ids=["euler", "dpm"])
@pytest.mark.parametrize("prompt", ["cat", ["cat", "red"]], ids=["one", "two"])
def test_every_tensor_is_the_references(pipes: Pair, solver: str, changes: dict, prompt: Any) -> None:
    use_solver(pipes, solver, changes)
    seen: list[list[tuple[int, float, Tensors]]] = []
    for pipe in pipes:
        calls: list[tuple[int, float, Tensors]] = []

        def keep(_pipe: Any, i: int, t: Any, tensors: Tensors, calls: list = calls) -> Tensors:
            calls.append((i, float(t), dict(tensors)))
            return {}

        run(pipe, keep, TENSOR_NAMES, prompt=prompt)
        seen.append(calls)
    assert [call[:2] for call in seen[0]] == [call[:2] for call in seen[1]]
    for (_, _, mine), (_, _, other) in zip(*seen, strict=True):
        for name in TENSOR_NAMES:
            # the reference has one row of negative ids for all prompts; ours has one for each
            theirs = (
                other[name].expand(len(mine[name]), -1) if name == "negative_add_time_ids" else other[name]
            )
            assert relative_error(mine[name], theirs) < FLOAT32, name


@pytest.mark.parametrize(("solver", "changes"), SOLVERS[:2], ids=["euler", "dpm"])
def test_changed_latents_and_prompts_take_effect(pipes: Pair, solver: str, changes: dict) -> None:
    use_solver(pipes, solver, changes)

    def change(_pipe: Any, i: int, _t: Any, tensors: Tensors) -> Tensors:
        if i != 1:
            return {}
        return {"latents": tensors["latents"] * 0.5 + 0.1, "prompt_embeds": tensors["prompt_embeds"].flip(-1)}

    mine, other = (run(pipe, change, ("latents", "prompt_embeds")) for pipe in pipes)
    assert relative_error(mine, other) < FLOAT32
    assert relative_error(mine, run(pipes[0], lambda *_: {})) > 1e-3


def test_latents_changed_in_place_take_effect(pipes: Pair) -> None:
    def change(_pipe: Any, _i: int, _t: Any, tensors: Tensors) -> Tensors:
        tensors["latents"] *= 0.9
        return tensors

    mine, other = (run(pipe, change) for pipe in pipes)
    assert relative_error(mine, other) < FLOAT32


def end_guidance(pipe: Any, i: int, _t: Any, tensors: Tensors) -> Tensors:
    """The dynamic guidance of the reference's documentation."""
    if i == 1:
        pipe._guidance_scale = 0.0
        return {name: tensor.chunk(2)[-1] for name, tensor in tensors.items()}
    return tensors


def test_guidance_can_be_ended(pipes: Pair) -> None:
    names = ("prompt_embeds", "add_text_embeds", "add_time_ids")
    mine, other = (run(pipe, end_guidance, names) for pipe in pipes)
    assert relative_error(mine, other) < FLOAT32
    assert pipes[0].guidance_scale == 0.0


def test_the_cutoff_callback_works_for_two_prompts(pipes: Pair) -> None:
    """The reference's keeps one row of all, and crashes with two prompts."""
    ours, theirs = pipes
    for arguments in ({"cutoff_step_index": 1}, {"cutoff_step_ratio": 0.5}):
        mine = run(ours, SDXLCFGCutoffCallback(**arguments), prompt="cat")
        index = {"cutoff_step_ratio": None} | arguments
        assert relative_error(mine, run(theirs, ReferenceCutoff(**index), prompt="cat")) < FLOAT32
    with pytest.raises(RuntimeError):
        run(theirs, ReferenceCutoff(cutoff_step_ratio=None, cutoff_step_index=1), prompt=["cat", "red"])
    names = ("prompt_embeds", "add_text_embeds", "add_time_ids")
    mine = run(ours, SDXLCFGCutoffCallback(cutoff_step_index=1), prompt=["cat", "red"])
    assert relative_error(mine, run(theirs, end_guidance, names, prompt=["cat", "red"])) < FLOAT32
    with pytest.raises(ValueError, match="cutoff_step_ratio must be from 0 to 1, got 3"):
        SDXLCFGCutoffCallback(cutoff_step_ratio=3)


@pytest.mark.parametrize(("solver", "changes"), SOLVERS[:2], ids=["euler", "dpm"])
def test_an_interrupted_run_ends_after_its_step(pipes: Pair, solver: str, changes: dict) -> None:
    use_solver(pipes, solver, changes)
    counts = []

    def interrupt(pipe: Any, i: int, _t: Any, tensors: Tensors) -> Tensors:
        counts.append(i)
        pipe._interrupt = i == 1
        return tensors

    mine = run(pipes[0], interrupt)
    assert counts == [0, 1]
    assert relative_error(mine, run(pipes[1], interrupt)) < FLOAT32
    assert pipes[0].num_timesteps == 4 and pipes[0].interrupt
    run(pipes[0], lambda *_: {})
    assert not pipes[0].interrupt, "the next run starts anew"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"noise": torch.zeros(1)}, "returned 'noise'; expected some of latents"),
        ({"latents": torch.zeros(1, 4, 2, 2)}, r"returned latents \[1, 4, 2, 2\], expected \[1, 4, 8, 9\]"),
        (
            {"prompt_embeds": torch.zeros(3, 256, 64)},
            "returned prompt_embeds of 3 rows, expected 2 for 1 images",
        ),
    ],
)
def test_what_a_callback_returns_is_checked(pipes: Pair, returned: Tensors, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(pipes[0], lambda *_: returned)


def test_the_reference_has_the_same_names() -> None:
    assert set(diffusers.KolorsPipeline._callback_tensor_inputs) == set(TENSOR_NAMES)
