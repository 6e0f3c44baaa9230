"""The run-book of one CUDA device: `python -m benchmarks.speed.gpu OUT [--budget 540] [--only STAGE ...]`.

Random weights at full size made on the device, 25 steps, 1024x1024, guidance on, beside the reference where
diffusers is there, else alone. Stages in order of value, each in a process that is ended at its limit; what
is left of the budget goes to the next ones. Each row is a line of OUT/gpu.jsonl as soon as it is measured.

  probe       rates of products, convolutions and copies at the UNet's sizes, what a launch costs
  kernels     every attention kernel and shape against float64, with times
  precision   every pipeline in fp16 and bfloat16 against float64, small and of all widths
  exact       offload against resident, bit for bit; CUDA graphs while a LoRA is loaded, scaled, unloaded
  recompiles  compiled blocks at three image sizes
  everywhere  the tests of every task and feature on the device (needs pytest and diffusers)
  eager       beside the reference at 1024x1024 and 512x512, there with CUDA graphs too
  compiled    by repeated blocks, and with CUDA graphs, the reference whole; with a step cache
  fp8         linear layers in float8, with its error; and with a step cache
  memory      peaks of all resident, staged, smallest
  batch       8 images at once
  profile     one step by kinds of kernels, beside its arithmetic at the measured rate
  variants    opt-in ways to compute the same, one row each (variants.py)
  autotuned   max-autotune, ours alone, only where it is named: 5 minutes

Without a CUDA device nothing is measured. --rehearse runs every stage on the CPU, tiny: its numbers mean
nothing. `python -m benchmarks.speed.report OUT` makes the table, also of a part of the rows.
"""

import argparse
import sys
from dataclasses import replace

from benchmarks.speed import arguments
from benchmarks.speed.gpu.book import STAGES, run_book

BUDGET = 540  # seconds; limits of stages grow with a larger one


def main(module: str = "benchmarks.speed.gpu.stage") -> int:
    """Run the book; module: of a stage's process."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--budget", type=_seconds, default=BUDGET, help="seconds in all (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE", help="these, in their order")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny: to see that it runs")
    options = parser.parse_args()
    names = options.only or [n for n, stage in STAGES.items() if options.rehearse or not stage.is_optional]
    longer = max(1.0, options.budget / BUDGET)
    stages = {name: replace(one, limit=longer * one.limit) for name, one in STAGES.items() if name in names}
    rehearse = ["--rehearse"] if options.rehearse else []

    def command(name: str) -> list[str]:
        return [sys.executable, "-m", module, name, str(options.out), *rehearse]

    outcomes = run_book(stages, command, options.out, options.budget)
    if "no device" in outcomes.values():
        print("no CUDA device: nothing is measured; --rehearse runs every stage on the CPU")
        return 0
    from benchmarks.speed.gpu.rows import read_rows  # imports torch, which a stage should not wait for
    from benchmarks.speed.report import table

    print(table(read_rows(options.out)))
    return 0 if set(outcomes.values()) == {"done"} else 1


def _seconds(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
