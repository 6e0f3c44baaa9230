"""Draw the loss of a run of the recipe: `python -m benchmarks.tiny.curve DATA loss.png`; needs `.[bench]`."""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

WINDOW = 50  # steps that a point of the curve is the mean of


def main(data: Path, out: Path) -> None:
    """Read `unet/losses.jsonl`; a step that a resumed run took twice counts as it was last taken."""
    lines = (data / "unet" / "losses.jsonl").read_text(encoding="utf-8").splitlines()
    by_step = {row["step"]: row["loss"] for row in map(json.loads, lines)}
    losses = [by_step[step] for step in sorted(by_step)]
    starts = range(0, len(losses) - WINDOW + 1, WINDOW)
    means = [sum(losses[i : i + WINDOW]) / WINDOW for i in starts]
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot([i + WINDOW / 2 for i in starts], means)
    axes.set(xlabel="step", ylabel=f"loss, mean of {WINDOW} steps", yscale="log")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    main(options.data, options.out)
