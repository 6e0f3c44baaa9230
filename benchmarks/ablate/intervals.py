"""95% intervals over a few seeds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t at 97.5%, by degrees of freedom, from 1.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
     2.120, 2.110, 2.101, 2.093)  # fmt: skip
FEWEST, MOST = 3, len(T) + 1  # seeds


@dataclass(frozen=True)
class Interval:
    """Where the mean probably lies."""

    mean: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether a value is in it."""
        return self.low <= value <= self.high


def over_seeds(values: Sequence[float], grain: float = 0.0) -> Interval:
    """Student's 95% interval of the mean.

    grain: the least step between values that are counted. Seeds that happen to count the same are no proof:
    the spread is at least that of rounding.
    """
    mean, spread = statistics.fmean(values), max(statistics.stdev(values), grain / math.sqrt(12))
    half = T[len(values) - 2] * spread / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def ratio_over_seeds(values: Sequence[float]) -> Interval:
    """The same of ratios, by their logarithms: the inverse ratios have the inverse interval."""
    found = over_seeds([math.log(value) for value in values])
    return Interval(*(math.exp(value) for value in (found.mean, found.low, found.high)))
