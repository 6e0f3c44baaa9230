"""Peaks of ours in its three placements, on the device and of the host; and images of a batch."""

import gc
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.side_by_side import race, timed
from benchmarks.speed.gpu.place import Place, drawing, our_pipeline

BATCH = 8
PLACEMENTS = {
    "resident": ["enable_vae_tiling"],
    "staged": ["enable_model_cpu_offload"],
    "smallest": ["enable_sequential_cpu_offload", "enable_vae_tiling"],
}


def memory(where: Place) -> None:
    """Write a row for each placement, all at full size in fp16."""
    pipe = our_pipeline(where, where.config, where.half, torch.float32)
    for name, methods in PLACEMENTS.items():
        pipe.disable_vae_tiling()
        for method in methods:
            device = {"device": where.device} if method.endswith("offload") else {}
            getattr(pipe, method)(**device)
        value, details = peak(drawing(pipe, where, where.pixels), where)
        note = f"{details['host_gib']:.1f} GiB of the host at most" if details else ""
        where.write(f"memory_{name}", value, note, details)


def peak(run: Callable[[], object], where: Place) -> tuple[float | None, dict[str, Any]]:
    """GiB at the peak of a second run, and what was reserved and of the host; None in a rehearsal."""
    run()
    if where.is_rehearsal:
        return None, {}
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    statistics = getattr(torch.cuda, "host_memory_stats", dict)()  # since torch 2.8
    pinned = {name: size / 2**30 for name, size in statistics.items() if name.endswith("_bytes.peak")}
    details = {
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "host_gib": host_peak(),
        "pinned": pinned,
    }
    return torch.cuda.max_memory_allocated() / 2**30, details


def host_peak() -> float:
    """GiB of this process at most so far, of the host (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 2**20 if found else math.nan


def batch(where: Place) -> None:
    """Several images at once against one after another."""
    pipe = our_pipeline(where, where.config, where.half, torch.float32)
    runs = {name: drawing(pipe, where, where.pixels, n) for name, n in {"one": 1, "batch": BATCH}.items()}
    found = race({name: timed(run, where.wait) for name, run in runs.items()}, rounds=1)
    where.write("batch", BATCH * found.ratio("one", "batch"), f"{BATCH} images", race=found)
