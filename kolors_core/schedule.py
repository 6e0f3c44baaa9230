"""Schedules, the numbers of one run, and the interface of schedulers, which compute them.

A scheduler is a frozen config; `scheduler.schedule(25)` computes the tensors of one run. `sigma` is the
standard deviation of the noise added to a clean image of variance 1 (Karras et al.,
https://arxiv.org/abs/2206.00364): x = image + sigma * noise. Classes are in schedulers.py and solvers.py.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor

from kolors_core.notebook import schedule_html
from kolors_core.scheduler_config import SchedulerFields
from kolors_core.sigmas import sigma_to_timestep
from kolors_core.targets import Epsilon, Target, target_of
from kolors_core.validation import check_fraction, short_repr


@dataclass(frozen=True)
class Schedule:
    """Schedule of one run of n steps."""

    sigmas: Tensor  # float64 [n + 1], descending; the run ends at the last, usually 0
    timesteps: Tensor  # float64 [n], the UNet's input at each sigma
    init_noise_sigma: float  # factor on the initial standard normal noise
    training_sigmas: Tensor  # float32 [T], one for each training timestep
    whole_timesteps: bool  # whether the UNet gets rounded ones
    orders: tuple[int, ...] = ()  # [n], the highest order of each step, for samplers that have several
    target: Target = Epsilon()  # what the model predicts
    _repr_html_ = schedule_html  # in notebooks

    def timestep(self, sigma: float) -> float:
        """Return the timestep of a sigma: the step's if it is one of the run's, else interpolated."""
        for known, timestep in zip(self.sigmas.tolist(), self.timesteps.tolist(), strict=False):
            if known == sigma:
                return timestep
        interpolated = sigma_to_timestep(sigma, self.training_sigmas)
        return float(round(interpolated)) if self.whole_timesteps else interpolated

    def before(self, fraction: float) -> Self:
        """Keep the steps in the first `fraction` of the T training timesteps (`denoising_end`)."""
        if check_fraction("denoising_end", fraction) == 1:
            return self
        if (steps := int((self.timesteps >= self._cutoff_timestep(fraction)).sum())) == 0:
            raise ValueError(f"denoising_end {fraction} leaves none of the {len(self.timesteps)} steps")
        kept = {"sigmas": self.sigmas[: steps + 1], "timesteps": self.timesteps[:steps]}
        return replace(self, **kept, orders=self.orders[:steps])

    def after(self, fraction: float) -> Self:
        """Keep the steps that `before` with the same fraction drops (`denoising_start`)."""
        cutoff = self._cutoff_timestep(check_fraction("denoising_start", fraction))
        if (steps := int((self.timesteps < cutoff).sum())) == 0:
            raise ValueError(f"denoising_start {fraction} leaves none of the {len(self.timesteps)} steps")
        return self.keep_last(steps)

    def last_steps(self, strength: float) -> Self:
        """Keep the last int(n * strength) of n steps, for an image noised with this strength."""
        if (steps := int((total := len(self.timesteps)) * check_fraction("strength", strength))) == 0:
            raise ValueError(f"strength times steps must be at least 1, got {strength} times {total}")
        return self.keep_last(steps)

    def keep_last(self, steps: int) -> Self:
        """Keep the last steps; pure noise before them is what the model's input scales to variance 1."""
        if steps == len(self.timesteps):
            return self
        kept = {"sigmas": self.sigmas[-steps - 1 :], "timesteps": self.timesteps[-steps:]}
        scale = self.target.scale(kept["sigmas"][0].item())
        return replace(self, **kept, orders=self.orders[-steps:], init_noise_sigma=scale)

    def _cutoff_timestep(self, fraction: float) -> int:
        return round((total := len(self.training_sigmas)) - fraction * total)


@dataclass(frozen=True, kw_only=True)
class Scheduler(SchedulerFields, ABC):
    """Scheduler: fields (scheduler_config.py) that the schedule and the sampler of a run depend on."""

    takes_eta: ClassVar[bool] = False  # whether `sampler` takes DDIM's eta, as the reference's step does
    prediction_type = "epsilon"  # a field of the classes that declare it so

    @property
    def target(self) -> Target:
        """Conversion of the model's output, see targets.py."""
        return target_of(self.prediction_type)

    @abstractmethod
    def schedule(
        self, steps: int | None = None, *, timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None
    ) -> Schedule:  # fmt: skip
        """Compute the schedule of a run of `steps` steps, or of given `timesteps` (n) or `sigmas` (n + 1).

        ValueError unless exactly one is given and the numbers are strictly descending.
        """

    @abstractmethod
    def training_sigmas(self) -> Tensor:
        """Compute the sigma of each training timestep: float32 [T], ascending."""

    @abstractmethod
    def sampler(self, schedule: Schedule, noise: Callable[[], Tensor]) -> Callable[..., Tensor]:
        """Return the sampler of a run: (denoise, x, sigmas, on_step) -> x. noise: draws noise like x."""

    def latent_scale(self, sigma: float) -> float:
        """Return the ratio of x to the latents that the reference keeps between steps."""
        return 1.0

    def evaluations(self, schedule: Schedule) -> int:
        """Count the UNet's evaluations of a run."""
        return len(schedule.timesteps)


def check_one_given(steps: Any, timesteps: Any, sigmas: Any) -> None:
    """Raise ValueError unless exactly one is given."""
    if sum(given is not None for given in (steps, timesteps, sigmas)) != 1:
        raise ValueError("give exactly one of steps, timesteps and sigmas")


def check_sigmas(sigmas: Sequence[float]) -> np.ndarray:
    """Convert a run's sigmas to float32 [n + 1]; ValueError unless they are at least two and descending."""
    given = check_descending("sigmas", sigmas, 0.0, math.inf)
    if len(given) < 2:
        raise ValueError(f"sigmas must be at least two, of which the last ends the run, got {given}")
    return np.array(given, np.float32)


def check_descending(name: str, values: Sequence[float], least: float, most: float) -> list[float]:
    """Convert numbers to floats; ValueError naming them unless they are strictly descending and in range."""
    try:
        numbers = [float(value) for value in values if not isinstance(value, str | bool)]
        if len(numbers) < len(values):
            raise TypeError("a string or a bool among them")
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a list of numbers, got {short_repr(values)}") from None
    is_descending = all(a > b for a, b in pairwise(numbers))
    if not numbers or not is_descending or not least <= numbers[-1] <= numbers[0] <= most:
        raise ValueError(f"{name} must fall strictly, within {least} to {most}, got {numbers}")
    return numbers
