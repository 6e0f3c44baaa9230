"""Stochastic samplers: every step removes noise with a deterministic sampler and adds some of its own.

Arguments and shapes are those of sampling.py; `noise()` draws standard normal noise like x. Drawing where the
reference's schedulers draw, and as often, one seed gives the same image.

| sampler                           | is                                                                  |
|-----------------------------------|---------------------------------------------------------------------|
| Euler ancestral                   | `ancestral`                                                         |
| DDIM                              | `ancestral` with its eta; 0 is `euler`                              |
| DDPM                              | `ancestral`, `fixed_large` for its larger variance                  |
| KDPM2 ancestral                   | `ancestral` with sampler `dpm2`                                     |
| Euler with churn, EDM's Euler     | `churn`; with sampler `heun`, Karras et al., algorithm 2            |
| DPM++ SDE, Restart                | `dpmpp_sde`, `restart`                                              |
| DPM++ 2M SDE, DPM++ 3M SDE        | `dpm_multistep` of sampling.py with noise; 3M: order 3, type "heun" |
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kolors_core.sampling import Denoiser, Noise, OnStep, Sampler, Sigmas, euler, step_ends
from kolors_core.sampling_deterministic import heun
from kolors_core.sigmas import karras


def ancestral(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None, *, noise: Noise,
    eta: float = 1.0, sampler: Sampler = euler, draw_last: bool = True, fixed_large: bool = False
) -> Tensor:  # fmt: skip
    """Step below each next sigma with `sampler`, and return to it by adding noise (see `split_sigma`).

    Source: DDIM, https://arxiv.org/abs/2010.02502, equations 12 and 16; at eta 1, DDPM,
    https://arxiv.org/abs/2006.11239, equation 7. x, sigmas, on_step: as for `euler`.

    eta: 0 draws nothing and is `sampler` itself. draw_last: draw for the step to sigma 0 too, where noise has
    weight 0. The reference's Euler ancestral and DDIM do, and DDPM unless that step's timestep is 0; KDPM2
    ancestral does not. fixed_large: DDPM's other variance, beta; it has a weight in the step to 0 too.
    """
    for i, (sigma, next_sigma) in enumerate(step_ends(sigmas)):
        down, up = split_sigma(sigma, next_sigma, eta)
        if fixed_large:  # beta = 1 - (1 + next_sigma^2) / (1 + sigma^2), of latents of variance 1
            up = math.sqrt((sigma**2 - next_sigma**2) / (sigma**2 + 1) * (next_sigma**2 + 1))
        x = sampler(denoise, x, (sigma, down))
        if eta > 0 and (next_sigma > 0 or draw_last):
            x = x + up * noise()
        if on_step is not None:
            x = on_step(i, x)
    return x


def split_sigma(sigma: float, next_sigma: float, eta: float) -> tuple[float, float]:
    """Split next_sigma into (down, up), the sigma to denoise to and that of the noise to add.

    down^2 + up^2 = next_sigma^2. At eta 1, up^2 is the variance of x at next_sigma, given x at sigma and the
    clean image.
    """
    up = min(next_sigma, eta * next_sigma * math.sqrt(sigma**2 - next_sigma**2) / sigma)
    return math.sqrt(next_sigma * next_sigma - up * up), up  # with up = 0, exactly next_sigma


def churn(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None, *, noise: Noise,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
    sampler: Sampler = euler
) -> Tensor:  # fmt: skip
    """Add noise at the start of each step, raising sigma by up to 41%, then step down with `sampler`.

    Source: Karras et al., https://arxiv.org/abs/2206.00364, algorithm 2, which uses Heun's method. x, sigmas,
    on_step: as for `euler`. s_churn: the noise of all steps together; 0 draws nothing. s_tmin, s_tmax: sigmas
    of the first and last step to add noise in. s_noise: the standard deviation of the noise.

    `denoise` sees x and sigma after the addition. The reference's EulerDiscreteScheduler adds the noise after
    the UNet, which then cannot remove it.
    """
    most = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    for i, (sigma, next_sigma) in enumerate(step_ends(sigmas)):
        gamma = most if s_tmin <= sigma <= s_tmax else 0.0
        raised = sigma * (gamma + 1)
        if gamma > 0:
            x = x + s_noise * math.sqrt(raised**2 - sigma**2) * noise()
        x = sampler(denoise, x, (raised, next_sigma))
        if on_step is not None:
            x = on_step(i, x)
    return x


def dpmpp_sde(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None, *, noise: Noise,
    eta: float = 1.0
) -> Tensor:  # fmt: skip
    """Integrate by DPM-Solver++(2S) with noise, its midpoint at sqrt(sigma * next_sigma).

    Source: `sample_dpmpp_sde` of k-diffusion; diffusers' scheduling_dpmsolver_sde.py. x, sigmas, on_step: as
    for `euler`. Two evaluations a step, one in a step to 0, which draws nothing. The noises of a step are of
    one Brownian motion in sigma, drawn in order of time: to the midpoint, then from there to the end; the
    reference's come from a tree with a seed of its own. eta: 0 draws nothing.
    """
    for i, (sigma, next_sigma) in enumerate(step_ends(sigmas)):
        x0 = denoise(x, sigma)
        if next_sigma > 0:
            middle = math.sqrt(sigma * next_sigma)
            middle_down, middle_up = split_sigma(sigma, middle, eta)
            down, up = split_sigma(sigma, next_sigma, eta)
            between = torch.lerp(x0, x, middle_down / sigma)
            eps = None
            if eta > 0:
                first, share = noise(), (sigma - middle) / (sigma - next_sigma)
                between = between + middle_up * first
                eps = math.sqrt(share) * first + math.sqrt(1 - share) * noise()
            x = torch.lerp(denoise(between, middle), x, down / sigma)
            x = x if eps is None else x + up * eps
        else:
            x = x0
        if on_step is not None:
            x = on_step(i, x)
    return x


def restart(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None, *, noise: Noise,
    restarts: Mapping[float, tuple[int, int, float]], sampler: Sampler = heun
) -> Tensor:  # fmt: skip
    """Integrate with `sampler`, and at chosen sigmas add noise up to a higher one and integrate again.

    Source: https://arxiv.org/abs/2306.14878. x, sigmas, on_step: as for `euler`; on_step(i, x) is called
    after the repeats at the end of step i. restarts: {sigma_min: (steps, repeats, sigma_max)}; each starts at
    the run's sigma that is nearest to its sigma_min, its steps in Karras' spacing. ValueError if that sigma
    is not below its sigma_max.
    """
    ends = [end for _, end in step_ends(sigmas)]
    plans = {}
    for sigma_min, (steps, repeats, high) in restarts.items():
        low = min(ends, key=lambda end: abs(end - sigma_min))
        if not low < high:
            raise ValueError(f"a restart's sigma_max must be above its sigma_min, {low:.4g}, got {high:.4g}")
        # The last is the run's own sigma, whose timestep is known.
        plans[ends.index(low)] = repeats, [*map(float, karras(low, high, steps + 1)[:-1]), low]

    def repeat(i: int, x: Tensor) -> Tensor:
        repeats, levels = plans.get(i, (0, []))
        for _ in range(repeats):
            x = x + math.sqrt(levels[0] ** 2 - levels[-1] ** 2) * noise()
            x = sampler(denoise, x, levels)
        return x if on_step is None else on_step(i, x)

    return sampler(denoise, x, sigmas, repeat)
