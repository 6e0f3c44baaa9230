"""What did a change do? Variants are trained beside A on the same images, noise and timesteps, and measured.

    python -m benchmarks.ablate OUT --b "depths=(0, 0, 1)"
    python -m benchmarks.ablate OUT --a mine.py:make --b other.py:make third.py:make --flops 2e12

A variant is TINY with fields of its UNet's config or of the training changed; a published change, by its name
in benchmarks/ablate/changes; a function in a file that takes the `UNetConfig` and returns a module with
`UNet.forward`'s arguments; or a `Change` in a file, of any of denoiser, text encoder, loss, scheduler,
guidance and sampler. "" is TINY as it is now. To compare a changed unet.py with what it was:

    git show HEAD:kolors_core/unet.py > before.py && python -m benchmarks.ablate OUT --a before.py:UNet --b ""

Lessons: things, small images from scratch; scenes, the embedded model trained on, judged with --detector;
texts, text encoders. The same command gives the same numbers bit for bit, and goes on where it was killed.
"""

import argparse
import os
import string
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.ablate.board import RUN
from benchmarks.ablate.change import Variant, read
from benchmarks.ablate.intervals import FEWEST, MOST
from benchmarks.ablate.lesson import Lesson
from benchmarks.ablate.models import Cost
from benchmarks.ablate.report import HAS_PLOT, write
from benchmarks.ablate.scenes import Scenes
from benchmarks.ablate.study import Job, check, read_json, run_all, steps_within
from benchmarks.ablate.texts import Texts
from benchmarks.ablate.thing_captions import THINGS
from benchmarks.ablate.things import Things, draw_pictures
from benchmarks.ablate.timing import BUSY, Timed, time_all
from benchmarks.side_by_side import environment, write_json
from benchmarks.tiny.emoji import SIZE
from kolors_core.validation import check_float, check_int

WIDTHS = (1.0, 0.5, 1.5)  # factors on TINY's channels
BUDGETS, STEPS = ("steps", "flops", "minutes"), 240
LETTERS = string.ascii_uppercase


def arguments() -> argparse.Namespace:
    """What is to be compared, and how long."""
    about, _, more = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablate", description=about, allow_abbrev=False,
        epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("out", type=Path, help="a new folder, or that of the same study")
    parser.add_argument("--a", default="", help="what the others are compared with (default: TINY)")
    parser.add_argument(
        "--b", nargs="+", default=["depths=(0, 0, 1)"], help="variants (default: %(default)s)"
    )
    parser.add_argument("--lesson", choices=("things", "scenes", "texts"), default="things")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, help="of each training (default: 240)")
    budget.add_argument("--flops", type=float, help="of each training, in place of steps")
    budget.add_argument("--minutes", type=float, help="of each training, by the times measured first")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each (default: %(default)s)")
    parser.add_argument("--widths", action="store_true", help="train at three widths and draw a line")
    parser.add_argument("--concepts", type=int, default=40, help="things to learn (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="of things, in pixels (default: %(default)s)")
    parser.add_argument(
        "--prompts", type=int, default=60, help="of scenes, a language (default: %(default)s)"
    )
    parser.add_argument("--detector", type=Path, help="folder of the recipe's detector, which judges scenes")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    """Check everything, then time, train, measure and write."""
    load, start = os.getloadavg()[0], time.monotonic()
    budget, amount = check_options(options)
    side = (options.size if options.lesson == "things" else SIZE) // 8
    texts = zip(LETTERS, [options.a, *options.b], strict=False)
    variants = {label: read(text, side) for label, text in texts}

    def say(text: str) -> None:
        print(f"{time.monotonic() - start:5.0f} s  {text}", flush=True)

    lesson, widths = open_lesson(options), WIDTHS if options.widths else WIDTHS[:1]
    jobs = {
        (label, width): Job(label=label, variant=variant, seed=0, steps=2, width=width)
        for width in widths for label, variant in variants.items()
    }  # fmt: skip
    checked = {key: check(lesson, job, variants["A"]) for key, job in jobs.items()}
    costs = {key: found[0] for key, found in checked.items()}
    check_widths(variants, costs)
    if budget != "minutes":
        steps_of(budget, amount, costs, [])  # before anything is written
    settings = {
        "variants": {label: [v.text, v.source, repr(v.config)] for label, v in variants.items()},
        "lesson": lesson.about, "budget": [budget, amount], "widths": list(widths),
    }  # fmt: skip
    open_study(options.out, settings)
    is_timed = load <= BUSY or budget == "minutes"  # else the times would show nothing
    timed = {label: jobs[label, 1.0] for label in variants if is_timed}
    times = times_of(options.out, lesson, timed, variants["A"], load, once=budget == "minutes")
    steps = steps_of(budget, amount, costs, times)
    seeds = range(options.seeds)
    todo = [replace(job, seed=seed, steps=steps[key]) for seed in seeds for key, job in jobs.items()]
    runs = run_all(lesson, todo, variants["A"], options.out, say)
    about = {
        **settings, "seeds": options.seeds, "lesson_name": lesson.name, "recipe": repr(lesson.recipe),
        "trained": {label: [repr(v.change.scheduler), repr(dict(v.change.training))]
                    for label, v in variants.items()},
        "about": {label: variant.about for label, variant in variants.items()},
        "commands": {label: command(options, variants[label].text) for label in list(variants)[1:]},
        "steps": {f"{label} {width:g}": value for (label, width), value in steps.items()},
        "own_first_values": {label: checked[label, 1.0][1].own for label in variants},
        "unused": {label: checked[label, 1.0][2] for label in variants}, "environment": environment(),
        "cpu_seconds": round(sum(run.cpu_seconds for run in runs)),
    }  # fmt: skip
    lines = describe(lesson, variants, checked, steps, options.seeds, times)
    if not HAS_PLOT:
        lines.append("ablate.png was not drawn: it needs matplotlib, `pip install -e '.[bench]'`.")
    text, rows, scaling = write(options.out, lesson, variants, runs, times, costs, lines, about)
    print(text)
    if HAS_PLOT:
        from benchmarks.ablate.plot import plot

        plot(options.out / "ablate.png", variants, runs, rows, times, costs, scaling)


def check_options(options: argparse.Namespace) -> tuple[str, float]:
    """Return what the budget is of, and how much; ValueError for numbers that make no study."""
    check_int("--seeds", options.seeds, least=FEWEST, most=MOST)
    check_int("--concepts", options.concepts, least=2, most=len(THINGS))
    check_int("--size", options.size, multiple=8)
    check_int("--prompts", options.prompts)
    if len(options.b) >= len(LETTERS):
        raise ValueError(f"--b: {len(options.b)} variants, expected {len(LETTERS) - 1} at most")
    given = ((name, getattr(options, name)) for name in BUDGETS)
    budget, amount = next((each for each in given if each[1] is not None), ("steps", STEPS))
    check_float(f"--{budget}", amount, 0)
    return budget, amount


def steps_of(
    budget: str, amount: float, costs: Mapping[tuple[str, float], Cost], times: Sequence[Timed]
) -> dict[tuple[str, float], int]:
    """Return the steps of each label and width. times: of a training step first, for minutes.

    Another width's time is reckoned by its FLOPs.
    """
    found = {}
    for (label, width), cost in costs.items():
        seconds = times[0].ms[label] / 1000 * cost.step / costs[label, 1.0].step if times else 0.0
        found[label, width] = steps_within(budget, amount, cost, seconds)
    return found


def open_lesson(options: argparse.Namespace) -> Lesson:
    """Make the lesson that is asked for; an error for what it needs and has not."""
    if options.detector is not None and options.lesson != "scenes":
        raise ValueError("--detector judges scenes: expected --lesson scenes")
    if options.lesson == "scenes":
        return Scenes(options.detector, options.prompts)
    if options.lesson == "texts":
        return Texts()
    with TemporaryDirectory() as folder:
        examples, names = draw_pictures(options.concepts, Path(folder))
        return Things(examples, names, options.size)


def check_widths(variants: Mapping[str, Variant], costs: Mapping[tuple[str, float], Cost]) -> None:
    """Raise ValueError for a variant that is the same at two widths."""
    for label, variant in variants.items():
        own = [cost.forward for (name, _), cost in costs.items() if name == label]
        if len(set(own)) < len(own):
            raise ValueError(f"--widths: {variant.text} has the same FLOPs at two widths, expected a module "
                             "as wide as its config's channels")  # fmt: skip


def open_study(out: Path, settings: dict[str, Any]) -> None:
    """Start a study in a folder, or take up the one that is there; ValueError if it is another."""
    file = out / "study.json"
    if not out.exists():
        out.mkdir(parents=True)
        write_json(settings, file)
        return
    if not file.is_file():
        raise FileExistsError(
            f"{out}: exists already and has no study.json, expected a new folder or a study's"
        )
    there = read_json(file)
    if different := [name for name, value in settings.items() if there.get(name) != value]:
        raise ValueError(f"{out}: has another study, other {', '.join(different)}: expected a new folder")


def times_of(
    out: Path, lesson: Lesson, jobs: dict[str, Job], base: Variant, load: float, once: bool
) -> list[Timed]:
    """Measure times, or read those that were measured. jobs: none under load, then nothing is measured.

    Times that other work disturbed are measured anew, unless they set the budget (once).
    """
    file, found = out / "times.json", []
    if file.is_file():
        found = [Timed(**content) for content in read_json(file)]
        if once or not any(each.busy for each in found):
            return found
    if jobs:
        found = time_all(lesson, jobs, base, load)
        write_json([asdict(each) for each in found], file)
    return found


def describe(
    lesson: Lesson, variants: dict[str, Variant], checked: dict[tuple[str, float], Any],
    steps: dict[tuple[str, float], int], seeds: int, times: Sequence[Timed],
) -> list[str]:  # fmt: skip
    """Say in lines what the tables do not: what was done, what started how, and whether times count."""
    counts = sorted({steps[label, 1.0] for label in variants})
    spans = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    lines = [f"Lesson: {lesson.name}. {' '.join(lesson.about)}",
             f"{spans} steps of {lesson.recipe.batch_size}, with each of {seeds} seeds.",
             "Intervals: Student's t over the seeds, of the difference from A, each for itself."]  # fmt: skip
    for label in variants:
        _, pupil, unused = checked[label, 1.0]
        start = "the embedded model's" if getattr(lesson, "starts_trained", False) else "A's"
        lines.append(
            f"{label}: {pupil.shared} tensors start as {start}, {len(pupil.own)} as its own"
            f"{shortly(pupil.own)}."
        )
        if unused:
            lines.append(f"{label} does not use {len(unused)} of its parameters{shortly(unused)}.")
    if not times:
        lines.append(
            "**Times were not measured: the machine had other work.** The same command measures them."
        )
    for each in times:
        floor = f"A against A: {each.floor.low:.3f} to {each.floor.high:.3f}; no verdict within that"
        lines.append(f"{each.name}: {floor}." if not each.busy else
                     f"**{each.name}: the machine had other work ({each.busy}): no times are told.** "
                     "The same command measures them anew when it has none.")  # fmt: skip
    lines.append(f"CPU threads: {torch.get_num_threads()}.")
    return lines


def command(options: argparse.Namespace, only: str) -> str:
    """Write the command of one variant, which gives the same numbers, without the folders of this machine."""
    words = [RUN]
    for name, value in vars(options).items():
        is_default = value is None or value is False or (name, value) in (
            ("a", ""), ("lesson", "things"), ("seeds", 5), ("concepts", 40), ("size", 64), ("prompts", 60)
        )  # fmt: skip
        if name == "out" or is_default:
            continue
        value = only if name == "b" else value
        every = value if isinstance(value, list) else [value]
        values = " ".join(f'"{one}"' if " " in str(one) else str(one) for one in every)
        values = "DETECTOR" if name == "detector" else values
        words.append(f"--{name}" if value is True else f"--{name} {values}")
    return " ".join(words)


def shortly(names: Sequence[str]) -> str:
    """Some names, to follow a number of them."""
    more = ", ..." if len(names) > 3 else ""
    return f" ({', '.join(names[:3])}{more})" if names else ""


if __name__ == "__main__":
    try:
        main(arguments())
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except ImportError as error:
        raise SystemExit(f"error: {error}: pip install -e '.[bench]' has what benchmarks need") from None
