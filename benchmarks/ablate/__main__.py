"""What did a change of the architecture do? Two are trained side by side on images of things.

    python -m benchmarks.ablate OUT --b "depths=(0, 0, 1)"
    python -m benchmarks.ablate OUT --a "channels=(64, 96, 128)" --b mine.py:make

An architecture is TINY's UNet with fields of its config changed, or a function in a file that takes the
`UNetConfig` and returns a module with `UNet.forward`'s arguments:

    def make(config):
        return MyUNet(replace(config, depths=(0, 1, 2)))

To compare a changed unet.py with what it was, name the old file's class; "" is TINY's UNet as it is now:

    git show HEAD:kolors_core/unet.py > before.py && python -m benchmarks.ablate OUT --a before.py:UNet --b ""

Both see the same images, noise and timesteps in the same order, and start from the same values where names
and shapes agree, with each of several seeds. On the CPU; the same command gives the same losses bit for bit
with the same number of threads. Writes ablate.md (the table), ablate.json, runs.jsonl (the curves),
ablate.png and samples.png to OUT.
"""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.ablate.architecture import check, cost, example, read
from benchmarks.ablate.captions import THINGS
from benchmarks.ablate.intervals import FEWEST, MOST
from benchmarks.ablate.lesson import Lesson, draw_pictures
from benchmarks.ablate.report import write
from benchmarks.ablate.study import side_by_side
from benchmarks.side_by_side import environment
from kolors_core.training.trainer import TrainingConfig
from kolors_core.validation import check_int

RECIPE = TrainingConfig(
    steps=1, batch_size=16, learning_rate=2e-3, schedule="cosine", warmup=50, min_snr_gamma=1.0, max_tokens=64
)  # fmt: skip
BUSY = 0.5  # programs at work at the start, from which on times are not to be trusted


def arguments() -> argparse.Namespace:
    """What is to be compared, and how long."""
    about, _, more = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablate", description=about, epilog=more, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--a", default="", help="fields or file.py:function (default: TINY's UNet)")
    parser.add_argument("--b", default="depths=(0, 0, 1)", help="likewise (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=240, help="of each training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each (default: %(default)s)")
    parser.add_argument("--concepts", type=int, default=40, help="things to learn (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side (default: %(default)s)")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    """Check everything, then train and write."""
    if options.out.exists():
        raise FileExistsError(f"{options.out}: exists already, expected a new folder")
    check_int("--seeds", options.seeds, least=FEWEST, most=MOST)
    check_int("--concepts", options.concepts, least=2, most=len(THINGS))
    check_int("--size", options.size, multiple=8)
    config = replace(RECIPE, steps=check_int("--steps", options.steps))
    both = [read(text, options.size // 8) for text in (options.a, options.b)]
    probe = example(options.size // 8)
    idle = [check(each, probe) for each in both]
    from benchmarks.ablate.plot import plot  # now: what it lacks should not be missed after minutes

    load, start = os.getloadavg()[0], time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - start:4.0f} s  {text}", flush=True)

    with TemporaryDirectory() as folder:
        examples, names = draw_pictures(options.concepts, Path(folder))
        lesson = Lesson(examples, names, options.size, config)
    options.out.mkdir(parents=True)
    costs = [cost(each, lesson.step) for each in both]
    pairs = [side_by_side(*both, lesson, replace(config, seed=i), say) for i in range(options.seeds)]
    seconds, texts, own = round(time.monotonic() - start), [each.text for each in both], pairs[0].own
    lines = [
        f"{options.steps} steps of {config.batch_size} images of {options.size}x{options.size}, of "
        f"{options.concepts} things, with each of {options.seeds} seeds; then {len(lesson.prompts)} prompts.",
        f"First values: {pairs[0].shared} tensors are equal, {len(own)} of B's are its own{shortly(own)}.",
        "Intervals: Student's t over the seeds, of B - A or of the logarithm of B / A, each row for itself.",
        f"{seconds} s, CPU threads: {torch.get_num_threads()}.",
    ]
    for name, unused in zip("AB", idle, strict=True):
        if unused:
            lines.append(f"{name} does not use {len(unused)} of its parameters{shortly(unused)}.")
    if load > BUSY:
        lines.append(f"**The machine had other work (load {load:.1f} at the start): trust no times.**")
    told = {
        "a": texts[0], "b": texts[1], "configs": [asdict(each.config) for each in both],
        "steps": options.steps, "seeds": options.seeds, "concepts": options.concepts, "size": options.size,
        "batch_size": config.batch_size, "own_first_values": own, "unused": idle, "seconds": seconds,
        "load_at_start": round(load, 2), "environment": environment(),
    }  # fmt: skip
    print(write(pairs, costs, lesson, texts, lines, told, options.out))
    plot(pairs, costs, texts, options.out / "ablate.png")


def shortly(names: Sequence[str]) -> str:
    """Some names, to follow a number of them."""
    more = ", ..." if len(names) > 3 else ""
    return f" ({', '.join(names[:3])}{more})" if names else ""


if __name__ == "__main__":
    try:
        main(arguments())
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from None
