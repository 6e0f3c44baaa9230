"""A decoder in half precision, where it is within a gray level of float32, as with the trained VAE."""

import copy

import pytest
import torch
from torch import Tensor, nn

from kolors_core.checkpoint import EMBEDDED, load_component
from kolors_core.performance.half_precision_vae import (
    HALVES,
    HalfPrecisionDecoder,
    decode_in,
    disable_half_precision,
    enable_half_precision,
    gray_levels,
)
from kolors_core.performance.vae_tiling import disable_tiling, enable_slicing, enable_tiling
from kolors_core.vae import VAE, call

HALF, BFLOAT16 = HALVES


@pytest.fixture(scope="module")
def trained() -> VAE:
    """The embedded model's."""
    vae = load_component(EMBEDDED, "vae")
    assert isinstance(vae, VAE)
    return vae.requires_grad_(False)


@pytest.fixture(scope="module")
def latents(trained: VAE) -> Tensor:
    """Of a small image of three smooth colors."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 16), indexing="ij")
    return trained.encode_images(torch.stack([x, y, torch.sin(3 * x * y)])[None]).mean


@pytest.fixture
def vae(trained: VAE) -> VAE:
    return copy.deepcopy(trained)


def scale_maps(vae: VAE, factor: float) -> None:
    """Scale the feature maps of the decoder; the norms after them take the scale back."""
    decoder = vae.decoder
    writers = [decoder.conv_in, decoder.mid.attention.to_out]
    for resnet in (
        decoder.mid.resnet_in,
        decoder.mid.resnet_out,
        *(r for up in decoder.up for r in up.resnets),
    ):
        writers.append(resnet.conv2)
        if isinstance(resnet.shortcut, nn.Conv2d) and resnet.shortcut.bias is not None:
            resnet.shortcut.bias.data *= factor
    for level in decoder.up:
        if level.upsample is not None and level.upsample.bias is not None:
            level.upsample.bias.data *= factor
    for layer in writers:
        layer.weight.data *= factor
        layer.bias.data *= factor


def test_float16_is_within_a_gray_level_and_bfloat16_is_not(vae: VAE, latents: Tensor) -> None:
    exact = vae.decode_latents(latents)
    decoder = enable_half_precision(vae)
    assert torch.equal(vae.decode_latents(latents), exact), "the first image is float32's"
    assert decoder.dtype == HALF and list(decoder.errors) == [HALF] and decoder.errors[HALF] < 1
    image = vae.decode_latents(latents)
    assert image.dtype == torch.float32 and image.is_contiguous() and not torch.equal(image, exact)
    assert gray_levels(image, exact) == decoder.errors[HALF]
    assert vae.decoder.conv_in.weight.dtype == torch.float32

    strict = enable_half_precision(vae, 0.001)
    for _ in range(2):
        assert torch.equal(vae.decode_latents(latents), exact)
    assert strict.dtype is None and list(strict.errors) == [HALF, BFLOAT16]
    assert strict.errors[HALF] < 1 < strict.errors[BFLOAT16] < 8
    decided = dict(strict.errors)
    vae.decode_latents(latents.flip(-1))
    assert strict.errors == decided, "the first image decides"
    disable_half_precision(vae)
    assert vae.run_coder is call and torch.equal(vae.decode_latents(latents), exact)


def test_a_vae_that_overflows_is_decoded_in_float32(vae: VAE, latents: Tensor) -> None:
    """As SDXL's does: the same image in float32, and none in float16, at first or at a later image."""
    plain = vae.decode_latents(latents)
    earlier = enable_half_precision(vae)
    vae.decode_latents(latents)
    scale_maps(vae, 1e5)
    disable_half_precision(vae)
    exact = vae.decode_latents(latents)
    assert gray_levels(exact, plain) < 0.1 and not torch.isfinite(decode_in(HALF, vae.decoder, latents)).all()
    vae.run_coder = earlier
    assert earlier.dtype == HALF and torch.equal(vae.decode_latents(latents), exact)
    decoder = enable_half_precision(vae)
    for _ in range(2):
        assert torch.equal(vae.decode_latents(latents), exact)
    assert decoder.dtype is None and decoder.errors[HALF] == float("inf") and decoder.errors[BFLOAT16] > 1
    generous = enable_half_precision(vae, 8)
    vae.decode_latents(latents)
    assert generous.dtype == BFLOAT16
    assert gray_levels(vae.decode_latents(latents), exact) == decoder.errors[BFLOAT16]


def test_encoding_and_gradients_keep_float32(vae: VAE, latents: Tensor) -> None:
    images = torch.zeros(1, 3, 16, 16)
    mean, exact = vae.encode_images(images).mean, vae.decode_latents(latents)
    vae.run_coder = HalfPrecisionDecoder(dtype=HALF)
    assert torch.equal(vae.encode_images(images).mean, mean)
    vae.requires_grad_(True)
    decoded = vae.decode_latents(latents)
    assert torch.equal(decoded, exact)
    decoded.sum().backward()
    assert vae.decoder.conv_in.weight.grad is not None
    with torch.no_grad():
        assert not torch.equal(vae.decode_latents(latents), exact)


def test_what_it_refuses(vae: VAE) -> None:
    for limit in (-1, float("nan"), "1"):
        with pytest.raises(ValueError, match="limit must be"):
            enable_half_precision(vae, limit)  # pyright: ignore[reportArgumentType]
    enable_half_precision(vae)
    for enable in (enable_tiling, enable_slicing):
        with pytest.raises(TypeError, match=r"vae.call or a TiledCoder, got HalfPrecisionDecoder\(limit=1.0"):
            enable(vae)
    disable_half_precision(vae)
    enable_tiling(vae)
    with pytest.raises(TypeError, match=r"whose run_coder is vae.call, got TiledCoder\(use_tiling=True"):
        enable_half_precision(vae)
    disable_tiling(vae)
    assert vae.run_coder is not call and enable_half_precision(vae) is vae.run_coder
    with pytest.raises(ValueError, match=r"in float32, got torch.bfloat16: .* vae.to\(torch.float32\)"):
        enable_half_precision(vae.bfloat16())
