"""What tempers guidance: noise brought back to the spread it had, and guidance in a part of a run only."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from kolors_core.sampling import Denoise
from kolors_core.schedule import Schedule
from kolors_core.validation import finite_number


class SigmaInterval(NamedTuple):
    """An interval of noise levels: above `low`, up to `high`."""

    low: float
    high: float


Interval = tuple[float, float]  # parts of a run's steps, from 0 to 1; or `SigmaInterval`
Rule = Callable[..., Denoise]  # of `guidance.guided`'s signature


def rescaling(part: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of guided and conditional noise [B, ...]: brings the guided one's standard deviation in each
    picture a part of the way back to the other's.

    Guidance spreads the noise, which overexposes. part: from 0 to 1; ValueError otherwise.
    Source: https://arxiv.org/abs/2305.08891, equations 15 and 16; `rescale_noise_cfg` in diffusers.
    """
    finite_number("rescale", part, 0, 1)

    def rescaled(noise: Tensor, conditional: Tensor) -> Tensor:
        axes = tuple(range(1, noise.ndim))
        spread = conditional.std(axes, keepdim=True) / noise.std(axes, keepdim=True)  # [B, 1, 1, 1]
        return noise * (part * spread + (1 - part))

    return rescaled if part else lambda noise, _conditional: noise


def within(interval: Interval, schedule: Schedule, inside: Denoise, outside: Denoise) -> Denoise:
    """`inside` where sigma is in the interval, `outside` elsewhere.

    Source: https://arxiv.org/abs/2404.07724, equation 6: guidance harms at high noise levels and is wasted at
    low ones. Errors as in `bounds`.
    """
    low, high = bounds(interval, schedule)
    return lambda x, sigma: (inside if low < sigma <= high else outside)(x, sigma)


def bounds(interval: Interval, schedule: Schedule) -> SigmaInterval:
    """An interval in noise levels; (start, stop) are steps round(start * n) to before round(stop * n) of n.

    Raises ValueError for what is no interval, and for one without any of the schedule's steps.
    """
    low, high = ends(interval)
    *sigmas, end = schedule.sigmas.tolist()
    if not isinstance(interval, SigmaInterval):
        start, stop = round(low * len(sigmas)), round(high * len(sigmas))
        low, high = [*sigmas, end][stop], [*sigmas, end][start]
    if not any(low < sigma <= high for sigma in sigmas):
        raise ValueError(f"the guidance interval {tuple(interval)} has none of the {len(sigmas)} steps")
    return SigmaInterval(low, high)


def ends(interval: Interval) -> tuple[float, float]:
    """An interval's two numbers; ValueError for what is none."""
    if not isinstance(interval, tuple | list) or len(interval) != 2:
        raise ValueError(f"a guidance interval must be two numbers, got {interval!r}")
    low, high = (finite_number("an end of the guidance interval", end) for end in interval)
    most = math.inf if isinstance(interval, SigmaInterval) else 1
    if not 0 <= low < high <= most:
        wanted = "rise from 0 or more" + ("" if isinstance(interval, SigmaInterval) else " to 1 at most")
        raise ValueError(f"a guidance interval must {wanted}, got {low} to {high}")
    return low, high


def throughout(rule: Rule) -> Rule:
    """A guidance rule without its interval, which needs in every step what that needs at most."""
    if not isinstance(rule, partial):
        return rule
    kept = {name: value for name, value in rule.keywords.items() if name != "interval"}
    return partial(rule.func, *rule.args, **kept)
