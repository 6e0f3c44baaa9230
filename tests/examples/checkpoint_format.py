"""Another checkpoint format: an autoencoder with the names that diffusers gave until 2023, read by one table.

Many published ones have `query`, `key`, `value` and `proj_attn` in the middle's attentions (diffusers'
models/modeling_utils.py, `_fix_state_dict_keys_on_load`).
In the library: one table in weights_convert/ and its entry in `TABLES`; every loader of folders and
`python -m weights_convert` then read the format. A tensor without a place, or missing, is named by an error.
Look at: plain.py's image, bit for bit.
"""

from dataclasses import replace
from pathlib import Path

import torch

from kolors_core.checkpoint import EMBEDDED, load_component
from kolors_core.conditioning import Conditioning, size_ids
from kolors_core.guidance import guided
from kolors_core.image import to_images
from kolors_core.loading import load
from kolors_core.sampling import dpmpp_2m
from kolors_core.schedulers import DPMSolverMultistepScheduler
from kolors_core.tokenizer import Tokenizer
from weights_convert import TABLES
from weights_convert.key_mapping import Table, inverse, rename
from weights_convert.safetensors_files import Source, save_tensors

RENAMED = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
VAE = TABLES["vae"]


def older(name: str) -> str:
    return rename(name, inverse(RENAMED))


TABLES["vae until 2023"] = OLD_VAE = Table(
    component="vae",
    blocks=tuple(replace(block, tensors=tuple(map(older, block.tensors))) for block in VAE.blocks),
    rules=(*RENAMED, *VAE.rules),
    required={older(name): why for name, why in VAE.required.items()},
)
folder, height, width = EMBEDDED, 128, 128
tokenizer = Tokenizer(folder / "tokenizer")
chatglm, unet, vae = (load_component(folder, name) for name in ("text_encoder", "unet", "vae"))
file = Path("old_vae.safetensors")  # in place of one that you have
save_tensors({OLD_VAE.to_public(name): tensor for name, tensor in vae.state_dict().items()}, file)
load(vae, Source([file]), "vae")

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
