"""Prompt-to-prompt (https://arxiv.org/abs/2208.01626): a word is replaced, and the image keeps its layout.

For a part of the steps, the edited prompt's cross-attention takes the maps of the first prompt, whose words
stand in the same places.
In the library: `inject_attention`, kolors_core/inspection/attention_changes.py.
Look at: the ladybug, whose outline comes nearer to the apple's than without.
"""

import torch
from torch import Tensor

from kolors_core.inspection.attention_changes import inject_attention
from kolors_core.pipelines.text_to_image import KolorsPipeline

pipe = KolorsPipeline.from_pretrained("tiny")


def swap(maps: Tensor, step: int) -> Tensor:
    maps[-1] = maps[-2]  # rows: both unconditional, then the first prompt's and the edited one's
    return maps


noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7)).expand(2, -1, -1, -1)
with inject_attention(pipe.unet, {"*cross_attention": swap}, steps=range(4)):
    images = pipe(["a red apple", "a red ladybug"], latents=noise, num_inference_steps=6).images
