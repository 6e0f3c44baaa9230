"""Memory that is left: what Linux says of the machine and of control groups, and of this machine itself."""

from pathlib import Path

import pytest
import torch

from kolors_core.performance import available_memory as memory

CPU, MIB = torch.device("cpu"), 2**20


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


MACHINE = {
    "proc/meminfo": "MemTotal: 4096000 kB\nMemAvailable: 1024000 kB\nSwapFree: 1000 kB\nHugePages_Total: 0\n"
}
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"
GROUPS: dict[str, tuple[dict[str, str], int]] = {
    "no group": ({}, 1025000 * 1024),
    "version 2, of the process": (
        {"proc/self/cgroup": "0::/user/job\n", f"{V2}/user/job/memory.max": f"{600 * MIB}\n",
         f"{V2}/user/job/memory.current": f"{200 * MIB}\n",
         f"{V2}/user/job/memory.stat": f"anon 5\ninactive_file {50 * MIB}\n",
         f"{V2}/user/memory.max": "max\n", f"{V2}/user/memory.current": "7\n"},
        450 * MIB,
    ),
    "version 2, of the group around it": (
        {"proc/self/cgroup": "0::/user/job\n", f"{V2}/user/job/memory.max": "max\n",
         f"{V2}/user/memory.max": f"{300 * MIB}\n", f"{V2}/user/memory.current": f"{100 * MIB}\n",
         f"{V2}/user/memory.stat": ""},
        200 * MIB,
    ),
    "version 1, in a container that sees its own group alone": (
        {"proc/self/cgroup": "9:name=systemd:/\n4:memory:/docker/1234\n0::/\n",
         f"{V1}/memory.limit_in_bytes": f"{100 * MIB}", f"{V1}/memory.usage_in_bytes": f"{90 * MIB}",
         f"{V1}/memory.stat": f"inactive_file 1\ntotal_inactive_file {20 * MIB}\n"},
        30 * MIB,
    ),
    "no limit": (
        {"proc/self/cgroup": "4:memory:/\n", f"{V1}/memory.limit_in_bytes": f"{2**63 - 4096}",
         f"{V1}/memory.usage_in_bytes": "5", f"{V1}/memory.stat": "total_inactive_file 1\n"},
        1025000 * 1024,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_the_least_of_machine_and_groups(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, left = GROUPS[name]
    write(tmp_path, MACHINE | {"proc/self/cgroup": ""} | files)
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    assert memory.available_memory(CPU) == left


def test_without_linux_it_is_what_the_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = memory.available_memory(CPU)
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    everything = memory.available_memory(CPU)
    assert here is not None and everything is not None and here > 0
    assert everything > 2**28


def test_of_a_device_that_allocates_nothing_it_is_unknown() -> None:
    assert memory.available_memory(torch.device("meta")) is None
