"""The GPU run-book rehearsed on a simulated device: `python -m tests.support.simulated_stage OUT --rehearse`.

Stages that compile run eager there, and counts of memory are left out.
"""

import sys
from functools import partial

from benchmarks.speed.gpu import stage
from benchmarks.speed.gpu.__main__ import main
from benchmarks.speed.gpu.book import STAGES
from benchmarks.speed.gpu.place import rehearsal
from tests.support.simulated_device import simulated_cuda

if __name__ == "__main__":
    if sys.argv[1] in STAGES:
        with simulated_cuda():
            stage.main(partial(rehearsal, device="cuda"))
    else:
        sys.exit(main("tests.support.simulated_stage"))
