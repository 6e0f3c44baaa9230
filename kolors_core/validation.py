"""Checks of arguments, numbers and paths, whose errors name the argument, what came and what was expected."""

import math
import operator
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

MAX_COUNT = 2**24  # of what is counted; more would end in an allocation that fails
LARGEST_SEED = 2**63 - 1  # that a torch.Generator takes on every device


def is_real(value: Any) -> bool:
    """Whether it is a real number of any type, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def short_repr(value: Any) -> str:
    """Format a value for one line of an error: at most 203 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list of thousands of levels
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_int(name: str, value: Any, multiple: int = 1, least: int = 1, most: int = MAX_COUNT) -> int:
    """A whole number, of any integer type, in a range and a multiple; ValueError naming it otherwise."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most or number % multiple:
        kind = "whole number" if multiple == 1 else f"multiple of {multiple}"
        kind = f"positive {kind}" if least == 1 and most == MAX_COUNT else f"{kind} from {least} to {most}"
        kind += f" up to {MAX_COUNT:,}" if number > MAX_COUNT == most else ""
        raise ValueError(f"{name} must be a {kind}, got {short_repr(value)}")
    return number


def check_float(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number, of any real type, in a range; ValueError naming it otherwise."""
    try:
        number = float(value) if is_real(value) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a number, got {short_repr(value)}")
    if not least <= number <= most:
        wanted = f"{least:g} or more" if most == math.inf else f"from {least:g} to {most:g}"
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return number


def check_fraction(name: str, value: Any) -> float:
    """A part of a whole, above 0; ValueError naming it otherwise."""
    if not is_real(value) or not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {short_repr(value)}")
    return float(value)


def as_path(name: str, value: Any) -> Path:
    """A path; TypeError naming it for what is none, ValueError for an empty one."""
    if not isinstance(value, str | PathLike):
        raise TypeError(f"{name} must be a path, got {short_repr(value)}")
    if not str(value):
        raise ValueError(f"{name} must be a path, got an empty one")
    return Path(value)


def as_new_path(name: str, value: Any, overwrite: bool) -> Path:
    """A path to write to; FileExistsError if something is there and is not to be overwritten."""
    path = as_path(name, value)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already: choose another file, or overwrite=True")
    return path
