"""The VAE in bands and picture by picture: what the whole gives, to the last bits, in less memory."""

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from kolors_core import KolorsImg2ImgPipeline
from kolors_core.attention import planned_for
from kolors_core.compiling import compile_blocks
from kolors_core.config import KOLORS, VAEConfig
from kolors_core.plan import Ledger
from kolors_core.vae import VAE, ResBlock
from kolors_core.vae_tiles import FEWEST_ROWS, Kept, pooled
from tests.offloads import offloaded
from tests.parity import EXACT, pair, randomise, relative_error
from tests.pipelines import Pair, picture, steps_of

CONFIG = VAEConfig(channels=(8, 16, 24, 24), norm_groups=4)


@pytest.fixture(scope="module")
def vae() -> VAE:
    model = VAE(CONFIG).double().eval()
    randomise(model)
    return model


def latents(batch: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randn(batch, 4, height, width, generator=generator, dtype=torch.float64).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize(
    ("batch", "height", "width", "side"),
    [(1, 32, 40, 64), (2, 20, 9, 64), (3, 33, 17, 96), (1, 64, 5, 64), (1, 9, 40, 120)],
)
def test_it_is_the_whole(vae: VAE, batch: int, height: int, width: int, side: int) -> None:
    """Decoded and encoded; heights that no band divides, single rows at the end, several pictures."""
    vae = copy.deepcopy(vae)
    given = latents(batch, height, width)
    image = vae.decode(given)
    encoded = vae.encode(image)
    vae.enable_tiling(tile_sample_min_size=side)
    bands: list[int] = []
    hook = vae.decoder.conv_out.register_forward_hook(lambda _, __, out: bands.append(out.shape[2]))
    assert relative_error(vae.decode(given), image) < EXACT
    assert len(bands) > 1, "it was decoded as a whole"
    hook.remove()
    again = vae.encode(image)
    assert relative_error(again.mean, encoded.mean) < EXACT
    assert relative_error(again.std, encoded.std) < EXACT


@torch.no_grad()
def test_what_is_no_larger_than_a_tile_is_computed_as_a_whole(vae: VAE) -> None:
    vae = copy.deepcopy(vae)
    given = latents(1, 8, 16)
    image = vae.decode(given)
    vae.enable_tiling(tile_sample_min_size=96)
    assert torch.equal(vae.decode(given), image)
    vae.enable_tiling(tile_sample_min_size=88)
    assert not torch.equal(vae.decode(given), image), "8 x 16 latents are more pixels than 88 x 88"


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 0.05)])
def test_in_lower_precision(vae: VAE, dtype: torch.dtype, tolerance: float) -> None:
    """As near to float64 as the whole is."""
    given = latents(1, 32, 24, dtype)
    exact = vae.decode(given.double())
    lower = copy.deepcopy(vae).to(dtype)
    whole = lower.decode(given)
    lower.enable_tiling(tile_sample_min_size=64)
    assert relative_error(lower.decode(given), whole) < tolerance
    assert relative_error(lower.decode(given), exact) < 2 * relative_error(whole, exact)


def decibels(image: Tensor, other: Tensor) -> float:
    """Peak signal to noise for values from -1 to 1."""
    return float(10 * torch.log10(4 / (image - other).square().mean()))


@torch.no_grad()
def test_the_references_tiles_have_colours_of_their_own() -> None:
    """Its defect: statistics by tile, and blended seams. Ours has neither."""
    ours, theirs = pair("vae", torch.float64)
    assert isinstance(ours, VAE) and isinstance(theirs, AutoencoderKL)
    given = latents(1, 24, 24) * torch.linspace(0.2, 2, 24, dtype=torch.float64)  # flat on one side
    whole = ours.decode(given)
    span = float(whole.abs().max())
    ours.enable_tiling(tile_sample_min_size=96)
    theirs.enable_tiling()
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = 96, 12
    other = theirs.decode(given / ours.config.scaling_factor).sample
    assert decibels(ours.decode(given) / span, whole / span) > 200
    assert decibels(other / span, whole / span) < 40


@torch.no_grad()
def test_statistics_are_pooled_over_bands_of_any_height(vae: VAE) -> None:
    x = latents(2, 37, 5) * 3 + 100  # a mean far from zero, where sums of squares lose digits
    for elements in (1, 2 * 4 * 5 * 11, 10**9):
        mean, variance = pooled(Kept(x), 2, elements)
        grouped = x.unflatten(1, (2, 2)).flatten(2)
        assert relative_error(mean, grouped.mean(2)) < 1e-14
        assert relative_error(variance, grouped.var(2, correction=0)) < 1e-12
    bands = Kept(x).bands(1)
    assert bands[0] == (0, FEWEST_ROWS) and bands[-1] == (32, 37)
    assert all(before[1] == after[0] for before, after in pairwise(bands))


@torch.no_grad()
@pytest.mark.parametrize(("side", "gib"), [(512, 0.38), (1024, 1.15)])
def test_the_full_size_decoder_needs_less(side: int, gib: float) -> None:
    """In float32, beside the weights; counted without values."""
    with torch.device("meta"):
        vae = VAE(KOLORS.vae)
        given = torch.empty(1, 4, side // 8, side // 8)

    def peak() -> float:
        with planned_for("cuda"), Ledger("cuda") as ledger:
            vae.decode(given)
        return max(ledger.work.values()) / 2**30

    whole = peak()
    vae.enable_tiling()
    assert peak() < gib < whole / 1.9


@torch.no_grad()
def test_slices_are_the_pictures_one_by_one(vae: VAE) -> None:
    vae = copy.deepcopy(vae)
    given = latents(3, 8, 12)
    images = torch.cat([vae.decode(one) for one in given.split(1)])
    means = torch.cat([vae.encode(one).mean for one in images.split(1)])
    sizes: list[int] = []
    hook = vae.decoder.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    vae.enable_slicing()
    assert torch.equal(vae.decode(given), images) and sizes == [1, 1, 1]
    assert torch.equal(vae.encode(images).mean, means)
    vae.disable_slicing()
    vae.decode(given)
    assert sizes[3:] == [3]
    hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("by_block", [False, True], ids=["by_model", "by_block"])
def test_a_pipeline_draws_the_same(pipes: Pair, by_block: bool) -> None:
    """Under offload too, where a norm's weights come by a call of it; and with compiled blocks."""
    ours = pipes[0]
    given = {"prompt": "cat", "height": 96, "width": 64, "num_inference_steps": 2}
    plain = steps_of(ours, **given)
    ours.vae.enable_tiling(tile_sample_min_size=64)
    try:
        with offloaded(ours, by_block):
            assert all(
                relative_error(a, b) < EXACT for a, b in zip(steps_of(ours, **given), plain, strict=True)
            )
        compiled = copy.deepcopy(ours.vae)
        compile_blocks(compiled, backend="eager")
        assert relative_error(compiled.decode(plain[-2]), ours.vae.decode(plain[-2])) < EXACT
    finally:
        ours.disable_vae_tiling()


def test_switches_of_the_pipeline_and_what_they_refuse(pipes: Pair) -> None:
    ours, theirs = pipes
    for way in ("tiling", "slicing"):
        getattr(ours, f"enable_vae_{way}")()
        assert getattr(ours.vae, f"use_{way}") is True
        getattr(ours, f"disable_vae_{way}")()
        for pipe in (ours, theirs):
            assert getattr(pipe.vae, f"use_{way}") is False
            getattr(pipe.vae, f"enable_{way}")()
            assert getattr(copy.deepcopy(pipe.vae), f"use_{way}") is True
            getattr(pipe.vae, f"disable_{way}")()
    for side in (63, 0, -8):
        with pytest.raises(ValueError, match=f"tile_sample_min_size must be at least 64 pixels, got {side}"):
            ours.vae.enable_tiling(tile_sample_min_size=side)
    for side in (96.0, "96", True):
        with pytest.raises(TypeError, match="tile_sample_min_size must be a whole number, got "):
            ours.vae.enable_tiling(tile_sample_min_size=side)
    assert ours.vae.use_tiling is False


class Other(ResBlock):
    """A changed block."""


@torch.no_grad()
def test_what_bands_would_not_get_right_is_refused_by_name(vae: VAE) -> None:
    vae = copy.deepcopy(vae)
    vae.decoder.up[1].resnets[0] = Other(24, 24, 4).double()
    vae.enable_tiling(tile_sample_min_size=64)
    with pytest.raises(TypeError, match="tiling knows .*ResBlock, got a Other: vae.disable_tiling"):
        vae.decode(latents(1, 16, 16))
    vae.disable_tiling()
    assert vae.decode(latents(1, 16, 16)).shape == (1, 3, 128, 128)
    bare = nn.GroupNorm(4, 24, affine=False)
    round_ = nn.Conv2d(24, 24, 3, padding=1, padding_mode="circular")
    changes = {
        "GroupNorm with weights, got GroupNorm.*affine=False": ("norm1", bare),
        "convolutions padded with zeros, got Conv2d.*circular": ("conv2", round_),
        "convolutions padded with zeros, got Identity": ("conv2", nn.Identity()),
    }
    for message, (name, layer) in changes.items():
        block = ResBlock(24, 24, 4)
        setattr(block, name, layer)
        vae.decoder.up[1].resnets[0] = block.double()
        vae.enable_tiling(tile_sample_min_size=64)
        with pytest.raises(TypeError, match=f"tiling knows {message}"):
            vae.decode(latents(1, 16, 16))


def test_gradients_pass(vae: VAE) -> None:
    """Of the input and of every parameter."""
    vae = copy.deepcopy(vae)
    given = latents(1, 16, 12).requires_grad_()
    wanted = (given, *vae.decoder.parameters())
    plain = torch.autograd.grad(vae.decode(given).square().mean(), wanted)
    vae.enable_tiling(tile_sample_min_size=64)
    mine = torch.autograd.grad(vae.decode(given).square().mean(), wanted)
    largest = max(float(grad.abs().max()) for grad in plain)
    assert all(float((a - b).abs().max()) < EXACT * largest for a, b in zip(mine, plain, strict=True))


@torch.no_grad()
def test_a_changed_convolution_is_called(vae: VAE) -> None:
    """Convolutions are called as modules, so that what a researcher puts there works."""

    class Louder(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    vae = copy.deepcopy(vae)
    vae.decoder.up[2].resnets[1].conv1.__class__ = Louder
    given = latents(1, 16, 24)
    image = vae.decode(given)
    vae.enable_tiling(tile_sample_min_size=64)
    assert relative_error(vae.decode(given), image) < EXACT


@torch.no_grad()
def test_image_to_image_in_bands(pipes: Pair) -> None:
    ours = KolorsImg2ImgPipeline.from_pipe(pipes[0])
    given: dict[str, Any] = {"prompt": "cat", "image": picture(0, 96, 72), "height": 96, "width": 72}
    plain = steps_of(ours, **given)
    ours.vae.enable_tiling(tile_sample_min_size=64)
    ours.enable_vae_slicing()
    try:
        assert all(relative_error(a, b) < EXACT for a, b in zip(steps_of(ours, **given), plain, strict=True))
    finally:
        ours.disable_vae_tiling()
        ours.disable_vae_slicing()


def test_config_with_one_group_of_levels() -> None:
    """Two levels and one group, where the encoder halves once."""
    config = replace(CONFIG, channels=(8, 16), norm_groups=1)
    model = VAE(config).double().eval()
    randomise(model)
    with torch.no_grad():
        given = latents(1, 48, 50)
        image = model.decode(given)
        mean = model.encode(image).mean
        model.enable_tiling(tile_sample_min_size=64)
        assert relative_error(model.decode(given), image) < EXACT
        assert relative_error(model.encode(image).mean, mean) < EXACT
