"""Training data that does not fit in memory: `python -m benchmarks.big_data OUT --folder SCRATCH`.

100,000 synthetic images with a caption each are encoded into a cache (kolors_core/training/cache.py) at the
embedded model's sizes, by encoders that stand in for the models and take little time. Then, each in a fresh
process, caches of 1,000, 10,000 and 100,000 records: the time to compare the source with the cache, to open
it and to end the first training step, and the memory that is not of mapped files after some steps. Last, in
one process and in turns, training steps on batches from memory and from the disk, with and without workers:
batches are the same, bit for bit, which is checked. A cache that is in SCRATCH already is compared with the
source and not written, so several processes may write it before. Writes big_data.json.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.side_by_side import environment, race, write_json
from kolors_core.chatglm import TextEmbedding
from kolors_core.checkpoint import EMBEDDED
from kolors_core.config import TINY
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.tokenizer import TokenBatch, Tokenizer
from kolors_core.training.cache import write_cache
from kolors_core.training.cached_data import CachedDataset
from kolors_core.training.data import LatentDataset
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.prefetch import Prefetched
from kolors_core.training.sources import Record, Records, Stored
from kolors_core.training.trainer import BatchSource, TrainingConfig
from kolors_core.unet import UNet
from kolors_core.vae import LatentDistribution

SIZES = [(128, 128), (96, 160), (160, 96)]
CONFIG = TrainingConfig(steps=10**6, batch_size=16, max_tokens=32)
# A step of it takes tens of milliseconds: slow data would show, where a large model hides it.
UNET = replace(TINY.unet, channels=(32, 64), heads=(2, 4), depths=(0, 1))
STEPS = 10  # of a contestant's turn
WORDS = (
    "red",
    "blue",
    "small",
    "old",
    "cat",
    "house",
    "tree",
    "river",
    "under",
    "beside",
    "a",
    "the",
    "night",
)
CPU = torch.device("cpu")


class StandInVAE(nn.Module):
    """Latents of means of pixels, and a constant standard deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.post_quant_conv = nn.Conv2d(4, 4, 1)

    def encode_images(self, images: Tensor) -> LatentDistribution:
        small = F.avg_pool2d(images, 8)  # [1, 3, H/8, W/8]
        mean = torch.cat([small, small.mean(1, keepdim=True)], dim=1)
        return LatentDistribution(mean, torch.full_like(mean, 0.01))


class StandInText(nn.Module):
    """A table of tokens."""

    reads_counts = True  # as ChatGLM, so that a caption's embedding is as short

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4096, TINY.text_encoder.hidden_size)

    def forward(self, batch: TokenBatch) -> TextEmbedding:
        tokens = self.embedding(batch.ids % 4096)
        return TextEmbedding(tokens, tokens[:, -1], batch.counts)


def models() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "vae": StandInVAE(),
        "text_encoder": StandInText(),
        "tokenizer": Tokenizer(EMBEDDED / "tokenizer"),
    }


def draw(number: int) -> Image.Image:
    """An image of blurred noise, of one of the sizes of the buckets."""
    height, width = SIZES[number % len(SIZES)]
    noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.NEAREST)


def records(count: int) -> Records:
    """So many images, each drawn when it is read, and a caption of up to 12 words."""

    def read() -> Any:
        for number in range(count):
            words = np.random.default_rng(number).integers(len(WORDS), size=3 + number % 10)
            caption = " ".join([*(WORDS[i] for i in words), str(number)])
            yield Record(Stored(f"image {number}", str(number), partial(draw, number)), (caption,))

    return Records(read)


def write(folder: Path, count: int) -> float:
    """Write or check a cache; return the seconds."""
    begin = time.perf_counter()
    write_cache(folder, records(count), SIZES, max_tokens=CONFIG.max_tokens, progress=False, **models())
    return time.perf_counter() - begin


def own_memory() -> float:
    """Memory of this process in MiB that is not of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


class Training:
    """Steps of a small UNet on a source's batches."""

    def __init__(self, data: BatchSource) -> None:
        torch.manual_seed(0)
        self.data, self.step, unet = data, 0, UNet(UNET)
        self.loss = DiffusionLoss(unet, None, EulerDiscreteScheduler().training_sigmas(), CONFIG)
        self.optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)

    def run(self, steps: int = STEPS) -> Mapping[str, float]:
        """Train; return the seconds of all steps, of waiting for batches, and of this process's time."""
        waited, begin, cpu = 0.0, time.perf_counter(), time.process_time()
        for _ in range(steps):
            asked = time.perf_counter()
            batch = self.data.batch(self.step, slice(0, CONFIG.batch_size), CPU)
            waited += time.perf_counter() - asked
            self.loss(batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        return {"seconds": seconds, "waiting": waited, "cpu": cpu}


def once(folder: Path, count: int) -> None:
    """Print what one process measures that starts to train on a cache that is whole."""
    found = {
        "records": count,
        "memory at the start": own_memory(),
        "processor seconds of imports": time.process_time(),
        "seconds to compare": write(folder, count),
    }
    begin = time.perf_counter()
    training = Training(Prefetched(CachedDataset(folder, CONFIG)))
    found["seconds to open"] = time.perf_counter() - begin
    training.run(1)
    found["seconds to the first step"] = found["seconds to compare"] + time.perf_counter() - begin
    found["processor seconds to the first step, with imports"] = time.process_time()
    for steps in (20, 100):
        training.run(steps - training.step)
        found[f"memory after {steps} steps"] = own_memory()
    print(json.dumps(found))


class InMemory(LatentDataset):
    """The same records in memory, as `LatentDataset` keeps them; they are not encoded again."""

    def __init__(self, cached: CachedDataset) -> None:
        self.config, self.timesteps, self.batches = cached.config, cached.timesteps, Samples(cached)
        self.latents, self.sizes, self.controls, self.text = {}, {}, {}, {}
        for i in range(len(cached.batches.caption_counts)):
            file, row = cached._place(i)
            shard = cached.shards[file]
            tensors = {name: tensor.clone() for name, tensor in shard.record(row).items()}
            self.latents[i], self.sizes[i] = tensors["latents"], tensors["size_ids"][None]
            for number in (0, *shard.text_numbers(row)):
                if (caption := shard.text(number)) not in self.text:
                    kept = shard.embedding(number)
                    counts = None if kept.counts is None else kept.counts.clone()
                    self.text[caption] = TextEmbedding(kept.tokens.clone(), kept.pooled.clone(), counts)
                self.batches.captions[i] = caption


class Samples:
    """The samples of a cache's batches, with captions in memory."""

    def __init__(self, cached: CachedDataset) -> None:
        self.own, self.captions = cached.batches, dict[int, str]()

    def samples(self, step: int) -> Any:
        size, picks = self.own.picks(step)
        return size, [(i, "" if number is None else self.captions[i]) for i, number in picks]


def same(one: Any, other: Any) -> bool:
    pairs = [(one.latents, other.latents), (one.noise, other.noise), (one.size_ids, other.size_ids)]
    pairs += [(getattr(one.text, name), getattr(other.text, name)) for name in ("tokens", "pooled", "counts")]
    return all(torch.equal(*pair) for pair in pairs)


def compare(folder: Path, rounds: int) -> dict[str, Any]:
    """Race training from memory and from the disk."""
    cached, before = CachedDataset(folder, CONFIG), own_memory()
    memory = InMemory(cached)
    grown = own_memory() - before
    for step in range(20):
        rows = slice(0, CONFIG.batch_size)
        assert same(memory.batch(step, rows, CPU), cached.batch(step, rows, CPU)), step
    sources: dict[str, BatchSource] = {
        "memory": memory,
        "disk": cached,
        "disk, 1 worker": Prefetched(cached, 1),
        "disk, 2 workers": Prefetched(cached),
    }
    trainings = {name: Training(source) for name, source in sources.items()}
    result = race({name: training.run for name, training in trainings.items()}, rounds)
    times = {name: result.ratio(name, "memory") for name in sources}
    cpu = {name: result.ratio(name, "memory", "cpu") for name in sources}  # of the process, without workers'
    steps = {name: result.median(name) / STEPS for name in sources}
    waits = {name: result.median(name, "waiting") / STEPS for name in sources}
    return {"memory of latents and embeddings in memory": grown, "times of memory's": times,
            "processor times of memory's": cpu,
            "seconds of a step": steps, "seconds of waiting": waits, "race": asdict(result)}  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?")
    parser.add_argument(
        "--folder", type=Path, required=True, metavar="SCRATCH", help="for caches, which stay"
    )
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--once", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.once is not None:
        return once(options.folder, options.once)
    counts = [options.records // 100, options.records // 10, options.records]
    folders = {count: options.folder / f"{count}" for count in counts}
    found: dict[str, Any] = {"machine": environment(), "write": {}, "start": []}
    for count, folder in folders.items():
        found["write"][count] = write(folder, count)
    for count, folder in folders.items():
        command = [sys.executable, "-m", "benchmarks.big_data", "--folder", str(folder), "--once", str(count)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        found["start"].append(json.loads(run.stdout.splitlines()[-1]))
    print(json.dumps({name: found[name] for name in ("write", "start")}, indent=2), flush=True)
    found["compare"] = compare(folders[options.records], options.rounds)
    write_json(found, options.out / "big_data.json")
    print(json.dumps({k: v for k, v in found["compare"].items() if k != "race"}, indent=2))


if __name__ == "__main__":
    main()
