"""Guidance: wraps the UNet and a schedule into `denoise(x, sigma) -> x0`, which is all that a sampler knows.

Shapes: B pictures, S text tokens; latents are [B, 4, H/8, W/8].
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kolors_core.conditioning import Conditioning
from kolors_core.context import Read
from kolors_core.fields import path_of, whole_number
from kolors_core.graphs import Graphs
from kolors_core.ip_adapter import attached
from kolors_core.lora import state_of
from kolors_core.sampling import Denoise
from kolors_core.schedule import Schedule
from kolors_core.tempering import Interval, rescaling, within
from kolors_core.unet import ResBlock, Shift, UNet


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

    def __post_init__(self) -> None:
        whole_number("cached_prompts", self.cached_prompts, least=0)
        if self.prompt_folder is not None:
            path_of("prompt_folder", self.prompt_folder)


def guided(
    unet: UNet,
    schedule: Schedule,
    positive: Conditioning,
    negative: Conditioning | None = None,
    scale: float = 1.0,
    *,
    rescale: float = 0.0,
    interval: Interval | None = None,
    read_once: bool = True,
    graphs: Graphs | None = None,
) -> Denoise:
    """Classifier-free guidance (https://arxiv.org/abs/2207.12598): eps = uncond + scale * (cond - uncond).

    Without a negative, or with a scale of at most 1, the UNet runs once on the positive alone. The UNet sees
    x / sqrt(1 + sigma^2) in its own dtype; x and x0 keep theirs. read_once: compute what does not depend on x
    (text and pictures as keys and values, what each block makes of sizes and all steps' times) now and not in
    every step; the result is the same. graphs: record the step there as a CUDA graph, unless there are masks.
    A UNet that is compiled as a whole, hooked, or has another forward is called as a whole and not recorded.
    rescale, interval: see kolors_core/tempering.py; outside of the interval, too, the positive alone is run.
    """
    temper = rescaling(rescale)

    def combine(_timestep: float, noise: Tensor) -> Tensor:
        unconditional, conditional = noise.chunk(2)
        return temper(unconditional + scale * (conditional - unconditional), conditional)

    x0_of = partial(combined, unet, schedule, read_once=read_once, graphs=graphs)
    if negative is None or scale <= 1:
        return x0_of(positive)
    inside = x0_of(Conditioning.cat(negative, positive), 2, combine)
    return inside if interval is None else within(interval, schedule, inside, x0_of(positive))


def combined(
    unet: UNet,
    schedule: Schedule,
    told: Conditioning,
    copies: int = 1,
    combine: Callable[[float, Tensor], Tensor] = lambda _timestep, noise: noise,
    *,
    read_once: bool,
    graphs: Graphs | None,
) -> Denoise:
    """x0 = x - sigma * eps, with eps what `combine(timestep, noise)` makes of all rows' noise.

    told: conditions of B pictures, `copies` times. read_once, graphs: see `guided`.
    """
    dtype = unet.conv_in.weight.dtype
    if read_once and _is_as_written(unet):
        predict = _reading_once(unet, schedule, told, copies, graphs)
    else:
        predict = _reading_always(unet, schedule, told, copies)
    known = dict(zip(schedule.sigmas.tolist(), schedule.timesteps.tolist(), strict=False))

    def denoise(x: Tensor, sigma: float) -> Tensor:
        latents = (x / (sigma**2 + 1) ** 0.5).to(dtype)
        timestep = known[sigma] if sigma in known else schedule.timestep(sigma)
        return x - sigma * combine(timestep, predict(latents, timestep).to(x.dtype))

    return denoise


def _is_as_written(unet: UNet) -> bool:
    """Whether the parts of `UNet.forward` may stand for calling the whole."""
    is_another = type(unet).forward is not UNet.forward or "forward" in vars(unet)
    return not (is_another or unet._compiled_call_impl or unet._forward_hooks or unet._forward_pre_hooks)


Predict = Callable[[Tensor, float], Tensor]  # (scaled latents [b, 4, H/8, W/8], timestep) -> noise [B, ...]


def _reading_always(unet: UNet, schedule: Schedule, told: Conditioning, copies: int) -> Predict:
    """The plain UNet."""
    more = {"perturbed": told.perturbed} if told.perturbed else {}

    def predict(latents: Tensor, timestep: float) -> Tensor:
        time = torch.tensor(timestep, dtype=torch.float32, device=latents.device)
        return unet(
            latents.repeat(copies, 1, 1, 1), time, told.text_tokens, told.pooled_text, told.size_ids,
            told.text_counts, told.image_prompts, **more,
        )  # fmt: skip

    return predict


def _reading_once(
    unet: UNet, schedule: Schedule, told: Conditioning, copies: int, graphs: Graphs | None
) -> Predict:
    """The UNet without what is the same in every step."""
    rows, where = unet.context(told.text_tokens, told.text_counts, told.image_prompts).distinct()
    reads = [read.rows(where) for read in unet.read(rows)]
    if told.perturbed:
        reads = [read._replace(perturbed=n) for read, n in zip(reads, told.perturbed, strict=True)]
    condition = unet.embed_condition(told.pooled_text, told.size_ids)  # [B, T]

    def shifts(timesteps: list[float]) -> list[Tensor]:
        times = torch.tensor(timesteps, dtype=torch.float32, device=condition.device)
        every = unet.shifts(unet.embed_time(times)[:, None] + condition)  # each [n, B, C]
        return list(torch.cat([shift.added for shift in every], dim=-1))  # n of [B, all blocks' C]

    widths = [block.time_proj.out_features for block in unet.modules() if isinstance(block, ResBlock)]

    def step(reads: list[Read], latents: Tensor, shifts: Tensor) -> Tensor:
        return unet.denoise(latents, map(Shift, shifts.split(widths, dim=-1)), reads, copies)

    run = partial(step, reads)
    if graphs is not None and all(image.masks is None for image in told.image_prompts):
        scales = [branch.scale for handle in attached(unet) for branch in handle.branches.values()]
        numbers = str((scales, told.perturbed, [level.freeu for level in unet.up]))
        run = graphs.of_run(step, (copies, state_of(unet), numbers), reads)
    timesteps = schedule.timesteps.tolist()
    known = dict(zip(timesteps, shifts(timesteps), strict=True))

    def predict(latents: Tensor, timestep: float) -> Tensor:
        return run(latents, known[timestep] if timestep in known else shifts([timestep])[0])

    return predict
