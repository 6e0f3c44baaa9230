"""Noise prediction: the UNet called as a whole, or with all that is the same in every step computed once.

Shapes: B rows, b latents, each shared by B / b rows, T width of the time embedding, C channels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kolors_core.conditioning import Conditioning
from kolors_core.module import WrapStep
from kolors_core.schedule import Schedule
from kolors_core.unet import ResBlock, TimeShift, UNet, UNetEncoder
from kolors_core.validation import as_path, check_int

# (input of conv_in [b, ...], timestep, residuals as in `UNet.forward`) -> noise [B, ...]
PredictNoise = Callable[[Tensor, float, list[Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Savings:
    """Savings of work that do not change a pipeline's result; each can be switched off, to compare."""

    merge_padding: bool = True  # encode and attend to equal pads of a prompt as one with a multiplicity
    precompute: bool = True  # see `guidance.guided`
    cached_prompts: int = 32  # prompts, or lists of them, whose embeddings stay in memory; 0 for none
    prompt_folder: str | Path | None = None  # of embeddings, shared with other processes: prompt_cache.py

    def __post_init__(self) -> None:
        check_int("cached_prompts", self.cached_prompts, least=0)
        if self.prompt_folder is not None:
            as_path("prompt_folder", self.prompt_folder)


class PrecomputedInputs:
    """Inputs of a UNet's or ControlNet's blocks that do not depend on the latents, for each step of a run."""

    def __init__(self, net: UNetEncoder, schedule: Schedule, conditioning: Conditioning) -> None:
        c = conditioning
        unique, rows = net.context(c.text_tokens, c.text_counts, c.image_prompts).unique_rows()
        self.net, self.keys_values = net, [kv.select_rows(rows) for kv in net.project_kv(unique)]
        if c.perturbed:
            pairs = zip(self.keys_values, c.perturbed, strict=True)
            self.keys_values = [kv._replace(perturbed=count) for kv, count in pairs]
        self.embedding = net.added_embedding(c.pooled_text, c.size_ids, c.added)  # [B, T]
        self.widths = [block.time_proj.out_features for block in net.modules() if isinstance(block, ResBlock)]
        timesteps = schedule.timesteps.tolist()
        times = torch.tensor(timesteps, dtype=torch.float32, device=self.embedding.device)
        self.scheduled = dict(zip(timesteps, self._shifts(times), strict=True))

    def shifts(self, timestep: float) -> Tensor:
        """Return the time shifts of all blocks at a timestep: [B, sum of the blocks' C]."""
        if timestep in self.scheduled:
            return self.scheduled[timestep]
        # Filled on the device: a tensor of given values is copied there, which the host waits for.
        return self._shifts(torch.full((1,), timestep, dtype=torch.float32, device=self.embedding.device))[0]

    def split(self, shifts: Tensor) -> Iterator[TimeShift]:
        """Split `shifts` into one for each block."""
        return map(TimeShift, shifts.split(self.widths, dim=-1))

    def _shifts(self, times: Tensor) -> list[Tensor]:
        shifts = self.net.time_shifts(self.net.embed_time(times)[:, None] + self.embedding)  # each [n, B, C]
        return list(torch.cat([shift.added for shift in shifts], dim=-1))  # n of [B, sum of the blocks' C]


def has_default_forward(net: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether calling parts of `kind.forward` equals calling the net: not overridden, and no hooks."""
    is_overridden = type(net).forward is not kind.forward or "forward" in vars(net)
    return not (is_overridden or net._compiled_call_impl or net._forward_hooks or net._forward_pre_hooks)


def predict_uncached(unet: UNet, conditioning: Conditioning, repeats: int) -> PredictNoise:
    """Return a function that calls `unet.forward`, with its optional inputs only if they are set."""
    c = conditioning
    optional: dict[str, Any] = {"perturbed": c.perturbed} if c.perturbed else {}
    optional |= {} if c.added is None else {"added": c.added}

    def predict(latents: Tensor, timestep: float, residuals: list[Tensor]) -> Tensor:
        time = torch.full((), timestep, dtype=torch.float32, device=latents.device)
        inputs = latents.repeat(repeats, 1, 1, 1), time, c.text_tokens, c.pooled_text, c.size_ids
        keywords = optional | {"residuals": residuals} if residuals else optional
        return unet(*inputs, c.text_counts, c.image_prompts, **keywords)

    return predict


def predict_precomputed(
    unet: UNet, schedule: Schedule, conditioning: Conditioning, repeats: int, wrap_step: WrapStep | None
) -> PredictNoise:
    """Return a function that runs the UNet on inputs computed once a run, see `PrecomputedInputs`.

    wrap_step: gets the step as a function of all keys and values, latents [b, ...], `shifts` and residuals.
    """
    inputs = PrecomputedInputs(unet, schedule, conditioning)

    def step(keys_values: Any, latents: Tensor, shifts: Tensor, *residuals: Tensor) -> Tensor:
        return unet.forward_precomputed(latents, inputs.split(shifts), keys_values, repeats, residuals)

    run = partial(step, inputs.keys_values)
    if wrap_step is not None:
        run = wrap_step(step, inputs.keys_values, [unet], (repeats, conditioning.perturbed))
    return lambda latents, timestep, residuals: run(latents, inputs.shifts(timestep), *residuals)
