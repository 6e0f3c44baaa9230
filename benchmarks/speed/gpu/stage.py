"""One stage in its process: `python -m benchmarks.speed.gpu.stage NAME OUT [--rehearse]`; book.py starts it.

It imports, waits for a line with its limit in seconds, and runs. When the line's writer ends, so does it.
"""

import argparse
import faulthandler
import importlib
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread

import torch

from benchmarks.speed.gpu.book import NO_DEVICE, STAGES, end_with_starter
from benchmarks.speed.gpu.place import Place, cuda_place, rehearsal


def main(make_rehearsal: Callable[[Path], Place] = rehearsal) -> None:
    """Run the stage. make_rehearsal: of a rehearsal's place."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("name", choices=STAGES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    run = getattr(
        importlib.import_module(f"benchmarks.speed.gpu.{STAGES[options.name].module}"), options.name
    )
    if STAGES[options.name].uses_reference:
        with suppress(ImportError):
            importlib.import_module("diffusers.pipelines.kolors")
    if not (limit := sys.stdin.readline()):
        raise SystemExit("expected a line with the limit in seconds")
    Thread(target=end_with_starter, daemon=True).start()
    faulthandler.dump_traceback_later(max(0.1, float(limit) - 1))  # where it hangs
    if options.rehearse:
        where = make_rehearsal(options.out)
    elif torch.cuda.is_available():
        where = cuda_place(options.out)
    else:
        raise SystemExit(NO_DEVICE)
    run(where)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
