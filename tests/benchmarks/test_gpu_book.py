"""The GPU run-book: its limits, what a kill leaves, and its cheapest stages rehearsed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.pairs import make_ours
from benchmarks.speed.gpu import exact, kernels, memory, probe
from benchmarks.speed.gpu.book import FILE, STAGES, Stage, append_line, read_lines, run_book
from benchmarks.speed.gpu.checks import Checks
from benchmarks.speed.gpu.counting import Shape, count_step, guided_step
from benchmarks.speed.gpu.place import REHEARSED, Place, rehearsal
from benchmarks.speed.gpu.rows import GOALS, make_row, read_rows
from benchmarks.speed.report import read, table
from kolors_core.attention import KERNELS, attention_kernel
from kolors_core.unet import UNet
from tests.support.simulated_device import simulated_cuda, simulates

ROOT = Path(__file__).parents[2]
QUICK = Stage(module="", limit=20, least=0.1, expected=1)
# A stage without torch: it waits for its line, writes one of its own, and then does what its name says.
WORKER = f"""
import os, subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from threading import Thread
from benchmarks.speed.gpu.book import append_line, end_with_starter
name, out = sys.argv[1], Path(sys.argv[2])
assert sys.stdin.readline()
Thread(target=end_with_starter, daemon=True).start()
append_line({{"name": name}}, out)
if name == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    append_line({{"ids": [os.getpid(), child.pid]}}, out)
    print("hangs here", file=sys.stderr, flush=True)
    time.sleep(600)
if name == "dies":
    os.kill(os.getpid(), 9)
if name == "lacks a device":
    sys.exit(3)
"""
BOOK = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from benchmarks.speed.gpu.book import Stage, run_book
stage = Stage(module="", limit=600, least=1, expected=1)
command = lambda name: [sys.executable, "-c", sys.argv[1], name, sys.argv[2]]
run_book({{"first": stage, "hangs": stage, "last": stage}}, command, Path(sys.argv[2]), 600)
"""


def run(out: Path, stages: dict[str, Stage], budget: float = 60) -> dict[str, str]:
    return run_book(stages, lambda name: [sys.executable, "-c", WORKER, name, str(out)], out, budget)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Any) -> None:
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.05)


def ids_in(out: Path) -> list[int]:
    return next((line["ids"] for line in read_lines(out) if "ids" in line), [])


def test_a_stage_that_hangs_or_dies_is_ended_and_later_ones_write_their_rows(tmp_path: Path) -> None:
    stages = {"first": QUICK, "hangs": replace(QUICK, limit=3), "dies": QUICK, "last": QUICK}
    outcomes = run(tmp_path, stages)
    assert outcomes == {
        "first": "done", "hangs": "ended after 3 s", "dies": "exit status -9", "last": "done"
    }  # fmt: skip
    lines = list(read_lines(tmp_path))
    assert [line["name"] for line in lines if "name" in line] == list(stages)
    ended = next(line for line in lines if line.get("stage") == "hangs")
    assert "hangs here" in ended["errors"] and 3 <= ended["seconds"] < 25
    wait_for(lambda: not any(map(is_alive, ids_in(tmp_path))))


def test_what_is_left_of_the_budget_decides_what_begins(tmp_path: Path) -> None:
    outcomes = run(tmp_path, {"first": replace(QUICK, least=100, limit=200), "last": QUICK}, budget=30)
    assert outcomes == {"first": "no time left", "last": "done"}
    assert run(tmp_path, {"lacks a device": QUICK, "last": QUICK}) == {"lacks a device": "no device"}


def test_rows_survive_a_kill_of_the_whole_book_and_no_stage_does(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", BOOK, WORKER, str(tmp_path)]) as book:
        wait_for(lambda: ids_in(tmp_path))
        book.send_signal(signal.SIGKILL)
    names = [line["name"] for line in read_lines(tmp_path) if "name" in line]
    assert names == ["first", "hangs"]
    wait_for(lambda: not any(map(is_alive, ids_in(tmp_path))))


def test_a_line_that_was_cut_off_harms_no_other(tmp_path: Path) -> None:
    append_line({"name": "one"}, tmp_path)
    with (tmp_path / FILE).open("ab") as file:
        file.write(json.dumps({"name": "cut"}).encode()[:-3])
    append_line({"name": "other"}, tmp_path)
    assert [line["name"] for line in read_lines(tmp_path)] == ["one", "other"]


def test_a_table_is_made_of_a_part_of_the_rows(tmp_path: Path) -> None:
    where = Place(out=tmp_path, checked={}, is_rehearsal=False)
    where.write("batch", 1.0)
    where.write("batch", 1.25)  # the last one counts
    replace(where, is_rehearsal=True).write("batch", 9.0)  # but no rehearsal after it
    where.write("eager", None, "why")
    rows = {row["name"]: row for row in read(tmp_path)}
    assert list(rows) == [f"gpu_{name}" for name in GOALS]
    assert rows["gpu_batch"]["value"] == 1.25
    lines = [line for line in table(list(rows.values())).splitlines() if line.startswith("|")][2:]
    assert sum("not measured" in line for line in lines) == len(GOALS) - 1
    assert next(line for line in lines if "**1.25**" in line).startswith(f"| {GOALS['batch'][0]}")
    with pytest.raises(KeyError):
        make_row("unknown", 1.0)


def rows_of(where: Place) -> dict[str, Any]:
    found = {row["name"].removeprefix("gpu_"): row for row in read_rows(where.out) if "environment" in row}
    assert all(row["is_rehearsal"] for row in found.values())
    return found


def test_stages_without_a_reference_write_their_rows(tmp_path: Path) -> None:
    where = rehearsal(tmp_path)
    probe.probe(where)
    probe.profile(where)
    exact.exact(where)
    found = rows_of(where)
    assert set(found) == {"probe", "step", "exact"}
    assert found["exact"]["value"] <= 1 and found["exact"]["note"] == "5 of 5 groups, 14 cases, 0 beyond"
    rates = found["probe"]["details"]["tflops"]
    assert min(rate for rate in rates.values() if isinstance(rate, float)) > 0
    assert found["step"]["details"]["kinds_ms"]


@simulates
def test_stages_run_on_a_simulated_device(tmp_path: Path) -> None:
    with simulated_cuda() as simulation:
        where = rehearsal(tmp_path, "cuda")
        memory.memory(where)
        exact.recompiles(where)
        assert len(simulation.launched) > 1000
    assert set(rows_of(where)) == {"memory_resident", "memory_staged", "memory_smallest", "recompiles"}


# One process, in which neither the reference nor what it needs can be imported.
WITHOUT = """
import importlib, sys
from pathlib import Path
sys.modules |= dict.fromkeys(["diffusers", "transformers", "accelerate", "peft"])
from benchmarks.speed.gpu.book import STAGES
for stage in STAGES.values():
    importlib.import_module(f"benchmarks.speed.gpu.{stage.module}")
from benchmarks.speed.gpu.place import rehearsal
importlib.import_module("benchmarks.speed.gpu.speed").eager(rehearsal(Path(sys.argv[1])))
"""


def test_without_the_reference_ours_is_measured(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT, tmp_path], cwd=ROOT, check=True, capture_output=True)
    found = {row["name"]: row for row in read_lines(tmp_path)}
    assert set(found) == {"gpu_eager", "gpu_eager_512", "gpu_graphs_512"}
    for row in found.values():
        assert row["value"] is None and "reference is not measured" in row["note"]
        assert row["details"]["seconds"]["ours"] > 0


def test_the_command_says_that_there_is_no_device(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "benchmarks.speed.gpu", str(tmp_path), "--only", "probe"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert "no CUDA device: nothing is measured" in done.stdout
    assert [line["outcome"] for line in read_lines(tmp_path)] == ["no device"]


def test_each_stage_has_a_function_and_fits_the_budget_with_the_others() -> None:
    assert sum(stage.expected for stage in STAGES.values() if not stage.is_optional) <= 600
    assert all(stage.least < stage.limit and stage.expected < stage.limit for stage in STAGES.values())


def test_a_kernel_that_is_wrong_is_beyond_what_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, shape = rehearsal(tmp_path), Shape((2, 3, 8, 16), 5, (2, 1, 1, 5))

    def without_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return KERNELS["matmul"](q, k, v, None)

    monkeypatch.setitem(KERNELS, "sdpa", without_bias)
    monkeypatch.setitem(KERNELS, "flash", lambda q, k, v, bias: q * torch.nan)
    checks = Checks(where, "kernels", total=1)
    checks.add("one", kernels.measure(where, shape, torch.float32))
    assert {name.split(",")[0] for name in checks.beyond} == {"one: sdpa", "one: flash"}
    assert rows_of(where)["kernels"]["value"] == float("inf")


def test_a_step_is_counted_as_it_runs() -> None:
    unet = make_ours(REHEARSED.unet, 0)
    step = guided_step(unet, 64)
    with attention_kernel("matmul"), FlopCounterMode(display=False) as flops, torch.no_grad():
        step()
    with torch.device("meta"):
        paper = UNet(REHEARSED.unet)
    count, shapes = count_step(paper, 64)
    assert sum(count.flops.values()) == flops.get_total_flops()
    assert count.launches["conv"] == sum(isinstance(m, torch.nn.Conv2d) for m in unet.modules())
    assert shapes.total() == 2 * 3 * sum(REHEARSED.unet.depths) + 2
