"""The embedded model, prompt to PNG: `python -m benchmarks.speed.tiny OUT`.

25 guided steps in float32. Ours in three ways: nothing saved, a new prompt, and the same prompt again, which
finds its embedding. The row's value is of a new prompt. --profile writes which operators take the time.
"""

import io
from collections.abc import Callable
from typing import Any

import diffusers
import torch

from benchmarks.side_by_side import Row, faster, operators, race, timed, write_json
from benchmarks.speed import arguments
from kolors_core import DPMSolverMultistepScheduler, KolorsPipeline
from kolors_core.checkpoint import EMBEDDED
from kolors_core.precompute import Savings

PROMPT = "一张瓢虫的照片"
NOTHING = Savings(merge_padding=False, precompute=False, cached_prompts=0)


def draw(pipe: Any) -> None:
    """Prompt to PNG."""
    generator = torch.Generator().manual_seed(0)
    image = pipe(PROMPT, num_inference_steps=25, guidance_scale=5.0, generator=generator).images[0]
    image.save(io.BytesIO(), "PNG")


def pipelines() -> tuple[diffusers.KolorsPipeline, KolorsPipeline]:
    """The reference's and ours, of the embedded folder."""
    theirs = diffusers.KolorsPipeline.from_pretrained(EMBEDDED, dtype=torch.float32)
    theirs.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        theirs.scheduler.config, use_karras_sigmas=True
    )
    ours = KolorsPipeline.from_pretrained("tiny")
    ours.scheduler = DPMSolverMultistepScheduler.from_config(ours.scheduler.config, use_karras_sigmas=True)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    return theirs, ours


def contestants() -> dict[str, Callable[[], None]]:
    """The reference, and ours with less and more saved."""
    theirs, ours = pipelines()

    def with_savings(savings: Savings, is_known: bool) -> Callable[[], None]:
        def run() -> None:
            ours.savings = savings
            if not is_known:
                ours.prompt_cache.clear()
            draw(ours)

        return run

    return {
        "reference": lambda: draw(theirs),
        "ours, nothing saved": with_savings(NOTHING, is_known=False),
        "ours": with_savings(Savings(), is_known=False),
        "ours, the same prompt again": with_savings(Savings(), is_known=True),
    }


def main() -> None:
    """Measure and write."""
    parser = arguments(__doc__, rounds=10)
    parser.add_argument("--profile", action="store_true", help="write tiny_profile.json instead of the row")
    options = parser.parse_args()
    runs = contestants()
    if options.profile:
        for name in ("reference", "ours"):
            runs[name]()
        found = {name: operators(runs[name]) for name in ("reference", "ours")}
        write_json(found, options.out / "tiny_profile.json")
        return
    result = race({name: timed(run) for name, run in runs.items()}, options.rounds)
    again = result.ratio("reference", "ours, the same prompt again")
    unsaved = result.ratio("reference", "ours, nothing saved")
    Row(
        name="tiny", work="TINY pipeline, 25 steps, prompt to PNG", goal=faster(2.5),
        value=result.ratio("reference", "ours"), race=result,
        note=f"the same prompt again {again:.2f}, nothing saved {unsaved:.2f} times as fast",
    ).write(options.out)  # fmt: skip


if __name__ == "__main__":
    main()
