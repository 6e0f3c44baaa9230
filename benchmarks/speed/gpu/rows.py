"""The goals of the run-book's rows, and the rows that a folder has."""

from pathlib import Path
from typing import Any

from benchmarks.side_by_side import Goal, Row, below, share
from benchmarks.speed.gpu.book import read_lines
from benchmarks.speed.gpu.variants import VARIANTS

ALLOWED = below(1, "of what is allowed")  # the worst error, divided by its limit
GOALS: dict[str, tuple[str, Goal]] = {
    "probe": ("what a launch costs the host", below(23, "us")),
    "kernels": ("every attention kernel and shape against float64, worst error", ALLOWED),
    "precision": ("every pipeline in fp16 and bfloat16 against float64, worst error", ALLOWED),
    "exact": ("offload against resident, and graphs while a LoRA comes and goes, worst error", ALLOWED),
    "recompiles": ("compilations at the third image size", below(0, "compilations")),
    "everywhere": ("the tests of every task and feature on the device", below(0, "failures")),
    "eager": ("eager, fp16, prompt to image", share(0.90, "time")),
    "eager_512": ("the same at 512x512", share(0.75, "time")),
    "graphs_512": ("the same with CUDA graphs, the reference without", share(0.65, "time")),
    "compiled": ("compiled with CUDA graphs, bfloat16, prompt to image", share(0.90, "time")),
    "compiled_blocks": ("compiled by repeated blocks, bfloat16, prompt to image", share(0.90, "time")),
    "seconds": ("compiled with CUDA graphs, absolute", below(0.75, "s")),
    "fp8": ("the same, linear layers in float8", below(0.60, "s")),
    "cached": ("the same, the deep part in every third step", below(0.40, "s")),
    "fp8_cached": ("both", below(0.30, "s")),
    "memory_resident": ("peak GPU memory, all resident, VAE in tiles", below(17, "GiB")),
    "memory_staged": ("peak GPU memory, staged", below(12, "GiB")),
    "memory_smallest": ("peak GPU memory, smallest", below(3, "GiB")),
    "batch": (
        "batch of 8, eager, fp16, images a second",
        Goal(limit=1.1, unit="times one at a time", at_least=True, is_ratio=False),
    ),
    **{name: (work, below(limit, "of the time without")) for name, (work, limit, _) in VARIANTS.items()},
    "step": ("a guided step, eager, fp16, beside the arithmetic at the measured rate", below(2.04, "times")),
    "autotuned": ("compiled with max-autotune, absolute", below(0.75, "s")),
}


def make_row(name: str, value: float | None, **fields: Any) -> Row:
    """A row of this folder by its name in `GOALS`."""
    work, goal = GOALS[name]
    return Row(name=f"gpu_{name}", work=f"{work}, one GPU", goal=goal, value=value, **fields)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The last row of each name, in the order of the goals; one that is not there is not measured.

    A row of the device stays when a rehearsal follows.
    """
    found = dict[str, dict[str, Any]]()
    for line in read_lines(folder):
        name = str(line.get("name", "")).removeprefix("gpu_")
        if name in GOALS and (line["is_rehearsal"] <= found.get(name, line)["is_rehearsal"]):
            found[name] = line
    empty: dict[str, Any] = {"value": None, "is_rehearsal": False, "note": "", "race": None, "details": {}}
    return [
        {"name": f"gpu_{name}", "work": f"{work}, one GPU", **empty} | found.get(name, {}) | {"goal": goal}
        for name, (work, goal) in GOALS.items()
    ]
