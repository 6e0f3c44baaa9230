"""Another block: global response normalisation in every feed-forward of the UNet, beside its old weights.

Equations 1 to 3 of https://arxiv.org/abs/2301.00808 (ConvNeXt V2): channels compete by their norms over the
image.
In the library: one class and one line in the constructor of `TransformerBlock`, kolors_core/unet.py, and a
field of `UNetConfig` to choose by. What fits is kept; what is new needs an initializer, here `zeros`.
Look at: the list of what is new; and plain.py's image, bit for bit, until it is trained.
"""

import torch
from torch import Tensor, nn

from kolors_core.checkpoint import EMBEDDED, load_component, load_modified
from kolors_core.conditioning import Conditioning, size_ids
from kolors_core.guidance import guided
from kolors_core.image import to_images
from kolors_core.loading import zeros
from kolors_core.sampling import dpmpp_2m
from kolors_core.schedulers import DPMSolverMultistepScheduler
from kolors_core.tokenizer import Tokenizer
from kolors_core.unet import FeedForward, TransformerBlock, UNet, UNetConfig


class ResponseNorm(FeedForward):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.gamma, self.beta = (nn.Parameter(torch.zeros(4 * width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        h = value * nn.functional.gelu(gate)  # [B, N, 4C]
        norm = h.norm(dim=1, keepdim=True)  # [B, 1, 4C]
        return self.proj_out(h + self.gamma * h * norm / (norm.mean(-1, keepdim=True) + 1e-6) + self.beta)


def build(config: UNetConfig) -> UNet:
    unet = UNet(config)
    for block in unet.modules():
        if isinstance(block, TransformerBlock):
            block.feed_forward = ResponseNorm(len(block.norm3.weight))
    return unet


folder, height, width = EMBEDDED, 128, 128
tokenizer = Tokenizer(folder / "tokenizer")
chatglm, vae = (load_component(folder, name) for name in ("text_encoder", "vae"))
unet, report = load_modified(folder, "unet", build, {"*.gamma": zeros, "*.beta": zeros})
print(report.missing)

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
