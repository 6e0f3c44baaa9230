"""What came out, as a table (Markdown and JSON) and a sheet of samples."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.ablate.architecture import Cost
from benchmarks.ablate.intervals import Interval, over_seeds, ratio_over_seeds
from benchmarks.ablate.lesson import Lesson
from benchmarks.ablate.study import Pair, Run, ratios
from benchmarks.side_by_side import write_json
from benchmarks.tiny.quality import sheet
from kolors_core.notebook import table_html

SHOWN, WIDE = 12, 96  # things on the sheet of samples, and pixels of each


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table. a, b: by seed. change: B - A, or B / A if `is_ratio`, over the seeds.

    words: what B is if the change is below none, and above. form, unit: how a value is written.
    """

    name: str
    a: list[float]
    b: list[float]
    change: Interval
    is_ratio: bool
    words: tuple[str, str]
    form: str
    unit: str = ""

    @property
    def verdict(self) -> str:
        """What the interval says."""
        none = 1.0 if self.is_ratio else 0.0
        if self.change.holds(none):
            return "no difference shown"
        return f"B is {self.words[self.change.mean > none]}"

    def cells(self) -> list[str]:
        """Its name, both means, the change with its interval, and the verdict."""
        means = [f"{statistics.fmean(values):{self.form}}{self.unit}" for values in (self.a, self.b)]
        form = ".3f" if self.is_ratio else f"+{self.form}"
        change, low, high = (format(x, form) for x in (self.change.mean, self.change.low, self.change.high))
        change += " times" if self.is_ratio else self.unit.replace("%", " points")
        return [self.name, *means, f"{change} ({low} to {high})", self.verdict]


def rows_of(pairs: Sequence[Pair]) -> list[Row]:
    """What was measured, a row a quantity."""

    def difference(name: str, of: Callable[[Run], float], grain: float = 0.0, **how: Any) -> Row:
        a, b = ([of(pair.runs[k]) for pair in pairs] for k in (0, 1))
        change = over_seeds([y - x for x, y in zip(a, b, strict=True)], grain)
        return Row(name=name, a=a, b=b, change=change, is_ratio=False, **how)

    def time(name: str, of: Callable[[Run], list[float]]) -> Row:
        a, b = ([statistics.median(of(pair.runs[k])) for pair in pairs] for k in (0, 1))
        found = [statistics.median(ratios(*map(of, pair.runs))) for pair in pairs]
        change, words = ratio_over_seeds(found), ("faster", "slower")
        return Row(name=name, a=a, b=b, change=change, is_ratio=True, words=words, form=".1f", unit=" ms")

    loss = {"words": ("better", "worse"), "form": ".4f"}
    right = {"words": ("worse", "better"), "form": ".1f", "unit": "%"}
    prompts = len(pairs[0].runs[0].nearest)
    return [
        difference("held-out loss", lambda run: run.held_out[-1], **loss),
        difference("training loss, last tenth of the steps", last_tenth, **loss),
        difference("prompts drawn right", lambda run: 100 * run.right, 100 / prompts, **right),
        time("training step", lambda run: run.train_ms),
        time("denoising step, one image with guidance", lambda run: run.denoise_ms),
    ]


def last_tenth(run: Run) -> float:
    """The mean training loss of the last tenth of the steps."""
    return statistics.fmean(run.losses[-max(1, len(run.losses) // 10) :])


@dataclass(frozen=True)
class Comparison:
    """The table: Markdown as text, HTML in notebooks."""

    rows: Sequence[Row]
    costs: Sequence[Cost]
    columns = ("", "A", "B", "B - A or B / A, and its 95% interval", "")

    def cells(self) -> list[list[str]]:
        """What was measured, and what was counted."""
        found = [row.cells() for row in self.rows]
        for name, a, b, ratio in counted(self.costs):
            found.append([name, f"{a:,}", f"{b:,}", f"{ratio:.3f} times", "counted"])
        return found

    def __str__(self) -> str:
        lines = ["|".join(("", *(f" {name} " if name else " " for name in self.columns), ""))]
        lines += ["|---|---|---|---|---|", *(f"| {' | '.join(cells)} |" for cells in self.cells())]
        return "\n".join(lines) + "\n"

    def _repr_html_(self) -> str:  # in notebooks
        return table_html("Two architectures", self.columns, self.cells())


def counted(costs: Sequence[Cost]) -> list[tuple[str, int, int, float]]:
    """What is known without measuring: its name, A's, B's and B's in parts of A's."""
    a, b = costs
    found = ("parameters", a.parameters, b.parameters), ("FLOPs, one image forward", a.flops, b.flops)
    return [(name, x, y, y / max(x, 1)) for name, x, y in found]


def samples(pair: Pair, lesson: Lesson) -> Image.Image:
    """What was asked for, and what A and B drew with one seed, each over what it looks like most."""
    count = min(SHOWN, len(lesson.names))
    chosen = [i * len(lesson.names) // count for i in range(count)]
    images, labels = [lesson.known[chosen]], [lesson.names[i] for i in chosen]
    for name, run, drawn in zip("AB", pair.runs, pair.images, strict=True):
        images.append(drawn[chosen])
        labels += [f"{name}: {lesson.names[run.nearest[i]]}" for i in chosen]
    return sheet(torch.cat(images), labels, count, WIDE / lesson.known.shape[-1])


def write(
    pairs: Sequence[Pair], costs: Sequence[Cost], lesson: Lesson, texts: Sequence[str], lines: Sequence[str],
    told: dict[str, Any], out: Path,
) -> str:  # fmt: skip
    """ablate.md, ablate.json, runs.jsonl and samples.png in `out`; returns the table with what it needs.

    lines: what the text says of the study beside the table. told: what else the JSON says of it.
    """
    rows = rows_of(pairs)
    names = [f"- {name}: `{text}`" for name, text in zip("AB", texts, strict=True)]
    text = "\n".join([*names, "", str(Comparison(rows, costs)), *lines])
    pictures = "![Losses, quality and cost](ablate.png)\n\n![Asked for, drawn by A, drawn by B](samples.png)"
    (out / "ablate.md").write_text(f"# Two architectures\n\n{text}\n\n{pictures}\n", encoding="utf-8")
    measured = [asdict(row) | {"verdict": row.verdict} for row in rows]
    write_json(told | {"rows": measured, "costs": [asdict(cost) for cost in costs]}, out / "ablate.json")
    with (out / "runs.jsonl").open("w", encoding="utf-8") as file:
        for seed, pair in enumerate(pairs):
            for name, run in zip("AB", pair.runs, strict=True):
                file.write(json.dumps({"architecture": name, "seed": seed, **asdict(run)}) + "\n")
    samples(pairs[0], lesson).save(out / "samples.png")
    return text
