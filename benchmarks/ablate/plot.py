"""The plot: losses of both, their difference, quality, and what B costs beside A. Needs the `bench` extra."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.ablate.architecture import Cost
from benchmarks.ablate.intervals import Interval, over_seeds, ratio_over_seeds
from benchmarks.ablate.report import Row, counted, rows_of
from benchmarks.ablate.study import Pair, points

COLOURS = ("#3d6fb4", "#d1762b")  # of A and B
LONGEST = 40  # letters of an architecture that are shown, the last ones
WINDOWS = 20  # parts of the training, over each of which the training loss is averaged


def plot(pairs: Sequence[Pair], costs: Sequence[Cost], texts: Sequence[str], file: Path) -> None:
    """Write the image. texts: what A and B are."""
    figure, grid = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    losses, change, quality, price = grid.flat
    held, _, right, *times = rows_of(pairs)
    ends = [text if len(text) <= LONGEST else f"...{text[-LONGEST:]}" for text in texts]
    names = [f"{name}: {end}" for name, end in zip("AB", ends, strict=True)]
    count = len(pairs[0].runs[0].losses)
    steps, window = points(count), max(1, count // WINDOWS)
    for k in (0, 1):
        runs = [pair.runs[k] for pair in pairs]
        found = [ratio_over_seeds(values) for values in zip(*(run.held_out for run in runs), strict=True)]
        band(losses, steps, found, COLOURS[k], f"{names[k]}, held out")
        means = [statistics.fmean(values) for values in zip(*(run.losses for run in runs), strict=True)]
        starts = range(0, count - window + 1, window)
        smooth = [statistics.fmean(means[i : i + window]) for i in starts]
        losses.plot([i + (window + 1) / 2 for i in starts], smooth, ":", color=COLOURS[k],
                    label=f"{'AB'[k]}, training")  # fmt: skip
        mean = statistics.fmean((right.a, right.b)[k])
        quality.plot([k - 0.12, k + 0.12], [mean, mean], color=COLOURS[k], linewidth=4)
    losses.set(xlabel="training step", ylabel="loss", yscale="log", title="Loss")
    losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    losses.yaxis.set_major_formatter("{x:g}")
    losses.yaxis.set_minor_formatter(NullFormatter())
    losses.legend()

    both = [zip(*(run.held_out for run in pair.runs), strict=True) for pair in pairs]
    differences = [[b - a for a, b in curves] for curves in both]
    band(change, steps, [over_seeds(values) for values in zip(*differences, strict=True)], "#444444")
    change.axhline(0, color="black", linewidth=1)
    change.set(xlabel="training step", ylabel="held-out loss, B - A (below 0: B is better)")
    change.set_title(f"Held-out loss at the end: {held.verdict}")

    for a, b in zip(right.a, right.b, strict=True):
        quality.plot([0, 1], [a, b], "o-", color="grey", alpha=0.6, markersize=4, zorder=1)
    quality.set_xticks([0, 1], names)
    quality.set(xlim=(-0.5, 1.5), ylim=(0, 100), ylabel="prompts drawn right, %")
    quality.set_title(f"Quality, a grey line a seed: {right.verdict}")

    concat_extra_channels(price, times, costs)

    for axes in (losses, change, quality, price):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{len(pairs)} seeds, in pairs; bands and bars: 95% intervals over them", fontsize=10)
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


def concat_extra_channels(axes: Axes, times: Sequence[Row], costs: Sequence[Cost]) -> None:
    """What B takes in parts of A's: measured times with their intervals, and what is counted."""
    parts = [(row.name.split(",")[0], row.change) for row in times]
    parts += [(name.split(",")[0], Interval(ratio, ratio, ratio)) for name, _, _, ratio in counted(costs)]
    for i, (_, part) in enumerate(parts):
        error = [[part.mean - part.low], [part.high - part.mean]]
        axes.errorbar(part.mean, -i, xerr=error, fmt="o", color=COLOURS[1], capsize=4)
        axes.annotate(f"{part.mean:.3f}", (part.mean, -i), (0, 8), textcoords="offset points", ha="center")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks([-i for i in range(len(parts))], [name for name, _ in parts])
    axes.set(xlabel="B / A", ylim=(0.6 - len(parts), 0.6), title="Cost: B in parts of A")


def band(
    axes: Axes, steps: Sequence[int], found: Sequence[Interval], colour: str, label: str | None = None
) -> None:
    """A line through means, in its band."""
    axes.plot(steps, [each.mean for each in found], "o-", color=colour, label=label, markersize=3.5)
    low, high = [each.low for each in found], [each.high for each in found]
    axes.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0)
