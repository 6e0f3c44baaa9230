"""Schedulers of diffusion: betas -> training sigmas -> the sigmas and timesteps of a run.

The training sigmas are computed in float32 and the arithmetic on them in float64, as in the reference, so
that all numbers are equal to the last bit. Classes differ in a few attributes and methods; see schedulers.py.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kolors_core.schedule import Schedule, Scheduler, check_descending, check_one_given, check_sigmas
from kolors_core.scheduler_config import check_betas
from kolors_core.sigmas import (
    LAST_ALPHA,
    beta,
    betas_of,
    exponential,
    flow_times,
    karras,
    lu,
    rescale_to_zero_snr,
    sigma_to_timestep,
    time_to_sigma,
)
from kolors_core.validation import check_float, check_int, is_real, short_repr

# Fields, of which a scheduler has at most one set, that give the sigmas instead of timesteps.
FAMILIES: dict[str, Callable[[float, float, int], np.ndarray] | None] = {
    "use_karras_sigmas": karras, "use_exponential_sigmas": exponential, "use_beta_sigmas": beta,
    "use_lu_lambdas": lu, "use_flow_sigmas": None,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DiffusionScheduler(Scheduler):
    """Scheduler of a diffusion process with betas; the defaults are the released Kolors'.

    At rescale_betas_zero_snr the last sigma is 4096 instead of infinite, in every class, as in the
    reference's Euler: 1/4096 of the image is left there, of which the model has seen none in training.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.014
    beta_schedule: str = "scaled_linear"
    trained_betas: Sequence[float] | None = None
    prediction_type: str = "epsilon"

    # Fields only of the classes that declare them so.
    timestep_spacing = "leading"
    steps_offset = 1
    use_karras_sigmas = use_exponential_sigmas = use_beta_sigmas = use_lu_lambdas = use_flow_sigmas = False
    flow_shift = 1.0
    rescale_betas_zero_snr = False
    final_sigmas_type = "zero"
    lambda_min_clipped = -math.inf

    # What else differs: whole timesteps, with latents of variance 1, or fractions in float32 or float64;
    # whether the last of n + 1 spaced timesteps is left out; which families may be set together.
    whole_timesteps: ClassVar[bool] = False
    float64_timesteps: ClassVar[bool] = False
    linspace_precision: ClassVar[type] = np.float32
    skips_last: ClassVar[bool] = False
    pair: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[dict[str, Any]] = {
        "beta_schedule": ("scaled_linear", "linear", "squaredcos_cap_v2"),
        "prediction_type": ("epsilon", "v_prediction", "sample"),
        "timestep_spacing": ("leading", "linspace", "trailing"), "final_sigmas_type": ("zero", "sigma_min"),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("steps_offset", self.steps_offset, least=0, most=self.num_train_timesteps - 1)
        betas = (self.beta_start, self.beta_end)
        if not all(isinstance(beta, float) for beta in betas) or not 0 < betas[0] <= betas[1] < 1:
            raise ValueError(f"0 < beta_start <= beta_end < 1 does not hold for {betas[0]!r}, {betas[1]!r}")
        if self.trained_betas is not None:
            object.__setattr__(
                self, "trained_betas", check_betas(self.trained_betas, self.num_train_timesteps)
            )
        if len(chosen := self._families()) > 1 and chosen != self.pair:
            raise ValueError(f"only one of {' and '.join(chosen)} can be set")
        if self.use_flow_sigmas and self.prediction_type != "flow_prediction":
            expected = "use_flow_sigmas needs prediction_type 'flow_prediction'"
            raise ValueError(f"{expected}, got {self.prediction_type!r}")
        check_float("flow_shift", self.flow_shift, least=1e-10)
        if not is_real(clipped := self.lambda_min_clipped) or not clipped < math.inf:
            raise ValueError(f"lambda_min_clipped must be a number, got {short_repr(clipped)}")

    def training_betas(self) -> Tensor:
        """Compute the variance that each training timestep adds: float32 [T]."""
        if self.trained_betas is None:
            betas = betas_of(self.beta_schedule, self.beta_start, self.beta_end, self.num_train_timesteps)
        else:
            betas = torch.tensor(self.trained_betas, dtype=torch.float32, device="cpu")
        return rescale_to_zero_snr(betas) if self.rescale_betas_zero_snr else betas

    def training_sigmas(self) -> Tensor:
        """Compute sqrt((1 - a) / a), a = cumprod(1 - beta), of each training timestep: float32 [T]."""
        alphas = torch.cumprod(1.0 - self.training_betas(), dim=0)
        if self.rescale_betas_zero_snr:
            alphas[-1] = LAST_ALPHA
        return ((1 - alphas) / alphas) ** 0.5

    def schedule(
        self, steps: int | None = None, *, timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None
    ) -> Schedule:  # fmt: skip
        """Compute the schedule of a run of `steps` steps, or of given `timesteps` (n) or `sigmas` (n + 1).

        ValueError unless exactly one is given and the numbers are strictly descending.
        """
        check_one_given(steps, timesteps, sigmas)
        table, families = self.training_sigmas(), self._families()
        if sigmas is not None:
            given = check_sigmas(sigmas)
            times = np.array(self._timesteps_of(given[:-1], table))
            return self._finish(given, times.round() if self.whole_timesteps else times, table)
        if timesteps is not None:
            if families:
                raise ValueError(f"timesteps cannot be given with {families[0]}, which sets its own")
            times = np.array(check_descending("timesteps", timesteps, 0.0, self.num_train_timesteps - 1))
            times = np.trunc(times) if self.whole_timesteps else times
        else:
            most = self.num_train_timesteps - 1
            times = self._spaced(steps := check_int("the number of steps", steps, most=most))
        run = np.interp(times, np.arange(len(table)), table.numpy())
        if families and steps is not None:
            run, times = self._convert(families[0], run, steps, table)
        ends = np.array([*run, self._end(run, times, table)], np.float32)
        if self.use_flow_sigmas:
            ends = time_to_sigma(torch.from_numpy(ends)).numpy()
        elif self.prediction_type == "flow_prediction":
            times = self._timesteps_of(ends[:-1], table)
        return self._finish(ends, times, table)

    def latent_scale(self, sigma: float) -> float:
        """Return the ratio of x to the latents that the reference keeps between steps.

        They are x; or have variance 1, sqrt(sigma^2 + 1); or are those of a rectified flow, sigma + 1.
        """
        if self.use_flow_sigmas:
            return sigma + 1
        return math.sqrt(sigma**2 + 1) if self.whole_timesteps else 1.0

    def _families(self) -> tuple[str, ...]:
        """Return the fields of FAMILIES that are set."""
        return tuple(name for name in FAMILIES if getattr(self, name))

    def _spaced(self, steps: int) -> np.ndarray:
        """Compute timesteps by `timestep_spacing`, descending: [n], n = steps unless some are clipped.

        Trailing steps back from the end by equal parts; numpy's range is cut to `steps`, unlike the
        reference's, which goes one too far for some.
        """
        total, parts = self.num_train_timesteps, steps + self.skips_last
        last = total
        if self.lambda_min_clipped > -math.inf:
            last -= int((-self.training_sigmas().log() < self.lambda_min_clipped).sum())
        if self.timestep_spacing == "trailing":
            return np.arange(last, 0, -total / steps)[:steps].round() - 1
        if self.timestep_spacing == "leading":
            times = np.arange(parts)[::-1][:steps] * (last // parts) + self.steps_offset
            return times.clip(max=total - 1).astype(np.float64)
        times = np.linspace(0, last - 1, parts)[::-1][:steps]
        if self.whole_timesteps:
            return times.round()
        return times.astype(self.linspace_precision)

    def _convert(
        self, family: str, run: np.ndarray, steps: int, table: Tensor
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """Compute a family's sigmas (times of the flow for flow sigmas) and timesteps: [steps] each."""
        if (spaced := FAMILIES[family]) is None:
            times = self._flow_times(steps)
            return times, times * self.num_train_timesteps
        sigmas = spaced(*self._range(run, table), steps)
        times = np.array([sigma_to_timestep(sigma, table) for sigma in sigmas])
        return sigmas, times.round() if self._rounds(family) else times

    def _flow_times(self, steps: int) -> np.ndarray:
        return flow_times(self.num_train_timesteps, steps, self.flow_shift)

    def _range(self, run: np.ndarray, table: Tensor) -> tuple[float, float]:
        """Return a family's smallest and largest sigma; run: the sigmas of the spaced timesteps."""
        return (table[0].item(), table[-1].item()) if self.skips_last else (run[-1].item(), run[0].item())

    def _rounds(self, family: str) -> bool:
        """Return whether a family's timesteps are rounded; those of whole timesteps are else cut."""
        return self.skips_last and family in ("use_karras_sigmas", "use_lu_lambdas")

    def _end(self, run: np.ndarray, times: np.ndarray, table: Tensor) -> float:
        """Return the sigma that the run ends at; run, times: of its steps."""
        return table[0].item() if self.final_sigmas_type == "sigma_min" else 0.0

    def _orders(self, steps: int) -> tuple[int, ...]:
        """Return the highest order of each step, for samplers that have several."""
        return ()

    def _timesteps_of(self, sigmas: np.ndarray, table: Tensor) -> list[float]:
        """Compute the timesteps that the model has for sigmas of x."""
        if self.prediction_type == "flow_prediction":
            return (self.num_train_timesteps * sigmas / (1 + sigmas)).tolist()
        return [sigma_to_timestep(sigma, table) for sigma in sigmas]

    def _finish(self, sigmas: np.ndarray, timesteps: Sequence[float] | np.ndarray, table: Tensor) -> Schedule:
        """Make the schedule of sigmas [n + 1] and timesteps (n), rounded as the reference does."""
        times, first = torch.from_numpy(np.array(timesteps, np.float64)), float(sigmas[0])
        if self.whole_timesteps:
            times, scale = times.trunc(), self.latent_scale(first)
        else:
            times = times if self.float64_timesteps else times.float().double()
            raised = (torch.tensor(first, dtype=torch.float32, device="cpu") ** 2 + 1) ** 0.5
            scale = raised.item() if self.timestep_spacing == "leading" else first
        return Schedule(
            torch.from_numpy(sigmas).double(), times, scale, table, self.whole_timesteps,
            self._orders(len(times)), self.target
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SpacedScheduler(DiffusionScheduler):
    """Scheduler whose timesteps are spaced evenly over those of the training."""

    timestep_spacing: str = "leading"
    steps_offset: int = 1


@dataclass(frozen=True, kw_only=True)
class SigmaScheduler(SpacedScheduler):
    """Scheduler that can take its sigmas from a family, and its timesteps from the sigmas."""

    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
