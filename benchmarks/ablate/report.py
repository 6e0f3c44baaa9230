"""What came out: a table (Markdown and JSON), a plot, and a sheet of samples. Needs the `bench` extra."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from PIL import Image

from benchmarks.ablate.architecture import Cost
from benchmarks.ablate.intervals import Interval, over_seeds, ratio_over_seeds
from benchmarks.ablate.lesson import Lesson
from benchmarks.ablate.study import Pair, Run, points, ratios
from benchmarks.tiny.quality import sheet

COLOURS = ("#3d6fb4", "#d1762b")  # of A and B
SHOWN, WIDE = 12, 96  # things on the sheet of samples, and pixels of each
NOTHING = "no difference shown"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table. a, b: by seed. change: B - A, or B / A if `is_ratio`, over the seeds.

    words: what B is if the change is below nothing, and above. shown: how a value is written.
    """

    name: str
    a: list[float]
    b: list[float]
    change: Interval
    is_ratio: bool
    words: tuple[str, str]
    shown: str

    @property
    def verdict(self) -> str:
        """What the interval says."""
        nothing = 1.0 if self.is_ratio else 0.0
        return NOTHING if self.change.holds(nothing) else f"B is {self.words[self.change.mean > nothing]}"

    def __str__(self) -> str:
        means = [self.shown.format(statistics.fmean(values)) for values in (self.a, self.b)]
        form = "{:.3f}" if self.is_ratio else self.shown.replace(":", ":+")
        change, low, high = (form.format(x) for x in (self.change.mean, self.change.low, self.change.high))
        times = " times" if self.is_ratio else ""
        return (
            f"| {self.name} | {means[0]} | {means[1]} | {change}{times} ({low} to {high}) | {self.verdict} |"
        )


def rows_of(pairs: Sequence[Pair]) -> list[Row]:
    """What was measured, a row a quantity."""

    def row(name: str, of: Callable[[Run], float], words: tuple[str, str], shown: str) -> Row:
        a, b = ([of(pair.runs[k]) for pair in pairs] for k in (0, 1))
        change = over_seeds([y - x for x, y in zip(a, b, strict=True)])
        return Row(name=name, a=a, b=b, change=change, is_ratio=False, words=words, shown=shown)

    def times(name: str, of: Callable[[Run], list[float]]) -> Row:
        a, b = ([statistics.median(of(pair.runs[k])) for pair in pairs] for k in (0, 1))
        found = [statistics.median(ratios(of(pair.runs[0]), of(pair.runs[1]))) for pair in pairs]
        words, change = ("faster", "slower"), ratio_over_seeds(found)
        return Row(name=name, a=a, b=b, change=change, is_ratio=True, words=words, shown="{:.1f} ms")

    loss = ("better", "worse")
    return [
        row("held-out loss", lambda run: run.held_out[-1], loss, "{:.4f}"),
        row("training loss, last tenth", last_tenth, loss, "{:.4f}"),
        row("prompts drawn right", lambda run: run.right, loss[::-1], "{:.1%}"),
        times("training step", lambda run: run.train_ms),
        times("denoising step, one picture with guidance", lambda run: run.denoise_ms),
    ]


def last_tenth(run: Run) -> float:
    """Mean training loss of the last tenth of the steps."""
    return statistics.fmean(run.losses[-max(1, len(run.losses) // 10) :])


def table(rows: Sequence[Row], costs: Sequence[Cost]) -> str:
    """Markdown."""
    lines = ["| | A | B | B beside A, 95% interval | |", "|---|---|---|---|---|", *map(str, rows)]
    a, b = costs
    for name, x, y in (
        ("parameters", a.parameters, b.parameters),
        ("multiplications and additions of one picture's forward", a.flops, b.flops),
    ):
        lines.append(f"| {name} | {x:,} | {y:,} | {y / max(x, 1):.3f} times | counted |")
    return "\n".join(lines) + "\n"


def _by_seed(axes: Axes, steps: Sequence[int], curves: Sequence[Sequence[float]], is_ratio: bool,
             colour: str, label: str | None = None) -> None:  # fmt: skip
    """A line through the means over seeds, in its 95% band."""
    interval = ratio_over_seeds if is_ratio else over_seeds
    found = [interval(values) for values in zip(*curves, strict=True)]
    axes.plot(steps, [each.mean for each in found], "o-", color=colour, label=label, markersize=3.5)
    low, high = [each.low for each in found], [each.high for each in found]
    axes.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0)


def plot(rows: Sequence[Row], pairs: Sequence[Pair], costs: Sequence[Cost], texts: Sequence[str],
         file: Path) -> None:  # fmt: skip
    """Losses of both, their difference, quality, and what B costs beside A."""
    figure, ((curves, change), (quality, price)) = pyplot.subplots(
        2, 2, figsize=(12, 8), layout="constrained"
    )
    count = len(pairs[0].runs[0].losses)
    window, steps = max(1, count // 20), points(count)
    for k in (0, 1):
        runs = [pair.runs[k] for pair in pairs]
        name = f"{'AB'[k]}: {texts[k]}"
        _by_seed(curves, steps, [run.held_out for run in runs], True, COLOURS[k], f"{name}, held out")
        means = [statistics.fmean(losses) for losses in zip(*(run.losses for run in runs), strict=True)]
        starts = range(0, count - window + 1, window)
        smooth = [statistics.fmean(means[i : i + window]) for i in starts]
        middles = [i + (window + 1) / 2 for i in starts]
        curves.plot(middles, smooth, ":", color=COLOURS[k], label=f"{'AB'[k]}, training")
    held, _, right, *speeds = rows
    curves.set(xlabel="training step", ylabel="loss", yscale="log", title="Loss")
    curves.legend()
    differences = [
        [y - x for x, y in zip(*(run.held_out for run in pair.runs), strict=True)] for pair in pairs
    ]
    _by_seed(change, steps, differences, False, "#444444")
    change.axhline(0, color="black", linewidth=1)
    change.set(xlabel="training step", ylabel="held-out loss, B - A", title=f"Held-out loss: {held.verdict}")
    for x, y in zip(right.a, right.b, strict=True):
        quality.plot([0, 1], [100 * x, 100 * y], "o-", color="grey", alpha=0.6, markersize=4)
    for k, values in enumerate((right.a, right.b)):
        mean = 100 * statistics.fmean(values)
        quality.plot([k - 0.12, k + 0.12], [mean, mean], color=COLOURS[k], linewidth=4)
    quality.set_xticks([0, 1], [f"{'AB'[k]}: {texts[k]}" for k in (0, 1)])
    quality.set(xlim=(-0.5, 1.5), ylim=(0, 100), ylabel="prompts drawn right, %")
    quality.set_title(f"Quality, a line a seed: {right.verdict}")
    named = [(row.name.split(",")[0], row.change) for row in speeds]
    a, b = costs
    for name, x, y in (("parameters", a.parameters, b.parameters), ("arithmetic", a.flops, b.flops)):
        named.append((name, Interval(*[y / max(x, 1)] * 3)))
    for i, (_, each) in enumerate(named):
        error = [[each.mean - each.low], [each.high - each.mean]]
        price.errorbar(each.mean, -i, xerr=error, fmt="o", color=COLOURS[1], capsize=4)
        price.annotate(f"{each.mean:.3f}", (each.mean, -i), (0, 8), textcoords="offset points", ha="center")
    price.axvline(1, color="black", linewidth=1)
    price.set_yticks([-i for i in range(len(named))], [name for name, _ in named])
    price.set(xlabel="B / A", ylim=(0.6 - len(named), 0.6), title="Cost: B in parts of A")
    for axes in (curves, change, quality, price):
        axes.grid(alpha=0.3, which="both" if axes is curves else "major")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{len(pairs)} seeds, in pairs; bands and bars: 95% intervals", fontsize=10)
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


def samples(pair: Pair, lesson: Lesson) -> Image.Image:
    """What was asked for, and what A and B drew with one seed, each over what it looks like most."""
    count = len(lesson.names)
    chosen = [i * count // min(SHOWN, count) for i in range(min(SHOWN, count))]
    images, labels = [lesson.known[chosen]], [lesson.names[i] for i in chosen]
    for name, run, drawn in zip("AB", pair.runs, pair.images, strict=True):
        images.append(drawn[chosen])
        labels += [f"{name}: {lesson.names[run.nearest[i]]}" for i in chosen]
    return sheet(torch.cat(images), labels, len(chosen), WIDE / lesson.known.shape[-1])


def write(pairs: Sequence[Pair], costs: Sequence[Cost], lesson: Lesson, texts: Sequence[str],
          told: dict[str, object], lines: Sequence[str], out: Path) -> str:  # fmt: skip
    """ablate.md, ablate.json, runs.jsonl, ablate.png and samples.png; returns the text of the first.

    told: what else the JSON says of the study. lines: what else the text says of it.
    """
    rows = rows_of(pairs)
    head = "\n".join([f"A: `{texts[0]}`\nB: `{texts[1]}`\n", *lines])
    text = f"{head}\n\n{table(rows, costs)}"
    pictures = "![Losses, quality and cost](ablate.png)\n\n![Asked for, drawn by A, drawn by B](samples.png)"
    (out / "ablate.md").write_text(f"# Two architectures\n\n{text}\n{pictures}\n", encoding="utf-8")
    content = told | {
        "rows": [asdict(row) | {"verdict": row.verdict} for row in rows],
        "costs": [asdict(cost) for cost in costs],
    }
    (out / "ablate.json").write_text(
        json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    with (out / "runs.jsonl").open("w", encoding="utf-8") as file:
        for seed, pair in enumerate(pairs):
            for name, run in zip("AB", pair.runs, strict=True):
                file.write(json.dumps({"architecture": name, "seed": seed, **asdict(run)}) + "\n")
    plot(rows, pairs, costs, texts, out / "ablate.png")
    samples(pairs[0], lesson).save(out / "samples.png")
    return text
