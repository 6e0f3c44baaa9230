"""What tests of the embedded model's recipes share: its fonts, names for its things, and a small pipeline."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.tiny.captions import Grammar
from benchmarks.tiny.emoji import CONCEPTS, FONT, Concept
from benchmarks.tiny.scenes import SIGN_FONT
from kolors_core import KolorsPipeline
from kolors_core.config import VAEConfig
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.lora_recipes import shallow_pipe
from tests.support.small import SHALLOW, randomise

SMALLEST_VAE = VAEConfig(sample_size=128, channels=(8, 8, 8, 8), norm_groups=4)
GRAMMAR = Grammar([Concept(c, (f"thing {i}",), (f"东西{i}",)) for i, c in enumerate(CONCEPTS)])

needs_fonts = pytest.mark.skipif(
    not (FONT.exists() and SIGN_FONT.exists()), reason="Debian's Noto fonts of emoji and Chinese are missing"
)


def scene_pipe(tokenizer: Path) -> KolorsPipeline:
    """A pipeline of small random models, whose own size is that of scenes, 128 pixels."""
    pipe = shallow_pipe(tokenizer)
    pipe.unet, pipe.vae = UNet(replace(SHALLOW.unet, sample_size=16)), VAE(SMALLEST_VAE)
    for seed, model in enumerate((pipe.unet, pipe.vae)):
        randomise(model.eval().requires_grad_(False), seed)
    return pipe
