"""A new condition: how good the image is to look, as a score of LAION's aesthetic predictor.

Told as SDXL tells sizes (https://arxiv.org/abs/2307.01952, section 2.2): a sinusoid and a perceptron, added
to the time. Its last layer is zero at first, so that nothing changes.
In the library: whatever is added to the time is `added`, a field of `Conditioning`, an argument of
`UNet.forward` and one line in `added_embedding`. What has a place in the image is `extra`; what comes as
tokens goes behind the text's.
Look at: plain.py's image, bit for bit, until it is trained.
"""

import torch
from torch import Tensor, nn

from kolors_core.checkpoint import EMBEDDED, load_component
from kolors_core.conditioning import Conditioning, size_ids
from kolors_core.guidance import guided
from kolors_core.image import to_images
from kolors_core.sampling import dpmpp_2m
from kolors_core.schedulers import DPMSolverMultistepScheduler
from kolors_core.tokenizer import Tokenizer
from kolors_core.unet import TimestepEmbedding, sinusoid

folder, height, width = EMBEDDED, 128, 128
tokenizer = Tokenizer(folder / "tokenizer")
chatglm, unet, vae = (load_component(folder, name) for name in ("text_encoder", "unet", "vae"))
score_embedding = TimestepEmbedding(unet.config.size_dim, unet.config.time_dim)
for parameter in score_embedding.linear_2.parameters():
    nn.init.zeros_(parameter)


def scored(*scores: float) -> Tensor:
    """What scores add to the time: [B, time_dim]."""
    return score_embedding(sinusoid(torch.tensor(scores), unet.config.size_dim))


with torch.no_grad():
    text = chatglm(tokenizer(["一张瓢虫的照片", ""]))  # tokens [2, 256, C], pooled [2, C]
    sizes = size_ids((height, width), (0, 0), (height, width))  # [1, 6]
    positive = Conditioning(text.tokens[:1], text.pooled[:1], sizes, added=scored(8.0))
    negative = Conditioning(text.tokens[1:], text.pooled[1:], sizes, added=scored(2.0))

    schedule = DPMSolverMultistepScheduler(use_karras_sigmas=True).schedule(8)
    denoise = guided(unet, schedule, positive, negative, scale=5.0)  # (x, sigma) -> x0
    noise = torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(7))
    latents = dpmpp_2m(denoise, noise * schedule.init_noise_sigma, schedule.sigmas)  # [1, 4, H/8, W/8]
    to_images(vae.decode_latents(latents), "pil")[0].save("ladybug.png")
