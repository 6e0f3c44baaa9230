"""Values from outside: a public `config.json` field by field, no field left unread; numbers and paths."""

import math
import operator
from collections.abc import Mapping
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

Public = Mapping[str, Any]
LARGEST = 2**24  # of what is counted; more would end in an allocation that fails
LARGEST_SEED = 2**63 - 1  # that a torch.Generator takes on every device


class Fields:
    """Reads a public config field by field, remembers which were read, and refuses the rest."""

    def __init__(self, public: Public, where: str) -> None:
        if not isinstance(public, Mapping):
            raise TypeError(f"{where}: wanted the fields of a config, got {_shown(public)}")
        self.public, self.where, self.seen = public, where, set[str]()

    def fail(self, name: str, got: Any, wanted: str) -> None:
        """ValueError that says which field of which config is what, and what was wanted."""
        field = name if name.isprintable() and len(name) <= 100 else repr(name[:100])
        raise ValueError(f"{self.where}: {field} is {_shown(got)}, wanted {wanted}")

    def integer(self, name: str, most: int = LARGEST) -> int:
        """A positive whole number; `most` bounds it before a model of that many parts is built."""
        value = self._get(name)
        if not _is_count(value, most):
            self.fail(name, value, f"a positive whole number up to {most:,}")
        return value

    def integers(self, name: str, length: int | None = None, most: int = LARGEST) -> tuple[int, ...]:
        """A list of positive whole numbers; where `length` is known, a single number stands for all."""
        value = self._get(name)
        values = [value] * length if length is not None and isinstance(value, int) else value
        fits = isinstance(values, list | tuple) and len(values) in (
            range(1, 16) if length is None else (length,)
        )
        if not fits or not all(_is_count(number, most) for number in values):
            self.fail(name, value, f"{length or 'some'} positive whole numbers")
        return tuple(values)

    def same(self, name: str, length: int, most: int = LARGEST) -> int:
        """A positive whole number, that the reference may also write once for each level."""
        values = self.integers(name, length, most)
        if len(set(values)) > 1:
            self.fail(name, list(values), "one number for all levels")
        return values[0]

    def number(self, name: str, most: float = 1e6) -> float:
        """A positive number."""
        value = self._get(name)
        if not _is_real(value) or not 0 < value <= most:
            self.fail(name, value, f"a positive number up to {most:g}")
        return float(value)

    def attends(self, way: str, length: int) -> list[bool]:
        """For each level on the way Down or Up, whether its blocks have attention."""
        name, with_attention = f"{way.lower()}_block_types", f"CrossAttn{way}Block2D"
        value, allowed = self._get(name), (f"{way}Block2D", with_attention)
        fits = isinstance(value, list | tuple) and len(value) == length
        if not fits or any(kind not in allowed for kind in value):
            self.fail(name, value, f"{length} of {' and '.join(allowed)}")
        return [kind == with_attention for kind in value]

    def equal(self, name: str, wanted: Any) -> None:
        """ValueError if the field is another value than this one."""
        value = self._get(name)
        if (list(value) if isinstance(value, tuple) else value) != wanted:
            self.fail(name, value, repr(wanted))

    def refuse_unless(self, fixed: Public) -> None:
        """ValueError if a field that may be absent is there with another value than this one."""
        for name, wanted in fixed.items():
            self.seen.add(name)
            value = self.public.get(name, wanted)
            is_off = value is None or value is False or value == [False] * 3  # once, or for each level
            if value != wanted and not (is_off and (wanted is None or wanted is False)):
                self.fail(name, value, repr(wanted))

    def refuse_rest(self, inert: set[str]) -> None:
        """An unknown field that is switched on would change the model; one that is off changes nothing."""
        for name, value in self.public.items():
            known = name in self.seen or name in inert or name.startswith("_")
            if not known and value is not None and value is not False:
                self.fail(name, value, "no such field, or null: its meaning is not known here")

    def _get(self, name: str) -> Any:
        self.seen.add(name)
        if name not in self.public:
            raise ValueError(f"{self.where}: the field {name} is missing")
        return self.public[name]


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A value in an error's one line, cut short."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list of thousands of levels
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def whole_number(name: str, value: Any, multiple: int = 1, least: int = 1, most: int = LARGEST) -> int:
    """A whole number, of any integer type, in a range and a multiple; ValueError naming it otherwise."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most or number % multiple:
        kind = "whole number" if multiple == 1 else f"multiple of {multiple}"
        kind = f"positive {kind}" if least == 1 and most == LARGEST else f"{kind} from {least} to {most}"
        kind += f" up to {LARGEST:,}" if number > LARGEST == most else ""
        raise ValueError(f"{name} must be a {kind}, got {_shown(value)}")
    return number


def finite_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number, of any real type, in a range; ValueError naming it otherwise."""
    try:
        number = float(value) if _is_real(value) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a number, got {_shown(value)}")
    if not least <= number <= most:
        wanted = f"{least:g} or more" if most == math.inf else f"from {least:g} to {most:g}"
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return number


def fraction_of(name: str, value: Any) -> float:
    """A part of a whole, above 0; ValueError naming it otherwise."""
    if not _is_real(value) or not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {_shown(value)}")
    return float(value)


def path_of(name: str, value: Any) -> Path:
    """A path; TypeError naming it for what is none, ValueError for an empty one."""
    if not isinstance(value, str | PathLike):
        raise TypeError(f"{name} must be a path, got {_shown(value)}")
    if not str(value):
        raise ValueError(f"{name} must be a path, got an empty one")
    return Path(value)


def new_path(name: str, value: Any, overwrite: bool) -> Path:
    """A path to write to; FileExistsError if something is there and is not to be overwritten."""
    path = path_of(name, value)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already: choose another file, or overwrite=True")
    return path
