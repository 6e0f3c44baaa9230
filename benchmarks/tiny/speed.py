"""How fast the embedded model draws beside the reference: `python -m benchmarks.tiny.speed OUT`.

Both in one process, alternating, forward and backward in turn; medians, prompt to PNG, 25 guided steps.
Writes speed.json: seconds, the ratio to the reference, and the machine.
"""

import argparse
import io
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from kolors_core import DPMSolverMultistepScheduler, KolorsPipeline
from kolors_core.checkpoint import EMBEDDED
from kolors_core.guidance import Savings

PROMPT = "一张瓢虫的照片"
NOTHING = Savings(collapse_pads=False, read_once=False, cached_prompts=0)


def draw(pipe: Any) -> None:
    """Prompt to PNG."""
    generator = torch.Generator().manual_seed(0)
    image = pipe(PROMPT, num_inference_steps=25, guidance_scale=5.0, generator=generator).images[0]
    image.save(io.BytesIO(), "PNG")


def contestants() -> dict[str, Callable[[], None]]:
    """The reference, and ours with less and more saved."""
    theirs = diffusers.KolorsPipeline.from_pretrained(EMBEDDED, dtype=torch.float32)
    theirs.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        theirs.scheduler.config, use_karras_sigmas=True
    )
    ours = KolorsPipeline.from_pretrained("tiny")
    ours.scheduler = DPMSolverMultistepScheduler.from_config(ours.scheduler.config, use_karras_sigmas=True)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)

    def with_savings(savings: Savings, is_known: bool) -> Callable[[], None]:
        def run() -> None:
            ours.savings = savings
            if not is_known:
                ours.prompt_cache.clear()
            draw(ours)

        return run

    return {
        "reference": lambda: draw(theirs),
        "ours, nothing saved": with_savings(NOTHING, False),
        "ours, a new prompt": with_savings(Savings(), False),
        "ours, the same prompt again": with_savings(Savings(), True),
    }


def main(out: Path, rounds: int) -> None:
    """Measure, print and write."""
    runs = contestants()
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name in list(runs)[:: 1 if i % 2 == 0 else -1]:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        "seconds": {name: round(median, 3) for name, median in medians.items()},
        "times as fast as the reference": {
            name: round(medians["reference"] / median, 2) for name, median in medians.items()
        },
        "rounds": rounds, "torch": torch.__version__, "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(), "machine": platform.machine(), "device": "cpu",
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    out.mkdir(parents=True, exist_ok=True)
    (out / "speed.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The embedded model's speed beside the reference's.")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    main(options.out, options.rounds)
