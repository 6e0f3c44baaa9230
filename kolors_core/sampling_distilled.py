"""Samplers of distilled models, whose `denoise` predicts the end of the whole trajectory, in 1 to 8 steps.

Arguments and shapes are those of sampling.py; `noise()` draws standard normal noise like x.
"""

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor

from kolors_core.sampling import Denoiser, Noise, OnStep, Sigmas, euler, step_ends


def lcm(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None, *, noise: Noise,
    scalings: Callable[[float], tuple[float, float]] | None = None
) -> Tensor:  # fmt: skip
    """Predict the clean latents and add noise of the next sigma to them, in every step.

    Source: consistency models, https://arxiv.org/abs/2303.01469, algorithm 1; latent consistency models,
    https://arxiv.org/abs/2310.04378, algorithm 3. x, sigmas, on_step: as for `euler`. The step to sigma 0
    draws nothing. scalings(sigma): the weights of latents of variance 1 and of x0 in the prediction, see
    `boundary_scalings`; without them it is x0.
    """
    for i, (sigma, next_sigma) in enumerate(step_ends(sigmas)):
        x0 = denoise(x, sigma)
        if scalings is not None:
            c_skip, c_out = scalings(sigma)
            x0 = c_out * x0 + c_skip / math.sqrt(sigma**2 + 1) * x
        x = x0 + next_sigma * noise() if next_sigma > 0 else x0
        if on_step is not None:
            x = on_step(i, x)
    return x


def boundary_scalings(timestep: float, timestep_scaling: float = 10.0) -> tuple[float, float]:
    """Compute (c_skip, c_out) of `lcm`: 1 and 0 at timestep 0, close to 0 and 1 soon after it.

    Source: https://arxiv.org/abs/2310.04378, section 4.1; diffusers' scheduling_lcm.py.
    """
    scaled, sigma_data = timestep * timestep_scaling, 0.5
    total = scaled**2 + sigma_data**2
    return sigma_data**2 / total, scaled / math.sqrt(total)


def tcd(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None, *, noise: Noise,
    lower: Callable[[float], float]
) -> Tensor:  # fmt: skip
    """Step by Euler's method to `lower(next_sigma)`, at most next_sigma, and add noise up to next_sigma.

    Source: strategic stochastic sampling of https://arxiv.org/abs/2402.19159. x, sigmas, on_step: as for
    `euler`; the reference's last sigma is that of timestep 0, not 0. lower: see `lower_sigma`; a step draws
    nothing where it returns next_sigma itself, as it does in the last step, and at eta 0 in all.
    """
    for i, (sigma, next_sigma) in enumerate(step_ends(sigmas)):
        down = lower(next_sigma)
        x = euler(denoise, x, (sigma, down))
        if down < next_sigma:
            x = x + math.sqrt(next_sigma**2 - down**2) * noise()
        if on_step is not None:
            x = on_step(i, x)
    return x


def lower_sigma(sigma: float, training_sigmas: Tensor, eta: float) -> float:
    """Return the sigma at floor((1 - eta) * t), where t is the training timestep of `sigma`.

    training_sigmas: [T], ascending. eta: the paper's gamma; 0 returns sigma of timestep t, 1 that of 0.
    """
    timestep = int((training_sigmas - sigma).abs().argmin())
    # In float32, as in the reference: it decides which side of a whole number the product is on.
    return training_sigmas[int(np.float32(1 - eta) * np.float32(timestep))].item()
