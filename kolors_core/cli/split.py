"""Flag --split: one image on all processes that `torchrun` started; the first writes it."""

import argparse
import logging
import os
from typing import Any

import torch
import torch.distributed as dist

from kolors_core.checkpoint import logger
from kolors_core.cli.options import guidance_kwargs
from kolors_core.devices import named_device
from kolors_core.performance.processes import join_processes
from kolors_core.performance.split_guidance import GuidancePair
from kolors_core.pipelines.stages import Task

STARTED_BY = "torchrun --nproc-per-node 2 -m kolors_core PROMPT --split rows"


def check_split(options: argparse.Namespace) -> None:
    """Raise ValueError for options that cannot be together with --split, or without `torchrun`."""
    if options.split is None:
        return
    if options.plan:
        raise ValueError("--plan counts what one process needs alone: leave --split out")
    if options.vae_tiling:
        raise ValueError("--split and --vae-tiling exclude each other: split rows take less memory too")
    if options.split == "guidance" and guidance_kwargs(options):
        raise ValueError("--split guidance splits no --pag, --guidance-rescale or --guidance-interval")
    if options.split == "guidance" and options.guidance <= 1:
        raise ValueError(f"--split guidance needs --guidance above 1, got {options.guidance}")
    world = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1  # as torchrun sets them
    if world < 2:
        raise ValueError(f"--split needs several processes, got one: {STARTED_BY}")
    if options.split == "guidance" and world % 2:
        raise ValueError(f"--split guidance needs an even number of processes, got {world}")


def join_split(options: argparse.Namespace) -> torch.device:
    """Return this process's device; with --split join the others, take the first's seed, and be quiet."""
    if options.split is None:
        return named_device(options.device)
    device = join_processes(options.device)
    seeds = [options.seed]
    dist.broadcast_object_list(seeds, src=0)
    options.seed = seeds[0]
    if dist.get_rank() > 0:
        options.quiet = True
        logger.setLevel(logging.ERROR)  # until `run_command` ends
    return device


def split_pipeline(pipe: Task, split: str) -> None:
    """Split a pipeline's rows over all processes, or over those that compute the same half of guidance."""
    if split == "rows":
        return pipe.enable_row_split()
    pair, world = GuidancePair(), dist.get_world_size()
    groups: list[Any] = [dist.new_group(range(role, world, 2)) for role in range(2)]
    pipe.guided = pair.guided
    pipe.enable_row_split(groups[pair.role])


def leave_split(split: str | None) -> bool:
    """Leave the processes of --split; return whether this one is to write the image."""
    if split is None:
        return True
    is_first = dist.get_rank() == 0
    dist.destroy_process_group()
    return is_first
