"""One image on several processes, each with some rows: the same image, in two, three and four of them."""

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from benchmarks.speed.rows import Unconnected
from kolors_core import KolorsImg2ImgPipeline, KolorsPipeline
from kolors_core.__main__ import main
from kolors_core.conditioning import Conditioning
from kolors_core.context import ImagePrompt
from kolors_core.guidance import guided, make_denoiser
from kolors_core.inspection.attention_maps import record_attention
from kolors_core.performance.compile import compile_blocks
from kolors_core.performance.cuda_graphs import CUDAGraphCache
from kolors_core.performance.row_split import Ranks, RowSplit, split_rows
from kolors_core.performance.vae_tiling import enable_tiling
from kolors_core.pipelines.memory_plan import plan
from kolors_core.pipelines.png_metadata import read_metadata
from kolors_core.unet import Attention
from kolors_core.vae import Decoder, call
from tests.support.row_worker import (
    HEIGHTS,
    PROCESSES,
    SCHEDULE,
    WIDTH,
    condition,
    denoised,
    measure,
    noise,
    small_unet,
    small_vae,
)
from tests.support.small import EXACT, FLOAT32, SMALL
from tests.support.two_processes import start


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What four processes found, the image that they drew by the command line, and what they printed."""
    folder = tmp_path_factory.mktemp("rows")
    image, log = folder / "image.png", folder / "log.txt"
    size = ["--height", "128", "--width", "64", "--steps", "2", "--device", "cpu", "-o", str(image)]
    for process in start(PROCESSES, measure, log, folder / "rank", ["a red apple", "--split", "rows", *size]):
        process.join(300)
        assert process.exitcode == 0, log.read_text()
    errors = [json.loads((folder / f"rank.{rank}").read_text()) for rank in range(PROCESSES)]
    received = [json.loads((folder / f"rank.received.{rank}").read_text()) for rank in range(2)]
    refused = [(folder / f"rank.refused.{rank}").read_text() for rank in range(2)]
    found = {"errors": errors, "received": received, "refused": refused}
    return SimpleNamespace(**found, image=image, log=log.read_text())


@pytest.mark.numerical
def test_processes_compute_what_one_does(measured: SimpleNamespace) -> None:
    """Also with a LoRA of every layer, an IP-Adapter, a ControlNet and PAG; all processes the same bits."""
    cases = {"pipeline, 2 x 2"} | {f"{net}, {size}" for net in ("unet", "vae") for size in HEIGHTS}
    assert cases | {"adapters", "float32"} <= measured.errors[0].keys()
    for errors in measured.errors:
        for case, error in errors.items():
            if not case.startswith("fault"):
                assert 0 < error < (FLOAT32 if case == "float32" else EXACT), (case, error)


def test_processes_with_noise_of_their_own_are_refused(measured: SimpleNamespace) -> None:
    hint = "have different latents: give all a generator of the same seed"
    assert all(hint in refused for refused in measured.refused)


@pytest.mark.parametrize("exchange", ["extend", "stack", "gather"])
def test_an_exchange_left_out_would_be_seen(exchange: str, measured: SimpleNamespace) -> None:
    """Rows of zeros beside a band, statistics of the band alone, keys and values of the band alone."""
    for net in ("unet", "vae"):
        assert 1e-2 < measured.errors[0][f"fault: {net}, {exchange}"] < 10


def test_no_more_is_exchanged_than_is_needed(measured: SimpleNamespace) -> None:
    """In bytes, for a step of the UNet on two rows, 19 rows high: bands of 2 and 3 of the innermost 5."""
    c, heights, rows, batch, number = SMALL.unet, (19, 10, 5), (11, 6, 3), 2, 8  # rows: of the higher band
    widths = [-(-WIDTH // 2**level) for level in range(3)]
    unet = small_unet()
    norms = sum(isinstance(module, nn.GroupNorm) for module in unet.modules())
    transformers = (0, 2 + 3, 2 + 3 + 1)  # of each level, with the middle's
    keys = sum(
        2 * batch * transformers[i] * c.depths[i] * rows[i] * widths[i] * c.channels[i] for i in range(3)
    )
    neighbor = unet.conv_in.in_channels * widths[0]  # of latents that guidance has not doubled yet
    for level, (down, up) in enumerate(zip(unet.down, unet.up[::-1], strict=True)):
        middle = [*unet.mid.resnets] if level == 2 else []
        for block in (*down.resnets, *up.resnets, *middle):
            convs = block.conv1.in_channels + block.conv2.in_channels
            neighbor += batch * convs * widths[level]
        neighbor += batch * c.channels[level] * widths[level] * (level < 2)  # downsampling
        neighbor += batch * c.channels[level] * widths[level - 1] * (level > 0)  # upsampling
    neighbor += batch * unet.conv_out.in_channels * widths[0]
    assert heights[0] == HEIGHTS[2]
    for received in measured.received:
        assert received == {
            "neighbors' rows": number * neighbor, "keys and values": number * keys,
            "statistics": number * norms * 2 * batch * c.norm_groups,
            "results": number * batch * 4 * rows[0] * widths[0], "checks": number,
        }  # fmt: skip


def test_torchruns_processes_draw_one_image(measured: SimpleNamespace, tmp_path: Path) -> None:
    """The first writes it and reports; all have its random seed, with which one process draws the same."""
    assert measured.log.count("128") >= 1 and measured.log.count("seed") == 1
    other = tmp_path / "other.png"
    assert main(["--from", str(measured.image), "-q", "--device", "cpu", "-o", str(other)]) == 0
    first, second = (np.asarray(Image.open(file)).astype(int) for file in (measured.image, other))
    assert first.shape == (128, 64, 3) and abs(first - second).max() <= 1
    assert read_metadata(other)["seed"] == read_metadata(measured.image)["seed"]


@pytest.mark.exact
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
def test_bands(processes: int) -> None:
    for height in range(4 * processes - 3, 4 * processes + 40):
        levels = split_rows(height, 3, processes)
        for level, bands in enumerate(levels):
            assert bands[0][0] == 0 and bands[-1][1] == -(-height // 2**level)
            assert all(top < bottom for top, bottom in bands)
            assert all(one[1] == other[0] for one, other in zip(bands, bands[1:], strict=False))
            assert level == 0 or [top for top, _ in levels[level - 1]] == [2 * top for top, _ in bands]
        sizes = [bottom - top for top, bottom in levels[-1]]
        assert max(sizes) - min(sizes) <= 1
    with pytest.raises(ValueError, match=rf"got {processes + 1} for {processes} rows of the innermost level"):
        split_rows(4 * processes, 3, processes + 1)


Change = Callable[[Any], Any]


def hooked(unet: Any) -> None:
    unet.mid.resnets[0].register_forward_hook(lambda *_: None)


def wide(unet: Any) -> None:
    unet.up[0].resnets[1].conv1 = nn.Conv2d(256, 128, 5, padding=2).double()


def patched(unet: Any) -> None:
    unet.mid.resnets[0].conv1.forward = unet.mid.resnets[0].conv1.forward


def other_norm(unet: Any) -> None:
    unet.mid.attentions[0].norm = nn.InstanceNorm2d(128)


def with_freeu(unet: Any) -> None:
    unet.up[0].freeu = lambda x, skip: torch.cat([x, skip], dim=1)


@pytest.mark.exact
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (hooked, ValueError, r"in mid\.resnets\.0: it has a hook"),
        (wide, TypeError, r"in up\.0\.resnets\.1\.conv1: .* got .*Conv2d\(256, 128, kernel_size=\(5, 5\)"),
        (patched, TypeError, r"in mid\.resnets\.0\.conv1: expected a module of kolors_core"),
        (other_norm, TypeError, r"in mid\.attentions\.0\.norm: .*InstanceNorm2d"),
        (with_freeu, ValueError, r"in up\.0: FreeU is enabled"),
        (partial(compile_blocks, backend="eager"), ValueError, r"in down\.0\.resnets\.0: it is compiled"),
        (lambda unet: unet.register_forward_hook(lambda *_: None), ValueError, "where the UNet is compiled"),
    ],
)
@torch.no_grad()
def test_a_unet_that_is_not_computed_by_rows_is_refused(change: Change, kind: Any, message: str) -> None:
    unet = copy.deepcopy(small_unet())
    change(unet)
    with pytest.raises(kind, match=message):
        denoised(unet, RowSplit(Unconnected(0, 2)).wrap_rule(guided), HEIGHTS[2])


class Gated(Attention):
    def project_out(self, h: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError(f"a gate of {list(h.shape)} and {list(x.shape)}")


@pytest.mark.exact
@torch.no_grad()
def test_what_a_subclass_makes_of_the_heads_is_asked_for_a_band_too() -> None:
    unet, split = copy.deepcopy(small_unet()), RowSplit(Unconnected(0, 2)).wrap_rule(guided)
    unet.mid.attentions[0].blocks[0].self_attention.__class__ = Gated
    pixels = split_rows(HEIGHTS[2], 3, 2)[-1][0][1] * -(-WIDTH // 4)
    with pytest.raises(NotImplementedError, match=rf"of \[2, 8, {pixels}, 8\] and \[2, {pixels}, 64\]"):
        denoised(unet, split, HEIGHTS[2])


@pytest.mark.exact
@torch.no_grad()
def test_runs_that_cannot_be_split_are_refused() -> None:
    unet, positive, rows = small_unet(), condition(small_unet(), 0), RowSplit(Unconnected(1, 2))
    arguments, split = (unet, SCHEDULE, positive), rows.wrap_rule(guided)

    def masked(*_: Any) -> Conditioning:
        image = ImagePrompt(noise(1, 1, 2, 48), masks=torch.ones(1, 1, 8, 8))
        return Conditioning(positive.text_tokens, positive.pooled_text, positive.size_ids, None, (image,))

    with pytest.raises(ValueError, match="not precomputed"):
        split(*arguments, precompute=False)
    with pytest.raises(ValueError, match="not split together with CUDA graphs or a step cache"):
        split(*arguments, wrap_step=CUDAGraphCache())
    with pytest.raises(ValueError, match="where image prompts have masks"):
        split(unet, SCHEDULE, masked())
    with pytest.raises(ValueError, match=r"the guidance rule .*own uses no wrap_step"):

        def own(unet: Any, schedule: Any, positive: Any, *_: Any, **__: Any) -> Any:
            return make_denoiser(unet, schedule, positive)

        rows.wrap_rule(own)(*arguments)
    with record_attention(unet, "mid*", None) as maps:
        with pytest.raises(ValueError, match=r"mid\..*: (its attention maps are recorded|it has a hook)"):
            split(*arguments)
        denoised(unet, guided, 4)
        assert maps
    with pytest.raises(ValueError, match="got 2 for 1 rows of the innermost level, of 4 of the outermost"):
        denoised(unet, split, 4)
    step = rows(lambda *_: None, [], [unet])
    with patch.object(unet.up[1], "freeu", torch.add), pytest.raises(ValueError, match=r"up\.1: FreeU is"):
        step(noise(1, 4, 19, WIDTH), noise(1, 2))  # enabled between two steps
    with pytest.raises(ValueError, match="where a ControlNet is compiled as a whole or hooked"):
        step(noise(1, 4, 19, WIDTH), noise(1, 2), noise(1, 32, 19, WIDTH))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="split rows have no gradients"):
        step(noise(1, 4, 19, WIDTH), noise(1, 2))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="split rows have no gradients"):
        rows.run_coder(small_vae().decoder, noise(1, 4, 5, 5))
    with pytest.raises(TypeError, match="of a UNet, ControlNet or VAE, got Sequential"):
        rows.run_coder(nn.Sequential(), noise(1, 4, 5, 5))
    with pytest.raises(TypeError, match="in the VAE: expected a module of kolors_core, got .*Louder"):
        rows.run_coder(Louder(SMALL.vae), noise(1, 4, 5, 5))
    with pytest.raises(ValueError, match="over several processes, got one: start them with torchrun"):
        Ranks()


class Louder(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.exact
@torch.no_grad()
def test_models_are_afterwards_what_they_were() -> None:
    """Also where a step fails in the middle."""
    unet = small_unet()
    split = RowSplit(Unconnected(0, 2)).wrap_rule(guided)(unet, SCHEDULE, condition(unet, 0))
    before = [dict(vars(module)) for module in unet.modules()]
    x = noise(1, 4, HEIGHTS[2], WIDTH)
    split(x, SCHEDULE.sigmas[0].item())
    assert before == [vars(module) for module in unet.modules()]
    with pytest.raises(RuntimeError, match="expected input"):
        split(x[:, :3], SCHEDULE.sigmas[0].item())
    assert before == [vars(module) for module in unet.modules()]


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def draw(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("cat", 64, 64, 1, generator=generator, output_type="pt").images


@pytest.mark.exact
def test_a_pipeline_of_one_process_and_its_copies(alone: None) -> None:
    pipe = KolorsPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    whole = draw(pipe)
    pipe.enable_row_split()
    assert pipe.row_split is not None and pipe._needs_alone() == "a row split"
    assert torch.equal(draw(pipe), whole)
    assert KolorsImg2ImgPipeline.from_pipe(pipe).row_split is pipe.row_split
    plan(pipe, 64, 64, is_printed=False)
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert twin.row_split is None and twin.vae.run_coder is call
    with pytest.raises(TypeError, match=r"run_coder is vae\.call or a TiledCoder, got SplitCoder"):
        pipe.enable_vae_tiling()
    pipe.disable_row_split()
    assert pipe.row_split is None and pipe.vae.run_coder is call
    enable_tiling(pipe.vae)
    with pytest.raises(TypeError, match=r"run_coder is vae\.call, got TiledCoder"):
        pipe.enable_row_split()
    assert pipe.row_split is None


@pytest.mark.exact
@pytest.mark.parametrize(
    ("flags", "world", "message"),
    [
        ("--split rows", None, "--split needs several processes, got one: torchrun --nproc-per-node 2 -m"),
        ("--split rows", "1", "--split needs several processes, got one"),
        ("--split guidance", "3", "--split guidance needs an even number of processes, got 3"),
        ("--split guidance --guidance 1", "2", "--split guidance needs --guidance above 1, got 1"),
        ("--split guidance --pag 3", "2", "--split guidance splits no --pag, --guidance-rescale"),
        ("--split rows --vae-tiling", "2", "--split and --vae-tiling exclude each other"),
        ("--split rows --plan", "2", "--plan counts what one process needs alone"),
        ("--split row", "2", "unknown 'row', did you mean rows?"),
    ],
)
def test_flags_that_cannot_be(
    flags: str, world: str | None, message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if world is not None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", world)
    try:
        status = main(["a cat", "--device", "cpu", "-q", *flags.split()])
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2 and message in error and len(error.splitlines()) == 1
