"""Another text encoder: bytes in place of word pieces, for any script and for spelling.

After ByT5 (https://arxiv.org/abs/2105.13626). For two prompts it learns in a second to be read as ChatGLM is:
its pooled state and what each cross-attention makes of its tokens are to be the same. That is distillation as
in https://arxiv.org/abs/2311.17086 (PEA-Diffusion), through the attentions alone.
In the library: one module, in a file of its own, that returns a `TextEmbedding`. A pipeline takes what it
gives as `prompt_embeds` and `pooled_prompt_embeds`.
Look at: a ladybug, of a prompt that ChatGLM has not read.
"""

import torch
from torch import nn

from kolors_core.attention import attention
from kolors_core.chatglm import TextEmbedding
from kolors_core.checkpoint import EMBEDDED, load_component
from kolors_core.conditioning import Conditioning, size_ids
from kolors_core.guidance import guided
from kolors_core.image import to_images
from kolors_core.sampling import dpmpp_2m
from kolors_core.schedulers import DPMSolverMultistepScheduler
from kolors_core.tokenizer import Tokenizer


class ByteEncoder(nn.Module):
    def __init__(self, text_dim: int) -> None:
        super().__init__()
        self.embedding, self.states = nn.Embedding(256, 64), nn.GRU(64, 64, batch_first=True)
        self.to_tokens, self.to_pooled = nn.Linear(64, text_dim), nn.Linear(64, text_dim)

    def forward(self, prompts: list[str]) -> TextEmbedding:
        ids = torch.tensor([[*prompt.encode().rjust(32, b"\0")] for prompt in prompts])
        states, last = self.states(self.embedding(ids))  # [B, 32, 64], [1, B, 64]
        return TextEmbedding(self.to_tokens(states), self.to_pooled(last[0]))


folder, height, width = EMBEDDED, 128, 128
tokenizer = Tokenizer(folder / "tokenizer")
chatglm, unet, vae = (load_component(folder, name) for name in ("text_encoder", "unet", "vae"))
torch.manual_seed(0)
prompts, encoder = ["一张瓢虫的照片", ""], ByteEncoder(unet.config.text_dim)
aim = chatglm.requires_grad_(False)(tokenizer(prompts).merge_padding())
optimizer = torch.optim.Adam(encoder.parameters(), lr=0.01)
for _ in range(60):
    text = encoder(prompts)
    loss = (text.pooled - aim.pooled).square().mean()
    for a, b in zip(*(unet.project_kv(unet.context(t.tokens, t.counts)) for t in (text, aim)), strict=True):
        loss = loss + (attention(b.k, *a[:3]) - attention(b.k, *b[:3])).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with torch.no_grad():
    text = encoder(prompts)  # tokens [2, 32, C], pooled [2, C]
    sizes = size_ids((height, width), (0, 0), (height, width))  # [1, 6]
    positive = Conditioning(text.tokens[:1], text.pooled[:1], sizes)
    negative = Conditioning(text.tokens[1:], text.pooled[1:], sizes)

    schedule = DPMSolverMultistepScheduler(use_karras_sigmas=True).schedule(8)
    denoise = guided(unet, schedule, positive, negative, scale=5.0)  # (x, sigma) -> x0
    noise = torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(7))
    latents = dpmpp_2m(denoise, noise * schedule.init_noise_sigma, schedule.sigmas)  # [1, 4, H/8, W/8]
    to_images(vae.decode_latents(latents), "pil")[0].save("ladybug.png")
