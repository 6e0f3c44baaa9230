"""The harness: contestants take turns in one process, and what they measured becomes a row in a JSON file.

A contestant is a function that runs once and returns what it measured, such as {"seconds": 1.2}: `timed`
makes one of any function. One that must be measured in a fresh process starts it and returns what it printed.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile

Contestant = Callable[[], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """What one contestant measured of one quantity, in the order of the runs, and how far it spreads."""

    median: float
    least: float
    most: float
    all: list[float]

    @classmethod
    def of(cls, values: list[float]) -> Self:
        """The spread of measured values."""
        middle = statistics.median(values)
        return cls(median=middle, least=min(values), most=max(values), all=[round(x, 4) for x in values])


@dataclass(frozen=True, kw_only=True)
class Race:
    """What each contestant measured, by quantity.

    cpu_share: how much of the threads' time this process and those it started were computing. For work that
    only computes, well below 1 means that another program had the cores: measure again.
    """

    contestants: dict[str, dict[str, Spread]]
    rounds: int
    cpu_share: float

    def median(self, contestant: str, quantity: str = "seconds") -> float:
        """One contestant's median."""
        return self.contestants[contestant][quantity].median

    def ratio(self, contestant: str, by: str, quantity: str = "seconds") -> float:
        """One contestant's median divided by another's."""
        return self.median(contestant, quantity) / self.median(by, quantity)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a value is to reach: at least (or else at most) so many of a unit.

    is_ratio: the value compares ours with the reference.
    """

    limit: float
    unit: str
    at_least: bool
    is_ratio: bool

    def __str__(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {self.limit:g} {self.unit}"

    def is_met(self, value: float) -> bool:
        """Written so that a NaN is a miss."""
        return value >= self.limit if self.at_least else value <= self.limit


def faster(limit: float) -> Goal:
    """At least `limit` times as fast as the reference."""
    return Goal(limit=limit, unit="times as fast", at_least=True, is_ratio=True)


def share(limit: float, of: str) -> Goal:
    """At most `limit` of the reference's time or memory."""
    return Goal(limit=limit, unit=f"of the reference's {of}", at_least=False, is_ratio=True)


def below(limit: float, unit: str) -> Goal:
    """At most `limit` of a unit, whatever the reference needs."""
    return Goal(limit=limit, unit=unit, at_least=False, is_ratio=False)


def write_json(content: Any, file: Path) -> None:
    """Write for people and programs to read."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table.

    name: the JSON file's stem. value: None if it was not measured. is_rehearsal: the value is of a small
    model, or of another device than the goal's: it shows that the script works, and nothing else. note: what
    a reader of the table has to know. details: everything else that was measured.
    """

    name: str
    work: str
    goal: Goal
    value: float | None
    is_rehearsal: bool = False
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    race: Race | None = None
    environment: dict[str, Any] = field(default_factory=lambda: environment())

    def line(self) -> str:
        """What came out, for the terminal."""
        value = "not measured" if self.value is None else f"{self.value:.3g}"
        return f"{self.name}: {value}{' (rehearsal)' if self.is_rehearsal else ''}, goal: {self.goal}"

    def write(self, folder: Path) -> None:
        """Write `name`.json, and say on the terminal what came out."""
        write_json(asdict(self), folder / f"{self.name}.json")
        print(self.line())


def nothing() -> None:
    """What a device without a queue has to wait for."""


def timed(
    run: Callable[[], object],
    wait: Callable[[], None] = nothing,
    clock: Callable[[], float] = time.perf_counter,
) -> Contestant:
    """A contestant that measures the seconds of one call. wait: until the device has done what is queued."""

    def measure() -> dict[str, float]:
        wait()
        start = clock()
        run()
        wait()
        return {"seconds": clock() - start}

    return measure


def race(contestants: Mapping[str, Contestant], rounds: int, warm_ups: int = 1) -> Race:
    """Run all contestants forward and backward in each round, A B B A, so that a machine that grows slower or
    faster does so for all alike. Warm-ups are not counted.
    """
    for _ in range(warm_ups):
        for measure in contestants.values():
            measure()
    values: dict[str, dict[str, list[float]]] = {name: {} for name in contestants}
    busy, start = _busy(), time.perf_counter()
    for _ in range(rounds):
        for name in [*contestants, *reversed(contestants)]:
            for quantity, value in contestants[name]().items():
                values[name].setdefault(quantity, []).append(value)
    wall = max(time.perf_counter() - start, 1e-9)
    spreads = {
        name: {quantity: Spread.of(found) for quantity, found in quantities.items()}
        for name, quantities in values.items()
    }
    cpu_share = round((_busy() - busy) / (wall * torch.get_num_threads()), 2)
    return Race(contestants=spreads, rounds=rounds, cpu_share=cpu_share)


def _busy() -> float:
    """Seconds that this process and its finished children have been computing."""
    return sum(os.times()[:4])


def operators(run: Callable[[], object], most: int = 20) -> dict[str, dict[str, float]]:
    """The operators that take most of one call's CPU time, without what they call: share of it, and calls."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    return {
        event.key: {"share": round(event.self_cpu_time_total / whole, 4), "calls": event.count}
        for event in events[:most]
    }


def environment() -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    from kolors_core.cli.env import cpu_name  # it brings all pipelines

    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": _version("diffusers"),
        "transformers": _version("transformers"),
        "accelerate": _version("accelerate"),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
