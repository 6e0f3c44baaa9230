"""Held-out losses: the same whenever they are measured; the best weights kept; a run ended when they rise."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kolors_core.training.evaluation import best_step, is_best, is_over
from kolors_core.training.step import Step
from kolors_core.training.trainer import Trainer
from tests.support.small_training import SETTINGS, Fit, Points, read_log

CONFIG = replace(
    SETTINGS, steps=40, schedule="constant", learning_rate=3e-2, save_every=7, evaluate_every=2,
    held_out_batches=3, gradient_accumulation_steps=2,
)  # fmt: skip
HELD_OUT = Points(seed=7)


class Dropped(Fit):
    """Fit with dropout, which draws from torch's own generator."""

    def forward(self, batch: Any) -> torch.Tensor:
        x, wanted = batch
        return super().forward((torch.nn.functional.dropout(x, 0.2, self.training), wanted))


class Few(Points):
    """The same eight points in every step, which are learned by heart."""

    def batch(self, step: int, rows: slice, device: torch.device) -> Any:
        return super().batch(0, rows, device)


def trainer(
    folder: Path, seen: list[Step] | None = None, make: Callable[[], Fit] = Fit, **changes: Any
) -> Trainer:
    options = {name: changes.pop(name) for name in ("held_out", "draw", "resume") if name in changes}
    config = replace(CONFIG, **changes)
    observer = (lambda step: None) if seen is None else seen.append
    return Trainer(make(), Few(), config, folder, observer, **options)


def held_out_loss(loss: Fit) -> float:
    found = [loss(HELD_OUT.batch(step, slice(None), torch.device("cpu"))).item() for step in range(3)]
    loss.means.take()
    return sum(found) / 3


def test_the_run_ends_when_the_held_out_loss_rises_and_keeps_the_best(tmp_path: Path) -> None:
    steps = list[Step]()
    run = trainer(tmp_path, steps, held_out=HELD_OUT, patience=3)
    run.fit(progress=False)
    found = run.held_out_losses
    best = min(found, key=found.__getitem__)
    assert list(found) == list(range(2, best + 7, 2)) and run.step == best + 6 < 40, "three worse ones follow"
    assert {step.step + 1: step.held_out["loss"] for step in steps if step.held_out} == found
    assert set(steps[1].held_out) == {"loss", "error_right"}
    at_end = {name: p.detach().clone() for name, p in run.named.items()}
    with run.averaged():
        assert held_out_loss(run.loss) == pytest.approx(found[run.step], rel=1e-5), "of the average"
    assert all(torch.equal(run.named[name], at_end[name]) for name in at_end)
    assert run.load_best_weights() == best
    assert held_out_loss(run.loss) == pytest.approx(found[best], rel=1e-5)
    assert held_out_loss(run.loss) < 0.999 * found[run.step]
    column = [row["held_out_loss"] for row in read_log(tmp_path)]
    assert [float(value) for value in column if value] == list(found.values())
    again = trainer(tmp_path, held_out=HELD_OUT, patience=3)
    assert again.fit(progress=False) == [] and again.step == run.step, "it stays ended"
    onward = trainer(tmp_path, held_out=HELD_OUT, patience=4)
    onward.fit(progress=False)
    assert onward.step > run.step and onward.held_out_losses.items() >= found.items()


def test_measuring_changes_no_step_and_a_resumed_run_measures_the_same(tmp_path: Path) -> None:
    def fit(name: str, **options: Any) -> Trainer:
        torch.manual_seed(0)
        run = trainer(tmp_path / name, make=Dropped, steps=8, **options)
        run.fit(progress=False)
        return run

    def draw() -> Sequence[Image.Image]:
        return [Image.new("L", (2, 2), int(torch.randint(255, ())))]  # from torch's own generator

    plain, measured = fit("plain"), fit("measured", held_out=HELD_OUT, draw=draw)
    assert measured.losses == plain.losses and list(measured.held_out_losses) == [2, 4, 6, 8]
    assert all(module.training for module in measured.loss.modules())
    assert len(list((tmp_path / "measured" / "samples").iterdir())) == 4
    whole = trainer(tmp_path / "whole", steps=8, held_out=HELD_OUT)
    whole.fit(progress=False)
    trainer(tmp_path / "parts", steps=5, held_out=HELD_OUT).fit(progress=False)
    parts = trainer(tmp_path / "parts", steps=8, held_out=HELD_OUT)
    parts.fit(progress=False)
    assert {step: parts.held_out_losses[step] for step in (2, 4, 6, 8)} == whole.held_out_losses


def test_images_are_drawn_with_the_average_and_reach_observer_and_folder(tmp_path: Path) -> None:
    steps = list[Step]()

    def shade_of(weight: torch.Tensor) -> int:
        return round(1000 * weight[0, 0].item()) % 256

    def draw() -> Sequence[Image.Image]:
        assert not torch.is_grad_enabled() and not run.loss.training
        return [Image.new("L", (2, 2), shade_of(run.loss.out.weight))]

    run = trainer(tmp_path, steps, draw=draw, steps=5)
    run.fit(progress=False)
    assert [len(step.images) for step in steps] == [0, 1, 0, 1, 1] and not run.held_out_losses
    names = [f"step_{done:06}_0.png" for done in (2, 4, 5)]
    assert sorted(file.name for file in (tmp_path / "samples").iterdir()) == names
    with Image.open(tmp_path / "samples" / names[-1]) as image:
        assert image.getpixel((0, 0)) == shade_of(run.ema["out.weight"]) != shade_of(run.named["out.weight"])


def test_a_run_that_starts_anew_has_no_best_of_another(tmp_path: Path) -> None:
    trainer(tmp_path, steps=4, held_out=HELD_OUT).fit(progress=False)
    assert (tmp_path / "best.safetensors").exists()
    with pytest.raises(ValueError, match="another run: held out: not the same"):
        trainer(tmp_path, steps=4, held_out=Points(seed=8)).fit(progress=False)
    anew = trainer(tmp_path, steps=1, resume="never")
    anew.fit(progress=False)
    with pytest.raises(FileNotFoundError, match="best.safetensors"):
        anew.load_best_weights()
    with pytest.raises(ValueError, match="patience has no effect without held_out"):
        trainer(tmp_path, patience=1)


def test_the_end_is_counted_from_the_best() -> None:
    losses = dict(enumerate([3.0, 1.0, 2.0, 1.0, math.nan], start=1))
    assert is_over(losses, 3) and not is_over(losses, 4) and not is_over(losses, None) and not is_over({}, 1)
    assert is_over({1: math.nan, 2: math.nan}, 1) and not is_over({1: math.nan, 2: 1.0}, 1)
    for before in ({1: math.nan}, {1: math.nan, 2: 0.5}, {1: 0.5, 2: math.nan}):
        assert is_best(0.4, before) and not is_best(math.nan, before)
    assert best_step({1: math.nan, 3: 0.5, 2: 0.5}) == 2


def test_held_out_data_that_cannot_be_read_are_found_before_the_first_step(tmp_path: Path) -> None:
    class Absent(Points):
        def batch(self, step: int, rows: slice, device: torch.device) -> Any:
            raise ValueError("they are not there")

    steps = list[Step]()
    with pytest.raises(ValueError, match="they are not there"):
        trainer(tmp_path, steps, held_out=Absent()).fit(progress=False)
    assert not steps and not list(tmp_path.iterdir())


def test_draw_may_return_one_image_and_nothing_else_but_images(tmp_path: Path) -> None:
    steps = list[Step]()
    image = Image.new("L", (2, 2))
    trainer(tmp_path, steps, draw=lambda: image, steps=2).fit(progress=False)
    assert steps[1].images == (image,)
    for wrong in (None, ["a.png"]):
        with pytest.raises(TypeError, match="draw must return images of pillow, got (None|'a.png')"):
            trainer(tmp_path, draw=lambda found=wrong: found, steps=2, resume="never").fit(progress=False)


class Unheard(Fit):
    """What is trained does not act on the loss."""

    def forward(self, batch: Any) -> torch.Tensor:
        return super().forward(batch).detach() + 0 * self.out.bias.sum()


def test_a_gradient_of_zero_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path / "a", steps=2).fit(progress=False)
    assert not caplog.messages
    trainer(tmp_path / "b", make=Unheard, steps=2).fit(progress=False)
    assert caplog.messages == ["the gradient of step 0 is 0: nothing that is trained acts on its loss"]


class Broken(Fit):
    """Its gradient is not finite in step 4, and its loss is."""

    def forward(self, batch: Any) -> torch.Tensor:
        loss = super().forward(batch)
        return loss + 0 * (loss - loss.detach()).sqrt() if self.step_is_bad else loss

    step_is_bad = False


def test_weights_of_a_gradient_that_is_not_finite_are_not_saved(tmp_path: Path) -> None:
    def damage(step: Step) -> None:
        loss.step_is_bad = step.step == 3

    loss, config = Broken(), replace(CONFIG, steps=6, save_every=1)
    run = Trainer(loss, Points(), config, tmp_path, damage)
    with pytest.raises(FloatingPointError, match="the gradient's norm of step 4 is nan"):
        run.fit(progress=False)
    state = load_file(tmp_path / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values()) and len(state["losses"]) == 4
    assert len(Trainer(Broken(), Points(), config, tmp_path).fit(progress=False)) == 2
