"""Load one UNet folder and say what it took: `python -m benchmarks.speed.load_once SIDE FOLDER DTYPE`.

A process of its own, since the peak of a process's memory is measured once. SIDE is "ours", "reference", or
"reference, without accelerate", which is how it loads where that package is not installed. Prints one line of
JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

PAGE = 4096
GIB = 2**30


def loader(side: str, folder: Path, dtype: torch.dtype) -> Callable[[], nn.Module]:
    """The call that is measured; importing its library is not part of it."""
    if side == "ours":
        from kolors_core.checkpoint import load_component

        return lambda: load_component(folder, "unet", dtype=dtype)

    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    has_accelerate = side == "reference"
    return lambda: UNet2DConditionModel.from_pretrained(
        folder, subfolder="unet", variant="fp16", torch_dtype=dtype, low_cpu_mem_usage=has_accelerate
    )


def touch(model: nn.Module) -> int:
    """Read a byte of every page of every weight, so that what was only mapped is in memory."""
    read = 0
    for parameter in model.parameters():
        pages = parameter.detach().flatten().view(torch.uint8)[::PAGE]
        read += int(pages.sum(dtype=torch.int64))
    return read


def memory() -> dict[str, float]:
    """GiB that this process has in memory now: all (at its peak), its own, and mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    names = {"peak": "VmHWM", "anonymous": "RssAnon", "file": "RssFile"}
    return {name: int(status[key].split()[0]) * 1024 / GIB for name, key in names.items()}


def main() -> None:
    """Measure and print."""
    side, folder, kind = sys.argv[1:]
    dtype = getattr(torch, kind)
    load = loader(side, Path(folder), dtype)
    before = memory()["peak"]
    start = time.perf_counter()
    model = load()
    loaded = time.perf_counter() - start
    touch(model)
    touched = time.perf_counter() - start
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / GIB
    if {p.dtype for p in model.parameters()} != {dtype}:
        raise TypeError(f"{side}: not all weights are in {kind}")
    found = memory()
    print(json.dumps({
        "seconds": touched, "seconds_untouched": loaded, "peak_gib": found["peak"],
        "peak_by_weights": found["peak"] / weights, "before_gib": before,
        "anonymous_gib": found["anonymous"], "file_gib": found["file"],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
