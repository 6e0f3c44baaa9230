"""The README's whole path on the embedded model, which every other example here changes.

Each arrow of `str -> TokenBatch -> TextEmbedding -> Conditioning -> denoise -> latents -> image` is one call.
To see an example's change: `diff tests/examples/plain.py tests/examples/sampler.py`.
"""

import torch

from kolors_core.checkpoint import EMBEDDED, load_component
from kolors_core.conditioning import Conditioning, size_ids
from kolors_core.guidance import guided
from kolors_core.image import to_images
from kolors_core.sampling import dpmpp_2m
from kolors_core.schedulers import DPMSolverMultistepScheduler
from kolors_core.tokenizer import Tokenizer

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
    latents = dpmpp_2m(denoise, noise * schedule.init_noise_sigma, schedule.sigmas)  # [1, 4, H/8, W/8]
    to_images(vae.decode_latents(latents), "pil")[0].save("ladybug.png")
