"""Small models with random weights, and how far apart two results may be: all that needs no reference."""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from benchmarks.parity.layers import relative_error as relative_error
from kolors_core.adapters.clip_vision import CLIPVisionConfig
from kolors_core.config import ChatGLMConfig, KolorsConfig, UNetConfig, VAEConfig

EXACT = 1e-10  # relative, in float64: the floor is about 1e-14, the smallest mistake we know of 1e-5
FLOAT32 = 5e-6  # relative, where the reference computes a part in float32: the floor is about 1e-6

# The smallest Kolors with every part of the large one: attention at two of three levels, two resnets a level.
SMALL = KolorsConfig(
    text_encoder=ChatGLMConfig(
        vocab_size=640, hidden_size=64, feed_forward_size=96, layers=3, heads=4, head_dim=16, num_kv_heads=2
    ),
    unet=UNetConfig(
        sample_size=16, channels=(16, 32, 64), heads=(2, 4, 8), depths=(0, 1, 2), text_dim=64, context_dim=48,
        size_dim=12, norm_groups=8,
    ),
    vae=VAEConfig(sample_size=128, channels=(16, 16, 32, 32), norm_groups=8),
)  # fmt: skip
SMALL_CLIP = CLIPVisionConfig(
    image_size=28, patch_size=7, hidden_size=64, feed_forward_size=96, layers=3, heads=4, projection_dim=48
)

# Two levels, as shallow as they can be, for what torch's compiler traces as a whole and for training.
SHALLOW = replace(
    SMALL,
    unet=replace(SMALL.unet, channels=(16, 32), heads=(2, 4), depths=(0, 1), resnets_per_level=1),
)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter its own random values, of a size that keeps activations near 1."""
    named = dict(model.named_parameters())
    layout = tuple((tuple(parameter.shape), name.endswith("weight")) for name, parameter in named.items())
    is_float32 = all(parameter.dtype == torch.float32 for parameter in named.values())
    for parameter, value in zip(named.values(), _values(layout, seed, is_float32), strict=True):
        parameter.data.copy_(value)


@lru_cache(maxsize=12)
def _values(layout: tuple[tuple[tuple[int, ...], bool], ...], seed: int, is_float32: bool) -> list[Tensor]:
    """Draw values for parameters of these shapes, weights or not; kept, as many tests have the same model."""
    generator, values = torch.Generator().manual_seed(seed), []
    for shape, is_weight in layout:
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) > 1:
            value = noise / noise[0].numel() ** 0.5
        else:
            value = 0.3 * noise + (1.0 if is_weight else 0.0)
        values.append(value.float() if is_float32 else value)
    return values
