"""Another guidance rule: CFG-Zero*, which first scales the unconditional noise to fit the conditional one.

https://arxiv.org/abs/2503.18886: its optimised scale, <cond, uncond> / |uncond|^2; its zero start is for flow
matching and left out.
In the library: one function of `guided`'s signature, kolors_core/guidance.py. A pipeline takes it as
`pipe.guided = fitted`.
Look at: the background is calmer than `guided` leaves it at a scale of 10.
"""

from typing import Any

import torch
from torch import Tensor

from kolors_core.checkpoint import EMBEDDED, load_component
from kolors_core.conditioning import Conditioning, size_ids
from kolors_core.guidance import guided, make_denoiser
from kolors_core.image import to_images
from kolors_core.sampling import Denoiser, dpmpp_2m
from kolors_core.schedule import Schedule
from kolors_core.schedulers import DPMSolverMultistepScheduler
from kolors_core.tokenizer import Tokenizer
from kolors_core.unet import UNet


def fitted(
    unet: UNet, schedule: Schedule, positive: Conditioning, negative: Conditioning | None = None,
    scale: float = 1.0, **how: Any,
) -> Denoiser:  # fmt: skip
    if negative is None:
        return guided(unet, schedule, positive, **how)

    def combine(_timestep: float, noise: Tensor) -> Tensor:
        uncond, cond = noise.chunk(2)  # each [B, 4, H/8, W/8]
        fit = (cond * uncond).sum((1, 2, 3), keepdim=True) / uncond.square().sum((1, 2, 3), keepdim=True)
        return fit * uncond + scale * (cond - fit * uncond)

    return make_denoiser(unet, schedule, Conditioning.cat(negative, positive), 2, combine, **how)


folder, height, width = EMBEDDED, 128, 128
tokenizer = Tokenizer(folder / "tokenizer")
chatglm, unet, vae = (load_component(folder, name) for name in ("text_encoder", "unet", "vae"))

with torch.no_grad():
    text = chatglm(tokenizer(["一张瓢虫的照片", ""]))  # tokens [2, 256, C], pooled [2, C]
    sizes = size_ids((height, width), (0, 0), (height, width))  # [1, 6]
    positive = Conditioning(text.tokens[:1], text.pooled[:1], sizes)
    negative = Conditioning(text.tokens[1:], text.pooled[1:], sizes)

    schedule = DPMSolverMultistepScheduler(use_karras_sigmas=True).schedule(12)
    denoise = fitted(unet, schedule, positive, negative, scale=10.0)  # (x, sigma) -> x0
    noise = torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(7))
    latents = dpmpp_2m(denoise, noise * schedule.init_noise_sigma, schedule.sigmas)  # [1, 4, H/8, W/8]
    to_images(vae.decode_latents(latents), "pil")[0].save("ladybug.png")
