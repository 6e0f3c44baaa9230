"""Schedules, the numbers of one run, and what all schedulers share: their fields and configs.

A scheduler is a frozen config; `scheduler.schedule(25)` computes the tensors of one run. `sigma` is the
standard deviation of the noise added to a clean image of variance 1 (Karras et al.,
https://arxiv.org/abs/2206.00364): x = image + sigma * noise. schedulers.py has the classes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor

from kolors_core.config import ConfigDict
from kolors_core.sigmas import sigma_to_timestep
from kolors_core.validation import check_fraction, check_int, did_you_mean, short_repr


@dataclass(frozen=True)
class Schedule:
    """Schedule of one run of n steps."""

    sigmas: Tensor  # float64 [n + 1], descending; the run ends at the last, usually 0
    timesteps: Tensor  # float64 [n], the UNet's input at each sigma
    init_noise_sigma: float  # factor on the initial standard normal noise
    training_sigmas: Tensor  # float32 [T], one for each training timestep
    whole_timesteps: bool  # whether the UNet gets rounded ones
    orders: tuple[int, ...] = ()  # [n], the highest order of each step, for samplers that have several
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
        return replace(self, **kept, orders=self.orders[:steps])

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
        scale = math.sqrt(kept["sigmas"][0].item() ** 2 + 1)
        return replace(self, **kept, orders=self.orders[-steps:], init_noise_sigma=scale)

    def _cutoff_timestep(self, fraction: float) -> int:
        total = len(self.training_sigmas)
        return round(total - fraction * total)


@dataclass(frozen=True, kw_only=True)
class Scheduler(ABC):
    """Scheduler: the fields that the schedule and the sampler of a run depend on."""

    # Not fields: how many times a step evaluates the UNet; the values of fields, besides False and True; the
    # reference's fields that are not ours, with the values that change nothing (... means any, the first is
    # written to files); the reference's other names for a value.
    evaluations: ClassVar[int] = 1
    choices: ClassVar[dict[str, Any]] = {}
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {}
    same: ClassVar[dict[str, dict[Any, Any]]] = {}

    num_train_timesteps: int = 1100

    def __post_init__(self) -> None:
        check_int("num_train_timesteps", self.num_train_timesteps, least=2, most=100_000)
        flags = {field.name: (False, True) for field in fields(self) if isinstance(field.default, bool)}
        for name, allowed in (flags | self.choices).items():
            if isinstance(allowed, range):
                check_int(name, getattr(self, name), least=allowed[0], most=allowed[-1])
            else:
                one_of(name, getattr(self, name), allowed)

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
        own, others = (
            cls._field_values(),
            {name for kind in SCHEDULERS.values() for name in kind._field_values()},
        )
        given = {
            name: value
            for name, value in config.items()
            if name in own or not (name in others or name[:1] == "_" or value is None or value is False)
        }
        return cls(**cls.own_fields(given | changes))

    @classmethod
    def own_fields(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Select this class's fields from those of the reference's schedulers.

        ValueError for another field at a value that would change the result, or of no class.
        """
        own, chosen = cls._field_values(), {}
        for name, value in given.items():
            if name in cls.fixed:
                allowed = cls.fixed[name]
                if ... not in allowed and not _is_among(value, allowed):
                    raise ValueError(
                        f"{cls.__name__}: {name} is {short_repr(value)}, expected {allowed[0]!r}"
                    )
            elif name in own:
                renamed, default = cls.same.get(name, {}), own[name][0]
                value = default if value is None and isinstance(default, bool) else value
                chosen[name] = renamed.get(value, value) if isinstance(value, str | None) else value
            elif kind := next((kind for kind in SCHEDULERS.values() if name in kind._field_values()), None):
                if not _is_among(value, kind._field_values()[name]):
                    raise ValueError(f"{cls.__name__} has no field {name!r}, {kind.__name__} has")
            else:
                hint = did_you_mean(name, sorted(own)) or f"; it has {', '.join(sorted(own))}"
                raise ValueError(f"{cls.__name__} has no field {name!r}{hint}")
        return chosen

    @classmethod
    def _field_values(cls) -> dict[str, tuple[Any, ...]]:
        """Return the fields of this class of the reference: their defaults, or values that change nothing."""
        return {field.name: (field.default,) for field in fields(cls)} | cls.fixed

    def to_public(self) -> dict[str, Any]:
        """Return the `scheduler_config.json` that the reference reads."""
        fixed = {name: values[0] for name, values in self.fixed.items()}
        return {"_class_name": type(self).__name__, **fixed, **asdict(self)}

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


# The classes of schedulers.py by name, which fills it.
SCHEDULERS: dict[str, type[Scheduler]] = {}


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


def one_of(name: str, got: Any, allowed: tuple[Any, ...]) -> None:
    """Raise ValueError naming a field unless its value is an allowed one."""
    if not _is_among(got, allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {short_repr(got)}")


def _is_among(value: Any, allowed: tuple[Any, ...]) -> bool:
    return isinstance(value, str | int | float | list | tuple | None) and value in allowed
