"""Another attention kernel: FlashAttention's online softmax in plain tensors, to start your own from.

Algorithm 1 of https://arxiv.org/abs/2205.14135: keys come block by block, no row of scores is ever whole.
In the library: one function and its entry in `KERNELS`, kolors_core/attention.py. Every attention of ChatGLM,
UNet and VAE then goes through it, a pipeline's too: `with attention_kernel("online"): pipe(...)`.
Look at: the image is plain.py's.
"""

import torch
from torch import Tensor

from kolors_core.attention import KERNELS, attention_kernel
from kolors_core.checkpoint import EMBEDDED, load_component
from kolors_core.conditioning import Conditioning, size_ids
from kolors_core.guidance import guided
from kolors_core.image import to_images
from kolors_core.sampling import dpmpp_2m
from kolors_core.schedulers import DPMSolverMultistepScheduler
from kolors_core.tokenizer import Tokenizer


def online(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v: q [B, H, L, D]; k, v [B, H, S, D]; bias bool or floats."""
    top = torch.full_like(q[..., :1], torch.finfo(q.dtype).min)
    total, out = torch.zeros_like(top), torch.zeros_like(v[:, :, :1])
    for start in range(0, k.shape[2], 32):
        keys = slice(start, start + 32)
        scores = q @ k[:, :, keys].transpose(2, 3) / q.shape[-1] ** 0.5  # [B, H, L, 32]
        if bias is not None:
            part = bias[..., keys]
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))  # [B, H, L, 1]
        kept, weights, top = (top - higher).exp(), (scores - higher).exp(), higher
        total, out = total * kept + weights.sum(-1, keepdim=True), out * kept + weights @ v[:, :, keys]
    return out / total  # [B, H, L, D]


KERNELS["online"] = online
folder, height, width = EMBEDDED, 128, 128
tokenizer = Tokenizer(folder / "tokenizer")
chatglm, unet, vae = (load_component(folder, name) for name in ("text_encoder", "unet", "vae"))

with torch.no_grad(), attention_kernel("online"):
    text = chatglm(tokenizer(["一张瓢虫的照片", ""]))  # tokens [2, 256, C], pooled [2, C]
    sizes = size_ids((height, width), (0, 0), (height, width))  # [1, 6]
    positive = Conditioning(text.tokens[:1], text.pooled[:1], sizes)
    negative = Conditioning(text.tokens[1:], text.pooled[1:], sizes)

    schedule = DPMSolverMultistepScheduler(use_karras_sigmas=True).schedule(8)
    denoise = guided(unet, schedule, positive, negative, scale=5.0)  # (x, sigma) -> x0
    noise = torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(7))
    latents = dpmpp_2m(denoise, noise * schedule.init_noise_sigma, schedule.sigmas)  # [1, 4, H/8, W/8]
    to_images(vae.decode_latents(latents), "pil")[0].save("ladybug.png")
