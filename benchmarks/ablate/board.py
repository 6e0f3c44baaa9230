"""Board of results: one line for each published change that was compared, from the studies' files.

    python -m benchmarks.ablate.board benchmarks/results/ablate --readme README.md

RESULTS has a folder for each study, with its `ablate.json`. Writes RESULTS/README.md, and the short board in
place of a README's table of the same first line.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN = "python -m benchmarks.ablate OUT"
HEAD = "| published change | held-out error beside Kolors' own training, 95% interval | options |"
SHOWN = {"things": 2, "texts": 1, "scenes": 2}  # measures of a lesson that are told here, the first ones
LESSONS = {
    "things": "TINY's UNet from scratch on 40 things, 64x64",
    "texts": "TINY's ChatGLM from scratch on captions of scenes",
    "scenes": "the embedded model, trained on",
}

ABOUT = """# Published changes, each beside Kolors' own training

{lessons}

How each was trained, all measures and what started how: the lesson's link. Held-out errors are of x0, so that
targets compare; less is better. A difference below what is visible would mostly have been missed. Times stand
there too, if a study had the machine alone. [Predictions](../../NOTES.md#the-results-board-of-the-ablation).
"""


@dataclass(frozen=True)
class Entry:
    """Line of the board. rows: of the measures, as a study's JSON has them. work: FLOPs of a step by A's."""

    study: str
    lesson: str
    text: str
    about: str
    rows: list[dict[str, Any]]
    work: float
    command: str

    @property
    def name(self) -> str:
        """Name of the change, in words."""
        return self.about.partition(":")[0] or f"`{self.text}`"

    def line(self) -> str:
        """Write the long line."""
        did = "; ".join(f"{row['name']} {change_of(row)}" for row in self.rows)
        seen = ", ".join(number(row["change"]["visible"], row, sign="") for row in self.rows)
        about, lesson = self.about or f"`{self.text}`", f"[{self.lesson}]({self.study}/ablate.md)"
        return f"| {about} | {lesson} | {did} | {seen} | {self.work:.2f} | `{self.command}` |"

    def short(self) -> str:
        """Write the short line, of the first measure."""
        lesson = "" if self.lesson == "things" else f", {self.lesson}"
        options = self.command.removeprefix(RUN).lstrip()
        return f"| {self.name}{lesson} | {change_of(self.rows[0])} | `{options}` |"


def number(value: float, row: dict[str, Any], sign: str = "+") -> str:
    """Write a value of a measure."""
    unit = " points" if row["unit"] == "%" else row["unit"]
    return f"{value:{sign}{row['form']}}{unit}"


def change_of(row: dict[str, Any]) -> str:
    """Write what a change did to a measure: the difference, its interval, and the verdict in a word."""
    change, verdict = row["change"], row["verdict"]
    if change["mean"] != change["mean"]:  # nan
        return verdict
    word = verdict.rpartition(" is ")[2]
    word = f"**{word}**" if word in ("better", "worse") else "not shown"
    low, high = (format(change[end], f"+{row['form']}") for end in ("low", "high"))
    return f"{number(change['mean'], row)} ({low} to {high}), {word}"


def entries(results: Path) -> Iterator[Entry]:
    """Read the entries of all studies in a folder; older files, which name no commands, are left out."""
    for lesson in LESSONS:
        for file in sorted(results.glob("*/ablate.json")):
            content = json.loads(file.read_text(encoding="utf-8"))
            if content.get("lesson_name") != lesson:
                continue
            work = {each["label"]: each["step"] for each in content["costs"] if each["width"] == 1}
            for label, told in content["commands"].items():
                rows = [row for row in content["rows"] if row["label"] == label and not row["is_ratio"]]
                yield Entry(
                    file.parent.name, lesson, content["variants"][label][0], content["about"][label],
                    rows[: SHOWN[lesson]], work[label] / work["A"], told,
                )  # fmt: skip


def long_board(found: list[Entry]) -> str:
    """Write the page of results."""
    used = {each.lesson for each in found}
    lessons = "\n".join(f"- {name}: {what}" for name, what in LESSONS.items() if name in used)
    columns = "change | lesson | what it did, with its 95% interval | visible at 80% power | FLOPs of a step"
    lines = [f"| {columns} | command |", f"|{'---|' * 6}", *(each.line() for each in found)]
    return f"{ABOUT.format(lessons=lessons)}\n" + "\n".join(lines) + "\n"


def short_board(found: list[Entry]) -> str:
    """Write the README's table: a line a change."""
    return "\n".join([HEAD, "|---|---|---|", *(each.short() for each in found)])


def replaced(text: str, board: str) -> str:
    """Replace a README's board; ValueError unless it has one."""
    head, start, rest = text.partition(HEAD)
    if not start:
        raise ValueError(f"expected a line {HEAD!r} in the README, there is none")
    lines = rest.split("\n")
    end = next((i for i, line in enumerate(lines) if i and not line.startswith("|")), len(lines))
    return "\n".join([head + board, *lines[end:]])


def main(results: Path, readme: Path | None) -> None:
    """Write both boards."""
    found = list(entries(results))
    if not found:
        raise ValueError(f"{results}: has no folder with the ablate.json of a study")
    if readme is not None:
        text = replaced(readme.read_text(encoding="utf-8"), short_board(found))
        readme.write_text(text, encoding="utf-8")
    (results / "README.md").write_text(long_board(found), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="a folder of studies' folders")
    parser.add_argument("--readme", type=Path, help="a README that has the short board")
    options = parser.parse_args()
    try:
        main(options.results, options.readme)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
