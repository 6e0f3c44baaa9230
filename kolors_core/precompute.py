"""Noise prediction: the UNet called as a whole, or with all that is the same in every step computed once.

Shapes: B images, b latents, of which each serves B / b rows, T width of the time embedding, C channels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kolors_core.conditioning import Conditioning
from kolors_core.context import ImagePrompt
from kolors_core.module import WrapStep
from kolors_core.schedule import Schedule
from kolors_core.unet import Encoder, ResBlock, Shift, UNet
from kolors_core.validation import as_path, check_int

# (what conv_in reads [b, ...], timestep, residuals as in `UNet.forward`) -> noise [B, ...]
PredictNoise = Callable[[Tensor, float, list[Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Savings:
    """What a pipeline saves without changing its result; each can be switched off, to compare.

    merge_padding: equal pads of a prompt are encoded and read as one that counts as many.
    precompute: see `guidance.guided`.
    cached_prompts: how many prompts, or lists of them, keep their embeddings in memory; 0 is none.
    prompt_folder: where they are kept as safetensors files too, for other processes and days; see
    kolors_core/performance/prompt_cache.py.
    """

    merge_padding: bool = True
    precompute: bool = True
    cached_prompts: int = 32
    prompt_folder: str | Path | None = None

    def __post_init__(self) -> None:
        check_int("cached_prompts", self.cached_prompts, least=0)
        if self.prompt_folder is not None:
            as_path("prompt_folder", self.prompt_folder)


class PrecomputedInputs:
    """All that a UNet or ControlNet computes before its first convolution, for every step of a run.

    reads: keys and values of each cross-attention, in the order in which they run.
    """

    def __init__(
        self,
        net: Encoder,
        schedule: Schedule,
        conditioning: Conditioning,
        images: Sequence[ImagePrompt] = (),
        perturbed: Sequence[int] = (),
        added: Tensor | None = None,
    ) -> None:
        context = net.context(conditioning.text_tokens, conditioning.text_counts, images)
        rows, where = context.distinct()
        self.net, self.reads = net, [read.rows(where) for read in net.read(rows)]
        if perturbed:
            pairs = zip(self.reads, perturbed, strict=True)
            self.reads = [read._replace(perturbed=count) for read, count in pairs]
        self.condition = net.added_embedding(conditioning.pooled_text, conditioning.size_ids, added)  # [B, T]
        self.widths = [block.time_proj.out_features for block in net.modules() if isinstance(block, ResBlock)]
        timesteps = schedule.timesteps.tolist()
        self.known = dict(zip(timesteps, self._shifts(timesteps), strict=True))

    def shifts(self, timestep: float) -> Tensor:
        """Return what all blocks add at a timestep: [B, all blocks' C]."""
        return self.known[timestep] if timestep in self.known else self._shifts([timestep])[0]

    def split(self, shifts: Tensor) -> Iterator[Shift]:
        """Split `shifts` into one for each block."""
        return map(Shift, shifts.split(self.widths, dim=-1))

    def _shifts(self, timesteps: list[float]) -> list[Tensor]:
        times = torch.tensor(timesteps, dtype=torch.float32, device=self.condition.device)
        every = self.net.shifts(self.net.embed_time(times)[:, None] + self.condition)  # each [n, B, C]
        return list(torch.cat([shift.added for shift in every], dim=-1))  # n of [B, all blocks' C]


def has_default_forward(net: Encoder, kind: type[Encoder]) -> bool:
    """Return whether parts of `kind.forward` may stand for calling the net: it has no other, nor hooks."""
    is_another = type(net).forward is not kind.forward or "forward" in vars(net)
    return not (is_another or net._compiled_call_impl or net._forward_hooks or net._forward_pre_hooks)


def predict_uncached(unet: UNet, conditioning: Conditioning, repeats: int) -> PredictNoise:
    """Call `unet.forward` in every step. Optional inputs are passed only if set, so a custom forward need not
    accept them.
    """
    c = conditioning
    optional: dict[str, Any] = {"perturbed": c.perturbed} if c.perturbed else {}
    optional |= {} if c.added is None else {"added": c.added}

    def predict(latents: Tensor, timestep: float, residuals: list[Tensor]) -> Tensor:
        time = torch.tensor(timestep, dtype=torch.float32, device=latents.device)
        inputs = latents.repeat(repeats, 1, 1, 1), time, c.text_tokens, c.pooled_text, c.size_ids
        now = optional | {"residuals": residuals} if residuals else optional
        return unet(*inputs, c.text_counts, c.image_prompts, **now)

    return predict


def predict_precomputed(
    unet: UNet, schedule: Schedule, conditioning: Conditioning, repeats: int, wrap_step: WrapStep | None
) -> PredictNoise:
    """Run the UNet without what is the same in every step."""
    images, perturbed = conditioning.image_prompts, conditioning.perturbed
    inputs = PrecomputedInputs(unet, schedule, conditioning, images, perturbed, conditioning.added)

    def step(reads: Any, latents: Tensor, shifts: Tensor, *residuals: Tensor) -> Tensor:
        return unet.denoise(latents, inputs.split(shifts), reads, repeats, residuals)

    run = partial(step, inputs.reads)
    if wrap_step is not None and not any(image.masks is not None for image in images):
        run = wrap_step(step, inputs.reads, [unet], (repeats, perturbed))
    return lambda latents, timestep, residuals: run(latents, inputs.shifts(timestep), *residuals)
