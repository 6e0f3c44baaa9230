"""The autoencoder in pieces: the same images as whole, in less memory, and beside the reference's tiles."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from kolors_core import KolorsImg2ImgPipeline, KolorsPipeline
from kolors_core.config import KOLORS
from kolors_core.performance import vae_tiling
from kolors_core.performance.compile import compile_blocks
from kolors_core.performance.memory_tracker import MemoryTracker
from kolors_core.performance.offload import bytes_of
from kolors_core.performance.vae_tiling import (
    TiledCoder,
    disable_slicing,
    disable_tiling,
    enable_slicing,
    enable_tiling,
    tiled_coder,
)
from kolors_core.vae import VAE, ResBlock
from tests.support.offloads import offloaded
from tests.support.parity import pair
from tests.support.pipelines import Pair, picture, steps_of
from tests.support.small import EXACT, SMALL, randomise, relative_error
from tests.test_devices import all_away

pytestmark = pytest.mark.numerical

SIDE = 32  # pixels: of SMALL_PICTURE and of most images here it makes several pieces


def small(dtype: torch.dtype = torch.float64) -> VAE:
    vae = VAE(SMALL.vae).to(dtype).eval()
    randomise(vae)
    return vae


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def both_ways(vae: VAE, latents: Tensor, images: Tensor) -> list[Tensor]:
    found = vae.encode_images(images)
    return [vae.decode_latents(latents), found.mean, found.std]


def errors(vae: VAE, batch: int, height: int, width: int, side: int = SIDE) -> list[float]:
    """Of tiles against the whole: the image, then mean and deviation. Sides in latents."""
    dtype = vae.decoder.conv_in.weight.dtype
    given = noise(batch, 4, height, width, dtype=dtype), noise(batch, 3, 8 * height, 8 * width, dtype=dtype)
    with torch.inference_mode():
        whole = both_ways(vae, *given)
        enable_tiling(vae, tile_sample_min_size=side)
        tiled = both_ways(vae, *given)
        disable_tiling(vae)
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(tiled, whole, strict=True))
    return [relative_error(a, b) for a, b in zip(tiled, whole, strict=True)]


@pytest.mark.parametrize(
    ("batch", "height", "width", "side"), [(1, 13, 11, 32), (2, 9, 14, 32), (1, 17, 5, 40), (1, 6, 24, 56)]
)
def test_tiles_are_the_whole_picture(batch: int, height: int, width: int, side: int) -> None:
    assert max(errors(small(), batch, height, width, side)) < EXACT


def test_other_precisions_and_layouts() -> None:
    vae = small(torch.float32)
    assert max(errors(vae, 1, 13, 11)) < 5e-6
    latents = noise(1, 4, 13, 11, dtype=torch.float32)
    with torch.inference_mode():
        whole = vae.decode_latents(latents)
        enable_tiling(vae.to(memory_format=torch.channels_last), tile_sample_min_size=SIDE)
        tiled = vae.decode_latents(latents.to(memory_format=torch.channels_last))
        assert tiled.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(tiled, whole) < 5e-6
        # In bfloat16 tiles are as far from float32's result as the whole is: there is only rounding.
        vae.to(torch.bfloat16)
        far = []
        for tiles in (True, False):
            (enable_tiling if tiles else disable_tiling)(vae)
            far.append((vae.decode_latents(latents.bfloat16()).float() - whole).square().mean().sqrt().item())
    assert far[0] < 1.1 * far[1]


def decibels(picture: Tensor, wanted: Tensor) -> float:
    return 10 * math.log10(4 / ((picture - wanted).square().mean().item() + 1e-30))  # from -1 to 1: 4


@torch.no_grad()
def test_the_references_tiles_are_another_picture() -> None:
    """Statistics of each tile tint it, and seams are blended."""
    ours, theirs = pair("vae", torch.float64)
    latents = noise(1, 4, 13, 11)
    whole, scaled = ours.decode_latents(latents), latents / ours.config.scaling_factor
    assert decibels(theirs.decode(scaled).sample, whole) > 200
    theirs.enable_tiling()
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = 64, 8
    enable_tiling(ours, tile_sample_min_size=64)
    assert decibels(theirs.decode(scaled).sample, whole) < 40
    assert decibels(ours.decode_latents(latents), whole) > 200


def alone(conv: nn.Conv2d, x: Any, change: Callable[[Tensor], Tensor] = lambda x: x, **_: Any) -> Any:
    """A convolution that does not see the rows beside a piece."""
    shape = conv.out_channels, x.height, x.width
    return vae_tiling.LazyMap(x, shape, lambda top, end: conv(change(x.read(top, end))), x.row)


def tinted(_run: object, norm: nn.GroupNorm, _x: object) -> Callable[[Tensor], Tensor]:
    """Statistics of each piece."""
    return lambda rows: torch.nn.functional.silu(norm(rows))


@pytest.mark.parametrize("spoil", ["halo", "statistics"])
def test_a_seam_or_a_tint_would_be_seen(spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if spoil == "halo":
        monkeypatch.setattr(vae_tiling, "_convolve", alone)
    else:
        monkeypatch.setattr(vae_tiling._TiledRun, "activation", tinted)
    assert min(errors(small(), 1, 13, 11)) > 1e4 * EXACT


@pytest.mark.parametrize(("way", "least"), [("decode_latents", 4.5), ("encode_images", 3.5)])
@torch.no_grad()
def test_tiles_take_little_memory(way: str, least: float) -> None:
    """The full-size autoencoder at 1024 x 1024, without numbers."""
    with torch.device("meta"):
        vae = VAE(KOLORS.vae)
        x = torch.empty((1, 4, 128, 128) if way == "decode_latents" else (1, 3, 1024, 1024))
    peaks = []
    for tiles in (False, True):
        (enable_tiling if tiles else disable_tiling)(vae)
        with MemoryTracker("cuda") as tracker:
            getattr(vae, way)(x)
        peaks.append(max(tracker.activations.values()))
    map_bytes = 4 * 128 * 1024 * 1024
    assert peaks[0] > least * peaks[1]
    assert map_bytes < peaks[1] < 1.3 * map_bytes, "one map of the outermost level, and pieces"


@torch.no_grad()
def test_slices_are_the_pictures_one_by_one() -> None:
    vae, given = small(), (noise(3, 4, 5, 6), noise(3, 3, 40, 48))
    batch = both_ways(vae, *given)
    single = [both_ways(vae, *(tensor[i : i + 1] for tensor in given)) for i in range(3)]
    seen = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    enable_slicing(vae)
    slices = both_ways(vae, *given)
    for i, values in enumerate(zip(*single, strict=True)):
        assert torch.equal(slices[i], torch.cat(values)) and relative_error(slices[i], batch[i]) < EXACT
    disable_slicing(vae)
    both_ways(vae, *given)
    assert seen == [1, 1, 1, 3]


def test_a_picture_of_one_tile_is_run_whole() -> None:
    vae, seen = small(), []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    enable_tiling(vae, tile_sample_min_size=64)
    with torch.no_grad():
        vae.decode_latents(noise(2, 4, 8, 8))
        assert seen == [2]
        vae.decode_latents(noise(1, 4, 8, 9))
        assert seen == [2]


@pytest.mark.exact
def test_settings_are_the_vaes_and_go_where_it_goes(pipes: Pair) -> None:
    pipe = KolorsPipeline.from_pipe(pipes[0], vae=small())
    assert tiled_coder(pipe.vae) == TiledCoder(use_tiling=False, use_slicing=False)
    pipe.enable_vae_tiling(tile_sample_min_size=48)
    pipe.enable_vae_slicing()
    other = KolorsImg2ImgPipeline.from_pipe(pipe)
    for vae in (other.vae, copy.deepcopy(pipe.vae), pickle.loads(pickle.dumps(pipe.vae))):
        assert vae.run_coder == TiledCoder(use_tiling=True, use_slicing=True, tile_sample_min_size=48)
    other.disable_vae_tiling()
    other.disable_vae_slicing()
    assert pipe.vae.run_coder == TiledCoder(use_tiling=False, use_slicing=False, tile_sample_min_size=48)
    pipe.enable_vae_tiling()
    assert tiled_coder(pipe.vae).tile_sample_min_size == 48 and not tiled_coder(pipes[0].vae).use_tiling
    assert small().state_dict().keys() == pipe.vae.state_dict().keys()


@pytest.mark.parametrize("side", [0, 24, 100, -64, 64.0, True, "64"])
@pytest.mark.exact
def test_sides_that_are_refused(side: Any) -> None:
    vae = small()
    with pytest.raises(ValueError, match=f"multiple of 8 from 32 to 16777216, got {side!r}"):
        enable_tiling(vae, tile_sample_min_size=side)
    assert not tiled_coder(vae).use_tiling
    vae.run_coder = TiledCoder(use_tiling=True, tile_sample_min_size=side)
    with pytest.raises(ValueError, match=f"multiple of 8 from 32 to 16777216, got {side!r}"):
        vae.decode_latents(noise(1, 4, 13, 11))


class Louder(ResBlock):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.exact
def test_parts_that_are_not_known_are_refused() -> None:
    vae = small()
    enable_tiling(vae, tile_sample_min_size=SIDE)
    own, resnets = Louder(16, 16, 8), vae.decoder.up[3].resnets
    resnets[1] = own.double()
    with pytest.raises(TypeError, match=r"decoder\.up\.3\.resnets\.1: expected a module of .*Louder\(\)"):
        vae.decode_latents(noise(1, 4, 13, 11))
    with pytest.raises(TypeError, match=r"cannot run decoder\.up\.3"):
        enable_tiling(vae)
    disable_tiling(vae)
    vae.decode_latents(noise(1, 4, 5, 5))
    resnets[1] = ResBlock(16, 16, 8)
    vae.encoder.conv_in = nn.Conv2d(3, 16, 5, padding=2)
    with pytest.raises(TypeError, match=r"encoder\.conv_in: .*got torch.*kernel_size=\(5, 5\)"):
        enable_tiling(vae)
    vae = small()
    enable_tiling(vae, tile_sample_min_size=SIDE)
    vae.decoder.norm_out = nn.GroupNorm(8, 16, affine=False)
    with pytest.raises(TypeError, match=r"decoder\.norm_out: expected a module of .*affine=False"):
        vae.decode_latents(noise(1, 4, 13, 11))
    vae.decoder = nn.Sequential(nn.ConvTranspose2d(4, 3, 8, 8))
    with pytest.raises(TypeError, match=r"cannot run coder: .*got torch.*Sequential\(\)"):
        vae.decode_latents(noise(1, 4, 13, 11))


def test_a_coder_of_the_users_own_is_called_and_is_not_replaced() -> None:
    """`run_coder` may be any function; tiling takes no other one's place."""
    vae, seen = small(), []

    def watched(coder: nn.Module, x: Tensor) -> Tensor:
        seen.append(type(coder).__name__)
        return coder(x)

    given = noise(1, 4, 5, 6), noise(1, 3, 40, 48)
    with torch.no_grad():
        plain = both_ways(vae, *given)
        vae.run_coder = watched
        assert all(torch.equal(a, b) for a, b in zip(both_ways(vae, *given), plain, strict=True))
    assert seen == ["Encoder", "Decoder"]
    with pytest.raises(TypeError, match="expected a VAE whose run_coder is vae.call or a TiledCoder, got"):
        enable_tiling(vae)
    assert vae.run_coder is watched


def test_a_new_attention_and_a_subclass_with_the_old_forward_are_run() -> None:
    class Named(ResBlock):
        pass

    vae = small()
    vae.decoder.up[3].resnets[1] = Named(16, 16, 8).double()
    vae.decoder.mid.attention = nn.Sequential(nn.Conv2d(32, 32, 5, padding=2), nn.Tanh()).double()
    assert max(errors(vae, 1, 13, 11)) < EXACT


@pytest.mark.exact
def test_gradients_are_refused() -> None:
    vae = small()
    enable_tiling(vae, tile_sample_min_size=SIDE)
    for run, shape in ((vae.decode_latents, (1, 4, 13, 11)), (vae.encode_images, (1, 3, 104, 88))):
        with pytest.raises(RuntimeError, match="tiles have no gradients"):
            run(noise(*shape))
    vae.requires_grad_(False)
    assert not vae.decode_latents(noise(1, 4, 13, 11)).requires_grad


@pytest.mark.parametrize("kind", [KolorsPipeline, KolorsImg2ImgPipeline])
def test_a_pipeline_draws_the_same(kind: type, pipes: Pair) -> None:
    pipe = kind.from_pipe(pipes[0], vae=copy.deepcopy(pipes[0].vae))
    pipe.set_progress_bar_config(disable=True)
    more = {} if kind is KolorsPipeline else {"image": picture(), "strength": 0.6, "height": 64, "width": 72}
    whole = steps_of(pipe, prompt="cat", **more)
    pipe.enable_vae_tiling(tile_sample_min_size=SIDE)
    tiled = steps_of(pipe, prompt="cat", **more)
    assert 0 < max(relative_error(a, b) for a, b in zip(tiled, whole, strict=True)) < EXACT


@pytest.mark.parametrize("by_block", [False, True], ids=["by_model", "by_block"])
@torch.no_grad()
def test_offload_brings_what_works(by_block: bool, pipes: Pair) -> None:
    pipe = KolorsPipeline.from_pipe(pipes[0], vae=small())
    given = noise(1, 4, 13, 11), noise(1, 3, 104, 88)
    pipe.enable_vae_tiling(tile_sample_min_size=SIDE)
    plain = both_ways(pipe.vae, *given)
    with offloaded(pipe, by_block) as offload, all_away(pipe) as worked:
        pipe._enter_stage("vae")
        away = both_ways(pipe.vae, *given)
        assert {"vae.decoder.up.3.resnets.2.norm1", "vae.decoder.norm_out"} <= worked
        pipe._enter_stage()
        size = bytes_of(((pipe.vae, ""),))
        assert offload.peak_bytes < size / 3 if by_block else offload.peak_bytes == size
    assert all(torch.equal(a, b) for a, b in zip(away, plain, strict=True))


def test_a_compiled_autoencoder_is_run_in_pieces_too() -> None:
    """Blocks that are run whole, those of the middle here, are run compiled."""
    vae = small()
    counters.clear()
    for part in (vae.decoder.mid, vae.decoder.up[3].resnets[2]):
        compile_blocks(part, backend="eager")
    enable_tiling(vae, tile_sample_min_size=SIDE)
    latents = noise(1, 4, 13, 11)
    with torch.no_grad():
        tiled = vae.decode_latents(latents)
        assert counters["stats"]["unique_graphs"] == 2, "a ResBlock's and the attention's"
        disable_tiling(vae)
        assert relative_error(tiled, vae.decode_latents(latents)) < EXACT
    torch.compiler.reset()
