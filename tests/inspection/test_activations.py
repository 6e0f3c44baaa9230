"""Activation statistics: moments of what layers read; a dead unit is found, and its removal does nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kolors_core import KolorsPipeline
from kolors_core.inspection.activations import (
    activations,
    dead_units,
    heat_maps,
    measure_silence,
    moments,
    record_moments,
)
from kolors_core.inspection.prompt_template import PromptTemplate
from tests.support.inspected import QUESTION, QUICK, small_pipe

DEAD = "mid.resnets.0.conv2"  # whose unit 5 is dead
NUMBERS = QUICK | {"images": 2, "seed": 0}


@pytest.fixture
def pipe(small_tokenizer: Path) -> Iterator[KolorsPipeline]:
    made = small_pipe(small_tokenizer)
    norm = made.unet.mid.resnets[0].norm2
    norm.weight.data[5], norm.bias.data[5] = 0, 0  # SiLU(0) is 0
    yield made


def test_moments_are_of_each_unit() -> None:
    x = torch.tensor([[[[1.0, -3.0]], [[0.0, 0.0]]], [[[1.0, 1.0]], [[0.0, 2.0]]]])  # [2, 2, 1, 2]
    wanted = [[3.0, 1.0], [21.0, 4.0], [3.0, 2.0]]  # of 1, -3, 1, 1 and of 0, 0, 0, 2
    assert moments(x).tolist() == wanted
    assert moments(x.flatten(2).transpose(1, 2)).tolist() == wanted


def test_the_heat_maps_are_these_statistics() -> None:
    """Of normal values, of which one unit is twice as large and another a tenth."""
    values = torch.randn(4, 1, 50_000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = values * torch.tensor([2.0, 0.1, 1, 1, 1, 1, 1, 1]).double()
    found = {"mid": torch.stack([torch.stack([moments(part[0])]) for part in values])}  # [P, T, 3, U]
    rms, kurtosis, peak, weakest = (each.values.item() for each in heat_maps(found, [999]))
    assert rms == pytest.approx((10.01 / 8) ** 0.5, rel=0.01) and kurtosis == pytest.approx(3, abs=0.1)
    assert peak == pytest.approx(float(values.abs().amax((1, 2, 3)).mean()) / rms, rel=0.01)
    assert weakest == pytest.approx(0.1, abs=0.002)


def test_a_dead_unit_is_found_and_setting_it_to_0_changes_nothing(pipe: KolorsPipeline) -> None:
    template = PromptTemplate.parse(QUESTION)
    found, timesteps = record_moments(pipe, template, "*.conv2", **NUMBERS)
    dead = {name: units.tolist() for name, units in dead_units(found).items() if len(units)}
    assert dead == {DEAD: [5]} and found[DEAD].shape == (4, len(timesteps), 3, 32)
    same = measure_silence(pipe, template, {DEAD: torch.tensor([5])}, **NUMBERS)
    assert same.shape == (4,) and same.max() < 1e-10
    other = measure_silence(pipe, template, {DEAD: torch.tensor([6])}, **NUMBERS)
    assert other.min() > 1e-4
    summary, maps = activations(pipe, template, "*.conv2", images=2, **QUICK)
    count = sum(x.shape[-1] for x in found.values())
    assert summary.startswith(f"1 of {count} units are dead, on other noise 1 of them. There, ")
    row = maps[3].rows.index(DEAD)
    assert maps[3].values[row].max() < 1e-10 < 1e-3 < maps[3].values[row - 1].min()


@pytest.mark.numerical
def test_units_set_to_0_are_as_a_layer_that_does_not_read_them(pipe: KolorsPipeline) -> None:
    """On the inputs of the unchanged run, in both steps: the change of the UNet's output, by hand."""
    template, units = PromptTemplate.parse(QUESTION), torch.tensor([3, 7])
    named = {"guidance_scale": 1.0, "height": 64, "width": 64}
    measured = measure_silence(pipe, template, {DEAD: units}, steps=2, images=1, seed=0, **named)
    calls: list[Any] = []
    handle = pipe.unet.register_forward_hook(lambda _m, *call: calls.append(call), with_kwargs=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    pipe(["a cat", "a dog"], num_inference_steps=2, generator=generators, output_type="latent", **named)
    handle.remove()
    pipe.unet.mid.resnets[0].conv2.weight.data[:, units] = 0
    ratios = []
    for arguments, keywords, output in calls:
        with torch.no_grad():
            change = pipe.unet(*arguments, **keywords) - output
        ratios.append(change.flatten(1).norm(dim=1) / output.flatten(1).norm(dim=1))
    assert len(ratios) == 2 and torch.allclose(measured, torch.stack(ratios).mean(0), rtol=1e-8)


def test_too_few_images_are_named(pipe: KolorsPipeline) -> None:
    with pytest.raises(ValueError, match="expected at least 4 images in all, got 2"):
        activations(pipe, PromptTemplate.parse(QUESTION), **QUICK)
