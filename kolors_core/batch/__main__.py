"""Command line for many prompts; see worker.py."""

import argparse
from contextlib import closing
from pathlib import Path

from kolors_core.batch.processes import join_processes
from kolors_core.batch.prompt_file import Job
from kolors_core.batch.worker import Worker
from kolors_core.cli import options as cli


def parser() -> argparse.ArgumentParser:
    """Build the parser of all flags."""
    top = argparse.ArgumentParser(
        prog="python -m kolors_core.batch",
        description="Generate an image for each line of a file.",
        epilog="On 8 GPUs: torchrun --nproc-per-node 8 -m kolors_core.batch prompts.jsonl OUT -w DIR. "
        "Exit status: 1 if a line failed, 2 if none could be tried.",
    )
    add = top.add_argument
    add("prompts", type=Path,
        help="JSON Lines, or a .csv, with the fields prompt, negative_prompt, seed, height, width, steps, "
        "guidance, lora (FROM[:SCALE], or a list of them)")  # fmt: skip
    add("out", type=Path, help="the folder of the images and their manifest.jsonl")
    add("--force", action="store_true", help="overwrite files in OUT that are of other lines")
    add("--seed", type=int, default=0, help="a line without a seed gets this plus its number (default: 0)")
    add("--split-guidance", action="store_true",
        help="generate each image on two processes, one with the prompt and one with the negative prompt: "
        "lower latency, not higher throughput")  # fmt: skip
    cli.add_model(top.add_argument_group("model"))
    sampling = top.add_argument_group("sampling")
    cli.add_sampler(sampling)
    cli.add_guidance(sampling)
    add("-q", "--quiet", action="store_true", help="no progress bar and no report")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 if a line failed, 2 if none could be tried."""
    return cli.run_command(run, parser().parse_args(arguments), "interrupted: the same command resumes")


def run(options: argparse.Namespace) -> list[Job]:
    """Run this process's part of a batch; return the jobs that failed."""
    worker = Worker(options, join_processes(options.device))
    with closing(worker.locks):
        return worker.run()


if __name__ == "__main__":
    raise SystemExit(main())
