"""Guidance: wraps the UNet and a schedule into `denoise(x, sigma) -> x0`, which is all that a sampler knows.

Shapes: B pictures, S text tokens; latents are [B, 4, H/8, W/8].
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kolors_core.conditioning import Conditioning
from kolors_core.controlnet import ControlNet, acting, summed
from kolors_core.graphs import Graphs
from kolors_core.ip_adapter import attached
from kolors_core.lora import state_of
from kolors_core.reading import Told
from kolors_core.sampling import Denoise
from kolors_core.schedule import Schedule
from kolors_core.unet import Encoder, UNet


@dataclass(frozen=True, kw_only=True)
class Savings:
    """What a pipeline saves without changing its result; each can be switched off, to compare.

    collapse_pads: equal pads of a prompt are encoded and read as one that counts as many.
    read_once: see `guided`.
    cached_prompts: how many prompts, or lists of them, keep their embeddings in memory; 0 is none.
    prompt_folder: where they are kept as safetensors files too, for other processes and days; see
    kolors_core/prompt_cache.py.
    """

    collapse_pads: bool = True
    read_once: bool = True
    cached_prompts: int = 32
    prompt_folder: str | Path | None = None


def guided(
    unet: UNet,
    schedule: Schedule,
    positive: Conditioning,
    negative: Conditioning | None = None,
    scale: float = 1.0,
    *,
    read_once: bool = True,
    graphs: Graphs | None = None,
) -> Denoise:
    """Classifier-free guidance (https://arxiv.org/abs/2207.12598): eps = uncond + scale * (cond - uncond).

    Without a negative, or with a scale of at most 1, the UNet runs once on the positive alone. The UNet sees
    x / sqrt(1 + sigma^2) in its own dtype; x and x0 keep theirs. read_once: compute what does not depend on x
    (text and pictures as keys and values, what each block makes of sizes and all steps' times) now and not in
    every step; the result is the same. Controls add their residuals in the steps in which they act. graphs:
    record the step there as a CUDA graph, unless there are masks. A UNet or ControlNet that is compiled as a
    whole, hooked, or has another forward is called as a whole, and nothing is recorded.
    """
    is_guided = negative is not None and scale > 1
    told = Conditioning.cat(negative, positive) if negative is not None and is_guided else positive
    dtype = unet.conv_in.weight.dtype
    copies = 2 if is_guided else 1
    if read_once and all(map(_is_as_written, (unet, *(control.net for control in told.controls)))):
        predict = _reading_once(unet, schedule, told, copies, graphs)
    else:
        predict = _reading_always(unet, schedule, told, copies)
    sigmas = schedule.sigmas.tolist()
    known = dict(zip(sigmas, schedule.timesteps.tolist(), strict=False))
    controls_of_step = acting(told.controls, len(schedule.timesteps))

    def denoise(x: Tensor, sigma: float) -> Tensor:
        latents = (x / (sigma**2 + 1) ** 0.5).to(dtype)
        timestep = known[sigma] if sigma in known else schedule.timestep(sigma)
        step = min(max(sum(level >= sigma for level in sigmas), 1), len(controls_of_step)) - 1
        noise = predict(latents, timestep, controls_of_step[step]).to(x.dtype)
        if is_guided:
            unconditional, conditional = noise.chunk(2)
            noise = unconditional + scale * (conditional - unconditional)
        return x - sigma * noise

    return denoise


def _is_as_written(net: Encoder) -> bool:
    """Whether the parts of a UNet's or ControlNet's `forward` may stand for calling the whole."""
    is_another = type(net).forward not in (UNet.forward, ControlNet.forward) or "forward" in vars(net)
    return not (is_another or net._compiled_call_impl or net._forward_hooks or net._forward_pre_hooks)


# (scaled latents [b, 4, H/8, W/8], timestep, which controls act) -> noise [B, ...]
Predict = Callable[[Tensor, float, tuple[int, ...]], Tensor]


def _reading_always(unet: UNet, schedule: Schedule, told: Conditioning, copies: int) -> Predict:
    """The plain UNet, and plain ControlNets."""

    def predict(latents: Tensor, timestep: float, those: tuple[int, ...]) -> Tensor:
        time = torch.tensor(timestep, dtype=torch.float32, device=latents.device)
        given = latents.repeat(copies, 1, 1, 1), time, told.text_tokens, told.pooled_text, told.size_ids
        controls = [told.controls[k] for k in those]
        residuals = summed((c.scale, c.net(*given, c.image, told.text_counts)) for c in controls)
        more = {"residuals": residuals} if residuals else {}
        return unet(*given, told.text_counts, told.image_prompts, **more)

    return predict


def _reading_once(
    unet: UNet, schedule: Schedule, told: Conditioning, copies: int, graphs: Graphs | None
) -> Predict:
    """The UNet and ControlNets without what is the same in every step."""
    main, controls = Told(unet, schedule, told, told.image_prompts), told.controls
    nets = [Told(control.net, schedule, told) for control in controls]
    images = [control.net.image_embedding(control.image) for control in controls]
    constant = [main.reads, [net.reads for net in nets], images]

    def step(those: tuple[int, ...], constant: Any, latents: Tensor, shifts: Tensor, *more: Tensor) -> Tensor:
        reads, reads_of, images = constant
        residuals = summed(
            (controls[k].scale,
             controls[k].net.residuals(latents, images[k], nets[k].split(one), reads_of[k], copies))
            for k, one in zip(those, more, strict=True)
        )  # fmt: skip
        return unet.denoise(latents, main.split(shifts), reads, copies, residuals)

    def runner(those: tuple[int, ...]) -> Callable[..., Tensor]:
        if graphs is None or any(image.masks is not None for image in told.image_prompts):
            return partial(step, those, constant)
        scales = [branch.scale for handle in attached(unet) for branch in handle.branches.values()]
        states = [(state_of(control.net), control.scale) for control in controls]
        key = copies, state_of(unet), str(scales), those, *states
        return graphs.of_run(partial(step, those), key, constant)

    runs = {those: runner(those) for those in acting(controls, len(schedule.timesteps))}

    def predict(latents: Tensor, timestep: float, those: tuple[int, ...]) -> Tensor:
        return runs[those](latents, main.shifts(timestep), *(nets[k].shifts(timestep) for k in those))

    return predict
