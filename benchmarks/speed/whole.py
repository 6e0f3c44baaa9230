"""A whole Kolors from a cold start to an image: `python -m benchmarks.speed.whole OUT --folder SCRATCH`.

Writes random weights in the published layout at full size (17.8 GB) to SCRATCH, unless they are there, and
draws with both libraries: 512x512, 2 guided steps in bfloat16, each image in a fresh process, from the
command to the PNG, taking turns. Ours twice, by a script that is the reference's but for its import, and by
the command line. Then a LoRA of rank 16 on all 560 attention projections, loaded, fused and unfused by both.

Each process is measured from outside: how long it took and computed, the most memory that it had (mapped
files too), and what it read from the disk, 0 where the page cache had the files. Files of float16, as they
are published, are converted: 38 GB of memory hold them and the copy, and with less each process reads the
disk. Of bfloat16 (--files bfloat16) they are mapped, as those of float16 are on a GPU, and 22 GB will do.
It takes 5 minutes to write at 60 MB/s, and by reckoning 10 to measure where the cache has the files.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.side_by_side import Contestant, Race, Row, faster, race, share
from benchmarks.speed import arguments
from benchmarks.speed.whole_folder import write_folder, write_lora
from benchmarks.speed.whole_once import GUIDANCE, PROMPT, SEED
from kolors_core.checkpoint import EMBEDDED
from kolors_core.config import KOLORS, TINY

GIB, RANK, STEPS = 2**30, 16, 2
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
LIBRARIES = {"reference": "diffusers", "ours": "kolors_core"}
BY_COMMAND = "ours, by the command line"
DONE = "written.json"  # in SCRATCH, once all of it is there


def fresh(command: list[str], threads: int, out: Path | None = None) -> Contestant:
    """A contestant in a process of its own, which the kernel measures. out: what it has to write.

    Its peak is at least this process's own memory, which it has until it begins.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}

    def measure() -> Mapping[str, float]:
        if out is not None:
            out.unlink(missing_ok=True)
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout as pipe:
            lines = pipe.read().splitlines()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or (out is not None and not out.exists()):
            raise subprocess.CalledProcessError(process.returncode, command)
        stages = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
        return {
            "seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_gib": usage.ru_maxrss * 1024 / GIB, "disk_gib": usage.ru_inblock * 512 / GIB,
        } | stages  # fmt: skip

    return measure


def once(task: str, side: str, *arguments: object) -> list[str]:
    """The command of one process of a side."""
    program = [sys.executable, "-m", "benchmarks.speed.whole_once"]
    return [*program, task, LIBRARIES[side], *map(str, arguments)]


def command_line(folder: Path, out: Path, pixels: int) -> list[str]:
    """The command of a user of ours."""
    flags = {
        "weights": folder, "out": out, "dtype": "bfloat16", "height": pixels, "width": pixels, "steps": STEPS,
        "guidance": GUIDANCE, "seed": SEED, "sampler": "euler", "device": "cpu",
    }  # fmt: skip
    pairs = (text for name, value in flags.items() for text in (f"--{name}", str(value)))
    return [sys.executable, "-m", "kolors_core", PROMPT, *pairs, "--quiet"]


def psnr(one: Path, other: Path) -> float:
    """Peak signal-to-noise ratio of two images, dB; 138 where they are equal."""
    a, b = (np.asarray(Image.open(file), dtype=np.float64) for file in (one, other))
    return float(20 * np.log10(255) - 10 * np.log10(np.maximum(np.square(a - b).mean(), 1e-9)))


def measure_images(folder: Path, pixels: int, options: argparse.Namespace) -> list[Row]:
    """The row of the time and the row of the memory."""
    images = {name: folder / f"{name.split()[-1]}.png" for name in (*LIBRARIES, BY_COMMAND)}
    commands = {side: once("draw", side, folder, images[side], pixels, STEPS) for side in LIBRARIES}
    commands[BY_COMMAND] = command_line(folder, images[BY_COMMAND], pixels)
    before, memory = os.getloadavg()[0], os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    result = race(
        {name: fresh(command, options.threads, images[name]) for name, command in commands.items()},
        options.rounds,
    )
    apart = {name: psnr(images["reference"], images[name]) for name in ("ours", BY_COMMAND)}
    pixel_values = np.asarray(Image.open(images["ours"]), dtype=np.float64)
    details = {
        "files": options.files, "psnr_db": apart, "gray_levels_deviation": float(pixel_values.std()),
        "load_average_before": before, "memory_gib": memory / GIB,
    }  # fmt: skip
    disk = " and ".join(f"{result.median(side, 'disk_gib'):.1f}" for side in LIBRARIES)
    common: dict[str, Any] = {"is_rehearsal": options.small, "race": result, "details": details}
    return [
        Row(
            name="whole", goal=faster(1.6), value=result.ratio("reference", "ours"),
            work=f"whole Kolors, command to PNG, {pixels}x{pixels}, {STEPS} guided steps, bfloat16",
            note=f"{options.files} files, of which they read {disk} GiB from the disk; ours by the command "
            f"line {result.ratio('reference', BY_COMMAND):.2f} times as fast, in CPU time "
            f"{result.ratio('reference', 'ours', 'cpu_seconds'):.2f}; images {apart['ours']:.0f} dB apart",
            **common,
        ),
        Row(
            name="whole_memory", work="peak memory of it", goal=share(0.9, "peak"),
            value=result.ratio("ours", "reference", "peak_gib"),
            note="mapped files counted; ours by the command line "
            f"{result.median(BY_COMMAND, 'peak_gib'):.1f} GiB", **common,
        ),
    ]  # fmt: skip


def measure_lora(folder: Path, layers: int, options: argparse.Namespace) -> Row:
    """The row of the LoRA; its value counts all three stages."""
    commands = {side: once("lora", side, folder, folder / "lora.safetensors") for side in LIBRARIES}
    result = race({side: fresh(command, options.threads) for side, command in commands.items()}, 1)
    for side in LIBRARIES:
        if not result.median(side, "changed_by_fuse"):
            raise ValueError(f"{side}: fusing the LoRA changed no weight")
    return Row(
        name="whole_lora", goal=faster(1), value=result.ratio("reference", "ours", "total"),
        work=f"a LoRA of rank {RANK} on {layers} layers loaded, fused, unfused", race=result,
        is_rehearsal=options.small,
        note="; ".join(_stages(result, side) for side in LIBRARIES),
    )  # fmt: skip


def _stages(result: Race, side: str) -> str:
    loaded, fused, unfused = (result.median(side, stage) for stage in ("load", "fuse", "unfuse"))
    differing = int(result.median(side, "changed_by_unfuse"))
    back = f"{differing} tensors not what they were" if differing else "back bit for bit"
    return f"{side} {loaded:.2g}, {fused:.2g} and {unfused:.2g} s, {back}"


def prepare(folder: Path, options: argparse.Namespace) -> int:
    """Write the checkpoint and the LoRA, unless they are there; return the LoRA's layers."""
    config, wanted = (TINY if options.small else KOLORS), {"files": options.files, "small": options.small}
    if (folder / DONE).exists():
        found = json.loads((folder / DONE).read_text())
        if found["kind"] != wanted:
            raise SystemExit(f"{folder} holds {found['kind']}, not {wanted}: name another --folder")
        return found["layers"]
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty, and not of this command: name another --folder")
    start = time.perf_counter()
    written = write_folder(folder, config, DTYPES[options.files], options.tokenizer)
    layers = write_lora(folder / "lora.safetensors", config.unet, RANK, DTYPES[options.files])
    (folder / DONE).write_text(json.dumps({"kind": wanted, "layers": layers}))
    print(f"wrote {written / 1e9:.1f} GB to {folder} in {time.perf_counter() - start:.0f} s")
    return layers


def main() -> None:
    """Measure and write."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder of the weights, kept")
    parser.add_argument("--files", choices=DTYPES, default="float16", help="dtype of the weights' files")
    parser.add_argument(
        "--tokenizer", type=Path, default=EMBEDDED / "tokenizer",
        help="folder with tokenizer.model (default: the embedded model's, of 2,048 tokens)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process (default: all)")
    parser.add_argument("--small", action="store_true", help="rehearse at the embedded model's size")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)  # which the rows say
    layers = prepare(options.folder, options)
    for row in measure_images(options.folder, 64 if options.small else 512, options):
        row.write(options.out)
    measure_lora(options.folder, layers, options).write(options.out)


if __name__ == "__main__":
    main()
