"""Report: a study's results as a table (Markdown and JSON), and a sheet of samples."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.ablate.change import Variant
from benchmarks.ablate.intervals import Interval, fit_line, over_seeds, ratio_over_seeds
from benchmarks.ablate.lesson import Lesson, Measure
from benchmarks.ablate.models import Cost
from benchmarks.ablate.study import Run, read_images
from benchmarks.ablate.timing import NOT_MEASURED, Timed
from benchmarks.side_by_side import write_json
from benchmarks.tiny.quality import sheet
from kolors_core.notebook import table_html

WIDE = 96  # pixels of an image on the sheet of samples
HAS_PLOT = find_spec("matplotlib") is not None
NAN = Interval(math.nan, math.nan, math.nan, math.nan)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table. a, b: by seed. change: B - A, or B / A if `is_ratio`. verdict: what it says.

    visible: the least difference that the study would have shown four times in five, if there is one.
    """

    label: str
    name: str
    a: list[float]
    b: list[float]
    change: Interval
    is_ratio: bool
    verdict: str
    form: str
    unit: str = ""

    def cells(self) -> list[str]:
        """Return the name, both means, the change with its interval, what is visible, and the verdict."""
        if self.verdict == NOT_MEASURED:
            return [self.name, "", "", "", "", self.verdict]
        means = [f"{statistics.fmean(values):{self.form}}{self.unit}" for values in (self.a, self.b)]
        if math.isnan(self.change.mean):
            return [self.name, *means, "", "", self.verdict]
        form = ".3f" if self.is_ratio else f"+{self.form}"
        change, low, high = (format(x, form) for x in (self.change.mean, self.change.low, self.change.high))
        change += " times" if self.is_ratio else self.unit.replace("%", " points")
        seen = self.change.visible
        power = "" if math.isnan(seen) else f"{seen:{'.3f' if self.is_ratio else self.form}}"
        return [self.name, *means, f"{change} ({low} to {high})", power, self.verdict]

    def __str__(self) -> str:
        return markdown(self.cells())


def markdown(cells: Sequence[str]) -> str:
    """Format a row of a Markdown table."""
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"


def rows_of(lesson: Lesson, runs: Sequence[Run], times: Sequence[Timed], labels: Sequence[str]) -> list[Row]:
    """List what was measured of each label but A, beside A: a row a quantity, at the first width."""
    found = []
    for label in labels[1:]:
        both = [[run for run in runs if run.width == 1 and run.label == one] for one in ("A", label)]
        found += [_compare(label, measure, *both) for measure in lesson.measures]
        found += [_timed(label, each) for each in times]
    return found


def _compare(label: str, measure: Measure, first: Sequence[Run], second: Sequence[Run]) -> Row:
    pairs = [(a.scores[measure.name], b.scores[measure.name]) for a, b in zip(first, second, strict=True)]
    a, b = ([math.nan if value is None else value for value in values] for values in zip(*pairs, strict=True))
    change, verdict = NAN, f"diverged, {sum(run.diverged is not None for run in second)} of {len(second)}"
    if all(map(math.isfinite, [*a, *b])):
        change = over_seeds([y - x for x, y in zip(a, b, strict=True)], measure.grain)
        is_better = (change.mean > 0) == (measure.more_is == "better")
        verdict = "no difference shown"
        if not change.holds(0.0):
            verdict = f"{label} is {'better' if is_better else 'worse'}"
    elif any(run.diverged is not None for run in first):
        verdict = "A diverged"
    return Row(label=label, name=measure.name, a=a, b=b, change=change, is_ratio=False, verdict=verdict,
               form=measure.form, unit=measure.unit)  # fmt: skip


def _timed(label: str, times: Timed) -> Row:
    return Row(label=label, name=times.name, a=[times.ms["A"]], b=[times.ms[label]],
               change=times.change(label), is_ratio=True, verdict=times.verdict(label), form=".1f",
               unit=" ms")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Power law of a label's first measure over FLOPs. points: (width, FLOPs of one, mean over the seeds).

    slope: exponent, over the seeds. gap: the measure by that of A's line at the same FLOPs; None of A.
    """

    label: str
    points: list[tuple[float, int, float]]
    slope: Interval
    gap: Interval | None

    def __str__(self) -> str:
        points = ", ".join(f"{value:.4f} at {flops / 1e6:.0f} M" for _, flops, value in self.points)
        slope = f"{self.slope.mean:.2f} ({self.slope.low:.2f} to {self.slope.high:.2f})"
        gap = "" if self.gap is None else (
            f"{self.gap.mean:.3f} times ({self.gap.low:.3f} to {self.gap.high:.3f})"
        )  # fmt: skip
        return f"| {self.label} | {points} | {slope} | {gap} |"


def scaling_of(
    measure: Measure, runs: Sequence[Run], costs: Mapping[tuple[str, float], Cost], labels: Sequence[str]
) -> list[Scaling]:
    """Fit each label's line through its widths, seed by seed; labels of which a run diverged are left out."""
    found, lines = [], {}
    for label in labels:
        by_seed: dict[int, list[tuple[float, int, float]]] = {}
        for run in (run for run in runs if run.label == label):
            value = run.scores[measure.name]
            point = (run.width, costs[label, run.width].forward, math.nan if value is None else value)
            by_seed.setdefault(run.seed, []).append(point)
        if not all(value > 0 for points in by_seed.values() for *_, value in points):
            continue
        lines[label] = [
            fit_line(*zip(*((x, y) for _, x, y in points), strict=True)) for points in by_seed.values()
        ]
        gap = None
        if label != "A" and "A" in lines:
            gap = ratio_over_seeds([
                statistics.geometric_mean([y / line.at(x) for _, x, y in points])
                for line, points in zip(lines["A"], by_seed.values(), strict=True)
            ])  # fmt: skip
        means = [(*same[0][:2], statistics.fmean(y for *_, y in same))
                 for same in zip(*by_seed.values(), strict=True)]  # fmt: skip
        slope = over_seeds([line.slope for line in lines[label]])
        found.append(Scaling(label=label, points=means, slope=slope, gap=gap))
    return found


@dataclass(frozen=True)
class Comparison:
    """Table of one label beside A: Markdown as a text, HTML in notebooks. costs: A's and the label's."""

    rows: Sequence[Row]
    costs: Sequence[Cost]
    label: str = "B"

    def columns(self) -> list[str]:
        """Return the names of the columns."""
        b = self.label
        return ["", "A", b, f"{b} - A or {b} / A, 95% interval", "visible at 80% power", ""]

    def cells(self) -> list[list[str]]:
        """List what was measured, and what was counted."""
        found = [row.cells() for row in self.rows if row.label == self.label]
        shown = {
            "parameters": "parameters",
            "forward": "FLOPs, one forward",
            "step": "FLOPs, a training step",
        }
        for name, text in shown.items():
            a, b = (getattr(cost, name) for cost in self.costs)
            found.append([text, f"{a:,}", f"{b:,}", f"{b / max(a, 1):.3f} times", "", "counted"])
        return found

    def __str__(self) -> str:
        lines = [self.columns(), ["---"] * 6, *self.cells()]
        return "".join(f"{markdown(line)}\n" for line in lines)

    def _repr_html_(self) -> str:  # in notebooks
        return table_html(f"{self.label} beside A", self.columns(), self.cells())


def chance(rows: Sequence[Row]) -> str:
    """Say how many of the intervals leave out zero by chance alone."""
    count = sum(not row.is_ratio and not math.isnan(row.change.mean) for row in rows)
    return f"{count} intervals at 95%: were there no difference at all, {count / 20:.1f} would show one."


def samples(out: Path, runs: Sequence[Run], variants: Mapping[str, Variant]) -> Image.Image | None:
    """Lay out what each variant drew with seed 0, in a row; None if nothing was drawn."""
    images, labels = [], []
    for label in variants:
        run = next((run for run in runs if run.label == label and run.seed == 0 and run.width == 1), None)
        drawn = read_images(out, label)
        if run is not None and drawn is not None:
            images.append(drawn)
            labels += [f"{label}: {text}" for text in run.image_labels]
    if not images:
        return None
    return sheet(torch.cat(images), labels, len(images[0]), WIDE / images[0].shape[-1])


def write(
    out: Path, lesson: Lesson, variants: Mapping[str, Variant], runs: Sequence[Run], times: Sequence[Timed],
    costs: Mapping[tuple[str, float], Cost], lines: Sequence[str], about: Mapping[str, Any],
) -> tuple[str, list[Row], list[Scaling]]:  # fmt: skip
    """Write ablate.md, ablate.json and samples.png in `out`; return the text, the rows and the lines.

    lines: what the text says of the study beside the tables. about: what else the JSON says of it.
    """
    labels = list(variants)
    rows = rows_of(lesson, runs, times, labels)
    is_scaled = any(run.width != 1 for run in runs)
    scaling = scaling_of(lesson.measures[0], runs, costs, labels) if is_scaled else []
    names = [f"- {label}: `{variant.text}`{' - ' * bool(variant.about)}{variant.about}"
             for label, variant in variants.items()]  # fmt: skip
    parts = ["\n".join(names)]
    parts += [str(Comparison(rows, [costs["A", 1.0], costs[label, 1.0]], label)) for label in labels[1:]]
    if scaling:
        head = f"| | {lesson.measures[0].name} by FLOPs | exponent | by A's line at the same FLOPs |"
        parts.append("\n".join([head, "|---|---|---|---|", *map(str, scaling)]))
    parts.append("\n".join([*lines, chance(rows)]))
    text = "\n\n".join(parts)
    pictures = "![Held-out numbers, changes and cost](ablate.png)" * HAS_PLOT
    if (page := samples(out, runs, variants)) is not None:
        page.save(out / "samples.png")
        pictures += "\n\n![Drawn by each](samples.png)"
    (out / "ablate.md").write_text(f"# Variants beside A\n\n{text}\n\n{pictures}\n", encoding="utf-8")
    write_json({
        **about, "rows": [asdict(row) for row in rows], "times": [asdict(each) for each in times],
        "costs": [{"label": label, "width": width, **asdict(cost)} for (label, width), cost in costs.items()],
        "scaling": [asdict(each) for each in scaling],
    }, out / "ablate.json")  # fmt: skip
    return text, rows, scaling
