"""Another sampler: Heun's method, which looks ahead to the end of a step and corrects its slope.

Algorithm 1 of https://arxiv.org/abs/2206.00364, without churn: of second order, with two calls of the UNet a
step.
In the library: one function, kolors_core/sampling.py. A pipeline takes it as `pipe.sampler = heun`.
Look at: with fewer steps than Euler's method needs, the same image.
"""

from itertools import pairwise

import torch
from torch import Tensor

from kolors_core.checkpoint import EMBEDDED, load_component
from kolors_core.conditioning import Conditioning, size_ids
from kolors_core.guidance import guided
from kolors_core.image import to_images
from kolors_core.sampling import Denoiser, OnStep, Sigmas
from kolors_core.schedulers import DPMSolverMultistepScheduler
from kolors_core.tokenizer import Tokenizer


def heun(denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None) -> Tensor:
    """Arguments as for `euler`: x [B, 4, H/8, W/8], n + 1 falling sigmas."""
    for i, (sigma, after) in enumerate(pairwise(map(float, sigmas))):
        slope = (x - denoise(x, sigma)) / sigma  # dx/dsigma
        ahead = x + (after - sigma) * slope
        if after > 0:
            slope = (slope + (ahead - denoise(ahead, after)) / after) / 2
        x = x + (after - sigma) * slope
        x = x if on_step is None else on_step(i, x)
    return x


folder, height, width = EMBEDDED, 128, 128
tokenizer = Tokenizer(folder / "tokenizer")
chatglm, unet, vae = (load_component(folder, name) for name in ("text_encoder", "unet", "vae"))

with torch.no_grad():
    text = chatglm(tokenizer(["一张瓢虫的照片", ""]))  # tokens [2, 256, C], pooled [2, C]
    sizes = size_ids((height, width), (0, 0), (height, width))  # [1, 6]
    positive = Conditioning(text.tokens[:1], text.pooled[:1], sizes)
    negative = Conditioning(text.tokens[1:], text.pooled[1:], sizes)

    schedule = DPMSolverMultistepScheduler(use_karras_sigmas=True).schedule(8)
    denoise = guided(unet, schedule, positive, negative, scale=5.0)  # (x, sigma) -> x0
    noise = torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(7))
    latents = heun(denoise, noise * schedule.init_noise_sigma, schedule.sigmas)  # [1, 4, H/8, W/8]
    to_images(vae.decode_latents(latents), "pil")[0].save("ladybug.png")
