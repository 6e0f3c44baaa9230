"""Noise schedules: betas -> sigmas -> timesteps.

A scheduler is a frozen config; `scheduler.schedule(25)` computes the tensors of one run. `sigma` is the
standard deviation of the noise added to a clean image of variance 1 (Karras et al.,
https://arxiv.org/abs/2206.00364): x = image + sigma * noise. The training sigmas are computed in float32 and
the arithmetic on them in float64, as in the reference, so that all numbers are equal to the last bit.
Source: diffusers' schedulers/scheduling_euler_discrete.py and scheduling_dpmsolver_multistep.py.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from kolors_core.config import ConfigDict
from kolors_core.validation import check_fraction, check_int, did_you_mean, short_repr


@dataclass(frozen=True)
class Schedule:
    """Schedule of one run of n steps."""

    sigmas: Tensor  # float64 [n + 1], descending; the run ends at the last, usually 0
    timesteps: Tensor  # float64 [n], the UNet's input at each sigma
    init_noise_sigma: float  # factor on the initial standard normal noise
    training_sigmas: Tensor  # float32 [T], one for each training timestep
    whole_timesteps: bool  # whether the UNet gets rounded ones
    first_order_last: bool = False  # whether the last step omits DPM-Solver++'s multistep term
    prediction: str = "epsilon"  # the model's `prediction_type`, see targets.py

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
        return replace(self, **kept, first_order_last=self.first_order_last and steps == len(self.timesteps))

    def after(self, fraction: float) -> Self:
        """Keep the steps that `before` with the same fraction drops (`denoising_start`)."""
        cutoff = self._cutoff_timestep(check_fraction("denoising_start", fraction))
        if (steps := int((self.timesteps < cutoff).sum())) == 0:
            raise ValueError(f"denoising_start {fraction} leaves none of the {len(self.timesteps)} steps")
        return self._keep_last(steps)

    def last_steps(self, strength: float) -> Self:
        """Keep the last int(n * strength) of n steps, for an image noised with this strength."""
        if (steps := int(len(self.timesteps) * check_fraction("strength", strength))) == 0:
            got = f"{strength} times {len(self.timesteps)}"
            raise ValueError(f"no step is left: strength times steps must be at least 1, got {got}")
        return self._keep_last(steps)

    def _keep_last(self, steps: int) -> Self:
        kept = {"sigmas": self.sigmas[-steps - 1 :], "timesteps": self.timesteps[-steps:]}
        return replace(self, **kept, init_noise_sigma=math.sqrt(kept["sigmas"][0].item() ** 2 + 1))

    def _cutoff_timestep(self, fraction: float) -> int:
        total = len(self.training_sigmas)
        return round(total - fraction * total)


@dataclass(frozen=True, kw_only=True)
class Scheduler(ABC):
    """Scheduler fields and methods that Euler and DPM-Solver++ share; defaults are the released Kolors'."""

    num_train_timesteps: int = 1100
    beta_start: float = 0.00085
    beta_end: float = 0.014
    beta_schedule: str = "scaled_linear"
    timestep_spacing: str = "leading"
    steps_offset: int = 1
    use_karras_sigmas: bool = False
    final_sigmas_type: str = "zero"

    def __post_init__(self) -> None:
        check_int("num_train_timesteps", self.num_train_timesteps, least=2, most=100_000)
        check_int("steps_offset", self.steps_offset, least=0, most=self.num_train_timesteps - 1)
        betas = (self.beta_start, self.beta_end)
        if not all(isinstance(beta, float) for beta in betas) or not 0 < betas[0] <= betas[1] < 1:
            raise ValueError(f"0 < beta_start <= beta_end < 1 does not hold for {betas[0]!r}, {betas[1]!r}")
        one_of("use_karras_sigmas", self.use_karras_sigmas, (False, True))
        one_of("beta_schedule", self.beta_schedule, ("scaled_linear", "linear"))
        one_of("timestep_spacing", self.timestep_spacing, ("leading", "linspace", "trailing"))
        one_of("final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min"))

    @property
    def config(self) -> ConfigDict:
        """The scheduler's fields, for another's `from_config`."""
        return ConfigDict(asdict(self))

    def describe(self) -> str:
        """Return the scheduler's name and the fields that differ from the released Kolors'."""
        changed = [f"{f.name}={value}" for f in fields(self) if (value := getattr(self, f.name)) != f.default]
        return type(self).__name__ + (f"({', '.join(changed)})" if changed else "")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> Self:
        """Build from a public config, or another scheduler's `.config`, with some fields changed.

        Fields that the config has for another class of scheduler are ignored. ValueError for a value that we
        do not implement and that would change the result, or for a change of a field that is not ours.
        """
        if not isinstance(config, Mapping):
            expected = "a scheduler's config, such as pipe.scheduler.config"
            raise TypeError(f"expected {expected}, got {config!r:.99}")
        checked = {*ONE_VALUE_FIELDS, *(field.name for field in fields(cls))}
        ignored = _FIELDS_OF_OTHERS.union(UNUSED_FIELDS, *_fields_by_class().values()) - checked
        given = {
            name: value
            for name, value in config.items()
            if name in checked or not (name in ignored or name[:1] == "_" or value is None or value is False)
        }
        return cls(**cls.own_fields(given | changes))

    @classmethod
    def own_fields(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Select this class's fields from those of the reference's schedulers.

        ValueError for another field at a value that would change the result, or of neither class.
        """
        own, fields_of = {field.name for field in fields(cls)}, _fields_by_class()
        for name in sorted(given.keys() - own):
            value, other = given[name], next((kind for kind in fields_of if name in fields_of[kind]), None)
            if other is not None:
                if value != getattr(SCHEDULERS[other], name):
                    raise ValueError(f"{cls.__name__} has no field {name!r}, {other} has")
            elif name in ONE_VALUE_FIELDS:
                same = ONE_VALUE_FIELDS[name]
                if not isinstance(value, str | int | float | None) or value not in same:
                    raise ValueError(f"{cls.__name__}: {name} is {short_repr(value)}, expected {same[0]!r}")
            elif name not in UNUSED_FIELDS:
                hint = did_you_mean(name, sorted({*own, *ONE_VALUE_FIELDS, *UNUSED_FIELDS}))
                hint = hint or f"; it has {', '.join(sorted(own))}"
                raise ValueError(f"{cls.__name__} has no field {name!r}{hint}")
        return {name: value for name, value in given.items() if name in own}

    def to_public(self) -> dict[str, Any]:
        """Return the `scheduler_config.json` that the reference reads."""
        return {"_class_name": type(self).__name__, **asdict(self), "prediction_type": "epsilon"}

    def training_betas(self) -> Tensor:
        """Compute the variance that each training timestep adds: float32 [T]."""
        root = 0.5 if self.beta_schedule == "scaled_linear" else 1.0
        ends = self.beta_start**root, self.beta_end**root
        return torch.linspace(*ends, self.num_train_timesteps, device="cpu") ** (1 / root)

    def training_sigmas(self) -> Tensor:
        """Compute sqrt((1 - a) / a), a = cumprod(1 - beta), of each training timestep: float32 [T]."""
        alphas = torch.cumprod(1.0 - self.training_betas(), dim=0)
        return ((1 - alphas) / alphas) ** 0.5

    def schedule(
        self, steps: int | None = None, *, timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None
    ) -> Schedule:  # fmt: skip
        """Compute the schedule of a run of `steps` steps, or of given `timesteps` (n) or `sigmas` (n + 1).

        ValueError unless exactly one is given and the numbers are strictly descending.
        """
        if sum(given is not None for given in (steps, timesteps, sigmas)) != 1:
            raise ValueError("give exactly one of steps, timesteps and sigmas")
        if timesteps is not None and self.use_karras_sigmas:
            raise ValueError("timesteps cannot be given with use_karras_sigmas, which sets its own")
        table, most = self.training_sigmas(), self.num_train_timesteps - 1
        if sigmas is not None:
            sigmas = _check_descending("sigmas", sigmas, 0.0, math.inf)
            if len(sigmas) < 2:
                raise ValueError(f"sigmas must be at least two, of which the last ends the run, got {sigmas}")
            rounded = np.array(sigmas, np.float32)  # the reference takes the logarithm in float32
            return self._finish(rounded, [sigma_to_timestep(sigma, table) for sigma in rounded[:-1]], table)
        if timesteps is not None:
            times = _check_descending("timesteps", timesteps, 0.0, most)
        else:
            times = self._spaced(check_int("the number of steps", steps, most=most)).tolist()
        run = np.interp(times, np.arange(len(table)), table).tolist()
        if self.use_karras_sigmas:
            run = karras(*self._karras_range(run, table), len(run))
            times = [sigma_to_timestep(sigma, table) for sigma in run]
        end = table[0].item() if self.final_sigmas_type == "sigma_min" else 0.0
        return self._finish(np.array([*run, end], np.float32), times, table)

    @abstractmethod
    def sampler(self, schedule: Schedule, noise: Callable[[], Tensor]) -> Callable[..., Tensor]:
        """Return the sampler of a run, (denoise, x, sigmas, on_step) -> x; noise draws normal noise like x."""

    def latent_scale(self, sigma: float) -> float:
        """Return the ratio of x to the latents that the reference keeps between steps."""
        return 1.0

    @abstractmethod
    def _finish(self, sigmas: np.ndarray, timesteps: list[float], table: Tensor) -> Schedule:
        """Make the schedule of sigmas (float32 [n + 1]) and timesteps (n), rounded as the reference does."""

    @abstractmethod
    def _spaced(self, steps: int) -> np.ndarray:
        """Compute timesteps by `timestep_spacing`, descending: [steps]."""

    def _leading(self, ratio: int, first: int, steps: int) -> np.ndarray:
        """Compute ratio * (first, first + 1, ...) + offset, clipped to the last timestep; descending."""
        timesteps = np.arange(first, first + steps)[::-1] * ratio + self.steps_offset
        return timesteps.clip(max=self.num_train_timesteps - 1)

    def _trailing(self, steps: int) -> np.ndarray:
        """Step back from the end by equal parts; unlike the reference, cut numpy's range to `steps`."""
        total = self.num_train_timesteps
        return np.arange(total, 0, -total / steps)[:steps].round() - 1

    @abstractmethod
    def _karras_range(self, run: list[float], table: Tensor) -> tuple[float, float]:
        """Return the smallest and largest of Karras' sigmas; run: the sigmas of the spaced timesteps."""


# The classes of schedulers.py by name, which fills it.
SCHEDULERS: dict[str, type[Scheduler]] = {}

# The other fields of the reference's schedulers: those with one value here, of which the first is the default
# and the others compute the same; those without effect at these values; those of its other schedulers.
ONE_VALUE_FIELDS: dict[str, tuple[Any, ...]] = {
    "trained_betas": (None,), "prediction_type": ("epsilon",), "interpolation_type": ("linear",),
    "timestep_type": ("discrete",), "sigma_min": (None,), "sigma_max": (None,), "variance_type": (None,),
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"), "lambda_min_clipped": (-math.inf,),
    "thresholding": (False, None), "use_exponential_sigmas": (False, None), "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None), "use_flow_sigmas": (False, None),
    "rescale_betas_zero_snr": (False, None), "use_dynamic_shifting": (False, None),
}  # fmt: skip
UNUSED_FIELDS: dict[str, Any] = {
    "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0, "flow_shift": 1.0,
    "time_shift_type": "exponential",
}  # fmt: skip
_FIELDS_OF_OTHERS = {"clip_sample_range", "set_alpha_to_one", "skip_prk_steps"}


def karras(sigma_min: float, sigma_max: float, steps: int, rho: float = 7.0) -> list[float]:
    """Compute descending sigmas, evenly spaced in sigma^(1/rho) (Karras et al., eq. 5, without the 0)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    ramp = [i / (steps - 1) for i in range(steps)] if steps > 1 else [0.0]
    return [(high + r * (low - high)) ** rho for r in ramp]


def sigma_to_timestep(sigma: float | np.float32, table: Tensor) -> float:
    """Interpolate the timestep of a sigma, linearly in log sigma, in the table of training sigmas."""
    logs = np.log(table.numpy())  # float32, as in the reference: torch's float32 log rounds differently
    log_sigma = np.log(max(sigma, 1e-10))
    low = np.clip(np.searchsorted(logs, log_sigma, side="right") - 1, 0, len(logs) - 2)
    weight = np.clip((logs[low] - log_sigma) / (logs[low] - logs[low + 1]), 0, 1)
    return float((1 - weight) * low + weight * (low + 1))


def _fields_by_class() -> dict[str, set[str]]:
    return {name: {field.name for field in fields(kind)} for name, kind in SCHEDULERS.items()}


def _check_descending(name: str, values: Sequence[float], least: float, most: float) -> list[float]:
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


def one_of(name: str, got: Any, allowed: tuple[Any, ...]) -> None:
    """Raise ValueError naming a field unless its value is an allowed one."""
    if got not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {got!r}")
