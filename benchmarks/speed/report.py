"""The rows in a folder as one table and one plot: `python -m benchmarks.speed.report OUT`.

Writes README.md, the table, and speed.png: of each row that compares ours with the reference, how many times
better ours is, and where its goal lies. Prints the table and that of the project's README. `tiny` and `start`
have goals that nobody reached and no user feels: they stand in NOTES.md. Needs the `bench` extra.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import Goal, Spread
from benchmarks.speed import RESULTS
from benchmarks.speed.gpu.book import FILE
from benchmarks.speed.gpu.rows import read_rows

ORDER = (
    "whole", "whole_memory", "whole_lora", "encode_bfloat16", "encode_float32", "unet_step", "load",
    "load_memory", "load_bfloat16", "load_memory_bfloat16", "alignment_load", "alignment_step",
)  # fmt: skip
FRONT = ("whole", "whole_memory", "whole_lora", "encode_bfloat16", "unet_step")
MET, MISSED = "#4c9f70", "#c8553d"


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows that the folder has, in the table's order, and those of a GPU, measured or not."""
    files = [folder / f"{name}.json" for name in ORDER]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    if not found and not (folder / FILE).exists():
        raise SystemExit(f"{folder}: has no rows, expected such as {ORDER[0]}.json or {FILE}")
    return [row | {"goal": Goal(**row["goal"])} for row in found] + read_rows(folder)


def is_measured(row: dict[str, Any]) -> bool:
    """Whether the value counts: of the goal's own device and size."""
    return row["value"] is not None and not row["is_rehearsal"]


def measured(row: dict[str, Any], contestant: str) -> tuple[Spread, str] | None:
    """The spread of a contestant and its unit, if it was measured."""
    contestants = row["race"]["contestants"] if row["race"] and is_measured(row) else {}
    names = [name for name in contestants if name.split(",")[0] == contestant]
    names.sort(key=lambda name: name != contestant)  # the plain one first, if there is one
    if not names:
        return None
    if "memory" in row["name"]:
        return Spread(**contestants[names[0]]["peak_gib"]), "GiB"
    return Spread(**contestants[names[0]]["total" if row["name"] == "whole_lora" else "seconds"]), "s"


def with_spread(row: dict[str, Any], contestant: str) -> str:
    """The median of a contestant, with the least and the most."""
    if (found := measured(row, contestant)) is None:
        return ""
    spread, unit = found
    return f"{spread.median:.3g} {unit} ({spread.least:.3g} to {spread.most:.3g})"


def machine(row: dict[str, Any]) -> str:
    """What a row was measured on, and when."""
    found = row["environment"]
    name = found["cpu"].replace(" Processor", "") if found["device"] == "cpu" else found["device"]
    return f"{name}, {found['threads']} threads, {found['date']}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown; and the machines that the rows were measured on."""
    lines = [
        "| work | ours | the reference | ratio | goal | machine and date | |", "|---|---|---|---|---|---|---|"
    ]  # fmt: skip
    for row in rows:
        value, place = "not measured", ""
        if is_measured(row):
            value = f"**{row['value']:.2f}**" + ("" if row["goal"].is_met(row["value"]) else ", missed")
            place = machine(row)
        cells = [row["work"], with_spread(row, "ours"), with_spread(row, "reference"), value]
        lines.append(f"| {' | '.join([*cells, str(row['goal']), place, row['note'] if place else ''])} |")
    lines += ["", "Medians (least to most) of runs that take turns: reference, ours, ours, reference."]
    machines = {json.dumps(row["environment"]): row["environment"] for row in rows if is_measured(row)}
    for m in machines.values():
        lines.append(
            f"Measured {m['date']}: {m['cpu']}, {m['threads']} threads, {m['cpu_capability']}, device "
            f"{m['device']}; torch {m['torch']}, diffusers {m['diffusers']}, "
            f"transformers {m['transformers']}, Python {m['python']}."
        )
    return "\n".join(lines) + "\n"


def front(rows: Sequence[dict[str, Any]]) -> str:
    """The table of the project's README: what a user feels most, each row in short."""
    lines = ["| work | ours | the reference | ratio | machine and date |", "|---|---|---|---|---|"]
    for row in (row for row in rows if row["name"] in FRONT and is_measured(row)):
        found = measured(row, "ours"), measured(row, "reference")
        cells = [f"{spread.median:.3g} {unit}" for spread, unit in filter(None, found)]
        ratio = f"**{row['value']:.2f}** {row['goal'].unit}"
        lines.append(f"| {' | '.join([row['work'], *cells, ratio, machine(row)])} |")
    return "\n".join(lines) + "\n"


def advantage(goal: Goal, value: float) -> float:
    """How many times better than the reference: above 1 is better, whichever way the goal is told."""
    return value if goal.at_least else 1 / value


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """A bar a row, and a line across it where the goal is."""
    from matplotlib import pyplot

    rows = [row for row in rows if row["goal"].is_ratio][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(rows) + 1.2), layout="constrained")
    goals = [advantage(row["goal"], row["goal"].limit) for row in rows]
    values = [advantage(row["goal"], row["value"]) if is_measured(row) else math.nan for row in rows]
    for y, (row, goal, value) in enumerate(zip(rows, goals, values, strict=True)):
        axes.plot([goal, goal], [y - 0.42, y + 0.42], color="black", linewidth=2)
        if not is_measured(row):
            axes.text(goal + 0.08, y, "not measured", va="center", fontsize=9, color="grey")
            continue
        axes.barh(y, value, color=MET if row["goal"].is_met(row["value"]) else MISSED, height=0.6)
        # Beside the bar, or beside the goal's line if that would cross the number.
        at = goal if value <= goal < value + 0.8 else value
        axes.text(at + 0.08, y, f"{value:.2f}", va="center", fontsize=9)
    axes.axvline(1, color="grey", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(rows)), [row["work"] for row in rows], fontsize=9)
    axes.set_xlabel("times better than the reference (time or memory); black line: the goal")
    axes.set_xlim(0, max([*goals, *(value for value in values if not math.isnan(value))]) * 1.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def write(folder: Path) -> None:
    """README.md and speed.png, and the table on the terminal."""
    rows = read(folder)
    text = table(rows)
    head = "# Speed and memory beside the reference\n\n`python -m benchmarks.speed` writes this folder.\n\n"
    (folder / "README.md").write_text(f"{head}{text}\n![Bars](speed.png)\n", encoding="utf-8")
    plot(rows, folder / "speed.png")
    print(text, front(rows), sep="\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
