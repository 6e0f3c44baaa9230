"""Another width: the cross-attentions read 256 numbers of each text token in place of 192.

At first nothing changes, as in Net2Net (https://arxiv.org/abs/1511.05641): new rows of the text projection
are copies of old ones, and the columns that read them zeros. Were both zero, neither would ever learn.
In the library: one field of `UNetConfig`, here another value of one that is there.
Look at: the list of what had another shape; and plain.py's image, until it is trained.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kolors_core.checkpoint import EMBEDDED, load_component, load_modified
from kolors_core.conditioning import Conditioning, size_ids
from kolors_core.guidance import guided
from kolors_core.image import to_images
from kolors_core.loading import zero_padded
from kolors_core.sampling import dpmpp_2m
from kolors_core.schedulers import DPMSolverMultistepScheduler
from kolors_core.tokenizer import Tokenizer
from kolors_core.unet import UNet


def repeated(shape: torch.Size, found: Tensor | None) -> Tensor:
    """An initializer: the checkpoint's rows, and again from the first."""
    assert found is not None
    return found[torch.arange(shape[0]) % len(found)]


folder, height, width = EMBEDDED, 128, 128
tokenizer = Tokenizer(folder / "tokenizer")
chatglm, vae = (load_component(folder, name) for name in ("text_encoder", "vae"))
unet, report = load_modified(
    folder,
    "unet",
    lambda config: UNet(replace(config, context_dim=256)),
    {"text_proj.*": repeated, "*.cross_attention.to_[kv].weight": zero_padded},
)
print(report)

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
