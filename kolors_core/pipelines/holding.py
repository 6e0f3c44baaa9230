"""Places of a picture that a run holds while others change: inpainting without a mask channel is one case.

Source: Levin and Fried, https://arxiv.org/abs/2306.00950, and the blending of diffusers'
pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl_inpaint.py.
Shapes: every tensor is [B, 4, H/8, W/8], or has 1 in place of B or 4.
"""

import torch
from torch import Tensor

from kolors_core.sampling import Denoise, OnStep, Sampler, Sigmas


def holding(sampler: Sampler, *, clean: Tensor, noise: Tensor, strength: Tensor) -> Sampler:
    """The sampler, that gives places back what they were until each place's own time has come.

    clean: latents of the picture; noise: what the run's x has been noised with. strength: from 0 to 1, how
    much of the run changes a place: int(strength * n) of n steps, the last ones, as image to image would. So
    0 holds a place to the end and 1 never, which is inpainting. After each step, places still held become
    clean + sigma * noise of the sigma reached.
    """

    def run(denoise: Denoise, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None) -> Tensor:
        steps = len(sigmas) - 1

        def hold(i: int, x: Tensor) -> Tensor:
            is_held = strength * steps < steps - i
            x = torch.where(is_held, clean + noise * float(sigmas[i + 1]), x)
            return x if on_step is None else on_step(i, x)

        return sampler(denoise, x, sigmas, hold)

    return run
