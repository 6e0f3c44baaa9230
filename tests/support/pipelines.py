"""Ours and the reference's pipeline with the same random weights, run side by side, latents step by step."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kolors_core import EulerDiscreteScheduler, KolorsPipeline
from kolors_core.chatglm import ChatGLM
from kolors_core.precompute import Savings
from kolors_core.schedulers import SCHEDULERS
from kolors_core.tokenizer import Tokenizer
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.parity import NO_MODULE, assert_parity, first_divergence, transfer
from tests.support.reference_folder import KOLORS_SCHEDULER, reference_pipeline
from tests.support.small import FLOAT32, SMALL

EMBEDDINGS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)
Pair = tuple[KolorsPipeline, diffusers.KolorsPipeline]
SOLVERS: list[tuple[str, dict[str, Any]]] = [
    ("EulerDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"}),
]
NO_SAVINGS = Savings(merge_padding=False, precompute=False, cached_prompts=0)
WEAK = 2.0  # guidance that hardly amplifies what float32 rounds
SMALL_PICTURE = {"height": 64, "width": 72, "num_inference_steps": 4}


def make_pair(tokenizer: Path, dtype: torch.dtype, force_zeros: bool = False) -> Pair:
    """Ours and the reference's pipeline with the same random weights."""
    theirs = reference_pipeline(tokenizer, force_zeros=force_zeros)
    parts = {"text_encoder": ChatGLM(SMALL.text_encoder), "unet": UNet(SMALL.unet), "vae": VAE(SMALL.vae)}
    for name, model in parts.items():
        transfer(getattr(theirs, name), model, name)
        getattr(theirs, name).to(dtype)
        model.to(dtype).eval()
    scheduler = EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    ours = KolorsPipeline(
        **parts, tokenizer=Tokenizer(tokenizer), scheduler=scheduler, force_zeros_for_empty_prompt=force_zeros
    )
    ours.set_progress_bar_config(disable=True)
    return ours, theirs


def use_solver(pair: Pair, solver: str, changes: dict[str, Any]) -> None:
    ours, theirs = pair
    theirs.scheduler = getattr(diffusers, solver)(**KOLORS_SCHEDULER, **changes)
    ours.scheduler = SCHEDULERS[solver].from_config(theirs.scheduler.config)


def picture(seed: int = 0, height: int = 64, width: int = 72) -> Image.Image:
    """Blurred colours."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def steps_of(pipe: Any, seed: int = 0, **arguments: Any) -> list[Tensor]:
    """Latents after each step, then the decoded images."""
    latents = []

    def keep(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(tensors["latents"].clone())
        return {}

    given = (
        {"generator": torch.Generator().manual_seed(seed), "output_type": "pt"} | SMALL_PICTURE | arguments
    )
    pictures = pipe(**given, callback_on_step_end=keep).images
    return [*latents, pictures]


def embeddings(pipe: Any, prompt: Any, **arguments: Any) -> dict[str, Tensor]:
    """`encode_prompt`'s four tensors by the names of the arguments that take them."""
    with torch.no_grad():
        return dict(zip(EMBEDDINGS, pipe.encode_prompt(prompt, **arguments), strict=True))


def assert_same_steps(
    pair: Pair, tolerance: float = FLOAT32, picture_tolerance: float = FLOAT32, **arguments: Any
) -> None:
    ours, theirs = pair
    mine, other = steps_of(ours, **arguments), steps_of(theirs, **arguments)
    assert len(mine) == len(other) > 1
    for i, (a, b) in enumerate(zip(mine, other, strict=True)):
        allowed = tolerance if i < len(mine) - 1 else picture_tolerance
        assert_parity(a, b, allowed, partial(diverging_module, pair, i, allowed, arguments))


@contextmanager
def saving(pipe: KolorsPipeline, savings: Savings) -> Iterator[None]:
    """Within it the pipeline saves this and no more."""
    before, pipe.savings = pipe.savings, savings
    try:
        yield
    finally:
        pipe.savings = before


def diverging_module(pair: Pair, step: int, tolerance: float, arguments: dict[str, Any]) -> str:
    """The first module of the first model whose output differs in a run of both pipelines.

    Without savings, with which modules see fewer tokens; what differs with them only, no module shows.
    """
    with saving(pair[0], NO_SAVINGS):
        return _diverging_module(pair, step, tolerance, arguments)


def _diverging_module(pair: Pair, step: int, tolerance: float, arguments: dict[str, Any]) -> str:
    runs = [lambda pipe=pipe: steps_of(pipe, **arguments) for pipe in pair]
    for component in ("text_encoder", "unet", "vae"):
        models = [getattr(pipe, component) for pipe in pair]
        found = first_divergence(*models, component, *runs, tolerance)
        if found != NO_MODULE:
            return f"step {step}, {component}: {found}"
    return f"step {step}, {NO_MODULE}"
