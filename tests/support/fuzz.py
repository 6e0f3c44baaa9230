"""Mutated safetensors headers, configs, indexes and arrays: each is read, or refused by a documented error.

`python -m tests.support.fuzz --count 100000` prints how many of each kind were read and refused, and by which
message, the longest time and the largest allocation. It exits with 1 at the first case that raises anything
else, takes SECONDS, or allocates more than twice its file's size beside ALLOWANCE. A case is known by its
number and the seed.
"""

import argparse
import copy
import faulthandler
import json
import random
import re
import resource
import struct
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from kolors_core.adapters.clip_vision import CLIPVisionConfig
from kolors_core.adapters.controlnet import ControlNetConfig
from kolors_core.adapters.face_id import load_face_embeds
from kolors_core.checkpoint import load_index, load_scheduler, read_json
from kolors_core.config import KOLORS
from kolors_core.pipelines.adapter_methods import MODELS
from kolors_core.schedulers import EulerDiscreteScheduler
from weights_convert import detect_component
from weights_convert.safetensors_files import Source, read_shard_index

DOCUMENTED = (ValueError, FileNotFoundError)
SECONDS = 5.0  # of one case, which takes less than a millisecond
ALLOWANCE = 2**18  # bytes beside the file's: what Python's own readers take for files of a few hundred bytes
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**24, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, -(10**30),
    0.5, -0.0, 1e-30, 1e308, float("inf"), float("nan"), "", "0", "F32", "F16", "BF16", "F4", "I64", "C64",
    "../x", "/x", "a\nb", "\0", "猫", "x" * 500, [], [0], [-1], [0, 4], [4, 0], [2**63, 2**63], [2**32] * 4,
    [[]], {}, {"a": 1}, [None] * 20,
)  # fmt: skip
FIELDS = ("dtype", "shape", "data_offsets", "__metadata__", "extra", "", "a", "b.weight", "\n", "weight_map")

CONFIGS = {component: config.to_public() for component, config in (
    ("text_encoder", KOLORS.text_encoder), ("unet", KOLORS.unet), ("vae", KOLORS.vae),
    ("image_encoder", CLIPVisionConfig()),
)}  # fmt: skip
PIPELINE = {"_class_name": "KolorsPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
            "force_zeros_for_empty_prompt": False, "image_encoder": [None, None]}  # fmt: skip
SHARDS = {"metadata": {"total_size": 64}, "weight_map": {"a": "w.safetensors", "b.weight": "w.safetensors"}}


def mutated(value: Any, rng: random.Random) -> Any:
    """A JSON value with one thing in it replaced, added, removed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        changed, name = dict(value), rng.choice(list(value))
        match rng.randrange(6):
            case 0:
                del changed[name]
            case 1:
                changed[rng.choice(FIELDS)] = rng.choice(ODD)
            case 2:
                changed[name] = rng.choice(ODD)
            case 3:
                changed[rng.choice(FIELDS) + name] = changed.pop(name)
            case _:
                changed[name] = mutated(value[name], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        replaced = [mutated(value[place], rng)] * rng.choice((0, 1, 1, 1, 2, 9))
        return [*value[:place], *replaced, *value[place + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 4, -4, 2**32)) if rng.random() < 0.5 else -value
    return copy.copy(rng.choice(ODD))


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """A file with bits flipped, bytes cut, doubled, overwritten or added."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(changed)) if changed else 0
        match rng.randrange(6):
            case 0 | 1:
                if changed:
                    changed[place] ^= 1 << rng.randrange(8)
            case 2:
                del changed[place:]
            case 3:
                changed[place:place] = changed[place : place + rng.randrange(64)]
            case 4:
                changed[place : place + 1] = rng.randbytes(rng.randrange(8))
            case _:
                changed += rng.randbytes(rng.randrange(16))
    return bytes(changed)


def weights(rng: random.Random) -> bytes:
    """A small safetensors file, damaged in its header's length, its header's fields, or anywhere."""
    tensors = {
        "vision_model.embeddings.patch_embedding.weight": torch.ones(2, 3),
        "visual_projection.weight": torch.ones(4, dtype=torch.float16),
        "b": torch.ones(0),
    }
    whole = save(tensors, {"format": "pt"})
    length = struct.unpack("<Q", whole[:8])[0]
    entries, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    match rng.randrange(5):
        case 0:
            return mutated_bytes(whole, rng)
        case 1:
            claimed = rng.choice(
                (0, 1, length - 1, length + 1, len(whole), 2**24, 10**8, 2**32, 2**63, 2**64 - 1)
            )
            return struct.pack("<Q", claimed) + whole[8:]
        case 2:
            text = json.dumps(entries)
            name = rng.choice(list(entries))
            text = text[:-1] + f", {json.dumps(name)}: {json.dumps(entries[name])}" + "}"
        case 3:
            text = rng.choice("[{") * rng.randrange(1, 5000) if rng.random() < 0.5 else '{"a":' * 2000
        case _:
            for _ in range(rng.randint(1, 3)):
                entries = mutated(entries, rng)
            text = json.dumps(entries)
    header = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(header)) + header + data


def array(rng: random.Random) -> bytes:
    """A small .npy file, damaged in its shape or anywhere."""
    shape = (6,) if rng.random() < 0.5 else rng.choice([*ODD, (2, 3), (-1, 6), (2**62, 4), (6,) * 70])
    content = {
        "descr": rng.choice(("<f4", ">f8", "|O", "<U9", "<M8[s]", "")),
        "fortran_order": False,
        "shape": shape,
    }
    header = repr(content).encode("ascii", "replace") + b"\n"
    whole = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(24)
    return mutated_bytes(whole, rng) if rng.random() < 0.5 else whole


def config(of: Any, rng: random.Random) -> bytes:
    """A JSON file of these fields, with some changed, and sometimes bytes too."""
    for _ in range(rng.randint(1, 3)):
        of = mutated(of, rng)
    text = json.dumps(of).encode("utf-8", "replace")
    return mutated_bytes(text, rng) if rng.random() < 0.1 else text


def read_weights(file: Path) -> None:
    """All that loading asks of a file, tensors too."""
    source = Source([file])
    for name in source:
        source.shape(name), source.dtype(name), source.nbytes(name)
        source[name].numel()
    detect_component(source.keys(), str(file))


def read_config(component: str) -> Callable[[Path], None]:
    def read(file: Path) -> None:
        MODELS[component].config.from_public(read_json(file), str(file))

    return read


# kind -> how to make a file of it, its place, and how it is read
CASES: dict[str, tuple[Callable[[random.Random], bytes], str, Callable[[Path], object]]] = {
    "weights": (weights, "w.safetensors", read_weights),
    "index": (lambda rng: config(SHARDS, rng), "w.safetensors.index.json", read_shard_index),
    "pipeline": (lambda rng: config(PIPELINE, rng), "model_index.json", lambda file: load_index(file.parent)),
    "scheduler": (lambda rng: config(EulerDiscreteScheduler().to_public(), rng),
                  "scheduler/scheduler_config.json", lambda file: load_scheduler(file.parent.parent)),
    "controlnet": (lambda rng: config(ControlNetConfig().to_public(), rng), "controlnet.json",
                   lambda file: ControlNetConfig.from_public(read_json(file), str(file))),
    "array": (array, "id.npy", load_face_embeds),
} | {
    component: (lambda rng, public=public: config(public, rng), f"{component}.json", read_config(component))
    for component, public in CONFIGS.items()
}  # fmt: skip


class Bad(Exception):
    """A case that did what it must not."""


def outcome(number: int, folder: Path, seed: int = 0) -> tuple[str, str, float, int]:
    """Run one case: its kind, "read" or the error, seconds, and bytes allocated beyond twice the file's.

    Half of the cases are weights. Raises Bad.
    """
    rng = random.Random(f"{seed}:{number}")
    kind = "weights" if rng.random() < 0.5 else rng.choice(list(CASES)[1:])
    make, place, read = CASES[kind]
    content = make(rng)
    file = folder / place
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    traced = tracemalloc.is_tracing()
    if traced:
        tracemalloc.reset_peak()
    before, start = tracemalloc.get_traced_memory()[0], time.perf_counter()
    try:
        read(file)
        told = "read"
    except DOCUMENTED as error:
        told = str(error)
        if str(folder) not in told or "\n" in told or len(told) > 1000:
            raise Bad(
                f"case {number}, {kind}: not one short line that names the file: {told[:2000]!r}"
            ) from None
    except BaseException as error:
        raise Bad(f"case {number}, {kind}: {type(error).__name__}: {error}") from error
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1] - before
    if seconds > SECONDS:
        raise Bad(f"case {number}, {kind}: took {seconds:.1f} s")
    if peak > 2 * len(content) + ALLOWANCE:
        raise Bad(f"case {number}, {kind}: allocated {peak:,} bytes, of a file of {len(content):,}")
    return kind, told, seconds, peak - 2 * len(content)


def general(told: str) -> str:
    """An error's message without what differs from case to case."""
    told = told.split(": ", 1)[-1]
    told = re.sub(r"'.*?'|\".*?\"|\[.*\]|\{.*\}", "_", told)
    told = re.sub(r"\b[\w.]+ is .*, expected", "FIELD is _, expected", told)
    return re.sub(r"-?\d[\d,.e+]*", "N", told)[:70]


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kinds, errors = Counter[tuple[str, str]](), Counter[str]()
    slowest, largest, start = 0.0, 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for number in range(min(500, options.count)):  # what is loaded once is loaded
            outcome(number, folder, options.seed)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tracemalloc.start()
        for number in range(options.count):
            faulthandler.dump_traceback_later(SECONDS * 4, exit=True)
            kind, told, seconds, extra = outcome(number, folder, options.seed)
            kinds[kind, "read" if told == "read" else "refused"] += 1
            errors[general(told)] += told != "read"
            slowest, largest = max(slowest, seconds), max(largest, extra)
        faulthandler.cancel_dump_traceback_later()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) / 1024
    for kind in CASES:
        print(f"{kind:14} {kinds[kind, 'read']:8,} read {kinds[kind, 'refused']:8,} refused")
    for message, count in errors.most_common(25):
        print(f"{count:8,}  {message}")
    print(
        f"{options.count:,} cases in {time.perf_counter() - start:.0f} s, slowest {slowest * 1000:.1f} ms; "
        f"at most {max(largest, 0):,} bytes beyond twice the file's; resident memory grew by {grown:.1f} MiB"
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Bad as bad:
        sys.exit(str(bad))
