"""What a researcher changes in a few lines: a part of the loss, the timesteps, what a batch carries, and what
the moving average is used for."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kolors_core import KolorsPipeline
from kolors_core.performance.compile import compile_blocks
from kolors_core.targets import target_of
from kolors_core.training.data import Batch
from kolors_core.training.loss import DiffusionLoss, Noised
from kolors_core.training.timesteps import OwnTimesteps
from kolors_core.training.trainer import Trainer, TrainingConfig
from tests.support.images import noise_image
from tests.support.small_training import SETTINGS, Fit, Points
from tests.support.versions import traces_whole
from tests.test_readme import block_with, run
from tests.training.test_loss import TABLE, TOTAL, Gain, GaussianData, batch_of

CONFIG = TrainingConfig(
    steps=6, batch_size=8, learning_rate=1e-2, warmup=0, save_every=3, prediction_type="v_prediction",
    min_snr_gamma=5.0, timestep_weights=(1.0, 2.0),
)  # fmt: skip
PLAIN = replace(CONFIG, timestep_weights=None)


class Net(nn.Module):
    """A ControlNet's stand-in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, latents: Tensor, *rest: Any) -> Tensor:
        return self.weight * latents.mean()


class Steered(Gain):
    """A UNet that adds the residual, and reads a fifth channel."""

    def forward(self, latents: Tensor, times: Tensor, *rest: Any, residuals: Any = ()) -> Tensor:
        return super().forward(latents[:, :4], times) + latents[:, 4:].mean() + residuals


class Huber(DiffusionLoss):
    def error(self, predicted: Tensor, noised: Noised, batch: Batch) -> Tensor:
        return (((predicted - noised.wanted) ** 2 + 1).sqrt() - 1).mean((1, 2, 3))


class Twice(DiffusionLoss):
    """Predicts from its own first prediction."""

    def predict(self, noised: Noised, batch: Batch) -> Tensor:
        first = super().predict(noised, batch)
        return super().predict(replace(noised, latents=noised.latents + torch.nn.functional.pad(
            first.detach(), (0, 0, 0, 0, 0, 1))), batch)  # fmt: skip


class Doubled(DiffusionLoss):
    """Adds twice the noise."""

    def noised(self, batch: Batch) -> Noised:
        return super().noised(replace(batch, noise=2 * batch.noise))


class Masked(DiffusionLoss):
    """Weighs by what the batch carries."""

    def weigh(self, error: Tensor, noised: Noised, batch: Batch) -> Tensor:
        return super().weigh(error, noised, batch) * batch.more["mask"]


def test_a_part_of_the_loss_is_changed_and_the_rest_stays() -> None:
    """With a ControlNet, another channel, min-SNR and weights of timesteps, against the loss written out."""
    batch = batch_of(torch.tensor([3, 500, 1000]), torch.Generator().manual_seed(0))
    mask, more = torch.tensor([0.0, 1.0, 3.0]), torch.randn(3, 1, 2, 2)
    batch = replace(batch, control=torch.zeros(3), extra=more, more={"mask": mask})
    unet, net, target = Steered(), Net(), target_of("v_prediction")
    sigma = TABLE[batch.timesteps]
    level = sigma.view(-1, 1, 1, 1)
    weights = target.min_snr(sigma, 5.0) / torch.tensor([2 / 3, 2 / 3, 4 / 3])

    def model(x: Tensor) -> Tensor:
        x = torch.cat([x, more], 1)
        return unet(x, batch.timesteps.float(), residuals=net(x))

    for kind in (DiffusionLoss, Huber, Twice, Doubled, Masked):
        noise = (2 if kind is Doubled else 1) * batch.noise
        x = target.model_input(batch.latents + level * noise, level)
        output = model(x + model(x)) if kind is Twice else model(x)
        difference = output - target.output(batch.latents, noise, level)
        each = ((difference**2 + 1).sqrt() - 1 if kind is Huber else difference**2).mean((1, 2, 3))
        expected = each * weights * (mask if kind is Masked else 1)
        found = kind(unet, None, TABLE, CONFIG, net).each(batch)  # type: ignore[arg-type]
        assert torch.allclose(found, expected, rtol=1e-5), kind.__name__


class WithMask:
    """A source's batches with the mean of each image's noise."""

    def __init__(self, data: GaussianData) -> None:
        self.data = data

    def batch(self, step: int, rows: slice, device: torch.device) -> Batch:
        batch = self.data.batch(step, rows, device)
        return replace(batch, more={**batch.more, "mask": batch.noise.mean((1, 2, 3))})

    def record(self) -> Mapping[str, Any]:
        return self.data.record()


def test_more_of_a_batch_reaches_the_loss(tmp_path: Path) -> None:
    def fit(kind: type[DiffusionLoss]) -> list[float]:
        loss = kind(Gain(), None, TABLE, CONFIG)  # type: ignore[arg-type]
        return Trainer(loss, WithMask(GaussianData(CONFIG)), CONFIG, tmp_path / kind.__name__).fit(
            progress=False
        )

    masked = fit(Masked)
    assert min(masked) < 0 < min(fit(DiffusionLoss)), "the means are of both signs"


def late(step: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw from the noisier half, from one more timestep with each step."""
    return torch.randint(TOTAL // 2 - step, TOTAL, (count,), generator=generator)


def test_own_timesteps_are_a_function_of_seed_and_step(tmp_path: Path) -> None:
    def trainer(name: str, draw: Any = late, **changes: Any) -> Trainer:
        config = replace(PLAIN, **changes)
        data = OwnTimesteps(GaussianData(config), config, draw)
        return Trainer(DiffusionLoss(Gain(), None, TABLE, config), data, config, tmp_path / name)  # type: ignore[arg-type]

    source = trainer("any").data
    whole, half = (source.batch(3, slice(*rows), torch.device("cpu")).timesteps for rows in ((0, 8), (4, 8)))
    assert torch.equal(whole[4:], half) and whole.min() >= TOTAL // 2 - 3 and len(whole.unique()) > 4
    assert not torch.equal(whole, source.batch(4, slice(0, 8), torch.device("cpu")).timesteps)
    expected = trainer("whole").fit(progress=False)
    trainer("parts", steps=3).fit(progress=False)
    assert trainer("parts").fit(progress=False) == expected[3:]
    assert trainer("other", seed=1).fit(progress=False) != expected
    with pytest.raises(ValueError, match="another run: timesteps: not the same"):
        trainer("whole", lambda step, count, generator: late(step + 9, count, generator)).fit(progress=False)
    for bad, message in (
        (lambda step, count, generator: torch.full((count,), TOTAL), "from 0 to 1099, got 1100 to 1100"),
        (
            lambda step, count, generator: torch.zeros(count),
            r"an int64 tensor \[64\], got torch.float32 \[64\]",
        ),
        (lambda step, count, generator: 5, r"an int64 tensor \[64\], got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer("any", bad)
    with pytest.raises(ValueError, match=r"timestep_weights has no effect on timesteps that are drawn here"):
        OwnTimesteps(source, CONFIG, late)


class ToAverage(DiffusionLoss):
    """A consistency loss in short: agree at a time with the average at the one before."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__(unet := Gain(), None, TABLE, config)  # type: ignore[arg-type]
        self.slow = deepcopy(unet).requires_grad_(False)
        self.seen = list[Tensor]()

    def predict(self, noised: Noised, batch: Batch) -> Tensor:
        self.seen.append(next(self.slow.parameters()).clone())
        return super().predict(noised, batch) - self.slow(noised.latents, noised.times - 1)


def test_a_loss_computes_with_the_moving_average(tmp_path: Path) -> None:
    def trainer(name: str, steps: int = 6) -> Trainer:
        config = replace(PLAIN, steps=steps, ema_decay=0.9)
        loss = ToAverage(config)
        return Trainer(loss, GaussianData(config), config, tmp_path / name, average={"unet": loss.slow})

    whole = trainer("whole")
    name, weights = next(iter(whole.named)), list[Tensor]()
    whole.on_step = lambda step: weights.append(whole.named[name].detach().clone())
    losses = whole.fit(progress=False)
    expected = [Gain().state_dict()[name.removeprefix("unet.")]]
    for step, after in enumerate(weights):
        expected.append(torch.lerp(expected[-1], after, 1 - min(0.9, (1 + step) / (10 + step))))
    assert all(torch.equal(*both) for both in zip(whole.loss.seen, expected[:-1], strict=True))
    assert torch.equal(next(whole.loss.slow.parameters()), expected[-1]) and len(losses) == 6
    trainer("parts", 3).fit(progress=False)
    assert trainer("parts").fit(progress=False) == losses[3:], "the average is in the state"


def test_the_pages_example_trains_draws_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("images", "held_out"):
        (tmp_path / folder).mkdir()
        noise_image("RGB", 128, 128).save(tmp_path / folder / "a.png")
        (tmp_path / folder / "a.txt").write_text("a cat")
    page = "kolors_core/training/RUNS.md"
    code = block_with("class Huber(", page)
    for published, here in (("steps=1000", "steps=2"), ("num_inference_steps=10", "num_inference_steps=1")):
        assert published in code
        code = code.replace(published, here)
    trainer = run(code, page)["trainer"]
    assert len(trainer.losses) == 2 and list(trainer.held_out_losses) == [2]
    assert len(list((tmp_path / "huber.run" / "samples").iterdir())) == 2
    again = KolorsPipeline.from_pretrained("huber")
    for name, tensor in again.unet.state_dict().items():
        assert torch.equal(tensor, trainer.loss.unet.state_dict()[name]), name


@traces_whole
def test_compiled_blocks_train_alike(tmp_path: Path) -> None:
    """Also where their activations are computed again."""
    expected = Trainer(Fit(), Points(), SETTINGS, tmp_path / "plain").fit(progress=False)
    for is_recomputed in (False, True):
        loss, config = Fit(), replace(SETTINGS, checkpoint_blocks=is_recomputed)
        assert compile_blocks(loss, backend="aot_eager") == 1
        trainer = Trainer(loss, Points(), config, tmp_path / str(is_recomputed))
        assert trainer.fit(progress=False) == pytest.approx(expected, rel=1e-5)


def test_bad_averages_are_named(tmp_path: Path) -> None:
    config = replace(PLAIN, ema_decay=0.9)
    for loss, name, change, message in (
        (ToAverage(config), "net", {}, "'net' has no parameter that is trained"),
        (ToAverage(config), "unet", {"slow": Gain()}, "expected a module of the loss that is frozen"),
        (ToAverage(config), "unet", {"slow": nn.Linear(1, 1).requires_grad_(False)}, "whose unet.layers.0.w"),
    ):  # fmt: skip
        for key, value in change.items():
            setattr(loss, key, value)
        with pytest.raises(ValueError, match=message):
            Trainer(loss, GaussianData(config), config, tmp_path, average={name: loss.slow})
    loss = ToAverage(PLAIN)
    with pytest.raises(ValueError, match="average has no effect with an ema_decay of 0"):
        Trainer(loss, GaussianData(PLAIN), PLAIN, tmp_path, average={"unet": loss.slow})
