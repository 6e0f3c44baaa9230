"""FreeU against the reference: a join, the UNet, a whole run; and nothing of it is left behind."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils.torch_utils import apply_freeu, fourier_filter

from kolors_core import KolorsImg2ImgPipeline, KolorsPAGPipeline, KolorsPipeline
from kolors_core.adapters.freeu import FreeU, FreeUMethods
from kolors_core.performance.cuda_graphs import CUDAGraphCache
from kolors_core.pipelines.memory_plan import plan
from kolors_core.unet import UNet
from tests.performance.test_compile import Recorder
from tests.support.parity import assert_parity, first_divergence, pair
from tests.support.pipelines import (
    NO_SAVINGS,
    SOLVERS,
    Pair,
    assert_same_steps,
    picture,
    saving,
    steps_of,
    use_solver,
)
from tests.support.small import EXACT, FLOAT32, SMALL, relative_error
from tests.test_unet import inputs, run_reference

pytestmark = pytest.mark.numerical

SDXL = {"s1": 0.6, "s2": 0.4, "b1": 1.1, "b2": 1.2}  # what its authors recommend
SIZES = [(16, 16), (9, 13), (2, 2), (1, 5), (3, 1), (1, 1), (24, 40)]


class OfUNet(FreeUMethods):
    """What the switch needs of a pipeline."""

    def __init__(self, unet: UNet) -> None:
        self.unet = unet


@pytest.fixture
def both(pipes: Pair) -> Iterator[Pair]:
    """Both pipelines with FreeU, and without it afterwards."""
    for pipe in pipes:
        pipe.enable_freeu(**SDXL)
    yield pipes
    for pipe in pipes:
        pipe.disable_freeu()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_join_equals_the_reference(height: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, skip = (torch.randn(2, c, height, width, generator=generator).to(dtype) for c in (6, 4))
    for level, (b, s) in enumerate(((1.1, 0.6), (1.2, 0.4))):
        mine = FreeU(b, s)(x, skip)
        parts = apply_freeu(level, x.clone(), skip, **SDXL)
        assert mine.dtype == dtype
        assert relative_error(mine, torch.cat(parts, dim=1)) <= (EXACT if dtype == torch.float64 else 1e-7)
    assert not relative_error(FreeU(1.1, 0.59)(x, skip), torch.cat(parts, dim=1)) < FLOAT32


def test_the_filter_is_the_papers() -> None:
    """In float64, by the four frequencies that are attenuated: constant, and the slowest along each side."""
    skip = torch.randn(1, 1, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spectrum = torch.fft.fft2(skip)
    for row in (0, -1):
        for column in (0, -1):
            spectrum[..., row, column] *= 0.3
    assert relative_error(FreeU(1.0, 0.3).filter_skip(skip), torch.fft.ifft2(spectrum).real) < FLOAT32
    flat = torch.ones(1, 1, 6, 5)
    assert relative_error(FreeU(1.0, 0.3).filter_skip(flat), 0.3 * flat) < FLOAT32
    assert relative_error(fourier_filter(flat, 1, 0.3), 0.3 * flat) < FLOAT32  # type: ignore[arg-type]


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 16, 16), (2, 9, 13), (2, 8, 24), (1, 5, 16)])
@torch.no_grad()
def test_the_unet_equals_the_reference(batch: int, height: int, width: int) -> None:
    """Both have their spectra in float32: 1e-10 holds since they round alike."""
    ours, theirs = pair("unet", torch.float64)
    assert isinstance(ours, UNet)
    given = inputs(batch, height, width)
    plain, switch = ours(**given), OfUNet(ours)
    switch.enable_freeu(**SDXL)
    theirs.enable_freeu(**SDXL)
    runs = (lambda: ours(**given)), (lambda: run_reference(theirs, given))
    mine, other = (run() for run in runs)
    assert_parity(mine, other, EXACT, lambda: first_divergence(ours, theirs, "unet", *runs, EXACT))
    assert relative_error(mine, plain) > 1e-3
    switch.enable_freeu(**SDXL | {"s2": 0.4001})
    assert relative_error(ours(**given), other) > FLOAT32, "so small a difference shows"
    switch.disable_freeu()
    assert torch.equal(ours(**given), plain)


@pytest.mark.parametrize(("solver", "changes"), SOLVERS[:2], ids=["euler", "dpm"])
def test_every_step_equals_the_reference(both: Pair, solver: str, changes: dict) -> None:
    use_solver(both, solver, changes)
    assert_same_steps(both, prompt=["cat", "red"], negative_prompt=["green", ""])
    with saving(both[0], NO_SAVINGS):
        assert_same_steps(both, prompt="cat")


def test_afterwards_all_is_as_before(pipes: Pair) -> None:
    ours = pipes[0]
    before, names = steps_of(ours, prompt="cat"), list(ours.unet.state_dict())
    ours.enable_freeu(**SDXL)
    assert ours.freeu == SDXL
    with_it = steps_of(ours, prompt="cat")
    assert relative_error(with_it[0], before[0]) > 1e-3
    assert list(ours.unet.state_dict()) == names, "it adds no tensor"
    copied = KolorsPipeline.from_pipe(ours, unet=deepcopy(ours.unet))
    ours.disable_freeu()
    ours.disable_freeu()
    assert ours.freeu is None
    assert all(torch.equal(a, b) for a, b in zip(steps_of(ours, prompt="cat"), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(steps_of(copied, prompt="cat"), with_it, strict=True))


def test_factors_of_1_change_nothing_and_0_is_a_value(pipes: Pair) -> None:
    """The reference takes a 0 for off, in silence."""
    ours, theirs = pipes
    before = steps_of(ours, prompt="cat")
    try:
        ours.enable_freeu(1.0, 1.0, 1.0, 1.0)
        assert relative_error(steps_of(ours, prompt="cat")[-1], before[-1]) < FLOAT32
        for pipe in (ours, theirs):
            pipe.enable_freeu(0.0, 1.0, 1.0, 1.0)
        assert relative_error(steps_of(theirs, prompt="cat")[0], before[0]) < FLOAT32
        zero = steps_of(ours, prompt="cat")[0]
        assert relative_error(zero, before[0]) > 1e-4
        ours.enable_freeu(1e-9, 1.0, 1.0, 1.0)
        assert relative_error(steps_of(ours, prompt="cat")[0], zero) < FLOAT32
    finally:
        for pipe in (ours, theirs):
            pipe.disable_freeu()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"s1": -0.1}, "s1 must be 0 or more, got -0.1"),
        ({"b2": float("inf")}, "b2 must be a number, got inf"),
        ({"s2": None}, "s2 must be a number, got None"),
        ({"b1": True}, "b1 must be a number, got True"),
    ],
)
@pytest.mark.exact
def test_what_is_no_factor_is_named(pipes: Pair, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipes[0].enable_freeu(**SDXL | change)
    assert pipes[0].freeu is None


def test_every_task_and_the_description_have_it(both: Pair) -> None:
    ours = both[0]
    info = ours("cat", 64, 64, 1).images[0].info
    assert info["freeu"] == "s1=0.6, s2=0.4, b1=1.1, b2=1.2"
    others: tuple[Any, ...] = (KolorsImg2ImgPipeline.from_pipe(ours), KolorsPAGPipeline.from_pipe(ours))
    for pipe, more in zip(others, ({"image": picture()}, {}), strict=True):
        with_it = steps_of(pipe, prompt="cat", **more)
        pipe.disable_freeu()
        assert relative_error(steps_of(pipe, prompt="cat", **more)[-1], with_it[-1]) > 1e-4
        pipe.enable_freeu(**SDXL)


def test_a_recorded_step_knows_it(pipes: Pair) -> None:
    ours = KolorsPipeline.from_pipe(pipes[0], unet=deepcopy(pipes[0].unet))
    plain, recorder = steps_of(ours, prompt="cat"), Recorder()
    ours._wrap_step = CUDAGraphCache(recorder)
    assert all(torch.equal(a, b) for a, b in zip(steps_of(ours, prompt="cat"), plain, strict=True))
    ours.enable_freeu(**SDXL)
    with_it = steps_of(ours, prompt="cat")
    assert relative_error(with_it[0], plain[0]) > 1e-3 and recorder.count == 2
    ours._wrap_step = None
    assert all(torch.equal(a, b) for a, b in zip(steps_of(ours, prompt="cat"), with_it, strict=True))


def test_a_join_compiles_whole() -> None:
    x, skip = (torch.randn(1, c, 9, 13, generator=torch.Generator().manual_seed(0)) for c in (6, 4))
    join = FreeU(1.1, 0.6)
    compiled = torch.compile(lambda x, skip: join(x, skip), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, skip), join(x, skip))
    torch.compiler.reset()


@pytest.mark.exact
def test_it_can_be_planned(reference_folder: Path, capsys: pytest.CaptureFixture) -> None:
    planned = KolorsPipeline.from_pretrained(reference_folder, device="meta")
    planned.enable_freeu(**SDXL)
    assert plan(planned, 64, 64).stages["unet"].work > 0


@pytest.mark.exact
def test_a_unet_of_one_level_has_none() -> None:
    one = OfUNet(UNet(replace(SMALL.unet, channels=(32,), heads=(2,), depths=(1,))))
    assert one.freeu is None
    with pytest.raises(ValueError, match="two levels, and this UNet has one"):
        one.enable_freeu(**SDXL)
