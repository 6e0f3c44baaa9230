"""95% intervals: of a mean over a few repeats, and of a share of correct answers."""

import math
from statistics import NormalDist

import torch
from torch import Tensor

LEVEL = 0.05  # how often an interval may miss the true value
FEWEST = 4  # repeats, from which `t_quantile` is right to 1%


def t_quantile(freedom: int, count: int = 1) -> float:
    """Compute Student's t of a two-sided interval at `LEVEL`, shared by `count` intervals (Bonferroni).

    The expansion in 1 / freedom of Abramowitz and Stegun, 26.7.5: within 1% from 3 degrees of freedom.
    """
    z = NormalDist().inv_cdf(1 - LEVEL / 2 / count)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / freedom + g2 / freedom**2 + g3 / freedom**3


def mean_interval(values: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Average values [n, ...] over independent repeats: the mean and half of its interval, both [...].

    count: intervals that are to hold together. ValueError for fewer repeats than `FEWEST`.
    """
    if len(values) < FEWEST:
        raise ValueError(f"an interval needs at least {FEWEST} repeats, got {len(values)}")
    error = values.std(dim=0) / math.sqrt(len(values))
    return values.mean(dim=0), t_quantile(len(values) - 1, count) * error


def share_interval(hits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Compute Wilson's score interval, low and high [...], of shares whose hits [...] of n are counted."""
    z, share = NormalDist().inv_cdf(1 - LEVEL / 2), hits.double() / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)).sqrt()
    return torch.clamp(middle - half, min=0), torch.clamp(middle + half, max=1)
