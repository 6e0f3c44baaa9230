"""Checks of arguments, numbers and paths, whose errors name the argument, its value and the expected one."""

import math
import operator
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

MAX_COUNT = 2**24  # the largest count or size; a larger one would end in a failed allocation
LARGEST_SEED = 2**63 - 1  # a torch.Generator takes it on every device


def is_real(value: Any) -> bool:
    """Return whether a value is a real number of any type and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def short_repr(value: Any) -> str:
    """Format a value for one line of an error: at most 203 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list nested a thousand deep
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ", did you mean X?" for the nearest of some names, or nothing."""
    bare = {one.lstrip("-"): one for one in names}  # dashes alone are no likeness
    near = get_close_matches(name.lstrip("-"), list(bare), 1)
    return f", did you mean {bare[near[0]]}?" if near else ""


def check_int(name: str, value: Any, multiple: int = 1, least: int = 1, most: int = MAX_COUNT) -> int:
    """Convert any integer type to int; ValueError naming it unless it is a multiple from least to most."""
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
    """Convert any real type, also a tensor or array without axes, to float.

    ValueError naming it unless it is finite and from least to most.
    """
    number = _as_float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a number, got {short_repr(value)}")
    if not least <= number <= most:
        expected = f"{least:g} or more" if most == math.inf else f"from {least:g} to {most:g}"
        raise ValueError(f"{name} must be {expected}, got {value}")
    return number


def _as_float(value: Any) -> float:
    """Convert any real type, also a tensor or array without axes, to float; NaN for other values."""
    try:
        number = value.item() if getattr(value, "ndim", None) == 0 else value
        return float(number) if is_real(number) else math.nan
    except (OverflowError, RuntimeError):  # an integer of hundreds of digits; a tensor without values
        return math.nan


def check_fraction(name: str, value: Any) -> float:
    """Convert a fraction to float; ValueError naming it unless it is above 0 and at most 1."""
    if not 0 < (number := _as_float(value)) <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {short_repr(value)}")
    return number


def check_safe_serialization(safe_serialization: bool) -> None:
    """Raise ValueError if the reference's argument asks for a pickle."""
    if not safe_serialization:
        raise ValueError("safe_serialization=False would write a pickle: only safetensors are written")


def as_path(name: str, value: Any) -> Path:
    """Convert to a Path; TypeError naming it for another type, ValueError for an empty path."""
    if not isinstance(value, str | PathLike):
        raise TypeError(f"{name} must be a path, got {short_repr(value)}")
    if not str(value):
        raise ValueError(f"{name} must be a path, got an empty one")
    return Path(value)


def as_new_path(name: str, value: Any, overwrite: bool) -> Path:
    """Convert to a Path to write to; FileExistsError if it exists, unless `overwrite`."""
    path = as_path(name, value)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already: choose another file, or overwrite=True")
    return path
