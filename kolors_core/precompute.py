"""Noise prediction: the UNet called as a whole, or with all that is the same in every step computed once.

Shapes: B rows, b latents, each shared by B / b rows, T width of the time embedding, C channels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from kolors_core.conditioning import Conditioning
from kolors_core.denoiser import OPTIONAL_INPUTS, DenoisingModel, check_accepts
from kolors_core.module import WrapStep
from kolors_core.schedule import Schedule
from kolors_core.unet import ResBlock, TimeShift, UNet, UNetEncoder
from kolors_core.validation import as_path, check_int

# (input of conv_in [b, ...], timestep or one for each [b], residuals as in `UNet.forward`) -> noise [B, ...]
PredictNoise = Callable[[Tensor, float | Tensor, list[Tensor]], Tensor]


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

    def shifts(self, timestep: float | Tensor) -> Tensor:
        """Return the time shifts of all blocks at a timestep, or each latent's [b]: [B, sum of C]."""
        if isinstance(timestep, Tensor):
            times = timestep.to(self.embedding.device, torch.float32)
            time = self.net.embed_time(times.repeat(len(self.embedding) // len(times))) + self.embedding
            return torch.cat([shift.added for shift in self.net.time_shifts(time)], dim=-1)
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


def predict_uncached(
    unet: DenoisingModel, conditioning: Conditioning, repeats: int, wrap_step: WrapStep | None = None
) -> PredictNoise:
    """Return a function that calls the denoiser, with its optional inputs only if they are set.

    wrap_step: gets the step as a function of all conditions, latents [b, ...], timesteps and residuals.
    """
    c = conditioning
    named = {name: value for name in OPTIONAL_INPUTS if _is_given(value := getattr(c, name))}
    check_accepts(unet, named)
    named.pop("residuals", None)  # of a step
    inputs = c.text_tokens, c.pooled_text, c.size_ids, c.text_counts

    def step(constant: Any, latents: Tensor, time: Tensor, *residuals: Tensor) -> Tensor:
        inputs, named = constant
        named = named | {"residuals": residuals} if residuals else named
        return unet(latents.repeat(repeats, 1, 1, 1), time, *inputs, **named)

    run = partial(step, (inputs, named))
    if wrap_step is not None:
        run = wrap_step(step, (inputs, named), [cast(nn.Module, unet)], (repeats, c.perturbed))

    def predict(latents: Tensor, timestep: float | Tensor, residuals: list[Tensor]) -> Tensor:
        if isinstance(timestep, Tensor):
            time = timestep.to(latents.device, torch.float32).repeat(len(c.text_tokens) // len(timestep))
        else:
            time = torch.full((), timestep, dtype=torch.float32, device=latents.device)
        return run(latents, time, *residuals)

    return predict


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, tuple) and not value)


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
