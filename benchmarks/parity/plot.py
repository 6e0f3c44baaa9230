"""Every module's error over depth, a panel a component. Needs the `bench` extra."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from benchmarks.parity.measure import Measured, Result
from benchmarks.parity.report import parting

COLOURS = {"float64": "#3b4cc0", "float32": "#2a9d8f", "bfloat16": "#c8553d", "float16": "#b8860b"}
COLUMNS, TOP, BOTTOM, BAND = 3, 1e1, 1e-20, 1e-17
EQUAL = {name: 10.0 ** (-17.6 - 0.6 * i) for i, name in enumerate(COLOURS)}  # where equal ones are drawn
STYLES = {"-": "ours from the reference", ":": "the reference from its float64", "--": "tolerance"}


def plot(results: Sequence[Result], file: Path) -> None:
    """Write the image."""
    shown = [result for result in results if any(one.dtype in COLOURS for one in result.measured)]
    rows = -(-len(shown) // COLUMNS)
    figure, grid = pyplot.subplots(
        rows, COLUMNS, figsize=(14, 2.7 * rows + 0.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(shown) :]:
        axes.axis("off")
    for axes, result in zip(grid.flat, shown, strict=False):
        panel(axes, result)
    lines = [Line2D([], [], color=colour, label=name) for name, colour in COLOURS.items()]
    lines += [Line2D([], [], color="black", linestyle=style, label=name) for style, name in STYLES.items()]
    lines.append(Line2D([], [], color="red", marker="x", linestyle="", label="first divergence"))
    figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), fontsize=9, frameon=False)
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


def panel(axes: Any, result: Result) -> None:
    """One component."""
    axes.axhspan(BOTTOM, BAND, color="#eeeeee")
    for one in result.measured:
        curves(axes, one)
    if (place := parting(result)) != "none":
        axes.text(0.02, 0.38, place, transform=axes.transAxes, fontsize=8, color="red")
    axes.set_yscale("log")
    axes.set_ylim(BOTTOM, TOP)
    axes.set_yticks([1e-19, 1e-15, 1e-10, 1e-5, 1], ["equal", "1e-15", "1e-10", "1e-5", "1"])
    axes.minorticks_off()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step" if result.unit == "step" else "module, in order of execution", fontsize=8)
    axes.set_title(result.name + (" (random weights)" if result.weights == "random" else ""), fontsize=10)
    axes.tick_params(labelsize=8)


def curves(axes: Any, one: Measured) -> None:
    """One dtype. Where a module is equal to the bit the line is broken, and a dot lies in the band."""
    colour, places = COLOURS[one.dtype], range(1, len(one.layers) + 1)
    errors = [min(layer.error, TOP) or math.nan for layer in one.layers]
    rounding = [min(layer.reference_from_float64, TOP) or math.nan for layer in one.layers]
    equal = [place for place, layer in zip(places, one.layers, strict=True) if layer.error == 0]
    axes.plot(places, errors, color=colour, linewidth=1.2, marker=".", markersize=3)
    axes.plot(equal, [EQUAL[one.dtype]] * len(equal), color=colour, linestyle="", marker="s", markersize=2)
    axes.plot(places, rounding, color=colour, linewidth=1, linestyle=":", alpha=0.8)
    axes.axhline(one.tolerance, color=colour, linewidth=0.8, linestyle="--", alpha=0.7)
    if one.first is not None:
        at = one.layers.index(one.first) + 1, min(one.first.error, TOP)
        axes.plot(*at, color="red", marker="x", markersize=9)
