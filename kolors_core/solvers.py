"""Schedulers under the reference's names, of its multistep and single-step solvers, and of EDM.

The others are in schedulers.py. Each is its fields, its rounding and its sampler; the fields are those of the
class of the same name in diffusers' schedulers, whose file each names, with the released Kolors' defaults.
`fixed` has those that are taken at one value only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kolors_core.diffusion import DiffusionScheduler, SigmaScheduler
from kolors_core.sampling import Noise, Sampler, dpm_multistep, euler, falling_orders
from kolors_core.sampling_deterministic import deis, dpm_singlestep, singlestep_orders, unipc
from kolors_core.schedule import Schedule, Scheduler, check_one_given, check_sigmas
from kolors_core.scheduler_config import SHIFTING, THRESHOLDING, check_limits, limited
from kolors_core.sigmas import shift_time
from kolors_core.targets import EDM, Target
from kolors_core.validation import check_float, check_int

SMALL_VARIANCES = (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
FLOW_CHOICES = DiffusionScheduler.choices | {
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction")
}


@dataclass(frozen=True, kw_only=True)
class DPMSolverMultistepScheduler(SigmaScheduler):
    """Scheduler of DPM-Solver++ (https://arxiv.org/abs/2211.01095); `sde-dpmsolver++` is its SDE form.

    algorithm_type: dpmsolver and sde-dpmsolver extrapolate the noise instead of the image; they cannot end at
    sigma 0. use_lu_lambdas, use_flow_sigmas, flow_shift: see sigmas.py. lambda_min_clipped: the smallest
    -log(sigma) of the timesteps. Source: scheduling_dpmsolver_multistep.py.
    """

    algorithm_type: str = "dpmsolver++"
    solver_order: int = 2
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_lu_lambdas: bool = False
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    final_sigmas_type: str = "zero"
    lambda_min_clipped: float = -math.inf
    rescale_betas_zero_snr: bool = False

    whole_timesteps = True
    skips_last = True
    choices: ClassVar = FLOW_CHOICES | {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"),
        "solver_type": ("midpoint", "heun"), "solver_order": range(1, 4),
    }  # fmt: skip
    fixed = THRESHOLDING | SHIFTING | {"variance_type": SMALL_VARIANCES}
    same: ClassVar = {
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_end(self.algorithm_type, self.final_sigmas_type)

    def _rounds(self, family: str) -> bool:
        return super()._rounds(family) and self.beta_schedule != "squaredcos_cap_v2"

    def _orders(self, steps: int) -> tuple[int, ...]:
        return _multistep_orders(self, steps, self.euler_at_final)

    def sampler(self, schedule: Schedule, noise: Noise) -> Sampler:
        """Return `dpm_multistep`."""
        return partial(dpm_multistep, order=schedule.orders, **_form(self.algorithm_type, noise),
                       solver_type=self.solver_type)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DPMSolverSinglestepScheduler(DiffusionScheduler):
    """Scheduler of the single-step DPM-Solver++; scheduling_dpmsolver_singlestep.py.

    A step of order k is k of the run's steps. The timesteps are spaced as by "linspace".
    """

    algorithm_type: str = "dpmsolver++"
    solver_order: int = 2
    solver_type: str = "midpoint"
    lower_order_final: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    final_sigmas_type: str = "zero"
    lambda_min_clipped: float = -math.inf

    timestep_spacing = "linspace"
    whole_timesteps = True
    skips_last = True
    choices: ClassVar = FLOW_CHOICES | {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver"),
        "solver_type": ("midpoint", "heun"), "solver_order": range(1, 4),
    }  # fmt: skip
    fixed = THRESHOLDING | SHIFTING | {"variance_type": SMALL_VARIANCES}
    same = DPMSolverMultistepScheduler.same

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_end(self.algorithm_type, self.final_sigmas_type)

    def _orders(self, steps: int) -> tuple[int, ...]:
        final = self.lower_order_final or self.final_sigmas_type == "zero" or steps % self.solver_order > 0
        return tuple(singlestep_orders(self.solver_order, steps, lower_order_final=final))

    def sampler(self, schedule: Schedule, noise: Noise) -> Sampler:
        """Return `dpm_singlestep`."""
        return partial(dpm_singlestep, order=schedule.orders, **_form(self.algorithm_type, noise),
                       solver_type=self.solver_type)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DEISMultistepScheduler(SigmaScheduler):
    """Scheduler of DEIS in log rho (https://arxiv.org/abs/2204.13902); scheduling_deis_multistep.py.

    It ends at the smallest training sigma; after a family of sigmas, at that family's last, so that the last
    step does nothing, as in the reference.
    """

    solver_order: int = 2
    lower_order_final: bool = True
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0

    whole_timesteps = True
    skips_last = True
    choices: ClassVar = FLOW_CHOICES | {"solver_order": range(1, 4)}
    fixed = THRESHOLDING | SHIFTING | {
        "algorithm_type": ("deis", "dpmsolver", "dpmsolver++"),
        "solver_type": ("logrho", "midpoint", "heun", "bh1", "bh2"),
    }  # fmt: skip

    def _end(self, run: np.ndarray, times: np.ndarray, table: Tensor) -> float:
        return run[-1].item() if self._families() else table[0].item()

    def _orders(self, steps: int) -> tuple[int, ...]:
        return _multistep_orders(self, steps)

    def sampler(self, schedule: Schedule, noise: Noise) -> Sampler:
        """Return `deis`."""
        return partial(deis, order=schedule.orders)


@dataclass(frozen=True, kw_only=True)
class UniPCMultistepScheduler(SigmaScheduler):
    """Scheduler of UniPC (https://arxiv.org/abs/2302.04867); scheduling_unipc_multistep.py.

    predict_x0: extrapolate the image, else the noise. sigma_min, sigma_max: ends of a family of sigmas. At
    final_sigmas_type "sigma_min" a family's last step does nothing, as in the reference.
    """

    solver_order: int = 2
    solver_type: str = "bh2"
    predict_x0: bool = True
    lower_order_final: bool = True
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    final_sigmas_type: str = "zero"
    sigma_min: float | None = None
    sigma_max: float | None = None
    rescale_betas_zero_snr: bool = False

    whole_timesteps = True
    skips_last = True
    pair = ("use_karras_sigmas", "use_flow_sigmas")
    choices: ClassVar = FLOW_CHOICES | {"solver_type": ("bh1", "bh2"), "solver_order": range(1, 10)}
    fixed = THRESHOLDING | SHIFTING | {
        "disable_corrector": ([], ()), "solver_p": (None,), "shift_terminal": (None,),
    }  # fmt: skip
    same: ClassVar = {"solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits(self.sigma_min, self.sigma_max)

    def _range(self, run: np.ndarray, table: Tensor) -> tuple[float, float]:
        return limited(super()._range(run, table), self.sigma_min, self.sigma_max)

    def _convert(
        self, family: str, run: np.ndarray, steps: int, table: Tensor
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        sigmas, times = super()._convert(family, run, steps, table)
        if family == "use_karras_sigmas" and self.use_flow_sigmas:
            sigmas = sigmas / (sigmas + 1)
            times = sigmas * self.num_train_timesteps
        return sigmas, times

    def _flow_times(self, steps: int) -> np.ndarray:
        times = shift_time(np.linspace(1, 1 / self.num_train_timesteps, steps + 1)[:-1], self.flow_shift)
        times[0] -= 1e-6 if abs(times[0] - 1) < 1e-6 else 0.0  # where sigma would be infinite
        return times

    def _end(self, run: np.ndarray, times: np.ndarray, table: Tensor) -> float:
        is_last = self._families() and self.final_sigmas_type == "sigma_min"
        return run[-1].item() if is_last else super()._end(run, times, table)

    def _orders(self, steps: int) -> tuple[int, ...]:
        order = self.solver_order
        return tuple(falling_orders(order, steps) if self.lower_order_final else [order] * steps)

    def sampler(self, schedule: Schedule, noise: Noise) -> Sampler:
        """Return `unipc`."""
        return partial(unipc, order=schedule.orders, predict_x0=self.predict_x0, solver_type=self.solver_type)


@dataclass(frozen=True, kw_only=True)
class EDMEulerScheduler(Scheduler):
    """Scheduler of Euler's method for models in EDM's parametrization; scheduling_edm_euler.py.

    Such a model sees x / sqrt(sigma^2 + sigma_data^2) and the timestep log(sigma) / 4
    (https://arxiv.org/abs/2206.00364, table 1). Kolors is no such model.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    sigma_schedule: str = "karras"
    rho: float = 7.0
    prediction_type: str = "epsilon"
    final_sigmas_type: str = "zero"

    precision: ClassVar[torch.dtype] = torch.float64
    same: ClassVar = {"sigma_min": {None: 0.002}, "sigma_max": {None: 80.0}}
    choices: ClassVar = {
        "sigma_schedule": ("karras", "exponential"), "prediction_type": ("epsilon", "v_prediction"),
        "final_sigmas_type": ("zero", "sigma_min"),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits(self.sigma_min, self.sigma_max)
        check_float("sigma_data", self.sigma_data, least=1e-10)
        check_float("rho", self.rho, least=1e-10)

    @property
    def target(self) -> Target:
        """Conversion of the model's output, see targets.py."""
        return EDM(self.sigma_data, 1 if self.prediction_type == "epsilon" else -1)

    def schedule(
        self, steps: int | None = None, *, timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None
    ) -> Schedule:  # fmt: skip
        """Compute the schedule of a run of `steps` steps or of given `sigmas` (n + 1); no timesteps."""
        check_one_given(steps, timesteps, sigmas)
        if timesteps is not None:
            raise ValueError(f"{type(self).__name__} has no training timesteps, give steps or sigmas")
        if sigmas is None:
            most = self.num_train_timesteps
            run = self._spaced(check_int("the number of steps", steps, most=most))
            is_zero = self.final_sigmas_type == "zero"
            run = torch.cat([run, run.new_zeros(1) if is_zero else self._end(run)])
        else:
            run = torch.from_numpy(check_sigmas(sigmas))
        times, scale = 0.25 * torch.log(run[:-1]), (self.sigma_max**2 + 1) ** 0.5
        table = self.training_sigmas()
        return Schedule(
            run.double(), times.double(), scale, table, False, self._orders(len(times)), self.target
        )

    def training_sigmas(self) -> Tensor:
        """Compute num_train_timesteps sigmas, spaced as those of a run: float32 [T], ascending."""
        return self._spaced(self.num_train_timesteps).flip(0)

    def _spaced(self, steps: int) -> Tensor:
        if self.sigma_schedule == "exponential":
            return torch.linspace(math.log(self.sigma_min), math.log(self.sigma_max), steps).exp().flip(0)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        ramp = torch.linspace(0, 1, steps, dtype=self.precision, device="cpu")
        return ((high + ramp * (low - high)) ** self.rho).float()

    def _end(self, run: Tensor) -> Tensor:
        return run[-1:]

    def _orders(self, steps: int) -> tuple[int, ...]:
        return ()

    def sampler(self, schedule: Schedule, noise: Noise) -> Sampler:
        """Return `euler`."""
        return euler


@dataclass(frozen=True, kw_only=True)
class EDMDPMSolverMultistepScheduler(EDMEulerScheduler):
    """Scheduler of DPM-Solver++ for EDM's parametrization; scheduling_edm_dpmsolver_multistep.py."""

    algorithm_type: str = "dpmsolver++"
    solver_order: int = 2
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False

    precision: ClassVar[torch.dtype] = torch.float32
    choices: ClassVar = EDMEulerScheduler.choices | {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun"), "solver_order": range(1, 4),
    }  # fmt: skip
    fixed = THRESHOLDING
    same = EDMEulerScheduler.same | DPMSolverMultistepScheduler.same

    def _end(self, run: Tensor) -> Tensor:
        return run.new_tensor([self.sigma_min])

    def _orders(self, steps: int) -> tuple[int, ...]:
        return _multistep_orders(self, steps, self.euler_at_final)

    def sampler(self, schedule: Schedule, noise: Noise) -> Sampler:
        """Return `dpm_multistep`."""
        return partial(dpm_multistep, order=schedule.orders, **_form(self.algorithm_type, noise),
                       solver_type=self.solver_type)  # fmt: skip


def _check_end(algorithm_type: str, final_sigmas_type: str) -> None:
    """Raise ValueError for a solver that cannot step to sigma 0."""
    if final_sigmas_type == "zero" and not algorithm_type.endswith("++"):
        raise ValueError(f"algorithm_type {algorithm_type!r} needs final_sigmas_type 'sigma_min', got 'zero'")


def _multistep_orders(scheduler: Any, steps: int, euler_at_final: bool = False) -> tuple[int, ...]:
    """Return each step's highest order: less in the last of fewer than 15 steps, at lower_order_final."""
    order = scheduler.solver_order
    falls = scheduler.lower_order_final and steps < 15
    orders = falling_orders(order, steps) if falls else [order] * steps
    return (*orders[:-1], 1) if euler_at_final else tuple(orders)


def _form(algorithm_type: str, noise: Noise) -> dict[str, Any]:
    is_sde = algorithm_type.startswith("sde-")
    return {"noise": noise if is_sde else None, "predict_x0": algorithm_type.endswith("++")}
