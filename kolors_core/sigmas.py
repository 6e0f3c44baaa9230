"""Betas and sigmas as pure functions: noise of the training timesteps, and families of a run's noise levels.

A beta is the variance that a training timestep adds; a sigma the standard deviation of the noise on a clean
image of variance 1. Families return n sigmas, float64, from `high` down to `low`; a run ends with one more,
usually 0: `scheduler.schedule(sigmas=[*polyexponential(0.03, 29.0, 25), 0.0])`.

The operations and their precision are the reference's, so that the numbers are equal to the last bit.
"""

import math

import numpy as np
import torch
from torch import Tensor

# In place of 0, where sigma or the time of a flow would be infinite; the reference's value.
LAST_ALPHA = 2**-24

# Published for Stable Diffusion 1.5 and XL, 10 steps: https://arxiv.org/abs/2404.14507, appendix; the last is
# the end of the interpolation, where a run has 0.
AYS_SD15 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
AYS_SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
# Of the embedded model and all of Kolors' sigmas, by `python -m benchmarks.align_steps`.
AYS_TINY = (29.061, 15.514, 7.724, 4.124, 2.714, 1.786, 1.260, 0.829, 0.509, 0.236, 0.029)


def betas_of(name: str, start: float, end: float, total: int) -> Tensor:
    """Compute the betas of `total` training timesteps: float32 [T].

    name: "linear", "scaled_linear" (linear in the square root) or "sigmoid", from start to end; or one of
    ALPHA_BARS, given by the share of the image in the variance at each time.
    """
    if name == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, total, device="cpu")) * (end - start) + start
    if name in ALPHA_BARS:
        bar = ALPHA_BARS[name]
        ratios = [bar((i + 1) / total) / bar(i / total) for i in range(total)]
        betas = [min(1 - ratio, 0.999) for ratio in ratios]
        return torch.tensor(betas, dtype=torch.float32, device="cpu")
    root = 0.5 if name == "scaled_linear" else 1.0
    return torch.linspace(start**root, end**root, total, device="cpu") ** (1 / root)


def _cosine(t: float) -> float:
    """Return cos^2, of https://arxiv.org/abs/2102.09672, equation 17."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: float) -> float:
    """Return the share of which log(snr) / 2 has a Laplace distribution (https://arxiv.org/abs/2407.03297)."""
    half = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * math.fabs(0.5 - t) + 1e-6)
    return math.sqrt(math.exp(half) / (1 + math.exp(half)))


ALPHA_BARS = {"squaredcos_cap_v2": _cosine, "laplace": _laplace, "exp": lambda t: math.exp(t * -12.0)}


def rescale_to_zero_snr(betas: Tensor) -> Tensor:
    """Rescale betas [T] so that nothing of the image is left at the last timestep.

    Source: https://arxiv.org/abs/2305.08891, algorithm 1.
    """
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    shares = ((roots - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([shares[:1], shares[1:] / shares[:-1]])


def karras(low: float, high: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """Compute sigmas evenly spaced in sigma^(1/rho) (https://arxiv.org/abs/2206.00364, equation 5)."""
    ends = low ** (1 / rho), high ** (1 / rho)
    return (ends[1] + np.linspace(0, 1, steps) * (ends[0] - ends[1])) ** rho


def exponential(low: float, high: float, steps: int) -> np.ndarray:
    """Compute sigmas evenly spaced in log sigma."""
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def polyexponential(low: float, high: float, steps: int, rho: float = 1.0) -> np.ndarray:
    """Compute sigmas with log sigma a polynomial of degree rho; 1 is `exponential`.

    Source: `get_sigmas_polyexponential` of k-diffusion.
    """
    ends = math.log(low), math.log(high)
    return np.exp(np.linspace(1, 0, steps) ** rho * (ends[1] - ends[0]) + ends[0])


def lu(low: float, high: float, steps: int) -> np.ndarray:
    """Compute sigmas evenly spaced in log sigma, with ends in float32 (https://arxiv.org/abs/2211.01095)."""
    ends = np.log(np.array([low, high], np.float32)).tolist()
    return np.exp(ends[1] + np.linspace(0, 1, steps) * (ends[0] - ends[1]))


def beta(low: float, high: float, steps: int, a: float = 0.6, b: float = 0.6) -> np.ndarray:
    """Compute sigmas at even quantiles of a beta distribution (https://arxiv.org/abs/2407.12173)."""
    return low + beta_quantile(1 - np.linspace(0, 1, steps), a, b) * (high - low)


def simple(training_sigmas: Tensor, steps: int) -> np.ndarray:
    """Take sigmas at even distances in the table of training sigmas [T]; `simple_scheduler` of ComfyUI."""
    table = training_sigmas.double().numpy()
    return table[[len(table) - 1 - int(i * len(table) / steps) for i in range(steps)]]


def align_your_steps(steps: int, table: tuple[float, ...] = AYS_SDXL) -> np.ndarray:
    """Interpolate a table in log sigma, for any number of steps.

    Source: https://arxiv.org/abs/2404.14507; the interpolation is the authors'. Their tables are of models
    whose largest sigma is 14.6; what Kolors has above that, up to 29, is left out. `AYS_TINY` begins there.
    """
    places = np.linspace(0, 1, steps + 1)[:-1]
    return np.exp(np.interp(places, np.linspace(0, 1, len(table)), np.log(table)))


def flow_times(total: int, steps: int, shift: float) -> np.ndarray:
    """Compute times of a rectified flow from 1 - 1/total down to above 0, moved up by `shift`: [steps].

    Source: https://arxiv.org/abs/2403.03206, equation 23; diffusers' scheduling_dpmsolver_multistep.py.
    """
    return shift_time(1.0 - np.linspace(1, 1 / total, steps + 1), shift)[::-1][:-1].copy()


def shift_time(time: np.ndarray, shift: float) -> np.ndarray:
    """Compute shift * t / (1 + (shift - 1) * t)."""
    return shift * time / (1 + (shift - 1) * time)


def time_to_sigma(time: Tensor) -> Tensor:
    """Compute sigma = t / (1 - t) of times of a rectified flow, where x is (1 - t) * image + t * noise.

    The sigma of t = 1, pure noise, would be infinite; it is that of the largest float32 below 1, 1.7e7.
    """
    time = time.double().clamp(max=1 - LAST_ALPHA)
    return time / (1 - time)


def sigma_to_timestep(sigma: float | np.floating, table: Tensor) -> float:
    """Interpolate the timestep of a sigma, linearly in log sigma, in the table of training sigmas."""
    logs = np.log(table.numpy())  # float32, as in the reference: torch's float32 log rounds differently
    log_sigma = np.log(max(sigma, 1e-10))
    # The last not above it, where zero terminal SNR makes the table's last fall.
    low = min(max(np.flatnonzero(logs <= log_sigma), default=0), len(logs) - 2)
    weight = np.clip((logs[low] - log_sigma) / (logs[low] - logs[low + 1]), 0, 1)
    return float((1 - weight) * low + weight * (low + 1))


def beta_quantile(share: np.ndarray, a: float, b: float) -> np.ndarray:
    """Compute the x below which a share of the distribution beta(a, b) lies, elementwise: float64, 0 to 1.

    The distribution function's power series (https://dlmf.nist.gov/8.17.E7) converges fast up to 1/2; larger
    x are 1 - x of beta(b, a). Found by bisection; the error is below 1e-15 for a and b of 0.3 to 3.
    """
    middle = _beta_function(np.array(0.5), a, b)
    lower = _bisect_beta(np.minimum(share, middle), a, b)
    upper = 1 - _bisect_beta(np.minimum(1 - share, 1 - middle), b, a)
    return np.where(share <= middle, lower, upper)


def _beta_function(x: np.ndarray, a: float, b: float) -> np.ndarray:
    """Compute the share of beta(a, b) below x, 0 to 1/2."""
    term, total = np.ones_like(x), np.full_like(x, 1 / a)
    for k in range(1, 60):
        term = term * x * ((k - b) / k)
        total = total + term / (a + k)
    return x**a * total * math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))


def _bisect_beta(share: np.ndarray, a: float, b: float) -> np.ndarray:
    """Find the x, 0 to 1/2, below which a share of beta(a, b) lies."""
    low, high = np.zeros_like(share), np.full_like(share, 0.5)
    for _ in range(56):
        middle = (low + high) / 2
        is_below = _beta_function(middle, a, b) < share
        low, high = np.where(is_below, middle, low), np.where(is_below, high, middle)
    return np.where(share == 0, 0.0, (low + high) / 2)
