"""95% intervals over a few seeds, what they could have shown, and lines through three points."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t at 97.5% and at 80%, by degrees of freedom, from 1.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
     2.120, 2.110, 2.101, 2.093)  # fmt: skip
T80 = (1.376, 1.061, 0.978, 0.941, 0.920, 0.906, 0.896, 0.889, 0.883, 0.879, 0.876, 0.873, 0.870, 0.868,
       0.866, 0.865, 0.863, 0.862, 0.861)  # fmt: skip
FEWEST, MOST = 3, len(T) + 1  # seeds


@dataclass(frozen=True)
class Interval:
    """Where the mean probably lies. visible: the difference that would have been shown four times in five."""

    mean: float
    low: float
    high: float
    visible: float = math.nan

    def holds(self, value: float) -> bool:
        """Whether a value is in it."""
        return self.low <= value <= self.high


def over_seeds(values: Sequence[float], grain: float = 0.0) -> Interval:
    """Student's 95% interval of the mean, and its power.

    grain: the least step between values that are counted. Seeds that happen to count the same are no proof:
    the spread is at least that of rounding. visible: (t of 97.5% + t of 80%) standard errors, the usual
    reckoning of a difference that a test at 5% shows with a probability of 80%.
    """
    mean, spread = statistics.fmean(values), max(statistics.stdev(values), grain / math.sqrt(12))
    error, free = spread / math.sqrt(len(values)), len(values) - 2
    half = T[free] * error
    return Interval(mean, mean - half, mean + half, (T[free] + T80[free]) * error)


def ratio_over_seeds(values: Sequence[float]) -> Interval:
    """The same of ratios, by their logarithms: the inverse ratios have the inverse interval.

    visible: a ratio above 1.
    """
    found = over_seeds([math.log(value) for value in values])
    return Interval(*(math.exp(value) for value in (found.mean, found.low, found.high, found.visible)))


@dataclass(frozen=True)
class Line:
    """log(y) = log(level) + slope * log(x / middle): a power law through a few points."""

    slope: float
    level: float
    middle: float

    def at(self, x: float) -> float:
        """Return y."""
        return self.level * (x / self.middle) ** self.slope


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """Fit a power law by least squares of logarithms."""
    us, vs = ([math.log(value) for value in values] for values in (xs, ys))
    u, v = statistics.fmean(us), statistics.fmean(vs)
    slope = sum((a - u) * (b - v) for a, b in zip(us, vs, strict=True)) / sum((a - u) ** 2 for a in us)
    return Line(slope, math.exp(v), math.exp(u))
