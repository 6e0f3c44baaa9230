"""Distillation into few steps: the loss against sampling itself, what is trained, and what comes out."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kolors_core.adapters.lora import LoRAAdapter, attach
from kolors_core.chatglm import TextEmbedding
from kolors_core.conditioning import Conditioning
from kolors_core.guidance import guided
from kolors_core.sampling import euler
from kolors_core.schedule import Schedule
from kolors_core.schedulers import EulerDiscreteScheduler, LCMScheduler
from kolors_core.targets import TARGETS, target_of
from kolors_core.tokenizer import TokenBatch
from kolors_core.training.data import Batch
from kolors_core.training.distillation import HUBER, ConsistencyLoss
from kolors_core.training.run_record import differences, record_run
from kolors_core.training.trainer import Trainer, TrainingConfig
from kolors_core.unet import UNet
from tests.support.small import EXACT, SHALLOW, randomise, relative_error

TABLE = EulerDiscreteScheduler().training_sigmas()
TOTAL, STD = len(TABLE), 0.5
TIMESTEPS = torch.tensor([0, 13, 21, 22, 550, 1099])
SETTINGS = TrainingConfig(steps=2, batch_size=6, learning_rate=1e-3, warmup=0, save_every=2)


def unet_of(seed: int) -> UNet:
    unet = UNet(SHALLOW.unet)
    randomise(unet, seed)
    return unet


def text_of(count: int, length: int, seed: int) -> TextEmbedding:
    generator, width = torch.Generator().manual_seed(seed), SHALLOW.unet.text_dim
    counts = torch.ones(count, length)
    counts[:, 0] = 5
    tokens = torch.randn(count, length, width, generator=generator)
    return TextEmbedding(tokens, torch.randn(count, width, generator=generator), counts)


def batch_of(timesteps: Tensor, seed: int = 0) -> Batch:
    count, generator = len(timesteps), torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, count, 4, 4, 4, generator=generator)
    return Batch(STD * latents, text_of(count, 3, 1), torch.full((count, 6), 32.0), timesteps, noise)


def double(batch: Batch) -> Batch:
    text = batch.text
    assert isinstance(text, TextEmbedding)
    text = TextEmbedding(text.tokens.double(), text.pooled.double(), text.counts)
    return replace(batch, latents=batch.latents.double(), noise=batch.noise.double(), text=text)


class SameBatches:
    """The same batch in every step."""

    def __init__(self, batch: Batch) -> None:
        self.whole = batch

    def batch(self, step: int, rows: slice, device: torch.device) -> Batch:
        return self.whole

    def record(self) -> dict[str, Any]:
        return {}


@pytest.mark.numerical
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("scale", "trajectory"), [(1.0, False), (5.0, False), (5.0, True)])
def test_the_loss_is_of_two_runs_of_the_sampler(name: str, scale: float, trajectory: bool) -> None:
    """Of the student's one step, and of a guided step of the teacher and then one of the student.

    Value and gradient, written out with what draws images; the second run has no gradient.
    """
    student, teacher = unet_of(0).double(), unet_of(1).double().requires_grad_(False)
    more = torch.randn(len(TIMESTEPS), SHALLOW.unet.time_dim, generator=torch.Generator().manual_seed(4))
    added = more.double()  # to the time, of teacher and student
    batch, negative = replace(double(batch_of(TIMESTEPS)), more={"added": added}), text_of(1, 2, 2)
    negative = TextEmbedding(negative.tokens.double(), negative.pooled.double(), negative.counts)
    loss = ConsistencyLoss(
        student, TABLE.double(), replace(SETTINGS, prediction_type=name), teacher=teacher,
        guidance_scale=scale, negative=negative if scale > 1 else None, trajectory=trajectory,
    )  # fmt: skip
    found = loss.each(batch)
    gradient = torch.autograd.grad(found.sum(), list(student.parameters()))
    target, expected = target_of(name), []
    levels = [0.0, *TABLE.double().tolist()]
    for i, positions in enumerate(zip(*(p.tolist() for p in loss.positions(TIMESTEPS)), strict=True)):
        sigma, middle, end = (levels[position] for position in positions)
        times = torch.tensor(
            [
                target.timestep(float(positions[k] - 1), level, TOTAL)
                for k, level in enumerate((sigma, middle))
            ]
        )
        schedule = Schedule(torch.tensor([sigma, middle, 0.0]).double(), times, 1.0, TABLE, False, (), target)
        text = batch.text
        assert isinstance(text, TextEmbedding) and text.counts is not None
        ids = batch.size_ids[i : i + 1]
        one = Conditioning(text.tokens[i : i + 1], text.pooled[i : i + 1], ids, text.counts[i : i + 1])
        without = Conditioning(negative.tokens, negative.pooled, ids, negative.counts)
        one, without = (replace(each, added=added[i : i + 1]) for each in (one, without))
        x = (batch.latents + sigma * batch.noise)[i : i + 1]
        draw = guided(student, schedule, one, precompute=False)
        ahead = euler(draw, x, [sigma, end])
        with torch.no_grad():
            y = euler(guided(teacher, schedule, one, without, scale, precompute=False), x, [sigma, middle])
            wanted = euler(draw, y, [middle, end]) if middle > 0 else y
        difference = (ahead - wanted) / target.scale(end)
        expected.append(((difference**2 + HUBER**2).sqrt() - HUBER).mean())
    assert relative_error(found, torch.stack(expected)) < EXACT
    # All in one: a bias before a norm of its channel alone has no gradient, but rounding.
    wanted_gradient = torch.autograd.grad(torch.stack(expected).sum(), list(student.parameters()))
    ours, theirs = (torch.cat([part.flatten() for part in all_]) for all_ in (gradient, wanted_gradient))
    assert relative_error(ours, theirs) < EXACT


def test_the_steps_are_those_of_the_scheduler_that_draws() -> None:
    """Each timestep belongs to one step between neighbors of LCM's; ends fill the trajectory below."""
    loss = ConsistencyLoss(unet_of(0), TABLE, SETTINGS, teacher=unet_of(1).requires_grad_(False))
    start, middle, end = loss.positions(torch.arange(TOTAL))
    assert set((start - 1).tolist()) == set(LCMScheduler().schedule(50).timesteps.tolist())
    assert torch.equal(start - middle, torch.full((TOTAL,), 22)) and not end.any()
    assert ((start - 1 >= torch.arange(TOTAL)) & (middle <= torch.arange(TOTAL))).all()
    loss.trajectory = True
    start, middle, end = loss.positions(torch.arange(TOTAL))
    of_last = end[start == TOTAL]
    assert (of_last.min(), of_last.max(), len(of_last.unique())) == (0, TOTAL - 22, 22)
    assert (end <= middle).all() and (end[middle == 0] == 0).all()


class Gaussian(nn.Module):
    """The best UNet of images of independent values of deviation STD around `mean`, predicting the image."""

    def __init__(self, std: float, mean: float = 0.0) -> None:
        super().__init__()
        self.variance, self.mean = std**2, mean
        self.register_buffer("table", TABLE.double())

    def forward(self, latents: Tensor, times: Tensor, *_rest: Any) -> Tensor:
        sigma = self.table[times.long()][:, None, None, None]
        x = latents * (sigma**2 + 1) ** 0.5
        return self.mean + self.variance / (self.variance + sigma**2) * (x - self.mean)


class Solved(nn.Module):
    """The student that goes to the end of the Gaussian's trajectory at once: its ODE is linear.

    With the solver's steps of (s + std^2 / s') / ... each, the end is x times the product of them.
    """

    def __init__(self, positions: range) -> None:
        super().__init__()
        levels = torch.cat([torch.zeros(1), TABLE]).double()
        factor, self.factors = 1.0, torch.ones(TOTAL + 1, dtype=torch.float64)
        for low, high in zip(positions, positions[1:], strict=False):
            sigma, end = levels[high], levels[low]
            gain = STD**2 / (STD**2 + sigma**2)
            factor *= float(gain + end / sigma * (1 - gain))
            self.factors[high] = factor
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, latents: Tensor, times: Tensor, *_rest: Any) -> Tensor:
        position = times.long() + 1
        scale = (TABLE.double()[position - 1] ** 2 + 1).sqrt() * self.factors[position]
        return self.gain * latents * scale[:, None, None, None]


def loss_of(student: nn.Module, teacher: nn.Module, **changes: Any) -> ConsistencyLoss:
    config = replace(SETTINGS, prediction_type="sample")
    return ConsistencyLoss(
        student, TABLE.double(), config, teacher=teacher.requires_grad_(False), **changes  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.numerical
@pytest.mark.parametrize("steps", [50, 275])
def test_the_solution_of_a_known_ode_has_no_loss(steps: int) -> None:
    """Of the linear ODE of Gaussian images, whose solution the factors approach with more steps."""
    spacing = TOTAL // steps
    student = Solved(range(0, TOTAL + 1, spacing))
    loss = loss_of(student, Gaussian(STD), solver_steps=steps)
    batch = double(batch_of(torch.arange(0, TOTAL, 7)))  # 0 and 1099 among them
    assert loss.each(batch).max().item() < 1e-12
    student.factors[-1] *= 1.01
    assert loss.each(batch)[-1].item() > 1e-3
    student.factors[-1] /= 1.01
    with torch.no_grad():
        student.gain.mul_(1.01)
    *others, first = loss.each(batch).flip(0).tolist()
    assert first > 1e-3 and others[0] < 1e-12, "the step to the image itself says how large it is"
    exact = STD / (STD**2 + TABLE[-1].item() ** 2) ** 0.5
    assert student.factors[-1].item() == pytest.approx(exact, rel=8 / steps)


@pytest.mark.numerical
def test_straight_trajectories_have_no_loss_to_any_end() -> None:
    """One image makes them straight: the student that knows it is right wherever they end."""
    batch = double(batch_of(torch.arange(0, TOTAL, 10)))
    one = replace(batch, latents=torch.full_like(batch.latents, 0.3))
    student = Gaussian(0.0, 0.3)
    for trajectory in (False, True):
        loss = loss_of(student, Gaussian(0.0, 0.3), trajectory=trajectory)
        assert loss.each(one).max().item() < 1e-12
        student.mean = 0.31
        assert loss.each(one).max().item() > 1e-3
        student.mean = 0.3


class Gain(nn.Module):
    """A student of Gaussian images to be trained: the input times a learned factor of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 1))
        randomise(self)

    def forward(self, latents: Tensor, times: Tensor, *_rest: Any) -> Tensor:
        waves = torch.cos(torch.pi / TOTAL * times.reshape(-1, 1) * torch.arange(16))  # [b, 16]
        return latents * self.layers(waves)[:, :, None, None]


class GaussianData:
    def batch(self, step: int, rows: slice, device: torch.device) -> Batch:
        generator = torch.Generator().manual_seed(step)
        return batch_of(torch.randint(TOTAL, (SETTINGS_LONG.batch_size,), generator=generator), step)

    def record(self) -> dict[str, Any]:
        return {}


SETTINGS_LONG = replace(
    SETTINGS, steps=300, batch_size=256, learning_rate=3e-3, schedule="cosine", warmup=10, weight_decay=0.0,
    prediction_type="sample", save_every=300,
)  # fmt: skip


def test_a_student_draws_in_one_step_what_its_teacher_draws_in_ten(tmp_path: Path) -> None:
    student, teacher = Gain(), Gaussian(STD).float()
    loss = ConsistencyLoss(student, TABLE, SETTINGS_LONG, teacher=teacher, solver_steps=10)  # type: ignore[arg-type]
    noise = torch.randn(4000, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    times = {TABLE[i].item(): float(i) for i in range(TOTAL - 1, 0, -110)}

    @torch.no_grad()
    def drawn(model: nn.Module, *sigmas: float) -> float:
        def denoise(x: Tensor, sigma: float) -> Tensor:
            return model(x / (sigma**2 + 1) ** 0.5, torch.full((len(x),), times[sigma]))

        return euler(denoise, sigmas[0] * noise, [*sigmas, 0.0]).std().item()

    wanted, largest = drawn(teacher, *times), max(times)
    assert drawn(teacher, largest) < 0.05 * wanted, "one step of the teacher is the mean of all images"
    losses = Trainer(loss, GaussianData(), SETTINGS_LONG, tmp_path).fit(progress=False)
    assert losses.mean(slice(-30, None)) < 0.05 * losses.mean(slice(10))
    assert drawn(student, largest) == pytest.approx(wanted, rel=0.05)


def test_only_the_student_is_trained(tmp_path: Path) -> None:
    student, teacher = unet_of(0), unet_of(1).requires_grad_(False)
    before = copy.deepcopy((student.state_dict(), teacher.state_dict()))
    loss = ConsistencyLoss(student, TABLE, SETTINGS, teacher=teacher)
    Trainer(loss, SameBatches(batch_of(TIMESTEPS)), SETTINGS, tmp_path).fit(progress=False)
    assert all(torch.equal(value, before[1][name]) for name, value in teacher.state_dict().items())
    assert not any(torch.equal(value, before[0][name]) for name, value in student.state_dict().items())


def test_every_weight_has_a_gradient_under_autocast() -> None:
    """Though the student runs without gradients too, and autocast keeps what it casts."""
    student = unet_of(0)
    loss = ConsistencyLoss(student, TABLE, SETTINGS, teacher=unet_of(1).requires_grad_(False))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(batch_of(TIMESTEPS))
    value.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in student.parameters())


def lora(unet: UNet, name: str, seed: int) -> LoRAAdapter:
    """An adapter that has an effect."""
    adapter = attach(unet.requires_grad_(False), 2, name=name)
    for i, parameter in enumerate(adapter.parameters()):
        parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed + i))
    return adapter


@pytest.fixture
def styled() -> Iterator[tuple[UNet, LoRAAdapter]]:
    """A UNet with a frozen adapter, which is part of the teacher, and one to train."""
    unet = unet_of(0)
    for parameter in lora(unet, "style", 0).parameters():
        parameter.requires_grad_(False)
    yield unet, attach(unet, 2, generator=torch.Generator().manual_seed(0))


def test_the_teacher_of_a_lora_is_the_model_without_it(styled: tuple[UNet, LoRAAdapter]) -> None:
    unet, adapter = styled
    teacher = copy.deepcopy(unet).requires_grad_(False)
    for i, parameter in enumerate(adapter.parameters()):
        parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(50 + i))
    batch = batch_of(TIMESTEPS)
    own, other = (
        ConsistencyLoss(unet, TABLE, SETTINGS),
        ConsistencyLoss(unet, TABLE, SETTINGS, teacher=teacher),
    )
    assert relative_error(own.each(batch), other.each(batch)) < 1e-5
    assert adapter.is_active
    for part in unet.modules():
        if getattr(part, "is_adapter", False):
            part.is_active = False  # type: ignore[assignment]
    plain = copy.deepcopy(unet).requires_grad_(False)
    adapter.set_active(True)
    wrong = ConsistencyLoss(unet, TABLE, SETTINGS, teacher=plain)
    assert relative_error(wrong.each(batch), other.each(batch)) > 1e-3


def test_a_lora_alone_is_trained_and_leaves_the_model_as_it_was(
    styled: tuple[UNet, LoRAAdapter], tmp_path: Path
) -> None:
    unet, adapter = styled
    trained = {id(parameter) for parameter in adapter.parameters()}
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    config = replace(SETTINGS, checkpoint_blocks=True)
    loss = ConsistencyLoss(unet, TABLE, config, guidance_scale=5.0, negative=text_of(1, 2, 2))
    trainer = Trainer(loss, SameBatches(batch_of(TIMESTEPS)), config, tmp_path)
    assert {id(parameter) for parameter in trainer.named.values()} == trained
    trainer.fit(progress=False)
    changed = {name for name, value in unet.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name.removeprefix("unet.") for name in trainer.named}
    adapter.detach()
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_another_teacher_or_guidance_is_another_run() -> None:
    """A state is the weights alone, for a step depends on nothing else; and is not taken for another's."""
    student, one, other = unet_of(0), *(unet_of(seed).requires_grad_(False) for seed in (1, 2))
    same = {"teacher": one, "guidance_scale": 5.0, "negative": text_of(1, 2, 2)}
    changes: dict[str, dict[str, Any]] = {
        "5": {}, "again": {}, "3": {"guidance_scale": 3.0}, "text": {"negative": text_of(1, 2, 3)},
        "tcd": {"trajectory": True}, "steps": {"solver_steps": 25}, "teacher": {"teacher": other},
    }  # fmt: skip
    runs = {
        name: record_run({}, ConsistencyLoss(student, TABLE, SETTINGS, **same | own), {})
        for name, own in changes.items()
    }
    found = {name: differences(json.dumps(runs["5"]), record) for name, record in runs.items()}
    assert found.pop("5") == found.pop("again") == []
    assert found.pop("teacher") == ["teacher: not the same"]
    assert set(map(tuple, found.values())) == {("objective: not the same",)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_scale": 5.0}, "above 1 and `negative` need each other, got 5 and no negative prompt's"),
        ({"negative": text_of(1, 2, 2)}, "need each other, got 1 and a negative prompt's embedding"),
        ({"guidance_scale": 5.0, "negative": text_of(3, 2, 2)}, "embedding of one prompt, got 3"),
        ({"guidance_scale": "5"}, "guidance_scale must be a number, got '5'"),
        ({"solver_steps": 40}, "solver_steps must divide the 1100 training timesteps, got 40"),
        ({"solver_steps": 1100}, "solver_steps must be .*550, got 1100"),
        ({"teacher": unet_of(1)}, "the teacher must be frozen"),
        ({"teacher": None}, "the student has no teacher: expected a UNet of which only adapters are trained"),
        ({"config": replace(SETTINGS, min_snr_gamma=5.0)}, "min_snr_gamma has no meaning .* got 5.0"),
        ({"config": replace(SETTINGS, timestep_weights=(1.0, 2.0))}, "timestep_weights has no meaning"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"config": SETTINGS, "teacher": unet_of(1).requires_grad_(False)}
    with pytest.raises(ValueError, match=message):
        ConsistencyLoss(unet_of(0), TABLE, **arguments | changes)


def test_bad_batches_are_named() -> None:
    loss = ConsistencyLoss(unet_of(0), TABLE, SETTINGS, teacher=unet_of(1).requires_grad_(False))
    batch = batch_of(TIMESTEPS)
    with pytest.raises(ValueError, match="expected a batch without control images"):
        loss.each(replace(batch, control=torch.zeros(6, 3, 32, 32)))
    ids = torch.zeros(6, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="expected captions as a TextEmbedding, got a TokenBatch"):
        loss.each(replace(batch, text=TokenBatch(ids, ids, ids)))
