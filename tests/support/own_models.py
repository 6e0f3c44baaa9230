"""A pipeline whose denoiser and text encoder are those of tests/examples/models, with random weights."""

from typing import Any

import torch
from torch import Tensor

from kolors_core import KolorsPipeline
from tests.examples.models.bidirectional import Reader, ReaderConfig
from tests.examples.models.dit import DiT, DiTConfig
from tests.support.small import randomise

SIZE: dict[str, Any] = {"height": 32, "width": 48}


def make_dit(dtype: torch.dtype = torch.float32, seed: int = 0) -> DiT:
    net = DiT(DiTConfig(width=32))
    randomise(net, seed)
    return net.to(dtype).eval()


def make_reader(seed: int = 0) -> Reader:
    encoder = Reader(ReaderConfig())
    randomise(encoder, seed)
    return encoder.eval()


def own_pipeline(base: KolorsPipeline, **parts: Any) -> KolorsPipeline:
    """The base's VAE, tokenizer and scheduler with a DiT and a Reader, or with other parts."""
    pipe = KolorsPipeline.from_pipe(base, **{"unet": make_dit(), "text_encoder": make_reader()} | parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, prompt: Any = "a red apple", **given: Any) -> Tensor:
    """Latents of two guided steps."""
    seed = torch.Generator().manual_seed(0)
    named = {"num_inference_steps": 2, "output_type": "latent", "generator": seed} | SIZE | given
    return pipe(prompt, **named).images
