"""Parity with the reference on one page: `python -m benchmarks.parity OUT`.

Runs the model that this package carries, offline, in a minute on one core. With the environment variable
KOLORS_WEIGHTS the folder it names, of Kolors-diffusers' layout: the real weights, model after model, each
library's alone in memory and in the dtype that its files have; on CUDA if there is any. Such a folder may
also have `image_encoder/`, `controlnet/` and `ip_adapter*.safetensors`; for what it lacks stand small random
models. Writes report.md, parity.png, numbers.json and an image for each task. Exit status: 1 if a component
diverges, 2 if the folder cannot be used. Needs the `bench` extra.
"""

import argparse
import logging
import os
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path

import diffusers
import torch
import transformers

from benchmarks.parity.checkpoint import Checkpoint, opened
from benchmarks.parity.components import cases
from benchmarks.parity.measure import Result, measure
from benchmarks.parity.pipelines import FEW_STEPS, STEPS, Pictures, measure_pipelines
from benchmarks.parity.report import parting, verdict, write
from benchmarks.parity.samplers import measure_samplers
from benchmarks.parity.texts import measure_tokenizer
from kolors_core.checkpoint import EMBEDDED, read_json

RESULTS = Path(__file__).parents[1] / "results" / "parity"
VARIABLE = "KOLORS_WEIGHTS"


def measure_all(checkpoint: Checkpoint) -> tuple[list[Result], list[Pictures]]:
    """Everything, one after another."""
    results = [measure_tokenizer(checkpoint.tokenizer())]
    for case in cases(checkpoint):
        results.append(measure(case, checkpoint.device))
        print(f"{case.name}: first divergence {parting(results[-1])}", file=sys.stderr)
    results += measure_samplers(read_json(checkpoint.folder / "scheduler" / "scheduler_config.json"))
    tasks, pictures = measure_pipelines(checkpoint, FEW_STEPS if checkpoint.is_slow else STEPS)
    return results + tasks, pictures


def quieten() -> None:
    """Nothing of what the reference says about loading and moving."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    warnings.filterwarnings("ignore", module="diffusers")
    logging.getLogger("kolors_core").setLevel(logging.ERROR)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("out", type=Path, nargs="?", default=RESULTS, help="folder of the page")
    out = parser.parse_args(arguments).out
    given = os.environ.get(VARIABLE)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32
    with ExitStack() as stack:
        try:
            checkpoint = stack.enter_context(opened(EMBEDDED if given is None else Path(given), device))
        except (OSError, ValueError) as error:
            print(f"error: {VARIABLE}={given}: {error}", file=sys.stderr)
            return 2
        if device.type == "cpu" and not checkpoint.is_large:
            torch.set_num_threads(1)  # for models so small a second thread costs more than it brings
        from benchmarks.parity.plot import plot  # what it needs is found missing before the work, not after

        results, pictures = measure_all(checkpoint)
        name = "the model that this package carries" if given is None else f"what {VARIABLE} names"
        write(out, checkpoint, results, pictures, name)
        plot(results, out / "parity.png")
    print(verdict(results), end="")
    return int(any(one.divergence != "none" for result in results for one in result.measured))


if __name__ == "__main__":
    quieten()
    sys.exit(main())
