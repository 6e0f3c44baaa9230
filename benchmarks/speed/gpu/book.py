"""The stages and their limits, what runs them, and the file of lines that they write. Needs no torch.

A line of gpu.jsonl is on the disk before the next thing is measured; one that a kill has cut off is skipped.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

FILE = "gpu.jsonl"
NO_DEVICE = 3  # exit status of a stage that finds no CUDA device
GRACE = 5.0  # seconds that ending a stage may take
MOST_ERROR = 4000  # characters of a stage's errors that are kept


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One process. module: of this folder, with a function of the stage's name. limit: the seconds after
    which it is ended. least: it is not begun with fewer left. expected: on an H200, counted and not measured.
    is_optional: it runs only where it is named. uses_reference: it imports diffusers, where that is.
    """

    module: str
    limit: float
    least: float
    expected: int
    is_optional: bool = False
    uses_reference: bool = False


STAGES: dict[str, Stage] = {
    "probe": Stage(module="probe", limit=40, least=10, expected=10),
    "kernels": Stage(module="kernels", limit=60, least=15, expected=25),
    "precision": Stage(module="precision", limit=75, least=20, expected=35),
    "exact": Stage(module="exact", limit=50, least=15, expected=20),
    "recompiles": Stage(module="exact", limit=60, least=20, expected=30),
    "everywhere": Stage(module="exact", limit=90, least=30, expected=50),
    "eager": Stage(module="speed", limit=80, least=25, expected=40, uses_reference=True),
    "compiled": Stage(module="speed", limit=220, least=60, expected=140, uses_reference=True),
    "fp8": Stage(module="speed", limit=110, least=30, expected=60),
    "memory": Stage(module="memory", limit=110, least=25, expected=70),
    "batch": Stage(module="memory", limit=45, least=20, expected=30),
    "profile": Stage(module="probe", limit=40, least=15, expected=15),
    "variants": Stage(module="speed", limit=110, least=25, expected=75),
    "autotuned": Stage(module="speed", limit=480, least=200, expected=300, is_optional=True),
}


def append_line(content: Mapping[str, Any], out: Path) -> None:
    """Add a line to the folder's file; it is on the disk when this returns."""
    out.mkdir(parents=True, exist_ok=True)
    line = json.dumps(content, ensure_ascii=False).encode() + b"\n"
    with (out / FILE).open("ab+") as lines:
        if lines.tell():
            lines.seek(-1, os.SEEK_END)
            line = line if lines.read() == b"\n" else b"\n" + line
        lines.write(line)
        lines.flush()
        os.fsync(lines.fileno())


def read_lines(out: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines that are whole, in their order."""
    if (out / FILE).exists():
        for line in (out / FILE).read_bytes().splitlines():
            with suppress(ValueError):
                yield json.loads(line)


class Process:
    """A stage's process, which imports and then waits for a line with its limit: `run`."""

    def __init__(self, command: list[str]) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  closed by `end`
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=self.file, process_group=0)
        self.errors = ""

    def run(self, limit: float) -> str:
        """Begin, and return how it ended: "done", "no device", or what went wrong."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already
            self.process.stdin.write(f"{limit}\n".encode())
            self.process.stdin.flush()
        try:
            status = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"ended after {limit:.0f} s"
        if status == NO_DEVICE:
            return "no device"
        return "done" if status == 0 else f"exit status {status}"

    def end(self) -> None:
        """Kill it and what it has started, and keep the last of its errors."""
        if self.file.closed:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.file.seek(0)
        self.errors = self.file.read().decode(errors="replace")[-MOST_ERROR:]
        self.file.close()


def end_with_starter() -> None:
    """End this process, and what it has started, when the one that started it ends: for a thread."""
    os.read(sys.stdin.fileno(), 1)
    os.killpg(0, signal.SIGKILL)


def run_book(
    stages: Mapping[str, Stage], command: Callable[[str], list[str]], out: Path, budget: float
) -> dict[str, str]:
    """Run the stages one after another within `budget` seconds, and return how each ended.

    command: of a stage's process, by the stage's name. While one stage runs, the next one's process imports.
    Each outcome becomes a line of the file.
    """
    ends, outcomes = time.monotonic() + budget, dict[str, str]()
    with ExitStack() as stack:

        def start(name: str | None) -> Process | None:
            if name is None:
                return None
            process = Process(command(name))
            stack.callback(process.end)
            return process

        names = [*stages, None]
        process = start(names[0])
        for name, following in pairwise(names):
            assert name is not None and process is not None
            own, process, stage = process, start(following), stages[name]
            began, left = time.monotonic(), ends - time.monotonic() - GRACE
            outcome = "no time left" if left < min(stage.least, stage.limit) else ""
            outcome = outcome or own.run(min(stage.limit, left))
            own.end()
            seconds = round(time.monotonic() - began, 1)
            outcomes[name] = outcome
            line = {"stage": name, "outcome": outcome, "seconds": seconds, "limit": stage.limit}
            is_fault = outcome not in ("done", "no time left")
            append_line(line | ({"errors": own.errors} if is_fault else {}), out)
            print(f"-- {name}: {outcome}, {seconds:.0f} s; {ends - time.monotonic():.0f} s left", flush=True)
            if is_fault:
                print(own.errors, file=sys.stderr, flush=True)
            if outcome == "no device":
                break
    return outcomes
