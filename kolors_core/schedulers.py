"""Schedulers under the reference's names: each is its fields, its rounding and its sampler.

Fields are those of the class of the same name in diffusers' schedulers, whose file each names; the defaults
are the released Kolors'. `fixed` has those that are taken at one value only. More classes are in solvers.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kolors_core.diffusion import DiffusionScheduler, SigmaScheduler, SpacedScheduler
from kolors_core.sampling import Noise, Sampler, dpm_multistep, euler
from kolors_core.sampling_deterministic import dpm2, heun, lms, plms
from kolors_core.sampling_distilled import boundary_scalings, lcm, lower_sigma, tcd
from kolors_core.sampling_stochastic import ancestral, dpmpp_sde
from kolors_core.schedule import Schedule, Scheduler, check_descending, check_one_given, check_sigmas
from kolors_core.scheduler_config import CLIPPING, KNOWN, NO, SHIFTING, THRESHOLDING, check_limits, limited
from kolors_core.sigmas import beta, exponential, karras, shift_time, time_to_sigma
from kolors_core.solvers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    UniPCMultistepScheduler,
)
from kolors_core.validation import check_float, check_int


@dataclass(frozen=True, kw_only=True)
class DDIMScheduler(SpacedScheduler):
    """Scheduler of DDIM (https://arxiv.org/abs/2010.02502), Euler's method at eta 0; scheduling_ddim.py.

    A step ends at the next step's timestep. The reference's ends num_train_timesteps // n below its own,
    which is the same for leading spacing, but misses the next one by some timesteps for the others.
    """

    set_alpha_to_one: bool = False
    rescale_betas_zero_snr: bool = False

    takes_eta = True
    whole_timesteps = True
    fixed = CLIPPING | THRESHOLDING

    def _end(self, run: np.ndarray, times: np.ndarray, table: Tensor) -> float:
        return _end_of_last(self.set_alpha_to_one, times, table)

    def sampler(self, schedule: Schedule, noise: Noise, eta: float = 0.0) -> Sampler:
        """Return `euler`, or `ancestral` for an eta above 0; 1 has DDPM's noise."""
        return partial(ancestral, noise=noise, eta=eta) if check_float("eta", eta, 0) else euler


@dataclass(frozen=True, kw_only=True)
class DDPMScheduler(SpacedScheduler):
    """Scheduler of DDPM (https://arxiv.org/abs/2006.11239), ancestral sampling; scheduling_ddpm.py.

    variance_type: of the noise, given the clean image (fixed_small) or not (fixed_large, beta).
    """

    variance_type: str = "fixed_small"
    rescale_betas_zero_snr: bool = False

    whole_timesteps = True
    fixed = CLIPPING | THRESHOLDING
    same: ClassVar = {"variance_type": {"fixed_small_log": "fixed_small", None: "fixed_small"}}
    choices: ClassVar = DiffusionScheduler.choices | {
        "variance_type": ("fixed_small", "fixed_large"),
        "beta_schedule": ("scaled_linear", "linear", "squaredcos_cap_v2", "laplace", "sigmoid"),
    }

    def sampler(self, schedule: Schedule, noise: Noise) -> Sampler:
        """Return `ancestral`, which draws noise for the last step unless its timestep is 0."""
        draws, is_large = schedule.timesteps[-1].item() > 0, self.variance_type == "fixed_large"
        return partial(ancestral, noise=noise, draw_last=draws, fixed_large=is_large)


@dataclass(frozen=True, kw_only=True)
class PNDMScheduler(SpacedScheduler):
    """Scheduler of PNDM without Runge-Kutta steps (https://arxiv.org/abs/2202.09778); scheduling_pndm.py.

    The first step evaluates the UNet twice. Steps end as those of DDIMScheduler.
    """

    set_alpha_to_one: bool = False

    whole_timesteps = True
    choices: ClassVar = DiffusionScheduler.choices | {"prediction_type": ("epsilon", "v_prediction")}
    fixed: ClassVar = {"skip_prk_steps": (True,)}

    def _end(self, run: np.ndarray, times: np.ndarray, table: Tensor) -> float:
        return _end_of_last(self.set_alpha_to_one, times, table)

    def sampler(self, schedule: Schedule, noise: Noise) -> Sampler:
        """Return `plms`."""
        return plms

    def evaluations(self, schedule: Schedule) -> int:
        """Count the UNet's evaluations of a run: one a step, and one more in the first of several."""
        steps = len(schedule.timesteps)
        return steps + (steps > 1)


def _end_of_last(set_alpha_to_one: bool, times: np.ndarray, table: Tensor) -> float:
    """Return the sigma total // n below the last timestep; where that is negative, of timestep 0, or 0."""
    if (end := int(times[-1]) - len(table) // len(times)) >= 0:
        return table[end].item()
    return 0.0 if set_alpha_to_one else table[0].item()


@dataclass(frozen=True, kw_only=True)
class LMSDiscreteScheduler(SigmaScheduler):
    """Scheduler of the linear multistep method of order 4; scheduling_lms_discrete.py."""

    def sampler(self, schedule: Schedule, noise: Noise) -> Sampler:
        """Return `lms`."""
        return lms


@dataclass(frozen=True, kw_only=True)
class EulerDiscreteScheduler(SigmaScheduler):
    """Scheduler of Euler's method (Karras et al., algorithm 1 without churn), Kolors' published default.

    sigma_min, sigma_max: ends of a family of sigmas, instead of those of the timesteps.
    Source: scheduling_euler_discrete.py.
    """

    sigma_min: float | None = None
    sigma_max: float | None = None
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: str = "zero"

    fixed: ClassVar = {"interpolation_type": ("linear",), "timestep_type": ("discrete",)}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits(self.sigma_min, self.sigma_max)

    def _range(self, run: np.ndarray, table: Tensor) -> tuple[float, float]:
        return limited(super()._range(run, table), self.sigma_min, self.sigma_max)

    def sampler(self, schedule: Schedule, noise: Noise) -> Sampler:
        """Return `euler`."""
        return euler


@dataclass(frozen=True, kw_only=True)
class TwoEvaluations(SigmaScheduler):
    """Scheduler whose steps take two evaluations of the UNet, but for one in a step to 0."""

    def evaluations(self, schedule: Schedule) -> int:
        """Count the UNet's evaluations of a run."""
        return len(schedule.timesteps) + int((schedule.sigmas[1:] > 0).sum())


@dataclass(frozen=True, kw_only=True)
class HeunDiscreteScheduler(TwoEvaluations):
    """Scheduler of Heun's method (Karras et al., algorithm 1); scheduling_heun_discrete.py."""

    choices: ClassVar = DiffusionScheduler.choices | {
        "beta_schedule": ("scaled_linear", "linear", "squaredcos_cap_v2", "exp")
    }
    fixed = CLIPPING

    def sampler(self, schedule: Schedule, noise: Noise) -> Sampler:
        """Return `heun`."""
        return heun


@dataclass(frozen=True, kw_only=True)
class EulerAncestralDiscreteScheduler(SpacedScheduler):
    """Scheduler of Euler's method with noise in each step; scheduling_euler_ancestral_discrete.py."""

    rescale_betas_zero_snr: bool = False

    def sampler(self, schedule: Schedule, noise: Noise) -> Sampler:
        """Return `ancestral`."""
        return partial(ancestral, noise=noise)


@dataclass(frozen=True, kw_only=True)
class KDPM2DiscreteScheduler(TwoEvaluations):
    """Scheduler of DPM-Solver-2 in sigmas (Karras et al., algorithm 2); scheduling_k_dpm_2_discrete.py."""

    float64_timesteps = True

    def _rounds(self, family: str) -> bool:
        return family == "use_karras_sigmas"

    def sampler(self, schedule: Schedule, noise: Noise) -> Sampler:
        """Return `dpm2`."""
        return dpm2


@dataclass(frozen=True, kw_only=True)
class KDPM2AncestralDiscreteScheduler(KDPM2DiscreteScheduler):
    """Scheduler of DPM-Solver-2 with noise in each step; scheduling_k_dpm_2_ancestral_discrete.py."""

    def sampler(self, schedule: Schedule, noise: Noise) -> Sampler:
        """Return `ancestral` with `dpm2`."""
        return partial(ancestral, noise=noise, sampler=dpm2, draw_last=False)


@dataclass(frozen=True, kw_only=True)
class DPMSolverSDEScheduler(TwoEvaluations):
    """Scheduler of DPM-Solver++(2S) with noise in each step; scheduling_dpmsolver_sde.py.

    The reference draws from a Brownian tree with a seed of its own, so that its images are others.
    """

    float64_timesteps = True
    linspace_precision = np.float64
    fixed: ClassVar = {"noise_sampler_seed": (None,)}

    def sampler(self, schedule: Schedule, noise: Noise) -> Sampler:
        """Return `dpmpp_sde`."""
        return partial(dpmpp_sde, noise=noise)


@dataclass(frozen=True, kw_only=True)
class LCMScheduler(DiffusionScheduler):
    """Scheduler of latent consistency models (https://arxiv.org/abs/2310.04378); scheduling_lcm.py.

    The timesteps are some of `original_inference_steps` evenly spaced ones. timestep_scaling: see
    `boundary_scalings`.
    """

    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    rescale_betas_zero_snr: bool = False

    whole_timesteps = True
    fixed = CLIPPING | THRESHOLDING | {
        "set_alpha_to_one": (False, ...), "steps_offset": (1, ...), "timestep_spacing": ("leading", ...),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.num_train_timesteps
        check_int("original_inference_steps", self.original_inference_steps, most=most)
        check_float("timestep_scaling", self.timestep_scaling, least=0)

    def _spaced(self, steps: int) -> np.ndarray:
        return _distilled_timesteps(steps, self.original_inference_steps, self.num_train_timesteps)

    def sampler(self, schedule: Schedule, noise: Noise) -> Sampler:
        """Return `lcm`."""
        scaling = self.timestep_scaling
        return partial(
            lcm, noise=noise, scalings=lambda sigma: boundary_scalings(schedule.timestep(sigma), scaling)
        )


@dataclass(frozen=True, kw_only=True)
class TCDScheduler(DiffusionScheduler):
    """Scheduler of trajectory consistency (https://arxiv.org/abs/2402.19159); scheduling_tcd.py.

    The timesteps are those of LCMScheduler; the run ends at timestep 0's sigma.
    """

    original_inference_steps: int = 50
    rescale_betas_zero_snr: bool = False

    takes_eta = True
    whole_timesteps = True
    fixed = LCMScheduler.fixed | {"timestep_scaling": (10.0, ...)}

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.num_train_timesteps
        check_int("original_inference_steps", self.original_inference_steps, most=most)

    def _spaced(self, steps: int) -> np.ndarray:
        return _distilled_timesteps(steps, self.original_inference_steps, self.num_train_timesteps)

    def _end(self, run: np.ndarray, times: np.ndarray, table: Tensor) -> float:
        return table[0].item()

    def sampler(self, schedule: Schedule, noise: Noise, eta: float = 0.3) -> Sampler:
        """Return `tcd`; eta, 0 to 1: how much of each step's noise is drawn anew, `euler` at 0."""
        if check_float("eta", eta, 0, 1) == 0:
            return euler
        lower = partial(lower_sigma, training_sigmas=schedule.training_sigmas, eta=eta)
        return partial(tcd, noise=noise, lower=lower)


def _distilled_timesteps(steps: int, original: int, total: int) -> np.ndarray:
    """Choose `steps` of `original` timesteps, total // original apart; ValueError if there are fewer."""
    if steps > original:
        raise ValueError(f"the steps must be at most original_inference_steps, {original}, got {steps}")
    known = np.arange(original, 0, -1) * (total // original) - 1
    return known[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)]


@dataclass(frozen=True, kw_only=True)
class FlowMatchEulerDiscreteScheduler(Scheduler):
    """Scheduler of Euler's method for rectified flows; scheduling_flow_match_euler_discrete.py.

    Times t go from 1, pure noise, to 0; shift moves them up (twice at the lower end, as in the reference). A
    family spaces them instead of sigmas t / (1 - t). The model's timestep is t * num_train_timesteps.
    """

    shift: float = 1.0
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False

    prediction_type = "flow_prediction"
    fixed = SHIFTING | {
        "base_shift": (0.5, ...), "max_shift": (1.15, ...), "base_image_seq_len": (256, ...),
        "max_image_seq_len": (4096, ...), "shift_terminal": (None,), "invert_sigmas": NO,
        "stochastic_sampling": NO,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_float("shift", self.shift, least=1e-10)
        if self.use_karras_sigmas + self.use_exponential_sigmas + self.use_beta_sigmas > 1:
            names = "use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas"
            raise ValueError(f"only one of {names} can be set")

    def schedule(
        self, steps: int | None = None, *, timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None
    ) -> Schedule:  # fmt: skip
        """Compute the schedule of a run of `steps` steps, or of given `timesteps` (n) or `sigmas` (n + 1).

        Unlike the reference, given ones are not shifted. ValueError as for other classes.
        """
        check_one_given(steps, timesteps, sigmas)
        total = self.num_train_timesteps
        if sigmas is not None:
            given = torch.from_numpy(check_sigmas(sigmas)).double()
            return self._finish(given, total * given[:-1] / (1 + given[:-1]))
        if timesteps is not None:
            times = np.array(check_descending("timesteps", timesteps, 1e-6, total)) / total
        else:
            times = self._spaced(check_int("the number of steps", steps, most=total))
        rounded = torch.tensor([*times, 0.0], dtype=torch.float32, device="cpu")
        return self._finish(time_to_sigma(rounded), (rounded[:-1] * total).double())

    def _spaced(self, steps: int) -> np.ndarray:
        ends, total = self._training_times()[[-1, 0]].tolist(), self.num_train_timesteps
        times = shift_time(np.linspace(ends[0] * total, ends[1] * total, steps) / total, self.shift)
        low, high = times[-1].item(), times[0].item()
        if self.use_karras_sigmas:
            return karras(low, high, steps)
        if self.use_exponential_sigmas:
            return exponential(low, high, steps)
        return beta(low, high, steps) if self.use_beta_sigmas else times

    def _training_times(self) -> Tensor:
        total = self.num_train_timesteps
        times = torch.arange(1, total + 1, dtype=torch.float32, device="cpu") / total
        return self.shift * times / (1 + (self.shift - 1) * times)

    def training_sigmas(self) -> Tensor:
        """Compute t / (1 - t) of each training timestep: float32 [T], ascending."""
        return time_to_sigma(self._training_times()).float()

    def _finish(self, sigmas: Tensor, timesteps: Tensor) -> Schedule:
        scale = self.latent_scale(sigmas[0].item())
        return Schedule(sigmas, timesteps, scale, self.training_sigmas(), False, (), self.target)

    def latent_scale(self, sigma: float) -> float:
        """Return sigma + 1: the reference keeps (1 - t) * image + t * noise."""
        return sigma + 1

    def sampler(self, schedule: Schedule, noise: Noise) -> Sampler:
        """Return Euler's method as DPM-Solver++ of order 1, which is exact in float32 from any sigma on."""
        return partial(dpm_multistep, order=1)


SCHEDULERS: dict[str, type[Scheduler]] = {
    kind.__name__: kind
    for kind in (
        EulerDiscreteScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler,
        UniPCMultistepScheduler, DEISMultistepScheduler, EulerAncestralDiscreteScheduler,
        HeunDiscreteScheduler, KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler,
        LMSDiscreteScheduler, DPMSolverSDEScheduler, DDIMScheduler, DDPMScheduler, PNDMScheduler,
        LCMScheduler, TCDScheduler, FlowMatchEulerDiscreteScheduler, EDMEulerScheduler,
        EDMDPMSolverMultistepScheduler,
    )
}  # fmt: skip
KNOWN.extend(SCHEDULERS.values())
