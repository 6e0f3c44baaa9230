"""From nothing to a pipeline: `python -m benchmarks.speed.start OUT`.

Importing the library and building the pipeline of the embedded folder, in fresh processes that take turns.
Both import torch, which is most of what ours takes; the interpreter's own start is not counted.
"""

import json
import subprocess
import sys

from benchmarks.side_by_side import Contestant, Row, faster, race
from benchmarks.speed import arguments
from kolors_core.checkpoint import EMBEDDED

PROGRAM = """
import json, sys, time
start = time.perf_counter()
from {library} import KolorsPipeline
imported = time.perf_counter()
KolorsPipeline.from_pretrained(sys.argv[1])
built = time.perf_counter()
print(json.dumps({{"seconds": built - start, "importing": imported - start, "building": built - imported}}))
"""
TORCH = """
import json, time
start = time.perf_counter()
import torch
print(json.dumps({"seconds": time.perf_counter() - start}))
"""


def fresh(program: str) -> Contestant:
    """A contestant in a process of its own."""

    def measure() -> dict[str, float]:
        command = [sys.executable, "-c", program, str(EMBEDDED)]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(run.stdout.splitlines()[-1])

    return measure


def main() -> None:
    """Measure and write."""
    options = arguments(__doc__, rounds=10).parse_args()
    programs = {
        "reference": PROGRAM.format(library="diffusers"),
        "ours": PROGRAM.format(library="kolors_core"),
        "torch alone": TORCH,
    }
    result = race({name: fresh(program) for name, program in programs.items()}, options.rounds)
    torch_alone = result.median("torch alone") / result.median("ours")
    Row(
        name="start", work="import and pipeline built, the embedded folder", goal=faster(4),
        value=result.ratio("reference", "ours"), race=result,
        note=f"`import torch` is {torch_alone:.0%} of ours, and part of both",
    ).write(options.out)  # fmt: skip


if __name__ == "__main__":
    main()
