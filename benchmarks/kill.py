"""Does a batch survive being killed? SIGKILL at random moments, under `torchrun` with two processes.

    python -m benchmarks.kill OUT --kills 50

One batch is drawn undisturbed. Others are started again and again with the same command, and each time one of
the three processes (`torchrun` itself, or a worker) is killed, until a batch is done; then the next batch. A
`torchrun` that is killed leaves its workers behind, which go on beside those of the next start. Each batch is
compared with the undisturbed one, byte for byte. Prints numbers as JSON; exits with 1 if an image is
missing, doubled, truncated or different.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from kolors_core.batch.prompt_file import png_fingerprint

NAMES = ("ladybug", "panda", "rocket", "sunflower", "banana", "frog", "fire truck", "snowman")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}  # as `torchrun` sets it, for equal bits


def write_prompts(file: Path, count: int, steps: int) -> None:
    """Lines of several sizes, for the embedded model."""
    with file.open("w", encoding="utf-8") as lines:
        for i in range(count):
            line = {"prompt": f"a photo of one {NAMES[i % len(NAMES)]}", "seed": i, "steps": steps}
            lines.write(json.dumps(line | {"height": 64, "width": 64 + 8 * (i % 3)}) + "\n")


def children(pid: int) -> list[int]:
    """The processes that a process has started (Linux)."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def is_alive(pid: int) -> bool:
    """Whether a process still runs, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def count_records(out: Path) -> int:
    file = out / "manifest.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def command(prompts: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
            "kolors_core.batch", str(prompts), str(out), "--device", "cpu", "-q"]  # fmt: skip


class Killing:
    """Starts a batch and kills it; counts."""

    def __init__(self, prompts: Path, seed: int, start: float, kills: int) -> None:
        """start: seconds from the command to its first image."""
        self.prompts, self.random, self.start, self.kills = prompts, random.Random(seed), start, kills
        self.counts: Counter[str] = Counter()
        self.orphans: list[int] = []

    def launch(self, out: Path) -> bool:
        """Start the batch and kill one process of it at a random moment; whether it was done before that."""
        before = count_records(out)
        with open(out.parent / "log.txt", "ab") as log:
            run = subprocess.Popen(command(self.prompts, out), env=ENVIRONMENT, stderr=log, stdout=log)
        self.counts["starts"] += 1
        end = time.monotonic() + self.random.uniform(0.5, 1.6) * self.start
        while run.poll() is None and (time.monotonic() < end or self.counts["kills"] == self.kills):
            time.sleep(0.002)
        if run.returncode is not None:
            if run.returncode:
                raise SystemExit(f"a batch that nobody killed ended with {run.returncode}: {log.name}")
            return True
        workers = [pid for pid in children(run.pid) if is_alive(pid)]
        victim = self.random.choice([run.pid, *workers])
        os.kill(victim, signal.SIGKILL)
        self.counts["kills"] += 1
        self.counts["of_torchrun" if victim == run.pid else "of_workers"] += 1
        self.counts["after_first_picture"] += count_records(out) > before
        run.wait()
        if victim == run.pid:
            self.orphans += workers
        return run.returncode == 0

    def wait_for_orphans(self) -> None:
        """Workers whose `torchrun` was killed go on alone."""
        while any(map(is_alive, self.orphans)):
            time.sleep(0.05)
        self.orphans = []


def compare(out: Path, expected: Path) -> dict[str, int]:
    """What is wrong with a batch's folder."""
    mine, wanted = ({file.name: file for file in folder.glob("*.png")} for folder in (out, expected))
    records = Counter(json.loads(line)["line"] for line in (out / "manifest.jsonl").open(encoding="utf-8"))
    return {
        "missing": len(wanted.keys() - mine.keys()) + len(wanted) - len(records),
        "doubled": len(mine.keys() - wanted.keys()) + sum(count > 1 for count in records.values()),
        "truncated": sum(not png_fingerprint(file) for file in mine.values()),
        "different": sum(mine[n].read_bytes() != wanted[n].read_bytes() for n in mine.keys() & wanted.keys()),
        "scratch_files_left": len([*out.glob(".*.partial")]),
    }


def main() -> int:
    """Run it; returns the exit status."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.kill", description=__doc__)
    top.add_argument("out", type=Path)
    top.add_argument("--kills", type=int, default=50)
    top.add_argument("--lines", type=int, default=120, help="images of a batch (default: 120)")
    top.add_argument("--steps", type=int, default=10)
    top.add_argument("--seed", type=int, default=0)
    options = top.parse_args()
    options.out.mkdir(parents=True)
    prompts, expected = options.out / "prompts.jsonl", options.out / "undisturbed"
    write_prompts(prompts, options.jobs, options.steps)
    begin = time.monotonic()
    with subprocess.Popen(command(prompts, expected), env=ENVIRONMENT) as run:
        while not count_records(expected) and run.poll() is None:
            time.sleep(0.01)
        start = time.monotonic() - begin
    if run.returncode:
        return run.returncode
    killing, wrong = Killing(prompts, options.seed, start, options.kills), Counter[str]()
    batches = 0
    while killing.counts["kills"] < options.kills:
        out = options.out / f"batch-{batches}"
        while not killing.launch(out):
            pass
        killing.wait_for_orphans()
        wrong.update(compare(out, expected))
        batches += 1
    told = {"batches": batches, "pictures": batches * options.jobs, **killing.counts, **wrong}
    told["seconds"] = round(time.monotonic() - begin)
    print(json.dumps(told, indent=1))
    (options.out / "kill.json").write_text(json.dumps(told, indent=1) + "\n")
    return int(any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())
