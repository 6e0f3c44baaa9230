"""Timing: training and denoising steps in turns, beside A against A, which says what noise alone shows.

Two equal UNets once came out 0.5 and 0.8% apart with intervals that left out 1: what is built where in memory
is the same in every round. So A is built twice, all are built anew in each of several parts, and turns start
with another in each round. No verdict is given below what A shows against A, nor under load.
"""

import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.ablate.change import Variant
from benchmarks.ablate.intervals import Interval, ratio_over_seeds
from benchmarks.ablate.lesson import Lesson
from benchmarks.ablate.models import Pupil
from benchmarks.ablate.study import Job, pupil_of
from benchmarks.side_by_side import Contestant, race, timed
from kolors_core.training.trainer import TrainingConfig

AGAIN, NOT_MEASURED = "A again", "not measured: other work"
PARTS, ROUNDS = 5, 4  # of building anew, and of turns in each
ONES = 8  # denoising steps of one image in a turn, whose median counts
BUSY = 0.5  # programs at work beside this one, from which on times are not to be trusted
LEAST_SHARE = 0.95  # of the threads' time that a race must have had


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Time of a step of each. ms: medians by label; parts: of each label, its time by A's in each part.

    busy: why the times are not to be trusted, or none.
    """

    name: str
    ms: dict[str, float]
    parts: dict[str, list[float]]
    busy: str = ""

    def change(self, label: str) -> Interval:
        """Return a label's time by A's, over the parts."""
        return ratio_over_seeds(self.parts[label])

    @property
    def floor(self) -> Interval:
        """Return the ratios that A against A shows: its interval, and the same the other way round."""
        found = self.change(AGAIN)
        most = max(found.high, 1 / found.low)
        return Interval(1.0, 1 / most, most)

    def verdict(self, label: str) -> str:
        """Say what the times show."""
        if self.busy:
            return NOT_MEASURED
        change, floor = self.change(label), self.floor
        if change.low > floor.high:
            return f"{label} is slower"
        if change.high < floor.low:
            return f"{label} is faster"
        return "no difference shown"


def training_step(pupil: Pupil, batch: Any, learning_rate: float = 1e-5) -> Callable[[], None]:
    """Return one step of AdamW on a batch."""
    weights = [each for each in pupil.objective.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(weights, learning_rate)

    def step() -> None:
        pupil.objective(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def several(call: Callable[[], object]) -> Contestant:
    """Return a contestant of the median of some calls."""
    once = timed(call)
    return lambda: {"seconds": statistics.median(once()["seconds"] for _ in range(ONES))}


def take_turns(contestants: Mapping[str, Contestant], rounds: int) -> tuple[dict[str, list[float]], float]:
    """Race, each round beginning with another; seconds by label, two a round, and a round's least share."""
    names, shares = list(contestants), []
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        order = names[i % len(names) :] + names[: i % len(names)]
        found = race({name: contestants[name] for name in order}, 1, warm_ups=int(i == 0))
        shares.append(found.cpu_share)
        for name in names:
            seconds[name] += found.contestants[name]["seconds"].all
    return seconds, min(shares)


def ratios(a: list[float], b: list[float]) -> list[float]:
    """How much longer b took than a in each round of turns."""
    return [(b[i] + b[i + 1]) / (a[i] + a[i + 1]) for i in range(0, len(a) - 1, 2)]


def others_at_work() -> float:
    """Return how many programs compute beside this one, over the last minute."""
    return os.getloadavg()[0] - torch.get_num_threads()


def time_all(lesson: Lesson, jobs: Mapping[str, Job], base: Variant, load: float) -> list[Timed]:
    """Time a training step of each label, and what a call of the lesson's `one` does. load: at the start."""

    def pupils() -> dict[str, tuple[Pupil, TrainingConfig]]:
        built = {"A": jobs["A"], AGAIN: jobs["A"], **jobs}
        return {label: pupil_of(lesson, job, base) for label, job in built.items()}

    def training() -> dict[str, Contestant]:
        found = {}
        for label, (pupil, config) in pupils().items():
            batches = lesson.batches(pupil, config)
            batch = batches.batch(0, slice(0, config.batch_size), torch.device("cpu"))
            found[label] = timed(training_step(pupil, batch))
        return found

    def ones() -> dict[str, Contestant]:
        return {label: several(lesson.one(pupil.eval())) for label, (pupil, _) in pupils().items()}

    return [
        measure_times("training step", training, load), measure_times(lesson.one_is, ones, load)
    ]  # fmt: skip


def measure_times(
    name: str, make: Callable[[], Mapping[str, Contestant]], load: float = 0.0, parts: int = PARTS,
    rounds: int = ROUNDS,
) -> Timed:  # fmt: skip
    """Time what `make` builds anew in each part: contestants by label, "A" and `AGAIN` among them.

    load: of the machine before this program worked.
    """
    every: dict[str, list[float]] = {}
    by_part: dict[str, list[float]] = {}
    least = 1.0
    for _ in range(parts):
        seconds, share = take_turns(make(), rounds)
        least = min(least, share)
        for label, values in seconds.items():
            every.setdefault(label, []).extend(values)
            by_part.setdefault(label, []).append(statistics.median(ratios(seconds["A"], values)))
    others, busy = max(load, others_at_work()), ""
    if others > BUSY or least < LEAST_SHARE:
        busy = f"load beside this {max(0.0, others):.1f}, least share of the threads' time {least:.2f}"
    ms = {label: 1000 * statistics.median(values) for label, values in every.items()}
    return Timed(name=name, ms=ms, parts=by_part, busy=busy)
