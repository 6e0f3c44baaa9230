"""Study: every variant trained with every seed, each on the same batches, and measured; a run is done once.

A run depends on its variant, width and seed alone: all random numbers are those of a seed and a step. So runs
need no turns, what is finished is kept in `runs`, and a study that was killed goes on. Times are taken apart,
in turns (timing.py).
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.ablate.change import Variant
from benchmarks.ablate.lesson import Lesson, finite
from benchmarks.ablate.models import Cost, Pupil, check_objective, flops
from benchmarks.side_by_side import write_json
from kolors_core.attention import attention_kernel
from kolors_core.training.data import derive_seed
from kolors_core.training.trainer import BatchSource, Trainer, TrainingConfig

POINTS = 4  # of the training, at which the held-out number is measured
FEWEST_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training. label: A, B, ...; width: factor on the channels; steps: of its training."""

    label: str
    variant: Variant
    seed: int
    steps: int
    width: float = 1.0

    @property
    def name(self) -> str:
        """Name of the run's files."""
        return f"{self.label}{'' if self.width == 1 else f'-width-{self.width:g}'}-seed-{self.seed}"


@dataclass(kw_only=True)
class Run:
    """What was measured of one training. curve: (step, held-out number) at `points`.

    scores: of each measure, None where it is not finite. diverged: the step at which the loss was not finite.
    """

    label: str
    width: float
    seed: int
    steps: int
    losses: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    scores: dict[str, float | None] = field(default_factory=dict)
    image_labels: list[str] = field(default_factory=list)
    diverged: int | None = None
    cpu_seconds: float = 0.0


def points(steps: int) -> list[int]:
    """List after how many steps the held-out number is measured: the last is `steps`."""
    return sorted({math.ceil(steps * i / POINTS) for i in range(1, POINTS + 1)})


class Seeded:
    """Source that makes what a module draws in its forward a function of seed and step."""

    def __init__(self, source: BatchSource, seed: int) -> None:
        self.source, self.seed = source, seed

    def batch(self, step: int, rows: slice, device: torch.device) -> Any:
        """Return the source's batch, and seed torch's own generator."""
        found = self.source.batch(step, rows, device)
        torch.manual_seed(derive_seed(self.seed, step, 9))
        return found

    def record(self) -> Any:
        """Return the source's record."""
        return self.source.record()


def pupil_of(lesson: Lesson, job: Job, base: Variant) -> tuple[Pupil, TrainingConfig]:
    """Build a job's models, and the settings that they are trained with."""
    variant, base = (one if job.width == 1 else one.scaled(job.width) for one in (job.variant, base))
    config = variant.training(lesson.recipe, steps=job.steps, seed=job.seed)
    return lesson.pupil(variant, base, config), config


def train(lesson: Lesson, job: Job, base: Variant, say: Callable[[str], None]) -> tuple[Run, Tensor | None]:
    """Train and measure one; also returns images that it drew."""
    pupil, config = pupil_of(lesson, job, base)
    run = Run(label=job.label, width=job.width, seed=job.seed, steps=job.steps)
    start, marks = time.process_time(), points(job.steps)

    source = Seeded(lesson.batches(pupil, config), job.seed)
    trainer = Trainer(pupil.objective, source, config, folder="")  # nothing is saved
    # In bfloat16 the plain products are faster than torch's fused kernel at these sizes, above all backwards.
    with attention_kernel("matmul") if config.dtype == torch.bfloat16 else nullcontext():
        for trainer.step in range(job.steps):
            try:
                run.losses.append(trainer.one_step().loss)
            except FloatingPointError:
                run.diverged = trainer.step
                run.scores = {measure.name: None for measure in lesson.measures}
                say(f"{job.name}: diverged at step {trainer.step}")
                return run, None
            if trainer.step + 1 in marks[:-1]:
                found = measured(lambda: lesson.held_out(pupil.eval()), job.seed)
                run.curve.append((trainer.step + 1, found))
                pupil.objective.train()
    if config.ema_decay:
        trainer.load_ema_weights()
    result = measured(lambda: lesson.measure(pupil.eval(), job.seed), job.seed)
    run.scores, run.image_labels = finite(result.scores), result.labels
    run.curve.append((job.steps, result.scores[lesson.measures[0].name]))
    run.cpu_seconds = round(time.process_time() - start, 1)
    told = ", ".join(f"{name} {value:.4g}" for name, value in result.scores.items())
    say(f"{job.name}, {job.steps} steps, {run.cpu_seconds:.0f} s of a core: {told}")
    return run, result.images


def measured(call: Callable[[], Any], seed: int) -> Any:
    """Call with torch's own generator seeded, for modules that draw in their forward."""
    torch.manual_seed(seed)
    return call()


def run_all(
    lesson: Lesson, jobs: list[Job], base: Variant, out: Path, say: Callable[[str], None]
) -> list[Run]:
    """Do every job that is not done in `out`/runs yet, and return all runs."""
    found = []
    for job in jobs:
        file = out / "runs" / f"{job.name}.json"
        if not file.is_file():
            run, images = train(lesson, job, base, say)
            file.parent.mkdir(parents=True, exist_ok=True)
            if images is not None and job.seed == 0 and job.width == 1:
                save_file({"images": images.contiguous()}, file.with_suffix(".safetensors"))
            part = file.with_suffix(".part")
            write_json(asdict(run), part)
            part.replace(file)  # last: a file that is there is of a run that is done
        found.append(read_run(file))
    return found


def read_json(file: Path) -> Any:
    """Read what `write_json` wrote."""
    return json.loads(file.read_text(encoding="utf-8"))


def read_run(file: Path) -> Run:
    """Read a finished run."""
    content = read_json(file)
    return Run(**content | {"curve": [tuple(point) for point in content["curve"]]})


def read_images(out: Path, label: str) -> Tensor | None:
    """Read the images that a variant drew with seed 0."""
    file = out / "runs" / f"{label}-seed-0.safetensors"
    return load_file(file)["images"] if file.is_file() else None


def check(lesson: Lesson, job: Job, base: Variant) -> tuple[Cost, Pupil, list[str]]:
    """Build a job's models and do one step without changing them; ValueError for what cannot be trained.

    Returns their cost, and the names of parameters that are not used.
    """
    pupil, config = pupil_of(lesson, job, base)
    batch = lesson.batches(pupil, config).batch(0, slice(0, config.batch_size), torch.device("cpu"))
    unused = check_objective(pupil, batch)
    trained = [each for each in pupil.objective.parameters() if each.requires_grad]
    for parameter in trained:
        parameter.grad = None
    step = flops(lambda: pupil.objective(batch).backward())
    forward = flops(lesson.one(pupil))
    parameters = sum(each.numel() for each in trained)
    return Cost(parameters=parameters, forward=forward, step=step), pupil, unused


def steps_within(budget: str, amount: float, cost: Cost, step_seconds: float) -> int:
    """Return how many steps a budget of "steps", "flops" or "minutes" pays for; ValueError for too few."""
    paid = {"steps": amount, "flops": amount / cost.step, "minutes": 60 * amount / max(step_seconds, 1e-9)}
    if (steps := int(paid[budget])) < FEWEST_STEPS:
        raise ValueError(
            f"--{budget} {amount:g} pays for {steps} training steps, expected {FEWEST_STEPS} or more"
        )
    return steps
