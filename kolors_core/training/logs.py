"""Logs of a run: a folder that is read without this library, and observers for loggers of other libraries.

    config.json   all settings, and the record of what else the result depends on
    log.csv       a line a step: the numbers of `Step.values`; a value that a step does not have is empty
    samples/      the images drawn after steps: step_000500_0.png is the first after 500 steps

`to_tensorboard` and `to_run` are given to a `Trainer` as its `on_step`; each takes an object that its user
made, offline or not, so that nothing of those libraries is imported here.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kolors_core.training.step import OnStep, Step
from weights_convert.atomic_write import atomic_file, write_bytes


class RunLog:
    """Log in a run's folder, of one process; a resumed run's goes on where its state was saved."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(json.dumps(facts, indent=1, default=str).encode(), folder / "config.json")
        self.file, self.samples, self.columns = folder / "log.csv", folder / "samples", list[str]()
        self._rewrite([], first_step)

    def write(self, step: Step) -> None:
        """Append a step, and write its images."""
        row = {"step": step.step, **step.values()}
        if new := [name for name in row if name not in self.columns]:
            self._rewrite(new)
        with self.file.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(row)
        for i, image in enumerate(step.images):
            self.samples.mkdir(exist_ok=True)
            with atomic_file(self.samples / f"step_{step.step + 1:06}_{i}.png") as path:
                image.save(path)

    def _rewrite(self, new: Iterable[str], end: float = math.inf) -> None:
        """Write the rows of steps before an end again, with new columns."""
        rows = list[dict[str, str]]()
        if self.file.exists():
            with self.file.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self.columns = [*(reader.fieldnames or ())]
                rows = [row for row in reader if (row["step"] or "").isdecimal() and int(row["step"]) < end]
        self.columns = [*self.columns, *new]
        content = io.StringIO(newline="")
        writer = csv.DictWriter(content, self.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_bytes(content.getvalue().encode(), self.file)


def to_tensorboard(writer: Any) -> OnStep:
    """Log to a `torch.utils.tensorboard.SummaryWriter(folder)`, which needs the package tensorboard."""

    def log(step: Step) -> None:
        for name, value in step.values().items():
            writer.add_scalar(name, value, step.step)
        for i, image in enumerate(step.images):
            writer.add_image(f"samples/{i}", np.asarray(image.convert("RGB")), step.step, dataformats="HWC")

    return log


def to_run(run: Any, image: Callable[[Any], Any]) -> OnStep:
    """Log to a run of Weights & Biases or trackio, with that library's class of images.

    `to_run(wandb.init(mode="offline", resume="allow", id=...), wandb.Image)`, or `to_run(trackio.init(...),
    trackio.Image)`, which keeps all on this machine unless it is given a `space_id`.
    """

    def log(step: Step) -> None:
        images = {f"samples/{i}": image(one) for i, one in enumerate(step.images)}
        run.log({**step.values(), **images}, step=step.step)

    return log
