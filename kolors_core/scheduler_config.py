"""Configs of schedulers: fields of the reference's `scheduler_config.json` -> those of a class, checked.

The reference hands a config from class to class, in which each finds the fields of all others. So a field is
the class's own; or of another class, and ignored; or taken at the one value that changes nothing; or an
error that names it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

from kolors_core.config import ConfigDict
from kolors_core.validation import check_float, check_int, did_you_mean, short_repr

Fixed = dict[str, tuple[Any, ...]]

# Fields of the reference's classes that ours take at these values only; ... is any.
NO = (False, None)
CLIPPING: Fixed = {"clip_sample": NO, "clip_sample_range": (1.0, ...)}
THRESHOLDING: Fixed = {
    "thresholding": NO, "dynamic_thresholding_ratio": (0.995, ...), "sample_max_value": (1.0, ...),
}  # fmt: skip
SHIFTING: Fixed = {"use_dynamic_shifting": NO, "time_shift_type": ("exponential", ...)}


@dataclass(frozen=True, kw_only=True)
class SchedulerFields:
    """Fields of a scheduler; the defaults are the released Kolors'."""

    # Not fields: the values of fields, besides False and True; the reference's fields that are not ours, with
    # the values that change nothing (... means any, the first is written to files); the reference's other
    # names for a value.
    choices: ClassVar[dict[str, Any]] = {}
    fixed: ClassVar[Fixed] = {}
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
        own, others = cls._field_values(), {name for kind in KNOWN for name in kind._field_values()}
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
            elif kind := next((kind for kind in KNOWN if name in kind._field_values()), None):
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


KNOWN: list[type[SchedulerFields]] = []  # the classes of schedulers.py, which fills it


def one_of(name: str, got: Any, allowed: tuple[Any, ...]) -> None:
    """Raise ValueError naming a field unless its value is an allowed one."""
    if not _is_among(got, allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {short_repr(got)}")


def _is_among(value: Any, allowed: tuple[Any, ...]) -> bool:
    return isinstance(value, str | int | float | list | tuple | None) and value in allowed


def check_limits(low: float | None, high: float | None) -> None:
    """Raise ValueError unless those of sigma_min and sigma_max that are given are above 0 and rise."""
    low = 0.0 if low is None else check_float("sigma_min", low, least=1e-10)
    if high is not None and check_float("sigma_max", high) <= low:
        raise ValueError(f"sigma_min must be below sigma_max, got {low:g}, {high:g}")


def limited(ends: tuple[float, float], low: float | None, high: float | None) -> tuple[float, float]:
    """Replace the ends of a family of sigmas by those of sigma_min and sigma_max that are given."""
    return ends[0] if low is None else low, ends[1] if high is None else high


def check_betas(betas: Any, total: int) -> tuple[float, ...]:
    """Convert trained_betas to floats; ValueError unless they are `total` numbers between 0 and 1."""
    try:
        numbers = tuple(float(one) for one in betas)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != total or not all(0 < one < 1 for one in numbers):
        expected = f"trained_betas must be num_train_timesteps = {total} numbers between 0 and 1"
        raise ValueError(f"{expected}, got {short_repr(betas)}")
    return numbers
