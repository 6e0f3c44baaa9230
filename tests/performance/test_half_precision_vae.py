"""A decoder in half precision, where it is within a gray level of float32, as with the trained VAE."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kolors_core import KolorsPipeline
from kolors_core.performance.half_precision_vae import (
    HALVES,
    decode_in,
    disable_half_precision,
    enable_half_precision,
    gray_levels,
)
from kolors_core.performance.vae_tiling import enable_tiling
from kolors_core.vae import VAE, call
from tests.support.offloads import offloaded

HALF, BFLOAT16 = HALVES


@pytest.fixture(scope="module")
def drawn() -> tuple[KolorsPipeline, Tensor]:
    """The embedded model, with latents that it drew."""
    pipe = KolorsPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    prompts = ["a red apple", "two dogs in the snow"]
    latents = pipe(prompts, num_inference_steps=4, generator=generators, output_type="latent").images
    return pipe, latents


@pytest.fixture
def vae(drawn: tuple[KolorsPipeline, Tensor]) -> VAE:
    return copy.deepcopy(drawn[0].vae)


def overflowing(vae: VAE) -> None:
    """Scale the feature maps of the decoder beyond float16; the norms after them take the scale back."""
    decoder = vae.decoder
    writers = [decoder.conv_in, decoder.mid.attention.to_out]
    for level in (
        decoder.mid.resnet_in,
        decoder.mid.resnet_out,
        *(r for up in decoder.up for r in up.resnets),
    ):
        writers.append(level.conv2)
        if isinstance(level.shortcut, nn.Conv2d) and level.shortcut.bias is not None:
            level.shortcut.bias.data *= 1e5
    for level in decoder.up:
        if level.upsample is not None and level.upsample.bias is not None:
            level.upsample.bias.data *= 1e5
    for layer in writers:
        layer.weight.data *= 1e5
        layer.bias.data *= 1e5


@torch.no_grad()
def test_float16_is_within_a_gray_level_and_bfloat16_is_not(
    vae: VAE, drawn: tuple[KolorsPipeline, Tensor]
) -> None:
    latents = drawn[1]
    exact = vae.decode_latents(latents)
    decoder = enable_half_precision(vae)
    assert torch.equal(vae.decode_latents(latents), exact), "the first image is float32's"
    assert decoder.dtype == HALF and list(decoder.errors) == [HALF] and decoder.errors[HALF] < 1
    image = vae.decode_latents(latents)
    assert image.dtype == torch.float32 and image.is_contiguous() and not torch.equal(image, exact)
    assert gray_levels(image, exact) == decoder.errors[HALF] < 1
    assert vae.decoder.conv_in.weight.dtype == torch.float32

    strict = enable_half_precision(vae, limit=0.001)
    for _ in range(2):
        assert torch.equal(vae.decode_latents(latents), exact)
    assert strict.dtype is None and list(strict.errors) == [HALF, BFLOAT16]
    assert strict.errors[HALF] < 1 < strict.errors[BFLOAT16] < 8

    by_name = enable_half_precision(vae, BFLOAT16)
    assert gray_levels(vae.decode_latents(latents), exact) == strict.errors[BFLOAT16] and not by_name.errors
    disable_half_precision(vae)
    assert vae.run_coder is call and torch.equal(vae.decode_latents(latents), exact)


@torch.no_grad()
def test_a_vae_that_overflows_is_decoded_in_float32(vae: VAE, drawn: tuple[KolorsPipeline, Tensor]) -> None:
    """As SDXL's does: the same image in float32, and none in float16, at first or at a later image."""
    latents, plain = drawn[1], vae.decode_latents(drawn[1])
    forced = enable_half_precision(vae, HALF)
    assert not torch.equal(vae.decode_latents(latents), plain)
    overflowing(vae)
    disable_half_precision(vae)
    exact = vae.decode_latents(latents)
    assert gray_levels(exact, plain) < 0.1 and not torch.isfinite(decode_in(HALF, vae.decoder, latents)).all()
    vae.run_coder = forced
    assert torch.equal(vae.decode_latents(latents), exact)
    decoder = enable_half_precision(vae)
    for _ in range(2):
        assert torch.equal(vae.decode_latents(latents), exact)
    assert decoder.dtype is None and decoder.errors[HALF] == float("inf") and decoder.errors[BFLOAT16] > 1
    assert enable_half_precision(vae, limit=8.0).errors == {} and vae.decode_latents(latents) is not None
    chosen: Any = vae.run_coder
    assert chosen.dtype == BFLOAT16


def test_encoding_gradients_and_offload_keep_float32(vae: VAE, drawn: tuple[KolorsPipeline, Tensor]) -> None:
    pipe, latents = drawn
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, exact = vae.encode_images(images).mean, vae.decode_latents(latents)
    enable_half_precision(vae, HALF)
    with torch.no_grad():
        assert torch.equal(vae.encode_images(images).mean, mean)
    decoded = vae.decode_latents(latents)
    assert torch.equal(decoded, exact)
    decoded.sum().backward()
    assert vae.decoder.conv_in.weight.grad is not None
    own = KolorsPipeline(**pipe.components | {"vae": vae})
    with torch.no_grad():
        half = vae.decode_latents(latents)
        for by_block, wanted in ((False, half), (True, half)):
            with offloaded(own, by_block):
                own._enter_stage("vae")
                assert torch.equal(vae.decode_latents(latents), wanted)


def test_what_it_refuses(vae: VAE) -> None:
    with pytest.raises(ValueError, match="torch.float16, torch.bfloat16 or None, got torch.float64"):
        enable_half_precision(vae, torch.float64)
    enable_half_precision(vae)
    with pytest.raises(TypeError, match="expected a VAE whose run_coder is vae.call or a TiledCoder"):
        enable_tiling(vae)
    disable_half_precision(vae)
    enable_tiling(vae)
    with pytest.raises(ValueError, match="runs in tiles or slices: disable them"):
        enable_half_precision(vae)
    with pytest.raises(ValueError, match=r"in float32, got torch.bfloat16: .* vae.to\(torch.float32\)"):
        enable_half_precision(vae.bfloat16())
