"""Schedulers under the reference's names: each is its fields, its rounding and its sampler.

Source: diffusers' schedulers/scheduling_euler_discrete.py and scheduling_dpmsolver_multistep.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kolors_core.sampling import Sampler, dpmpp_2m, euler
from kolors_core.schedule import SCHEDULERS, Schedule, Scheduler, one_of
from kolors_core.validation import check_int


@dataclass(frozen=True, kw_only=True)
class EulerDiscreteScheduler(Scheduler):
    """Scheduler of Euler's method (Karras et al., algorithm 1 without churn), Kolors' published default."""

    def _spaced(self, steps: int) -> np.ndarray:
        total = self.num_train_timesteps
        if self.timestep_spacing == "linspace":
            return np.linspace(0, total - 1, steps, dtype=np.float32)[::-1]
        if self.timestep_spacing == "leading":
            return self._leading(total // steps, 0, steps)
        return self._trailing(steps)

    def _karras_range(self, run: list[float], table: Tensor) -> tuple[float, float]:
        return run[-1], run[0]

    def _finish(self, sigmas: np.ndarray, timesteps: list[float], table: Tensor) -> Schedule:
        start = float(sigmas[0])
        scale = math.sqrt(start**2 + 1) if self.timestep_spacing == "leading" else start
        rounded = torch.tensor(timesteps, dtype=torch.float32, device="cpu").double()
        return Schedule(torch.from_numpy(sigmas).double(), rounded, scale, table, whole_timesteps=False)

    def sampler(self, schedule: Schedule, noise: Callable[[], Tensor]) -> Sampler:
        """Return `euler`."""
        return euler


@dataclass(frozen=True, kw_only=True)
class DPMSolverMultistepScheduler(Scheduler):
    """Scheduler of DPM-Solver++ (https://arxiv.org/abs/2211.01095); `sde-dpmsolver++` is its SDE form."""

    algorithm_type: str = "dpmsolver++"
    solver_order: int = 2
    lower_order_final: bool = True
    euler_at_final: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("algorithm_type", self.algorithm_type, ("dpmsolver++", "sde-dpmsolver++"))
        check_int("solver_order", self.solver_order, most=2)
        one_of("lower_order_final", self.lower_order_final, (False, True))
        one_of("euler_at_final", self.euler_at_final, (False, True))

    def latent_scale(self, sigma: float) -> float:
        """Return sqrt(sigma^2 + 1): the reference keeps latents of variance 1."""
        return math.sqrt(sigma**2 + 1)

    def _spaced(self, steps: int) -> np.ndarray:
        total = self.num_train_timesteps
        if self.timestep_spacing == "linspace":
            return np.linspace(0, total - 1, steps + 1).round()[:0:-1]
        if self.timestep_spacing == "leading":
            return self._leading(total // (steps + 1), 1, steps)
        return self._trailing(steps)

    def _karras_range(self, run: list[float], table: Tensor) -> tuple[float, float]:
        return table[0].item(), table[-1].item()

    def _finish(self, sigmas: np.ndarray, timesteps: list[float], table: Tensor) -> Schedule:
        whole = torch.tensor(timesteps, dtype=torch.float64, device="cpu").round()
        last = self.euler_at_final or (self.lower_order_final and len(whole) < 15)
        sigmas64, scale = torch.from_numpy(sigmas).double(), self.latent_scale(float(sigmas[0]))
        return Schedule(sigmas64, whole, scale, table, whole_timesteps=True, first_order_last=last)

    def sampler(self, schedule: Schedule, noise: Callable[[], Tensor]) -> Sampler:
        """Return `dpmpp_2m` with this scheduler's fields."""
        return partial(
            dpmpp_2m, noise=noise if self.algorithm_type == "sde-dpmsolver++" else None,
            order=self.solver_order, first_order_last=schedule.first_order_last
        )  # fmt: skip


SCHEDULERS.update({kind.__name__: kind for kind in (EulerDiscreteScheduler, DPMSolverMultistepScheduler)})
