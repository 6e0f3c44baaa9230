"""Denoising loop of one call, with a step callback that sees and changes tensors between steps.

The protocol is the reference's: `callback(pipe, i, timestep, tensors) -> tensors`, `pipe._guidance_scale` and
`pipe._interrupt`. Source: the denoising loop of diffusers' pipelines/kolors/pipeline_kolors.py.
Shapes: B images; under guidance the tensors that are not negative have 2B rows, negatives first.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kolors_core.conditioning import Conditioning
from kolors_core.devices import check_finite
from kolors_core.guidance import GuidanceRule
from kolors_core.pipelines.base import Components
from kolors_core.pipelines.runs import Run
from kolors_core.sampling import Denoiser, Sampler
from kolors_core.schedule import Schedule
from kolors_core.validation import check_float, check_int

# The reference's names of a `Conditioning`'s fields: of both halves, and of the negative half alone.
FIELDS = ("text_tokens", "pooled_text", "size_ids")
POSITIVE_TENSORS = ("prompt_embeds", "add_text_embeds", "add_time_ids")
NEGATIVE_TENSORS = ("negative_prompt_embeds", "negative_pooled_prompt_embeds", "negative_add_time_ids")
TENSOR_NAMES = ("latents", *POSITIVE_TENSORS, *NEGATIVE_TENSORS)
RETURNED = "callback_on_step_end returned"

StepCallback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]


class _Interrupted(Exception):
    """Carries the latents out of a sampler."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class DenoisingLoop:
    """Sampling loop of one call, under conditions that the callback may change."""

    def __init__(
        self, pipe: Components, run: Run, schedule: Schedule, positive: Conditioning,
        negative: Conditioning | None, *, rule: GuidanceRule, scale: float, callback: StepCallback | None,
        names: Sequence[str], progress: Callable[[], Any],
    ) -> None:  # fmt: skip
        """run: state that the callback may set. negative: None without guidance. rule, scale: of guidance.
        names: of `TENSOR_NAMES`. progress: called after each step. TypeError for a callback of another type.
        """
        if callback is not None and not callable(callback):
            raise TypeError(f"callback_on_step_end must be a function, got {type(callback).__name__}")
        self.pipe, self.run, self.schedule, self.rule = pipe, run, schedule, rule
        self.callback, self.names, self.progress = callback, names, progress
        self.batch = len(positive.text_tokens)
        run.guidance_scale, run.num_timesteps = scale, len(schedule.timesteps)
        both = positive if negative is None else Conditioning.cat(negative, positive)
        self.tensors: dict[str, Any] = {}
        for name, of_negative, field in zip(POSITIVE_TENSORS, NEGATIVE_TENSORS, FIELDS, strict=True):
            self.tensors |= {name: getattr(both, field), of_negative: getattr(negative, field, None)}
        self.halves = (positive, positive if negative is None else negative)
        self.finite: list[Tensor] = []  # whether all latents were, after each step
        self.counts = both.text_counts  # until the callback brings tokens of its own
        self.denoise = self._guided(positive, negative)

    def _guided(self, positive: Conditioning, negative: Conditioning | None) -> Denoiser:
        return self.rule(
            self.pipe.unet, self.schedule, positive, negative, self.run.guidance_scale,
            precompute=self.pipe.savings.precompute, wrap_step=self.pipe._step_wrapper(),
        )  # fmt: skip

    def __call__(self, sampler: Sampler, x: Tensor) -> Tensor:
        """Run the sampler from x; returns the latents as the reference has them at the last sigma.

        FloatingPointError names the first step that was not finite, at the end: asking earlier stalls a GPU.
        """
        denoise = self.denoise if self.callback is None else lambda x, sigma: self.denoise(x, sigma)
        try:
            x = sampler(denoise, x, self.schedule.sigmas, self.on_step)
            x = x / self._scale(len(self.schedule.timesteps))
        except _Interrupted as stopped:
            x = stopped.x
        return check_finite(x, self._first_nonfinite_step, self.pipe.dtype)

    def _first_nonfinite_step(self) -> str:
        first = next((i for i, is_finite in enumerate(self.finite, 1) if not is_finite), len(self.finite))
        return f"the latents after step {first} of {len(self.finite)}"

    def on_step(self, i: int, x: Tensor) -> Tensor:
        """Update the progress bar, call the callback, and stop if the call was interrupted, after step i."""
        self.progress()
        self.finite.append(torch.isfinite(x).all())
        if self.callback is not None:
            x = self._apply_callback(self.callback, i, x)
        if self.run.is_interrupted:
            raise _Interrupted(x / self._scale(i + 1))
        return x

    def _apply_callback(self, callback: StepCallback, i: int, x: Tensor) -> Tensor:
        latents, scale = (x / self._scale(i + 1)).to(self.pipe.dtype), self.run.guidance_scale
        seen = {name: latents if name == "latents" else self.tensors[name] for name in self.names}
        answer = callback(self.pipe, i, self.schedule.timesteps[i], seen)
        if not isinstance(answer, dict):
            got = type(answer).__name__
            raise TypeError(f"callback_on_step_end must return a dict of tensors, got {got}")
        returned, before = dict(answer), self.tensors
        for name, value in returned.items():
            if not isinstance(value, Tensor) and value is not before.get(name):
                raise TypeError(f"{RETURNED} {name} as {type(value).__name__}, expected a tensor")
        if unknown := sorted(returned.keys() - set(TENSOR_NAMES)):
            raise ValueError(f"{RETURNED} {unknown[0]!r}; expected some of {', '.join(TENSOR_NAMES)}")
        if (after := returned.pop("latents", None)) is not None:
            if after.shape != x.shape:
                raise ValueError(f"{RETURNED} latents {list(after.shape)}, expected {list(x.shape)}")
            x = after.to(x) * self._scale(i + 1)
        changed = {name for name in POSITIVE_TENSORS if returned.get(name, before[name]) is not before[name]}
        for name in changed:
            new, old = returned[name], before[name]
            fits = new.ndim == old.ndim and new.shape[-1] == old.shape[-1]
            if not fits or not new.is_floating_point():
                wanted = "floats [" + "any, " * (old.ndim - 1) + f"{old.shape[-1]}]"
                raise ValueError(f"{RETURNED} {name} {list(new.shape)} of {new.dtype}, expected {wanted}")
        self.tensors = before | returned
        if "prompt_embeds" in changed and self.counts is not None:
            rows, length = returned["prompt_embeds"].shape[:2]
            is_same = "prompt_embeds" in self.names and length == self.counts.shape[1]
            self.counts = self.counts[-rows:] if is_same else None  # of ragged prompts, which it has seen
        if changed or scale != self.run.guidance_scale:
            self.denoise = self._guided(*self._conditions())
        return x

    def _scale(self, step: int) -> float:
        """Return x divided by the latents that the reference has before step `step`."""
        return self.pipe.scheduler.latent_scale(self.schedule.sigmas[step].item())

    def _conditions(self) -> tuple[Conditioning, Conditioning | None]:
        """Build the conditions from the tensors; once guidance has ended, the positive rows are enough."""
        is_guided = self.run.guidance_scale > 1
        allowed = (2 * self.batch,) if is_guided else (self.batch, 2 * self.batch)
        for name in POSITIVE_TENSORS:
            if (rows := len(self.tensors[name])) not in allowed:
                wanted = f"{' or '.join(map(str, allowed))} for {self.batch} images"
                raise ValueError(f"{RETURNED} {name} of {rows} rows, expected {wanted}")

        def updated(half: Conditioning, rows: slice) -> Conditioning:
            counts = None if self.counts is None else self.counts[rows]
            tensors = (self.tensors[name][rows] for name in POSITIVE_TENSORS)
            return replace(half, **dict(zip(FIELDS, tensors, strict=True)), text_counts=counts)

        positive, negative = self.halves
        last, first = slice(-self.batch, None), slice(None, self.batch)
        return updated(positive, last), updated(negative, first) if is_guided else None


class SDXLCFGCutoffCallback:
    """End guidance after a step, or after a part of the steps. The reference's fails for two images."""

    tensor_inputs = POSITIVE_TENSORS

    def __init__(self, cutoff_step_ratio: float | None = 0.8, cutoff_step_index: int | None = None) -> None:
        if cutoff_step_index is None:
            cutoff_step_ratio = check_float("cutoff_step_ratio", cutoff_step_ratio, 0, 1)
        else:
            check_int("cutoff_step_index", cutoff_step_index, least=0)
        self.ratio, self.index = cutoff_step_ratio, cutoff_step_index

    def __call__(self, pipe: Any, i: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        """End guidance if step i is the last one with it."""
        last = self.index if self.index is not None else int(pipe.num_timesteps * (self.ratio or 0.0))
        if i == last and pipe.guidance_scale > 1:
            pipe._guidance_scale = 0.0
            return {name: torch.chunk(tensor, 2)[1] for name, tensor in tensors.items()}
        return tensors
