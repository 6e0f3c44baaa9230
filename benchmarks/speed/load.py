"""Loading a full-size fp16 UNet folder, time and memory: `python -m benchmarks.speed.load OUT`.

The reference writes the folder (5.2 GB, in the temporary directory, which TMPDIR names); both load it in
fresh processes that take turns, with the file in the page cache. Ours maps the file and reads it when it is
used, so the time counts reading every page of every weight. Peak memory is all that the process has in
memory at once, mapped pages too. The reference loads faster with `accelerate`, which a plain installation
has not, so both ways are measured. And the same folder into bfloat16, which has to copy.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.pairs import make_reference
from benchmarks.side_by_side import Contestant, Row, faster, race, share
from benchmarks.speed import arguments
from kolors_core.config import KOLORS, TINY, UNetConfig

SEED, SPARE = 20240709, 2**30
PLAIN = "reference, without accelerate"


def write_folder(folder: Path, config: UNetConfig) -> None:
    """As the reference publishes it: unet/ with config.json and one fp16 safetensors file."""
    model: Any = make_reference(config, SEED, torch.float16)
    needed = sum(p.numel() * p.element_size() for p in model.parameters()) + SPARE
    if (free := shutil.disk_usage(folder).free) < needed:
        gib = [f"{size / 2**30:.1f} GiB" for size in (needed, free)]
        raise SystemExit(f"the folder for the UNet needs {gib[0]}, and has {gib[1]}: set TMPDIR to another")
    model.save_pretrained(folder / "unet", variant="fp16")


def fresh(side: str, folder: Path, kind: str) -> Contestant:
    """A contestant in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.speed.load_once", side, str(folder), kind]

    def measure() -> dict[str, float]:
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(run.stdout.splitlines()[-1])

    return measure


def measure(folder: Path, kind: str, rounds: int, is_small: bool) -> list[Row]:
    """The row of the time and the row of the memory."""
    result = race({side: fresh(side, folder, kind) for side in ("reference", PLAIN, "ours")}, rounds)
    untouched = result.ratio("reference", "ours", "seconds_untouched")
    by_weights = result.median("ours", "peak_by_weights")
    suffix, what = ("", "") if kind == "float16" else (f"_{kind}", f", into {kind}")
    common: dict[str, Any] = {"is_rehearsal": is_small, "race": result}
    return [
        Row(
            name=f"load{suffix}", work=f"load a full-size fp16 UNet folder{what}", goal=faster(2),
            value=result.ratio("reference", "ours"),
            note=f"every page read; the load call alone {untouched:.2f}, all against the reference without "
            f"accelerate {result.ratio(PLAIN, 'ours'):.2f} times as fast", **common,
        ),
        Row(
            name=f"load_memory{suffix}", work=f"peak memory of loading it{what}", goal=share(0.6, "peak"),
            value=result.ratio("ours", "reference", "peak_gib"),
            note=f"ours {by_weights:.2f} times the weights' bytes, mapped pages counted; "
            f"{result.ratio('ours', PLAIN, 'peak_gib'):.2f} of the reference without accelerate", **common,
        ),
    ]  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--small", action="store_true", help="rehearse with the embedded model's UNet")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        write_folder(Path(scratch), (TINY if options.small else KOLORS).unet)
        for kind in ("float16", "bfloat16"):
            for row in measure(Path(scratch), kind, options.rounds, options.small):
                row.write(options.out)


if __name__ == "__main__":
    main()
