"""Memory that a device has left for this process, in bytes."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import torch

ROOT = Path("/")  # of the files in which Linux describes its memory
# By the controllers that /proc/self/cgroup names ("" in version 2): the folder of all control groups, and the
# files of a group's limit and use.
GROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that this process can still allocate on a device; None if that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return _available_on_cpu() if device.type == "cpu" else None


def _available_on_cpu() -> int | None:
    """Return what the machine has left, swap included, or what its control groups leave, if that is less."""
    with suppress(OSError, ValueError, KeyError):
        lines = (line.split() for line in (ROOT / "proc/meminfo").read_text().splitlines())
        kib = {name: int(number) for name, number, *_ in lines}
        return min((kib["MemAvailable:"] + kib["SwapFree:"]) * 1024, *_left_in_groups())
    with suppress(AttributeError, ValueError, OSError):  # not Linux: all memory, since the free is unknown
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _left_in_groups() -> Iterator[int]:
    """Yield what each control group of this process leaves of its limit; its cached files can be freed."""
    yield 2**63
    for line in (ROOT / "proc/self/cgroup").read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers not in GROUPS:
            continue
        mount, limit, usage = GROUPS[controllers]
        for group in (PurePosixPath(own), *PurePosixPath(own).parents):
            folder = ROOT / mount / str(group).lstrip("/")
            with suppress(OSError, ValueError):  # "max" is no limit; in a container outer groups are not seen
                most, used = (int((folder / name).read_text()) for name in (limit, usage))
                stat = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
                cached = {name: int(value) for name, value in stat}
                yield most - used + cached.get("total_inactive_file", cached.get("inactive_file", 0))
