"""Plot of a study: held-out numbers, changes of two measures, cost or lines. Needs the `bench` extra."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.ablate.change import Variant
from benchmarks.ablate.intervals import Interval, ratio_over_seeds
from benchmarks.ablate.models import Cost
from benchmarks.ablate.report import Row, Scaling
from benchmarks.ablate.study import Run
from benchmarks.ablate.timing import Timed

LONGEST = 32  # letters of a variant that are shown, the last ones
COLORS = pyplot.get_cmap("tab10")


def plot(
    file: Path, variants: Mapping[str, Variant], runs: Sequence[Run], rows: Sequence[Row],
    times: Sequence[Timed], costs: Mapping[tuple[str, float], Cost], scaling: Sequence[Scaling],
) -> None:  # fmt: skip
    """Write the image."""
    figure, grid = pyplot.subplots(2, 2, figsize=(13, 8), layout="constrained")
    curves, first, second, last = grid.flat
    names = {label: f"{label}: {variant.text[-LONGEST:]}" for label, variant in variants.items()}
    colors = {label: COLORS(i % 10) for i, label in enumerate(names)}
    measures = list(dict.fromkeys(row.name for row in rows if not row.is_ratio))
    for label, name in names.items():
        own = [run for run in runs if run.label == label and run.width == 1 and run.diverged is None]
        if len(own) > 1:
            steps = [step for step, _ in own[0].curve]
            values = zip(*([value for _, value in run.curve] for run in own), strict=True)
            band(curves, steps, [ratio_over_seeds(each) for each in values], colors[label], name)
    curves.set(xlabel="training step", ylabel=measures[0], yscale="log", title=measures[0])
    curves.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    curves.yaxis.set_major_formatter("{x:g}")
    curves.yaxis.set_minor_formatter(NullFormatter())
    curves.legend(fontsize=8)
    for axes, measure in zip((first, second), measures, strict=False):
        found = {names[row.label]: row.change for row in rows if row.name == measure}
        forest(axes, found, 0.0, f"{measure}, difference from A")
    if scaling:
        for each in scaling:
            _, xs, ys = zip(*each.points, strict=True)
            last.loglog(
                xs, ys, "o-", color=colors[each.label], label=f"{each.label}, exponent {each.slope.mean:.2f}"
            )
        last.set(xlabel="FLOPs, one forward", ylabel=measures[0], title="Three widths")
        last.legend(fontsize=8)
    else:
        ratios = {f"{names[label]}, FLOPs": _exact(costs[label, 1.0].step / costs["A", 1.0].step)
                  for label in list(names)[1:]}  # fmt: skip
        for each in (each for each in times[:1] if not each.busy):
            ratios = {f"{names[label]}, time": each.change(label) for label in list(names)[1:]} | ratios
        forest(last, ratios, 1.0, "A training step in parts of A's")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    seeds = len({run.seed for run in runs})
    figure.suptitle(f"{seeds} seeds, in pairs; bands and bars: 95% intervals over them", fontsize=10)
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


def _exact(value: float) -> Interval:
    return Interval(value, value, value)


def forest(axes: Axes, found: Mapping[str, Interval], none: float, title: str) -> None:
    """Draw an interval a line, beside where there is no difference."""
    for i, part in enumerate(found.values()):
        error = [[part.mean - part.low], [part.high - part.mean]]
        axes.errorbar(part.mean, -i, xerr=error, fmt="o", color="#444444", capsize=4)
    axes.axvline(none, color="black", linewidth=1)
    axes.set_yticks([-i for i in range(len(found))], list(found), fontsize=8)
    axes.set(ylim=(0.6 - len(found), 0.6), title=title)


def band(
    axes: Axes, steps: Sequence[int], found: Sequence[Interval], color: object, label: str | None = None
) -> None:
    """Draw a line through means, in its band."""
    axes.plot(steps, [each.mean for each in found], "o-", color=color, label=label, markersize=3.5)
    low, high = [each.low for each in found], [each.high for each in found]
    axes.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)
