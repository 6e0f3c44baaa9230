"""What is known of each step: by the observer, in the run's folder, and in the loggers of other libraries."""

import json
import math
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kolors_core.training.logs import RunLog, to_run, to_tensorboard
from kolors_core.training.loss import BANDS, DiffusionLoss
from kolors_core.training.step import Means, Step
from kolors_core.training.trainer import Trainer
from tests.support.small_training import SETTINGS, Fit, Points, fit_killed_and_resumed, read_log
from tests.training.test_loss import SETTINGS as DIFFUSION
from tests.training.test_loss import TABLE, Gain, batch_of

STEP = Step(step=4, loss=0.5, learning_rates=(0.1, 0.01), gradient_norm=2.0, seconds=0.5, samples=8,
            memory=1000, means={"loss_t0-9": 0.25}, held_out={"loss": 0.75})  # fmt: skip
VALUES = {
    "loss": 0.5, "learning_rate": 0.1, "learning_rate_1": 0.01, "gradient_norm": 2.0, "seconds": 0.5,
    "samples_per_second": 16.0, "memory": 1000, "loss_t0-9": 0.25, "held_out_loss": 0.75,
}  # fmt: skip


def test_a_step_has_all_that_is_known_of_it(tmp_path: Path) -> None:
    steps, norms = list[Step](), list[float]()
    config = replace(SETTINGS, steps=3, max_grad_norm=0.5)
    trainer = Trainer(loss := Fit(), Points(), config, tmp_path, steps.append)

    def keep(*_: Any) -> None:
        gradients = [p.grad.flatten() for p in loss.parameters()]
        norms.append(torch.cat(gradients).norm().item())

    trainer.optimizer.register_step_pre_hook(keep)  # after they are limited
    losses = trainer.fit(progress=False)
    assert [step.step for step in steps] == [0, 1, 2] and [step.loss for step in steps] == losses
    assert [step.learning_rate for step in steps] == [trainer.config.learning_rate_at(i) for i in range(3)]
    assert max(norms) <= 0.5 < min(step.gradient_norm for step in steps), "before it is limited"
    assert all(0 < step.seconds < 60 and not step.resumed for step in steps)
    assert steps[0].samples_per_second == 8 / steps[0].seconds and (steps[0].memory or 2**30) > 2**20
    x, wanted = Points().batch(0, slice(None), torch.device("cpu"))
    each = Fit().each((x, wanted))
    assert steps[0].means == {"error_right": pytest.approx(each[x[:, 0] > 0].mean().item(), rel=1e-5)}
    free = Trainer(Fit(), Points(), replace(config, max_grad_norm=0.0), tmp_path / "b", steps.append)
    free.fit(progress=False)
    assert steps[3].gradient_norm == steps[0].gradient_norm
    assert steps[4].gradient_norm != steps[1].gradient_norm
    assert STEP.values() == VALUES


def test_parts_of_a_batch_have_its_means(tmp_path: Path) -> None:
    config, found = replace(SETTINGS, steps=1, gradient_accumulation_steps=4), list[Step]()
    for name, own in (("whole", SETTINGS), ("parts", config)):
        Trainer(Fit(), Points(), replace(own, steps=1), tmp_path / name, found.append).fit(progress=False)
    assert found[0].means["error_right"] == pytest.approx(found[1].means["error_right"], rel=1e-5)


def test_the_diffusion_loss_is_known_by_band_of_timesteps() -> None:
    loss = DiffusionLoss(Gain(), None, TABLE, DIFFUSION)  # type: ignore[arg-type]
    batch = batch_of(torch.tensor([0, 274, 275, 1099]), torch.Generator().manual_seed(0))
    loss(batch)
    each, sums = loss.each(batch).tolist(), loss.means.take()
    assert list(sums) == ["loss_t0-274", "loss_t275-549", "loss_t550-824", "loss_t825-1099"] and BANDS == 4
    sums = [found.tolist() for found in sums.values()]
    assert sums == [pytest.approx(pair) for pair in (
        (each[0] + each[1], 2), (each[2], 1), (0, 0), (each[3], 1))]  # fmt: skip
    assert loss.means.take() == {}


def test_means_ignore_what_is_not_among_them() -> None:
    means = Means()
    means.add("a", torch.tensor([1.0, math.nan]), torch.tensor([True, False]))
    means.add("a", torch.tensor(4.0))
    assert means.take()["a"].tolist() == [5.0, 2.0]


def test_a_runs_folder_is_read_without_the_library(tmp_path: Path) -> None:
    """And a killed run's log goes on where its state was saved."""
    Trainer(Fit(), Points(), SETTINGS, tmp_path / "whole").fit(progress=False)

    def tear(file: Path) -> None:
        log = file.with_name("log.csv")
        assert [row["step"] for row in read_log(log.parent)] == ["0", "1", "2", "3", "4"]
        with log.open("a") as end:
            end.write("5,0.1")  # a line that was not written whole

    fit_killed_and_resumed(tmp_path / "parts", None, SETTINGS, tear)
    whole, parts = (read_log(tmp_path / run) for run in ("whole", "parts"))
    assert [row["step"] for row in whole] == [row["step"] for row in parts] == [str(i) for i in range(6)]
    assert all(one[name] == other[name] for one, other in zip(whole, parts, strict=True)
               for name in ("loss", "learning_rate", "gradient_norm", "error_right"))  # fmt: skip
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["settings"]["learning_rate"] == 1e-2 and config["record"]["points"] == 0
    assert config["settings"]["dtype"] == "torch.float32"
    shorter = Trainer(Fit(), Points(), replace(SETTINGS, steps=2), tmp_path / "whole", resume="never")
    shorter.fit(progress=False)
    assert [row["step"] for row in read_log(tmp_path / "whole")] == ["0", "1"], "begun anew"


def test_the_log_takes_columns_and_images_that_come_later(tmp_path: Path) -> None:
    log = RunLog(tmp_path, {}, 0)
    log.write(replace(STEP, step=3, held_out={}, means={}))
    red = Image.new("RGB", (4, 2), "red")
    log.write(replace(STEP, images=[red, red]))
    rows = read_log(tmp_path)
    assert [row["held_out_loss"] for row in rows] == ["", "0.75"] and rows[0]["loss"] == "0.5"
    assert {name: float(rows[1][name]) for name in VALUES} == VALUES
    files = sorted(file.name for file in (tmp_path / "samples").iterdir())
    assert files == ["step_000005_0.png", "step_000005_1.png"]
    with Image.open(tmp_path / "samples" / files[0]) as image:
        assert image.size == (4, 2) and image.getpixel((0, 0)) == (255, 0, 0)


def test_tensorboard_gets_numbers_and_images(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is an extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        to_tensorboard(writer)(replace(STEP, images=[Image.new("L", (4, 2), 255)]))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = {name: events.Scalars(name)[0] for name in events.Tags()["scalars"]}
    assert {name: event.value for name, event in scalars.items()} == pytest.approx(VALUES)
    assert {event.step for event in scalars.values()} == {4}
    [image] = events.Images("samples/0")
    assert (image.width, image.height) == (4, 2)


def test_weights_and_biases_keeps_a_run_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is an extra")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", project="p", dir=tmp_path)
    log = to_run(run, wandb.Image)
    log(replace(STEP, images=[Image.new("RGB", (4, 2))]))
    log(replace(STEP, step=5, loss=9.0))  # the step before it is now in the summary
    assert {name: run.summary[name] for name in VALUES} == VALUES and run.summary["_step"] == 4
    run.finish()
    [file] = tmp_path.rglob("media/images/samples/*.png")
    assert Image.open(file).size == (4, 2)


def test_trackio_keeps_a_run_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # which it reads when it is imported
    trackio = pytest.importorskip("trackio", reason="trackio needs an older pillow: no extra")
    to_run(trackio.init(project="p"), trackio.Image)(replace(STEP, images=[Image.new("RGB", (4, 2))]))
    trackio.finish()
    with closing(sqlite3.connect(tmp_path / "p.db")) as base:
        [(step, metrics)] = base.execute("SELECT step, metrics FROM metrics")
    found = json.loads(metrics)
    assert Image.open(tmp_path / "media" / found.pop("samples/0")["file_path"]).size == (4, 2)
    assert (step, found) == (4, VALUES)


class Run:
    """The part of a run of Weights & Biases or trackio that is used."""

    def __init__(self) -> None:
        self.lines = list[tuple[int, dict[str, Any]]]()

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.lines.append((step, metrics))


def test_a_run_of_another_library_gets_numbers_and_images() -> None:
    run, white = Run(), Image.new("RGB", (4, 2), "white")
    to_run(run, np.asarray)(replace(STEP, images=[white]))
    [(step, metrics)] = run.lines
    assert metrics.pop("samples/0").shape == (2, 4, 3) and (step, metrics) == (4, VALUES)
