"""Command line for many prompts; see worker.py, which is imported, as torch is, when a batch runs."""

import argparse
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from kolors_core.cli import parsers as cli

if TYPE_CHECKING:
    from kolors_core.batch.prompt_file import Job


def parser() -> cli.Parser:
    """Build the parser of all flags."""
    top = cli.Parser(
        "batch", usage="kolors batch PROMPTS OUT [flags]",
        description="Generate an image for each line of a file. The same command resumes.",
        epilog="Example: kolors batch prompts.txt OUT --steps 25\n"
        "On 8 GPUs: torchrun --nproc-per-node 8 -m kolors_core.batch prompts.jsonl OUT -w DIR\n"
        "Exit status: 1 if a line failed, 2 if none could be tried.",
    )  # fmt: skip
    add = top.add_argument
    add("prompts", type=Path, metavar="PROMPTS",
        help="a .txt of one prompt a line; or JSON Lines, or a .csv, with the fields prompt, "
        "negative_prompt, seed, height, width, steps, guidance, lora, lora_partial")  # fmt: skip
    add("out", type=Path, metavar="OUT", help="the folder of the images and their manifest.jsonl")
    add("--force", action="store_true", help="overwrite files in OUT that are of other lines")
    add("--seed", type=cli.integer, default=0, metavar="N",
        help="a line without a seed gets this plus its number (default: 0)")  # fmt: skip
    add("--split-guidance", action="store_true",
        help="two processes an image, one for the prompt and one for the negative prompt: lower latency, not "
        "higher throughput")  # fmt: skip
    add("-q", "--quiet", action="store_true", help="no progress bar and no report")
    model = top.add_argument_group("model")
    cli.add_model(model)
    cli.add_lora_partial(model)
    cli.add_image(top.add_argument_group("of lines that do not say otherwise"))
    sampling = top.add_argument_group("sampling, where steps and guidance are of lines without their own")
    cli.add_steps(sampling, lists_names=False)
    cli.add_guidance(sampling)
    return top.list_only("--force", "--seed", "--split-guidance", "-q", "-w", "-n", "--height", "--width",
                         "--steps", "--sampler", "--guidance",
                         note="Schedules, and more of model and guidance: kolors draw --help")  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 if a line failed, 2 if none could be tried."""
    options = parser().parse_args(arguments)
    from kolors_core.cli.options import run_command

    return run_command(run, options, "interrupted: the same command resumes")


def run(options: argparse.Namespace) -> "list[Job]":
    """Run this process's part of a batch; return the jobs that failed."""
    from kolors_core.batch.worker import Worker
    from kolors_core.performance.processes import join_processes

    worker = Worker(options, join_processes(options.device))
    with closing(worker.locks):
        return worker.run()


if __name__ == "__main__":
    raise SystemExit(main())
