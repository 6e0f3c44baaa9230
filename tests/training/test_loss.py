"""The loss for every target, and how timesteps are drawn for it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kolors_core.chatglm import TextEmbedding
from kolors_core.sampling import dpmpp_2m
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.targets import TARGETS, target_of
from kolors_core.training.data import Batch, draw_timesteps, timestep_density
from kolors_core.training.loss import DiffusionLoss, measure_timestep_weights
from kolors_core.training.step import Step
from kolors_core.training.trainer import Trainer, TrainingConfig
from tests.support.small import relative_error
from tests.support.train_worker import CONFIG, make_trainer
from tests.training.test_data import write_pictures

CPU = torch.device("cpu")
TOTAL = 1100
TABLE = EulerDiscreteScheduler().training_sigmas()
TIMES = torch.arange(1, TOTAL + 1) / TOTAL
FLOW_TABLE = TIMES / (1 - TIMES)  # the last is infinite
STD = 0.5  # of the images that are learned
SETTINGS = TrainingConfig(
    steps=300, batch_size=256, learning_rate=1e-2, schedule="cosine", warmup=10, weight_decay=0.0,
    save_every=300,
)  # fmt: skip


class Gain(nn.Module):
    """A UNet's stand-in: its input times a learned factor of the time, which is best for Gaussian images."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 1))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            scale = parameter.shape[-1] ** -0.5
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))

    def forward(self, latents: Tensor, times: Tensor, *_rest: Any, residuals: Any = ()) -> Tensor:
        waves = torch.cos(math.pi / TOTAL * times.reshape(-1, 1) * torch.arange(8))  # [b, 8]
        gains = self.layers(waves)  # [b, 1]
        return latents * gains[:, :, None, None]


def batch_of(timesteps: Tensor, generator: torch.Generator) -> Batch:
    count = len(timesteps)
    latents, noise = torch.randn(2, count, 4, 2, 2, generator=generator)
    text = TextEmbedding(torch.zeros(count, 1, 1), torch.zeros(count, 1))
    return Batch(STD * latents, text, torch.zeros(count, 6), timesteps, noise)


class GaussianData:
    """Batches of images whose values are independent, of standard deviation STD."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config

    def batch(self, step: int, rows: slice, device: torch.device) -> Batch:
        generator = torch.Generator().manual_seed(step)
        return batch_of(draw_timesteps(self.config, TOTAL, self.config.batch_size, generator), generator)

    def record(self) -> dict[str, Any]:
        return {}


def loss_of(config: TrainingConfig, table: Tensor | None = None) -> DiffusionLoss:
    own = FLOW_TABLE if config.prediction_type == "flow_prediction" else TABLE
    return DiffusionLoss(Gain(), None, own if table is None else table, config)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TARGETS)
def test_a_model_of_each_target_draws_the_variance_that_it_was_trained_on(name: str, tmp_path: Path) -> None:
    drawn = (0.5, 1.0) if name == "flow_prediction" else None
    config = replace(SETTINGS, prediction_type=name, logit_normal=drawn)
    loss = loss_of(config)
    losses = Trainer(loss, GaussianData(config), config, tmp_path).fit(progress=False)
    assert all(map(math.isfinite, losses)) and losses.mean(slice(-50, None)) < losses.mean(slice(10))
    target, table = target_of(name), loss.sigmas
    picked = range(1088, -1, -8)  # on the best model: 1% too much for VP, 0.1% for flow
    times = dict(zip(sigmas := [table[i].item() for i in picked], picked, strict=True))

    @torch.no_grad()
    def denoise(x: Tensor, sigma: float) -> Tensor:
        time = target.timestep(float(times[sigma]), sigma, TOTAL)
        return target.x0(x, sigma, loss.unet(target.model_input(x, sigma), torch.tensor(time)))

    noise = torch.randn(1000, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    images = dpmpp_2m(denoise, noise * (sigmas[0] ** 2 + 1) ** 0.5, [*sigmas, 0.0])
    assert images.std().item() == pytest.approx(STD, rel=0.05)


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("name", TARGETS)
def test_losses_and_gradients_are_finite_up_to_zero_terminal_snr(name: str, gamma: float | None) -> None:
    """At sigma infinity the model sees the noise alone."""
    endless = torch.cat([TABLE[:-1], torch.tensor([math.inf])])
    loss = loss_of(replace(SETTINGS, prediction_type=name, min_snr_gamma=gamma), endless)
    timesteps = torch.tensor([0, 10, 500, 1098, 1099])
    batch = batch_of(timesteps, torch.Generator().manual_seed(0))
    each, seen = loss.each(batch), []
    handle = loss.unet.register_forward_pre_hook(lambda _net, given: seen.append(given[0]))
    loss(batch).backward()
    handle.remove()
    assert each.isfinite().all() and (gamma is not None or (each > 0).all())
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in loss.parameters())
    assert relative_error(seen[0][-1], batch.noise[-1]) < 1e-6
    assert relative_error(seen[0][0], batch.latents[0]) > 1e-3
    if gamma is not None:
        plain = loss_of(replace(SETTINGS, prediction_type=name), endless).each(batch)
        weights = target_of(name).min_snr(endless[timesteps].clamp(max=1e12), gamma)
        assert torch.allclose(each, weights * plain, rtol=1e-6, atol=0)
        assert (weights[-1].item() < 1e-20) == (name != "epsilon")


def test_the_wrong_target_is_not_learned() -> None:
    """The loss of one target's best outputs is high for another's."""
    batch = batch_of(torch.tensor([100, 400, 700, 1000]), torch.Generator().manual_seed(0))
    found = {}
    for name in TARGETS:
        loss = loss_of(replace(SETTINGS, prediction_type=name), TABLE)
        sigma = TABLE[batch.timesteps].view(-1, 1, 1, 1)
        for other, target in TARGETS.items():
            output = target.output(batch.latents, batch.noise, sigma)
            loss.unet.forward = lambda *_given, output=output, **_more: output  # type: ignore[method-assign]
            found[name, other] = loss(batch).item()
    assert all((value == 0) == (name == other) for (name, other), value in found.items())
    assert min(value for (name, other), value in found.items() if name != other) > 0.05


def drawn(config: TrainingConfig, count: int = 200_000, total: int = TOTAL) -> Tensor:
    return draw_timesteps(config, total, count, torch.Generator().manual_seed(3))


def test_timesteps_are_drawn_evenly_as_before() -> None:
    expected = torch.randint(TOTAL, (1000,), generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn(SETTINGS, 1000), expected)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.6), (-1.0, 2.0)])
def test_logit_normal_times(mean: float, std: float) -> None:
    """The logits of their fractions have this mean and standard deviation; above 0 there is more noise."""
    found = drawn(replace(SETTINGS, logit_normal=(mean, std)), total=100_000)
    logits = ((found + 0.5) / 100_000).double().logit()
    assert logits.mean().item() == pytest.approx(mean, abs=0.02)
    assert logits.std().item() == pytest.approx(std, rel=0.02)
    assert drawn(replace(SETTINGS, logit_normal=(40.0, 1.0)), 10).tolist() == [TOTAL - 1] * 10


def test_weights_draw_by_importance_and_leave_the_mean_loss_as_it_is() -> None:
    config = replace(SETTINGS, timestep_weights=(1.0, 3.0, 4.0))
    density = timestep_density((1.0, 3.0, 4.0), TOTAL)
    assert density.mean().item() == pytest.approx(1) and len(density.unique()) == 3
    counts = torch.bincount(drawn(config), minlength=TOTAL) / 200_000
    for part in range(3):
        own = torch.arange(TOTAL) * 3 // TOTAL == part
        assert counts[own].sum().item() == pytest.approx(density[own].sum().item() / TOTAL, rel=0.02)
        assert counts[own].max() < 1.6 * counts[own].mean(), "evenly within a part"
    batch = batch_of(torch.arange(TOTAL), torch.Generator().manual_seed(0))
    plain, weighed = loss_of(SETTINGS).each(batch), loss_of(config).each(batch)
    expected = (weighed.double() * density / TOTAL).sum().item()
    assert expected == pytest.approx(plain.double().mean().item(), rel=1e-6)
    with pytest.raises(ValueError, match="at most 2 timestep_weights, one a timestep, got 3"):
        drawn(config, total=2)


def test_measured_weights_are_the_losses_and_draw_it_with_less_variance() -> None:
    plain = replace(SETTINGS, min_snr_gamma=5.0)  # with it, losses depend much on the time
    data = GaussianData(plain)
    weights = measure_timestep_weights(loss_of(plain), data, plain.batch_size, batches=20, parts=5)
    batch = batch_of(torch.arange(TOTAL).repeat(10), torch.Generator().manual_seed(0))
    squares = loss_of(plain).each(batch).detach().square()
    parts = torch.arange(TOTAL).repeat(10) * 5 // TOTAL
    expected = torch.stack([squares[parts == part].mean().sqrt() for part in range(5)])
    assert relative_error(torch.tensor(weights), expected) < 0.1
    config = replace(plain, timestep_weights=weights)
    spreads = []
    for own in (plain, config):
        batch = GaussianData(replace(own, batch_size=20_000)).batch(0, slice(None), CPU)
        spreads.append(loss_of(own).each(batch).std().item())
    assert spreads[1] < 0.95 * spreads[0]
    with pytest.raises(ValueError, match="no timestep of some of 900 parts: take more batches"):
        measure_timestep_weights(loss_of(plain), data, plain.batch_size, batches=1, parts=900)
    with pytest.raises(ValueError, match="a loss that has no timestep_weights itself"):
        measure_timestep_weights(loss_of(config), data, plain.batch_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "v"}, "prediction_type must be one of 'epsilon', .*, got 'v'"),
        ({"logit_normal": (0.0,)}, r"logit_normal must be two numbers, mean and .*, got \(0.0,\)"),
        ({"logit_normal": 1.0}, "logit_normal must be two numbers, mean and standard deviation, got 1.0"),
        ({"logit_normal": (0.0, math.nan)}, "logit_normal must be a number, got nan"),
        ({"logit_normal": (0.0, 0.0)}, r"must have a standard deviation above 0, got \(0.0, 0.0\)"),
        ({"timestep_weights": ()}, r"timestep_weights must be a tuple of numbers, got \(\)"),
        ({"timestep_weights": [1.0]}, r"timestep_weights must be a tuple of numbers, got \[1.0\]"),
        ({"timestep_weights": (1.0, 0.0)}, r"timestep_weights must be above 0, got \(1.0, 0.0\)"),
        ({"timestep_weights": (1.0, "x")}, "timestep_weights must be a number, got 'x'"),
        ({"timestep_weights": (1.0,), "logit_normal": (0.0, 1.0)}, "give logit_normal or .*not both"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes)


def test_only_changes_are_recorded_so_that_older_states_go_on() -> None:
    names = {"prediction_type", "logit_normal", "timestep_weights"}
    assert not names & SETTINGS.record().keys()
    changed = replace(SETTINGS, prediction_type="v_prediction", logit_normal=(0.0, 1.0)).record()
    assert json.loads(json.dumps({name: changed[name] for name in names & changed.keys()})) == {
        "prediction_type": "v_prediction", "logit_normal": [0.0, 1.0],
    }  # fmt: skip


def test_a_run_with_another_target_and_times_goes_on_to_the_same_losses(
    tmp_path: Path, small_tokenizer: Path
) -> None:
    """And is another run than one that predicts the noise."""
    (pictures := tmp_path / "pictures").mkdir()
    write_pictures(pictures)
    for name, how in (("v_prediction", {"logit_normal": (0.0, 1.0)}),
                      ("flow_prediction", {"timestep_weights": (1.0, 2.0, 1.0)})):  # fmt: skip
        config = replace(CONFIG, steps=4, save_every=2, prediction_type=name, min_snr_gamma=5.0, **how)
        expected = make_trainer(tmp_path / name, pictures, small_tokenizer, config).fit(progress=False)
        first = make_trainer(tmp_path / f"{name} again", pictures, small_tokenizer, config)

        def stop(step: Step) -> None:
            if step.step == 2:
                raise InterruptedError

        first.on_step = stop
        with pytest.raises(InterruptedError):
            first.fit(progress=False)
        again = make_trainer(tmp_path / f"{name} again", pictures, small_tokenizer, config)
        assert again.fit(progress=False) == expected[2:]
        other = replace(config, prediction_type="epsilon")
        with pytest.raises(ValueError, match=f"prediction_type: '{name}' there, None here"):
            make_trainer(tmp_path / name, pictures, small_tokenizer, other).fit(progress=False)
