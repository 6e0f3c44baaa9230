"""A whole Kolors with random weights in the published layout, written as fast as the disk takes it.

One block of normal numbers is scaled for each tensor and repeated until it is full, so that no time is spent
on drawing 8.9 billion of them. Its length is a prime, so that rows of a matrix do not repeat with it. The
scales are those of `pairs.randomise`, with which every activation is finite in half precision.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kolors_core.checkpoint import EMBEDDED, MODEL_SPECS, load_scheduler, save_metadata, write_json
from kolors_core.config import KolorsConfig, UNetConfig
from kolors_core.tokenizer import Tokenizer
from weights_convert import TABLES
from weights_convert.safetensors_files import FORMAT, WEIGHT_FILE_STEMS
from weights_convert.untrusted_files import DTYPES

SEED, BLOCK, STRIDE = 20261130, 2**24 - 3, 10_000_019
SHARD, SPARE = 2 * 10**9, 2**30  # bytes: of a file, and to leave on the disk
VARIANTS = {torch.float16: "fp16", torch.bfloat16: "bf16"}
LORA_TARGETS = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")
Shapes = dict[str, tuple[int, ...]]


def public_shapes(component: str, config: Any) -> Shapes:
    """Return every tensor of a published model by its public name, also those that Kolors never reads."""
    table, model = TABLES[component], MODEL_SPECS[component].empty(config)
    shapes = {table.to_public(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if component == "text_encoder":
        shapes["encoder.final_layernorm.weight"] = (config.hidden_size,)
        shapes["output_layer.weight"] = (config.vocab_size, config.hidden_size)
        shapes["rotary_pos_emb.inv_freq"] = (config.head_dim // 4,)
    return dict(sorted(shapes.items()))


def write_folder(
    folder: Path, config: KolorsConfig, dtype: torch.dtype, tokenizer: Path, shard: int = SHARD
) -> int:
    """Write a Kolors as Kwai-Kolors/Kolors-diffusers has it; return the bytes of its weights.

    dtype: float16 or bfloat16. tokenizer: a folder with tokenizer.model. shard: bytes of one of the text
    encoder's files. SystemExit if the disk is too full.
    """
    shapes = {name: public_shapes(name, getattr(config, name)) for name in MODEL_SPECS}
    sizes = {name: sum(map(prod, model.values())) * dtype.itemsize for name, model in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < sum(sizes.values()) + SPARE:
        needed, found = (f"{size / 1e9:.1f} GB" for size in (sum(sizes.values()) + SPARE, free))
        raise SystemExit(f"{folder} needs {needed}, and has {found}: name another --folder")
    block = _normal_numbers()
    for component, tensors in shapes.items():
        (place := folder / component).mkdir(exist_ok=True)
        write_json(getattr(config, component).to_public(), place / "config.json")
        stem = f"{WEIGHT_FILE_STEMS[component]}.{VARIANTS[dtype]}"
        parts = _shards(tensors, dtype.itemsize, shard if component == "text_encoder" else sizes[component])
        names = [f"{stem}-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
        for file, part in zip(names if len(parts) > 1 else [f"{stem}.safetensors"], parts, strict=True):
            _write_file(place / file, part, block, dtype)
        if len(parts) > 1:
            index = {name: file for file, part in zip(names, parts, strict=True) for name in part}
            content = {"metadata": {"total_size": sizes[component]}, "weight_map": index}
            write_json(content, place / f"model.safetensors.index.{VARIANTS[dtype]}.json")
    models = dict.fromkeys(MODEL_SPECS, "there")  # model_index.json says of each whether it is
    others = {"scheduler": load_scheduler(EMBEDDED), "tokenizer": Tokenizer(tokenizer), "image_encoder": None}
    save_metadata(folder, "KolorsPipeline", models | others | {"force_zeros_for_empty_prompt": False})
    return sum(sizes.values())


def write_lora(file: Path, config: UNetConfig, rank: int, dtype: torch.dtype) -> int:
    """Write a LoRA of every attention projection in diffusers' names; return how many layers it has."""
    shapes, layers = public_shapes("unet", config), 0
    factors = Shapes()
    for name, (rows, columns) in ((name, shapes[name]) for name in shapes if name.endswith(LORA_TARGETS)):
        path = f"unet.{name.removesuffix('.weight')}"
        factors |= {f"{path}.lora_A.weight": (rank, columns), f"{path}.lora_B.weight": (rows, rank)}
        layers += 1
    file.parent.mkdir(parents=True, exist_ok=True)
    _write_file(file, factors, _normal_numbers() * 0.1, dtype)
    return layers


def _normal_numbers() -> Tensor:
    return torch.randn(BLOCK, generator=torch.Generator().manual_seed(SEED))


def _values(
    name: str, shape: tuple[int, ...], block: Tensor, start: int, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Yield the values of a tensor in pieces of at most a block, which is read from `start` on."""
    mean, std = 0.0, 0.3
    if not name.endswith("bias") and len(shape) == 1:
        mean = 1.0
    elif not name.endswith("bias"):
        std = 1.0 if "word_embeddings" in name else 0.7 * prod(shape[1:]) ** -0.5
    left = prod(shape)
    while left > 0:
        piece = block[start : start + left]
        yield (piece * std + mean).to(dtype)
        left, start = left - len(piece), 0


def _write_file(file: Path, shapes: Shapes, block: Tensor, dtype: torch.dtype) -> None:
    """Write a safetensors file piece by piece, and wait until the disk has it."""
    kind = next(name for name, known in DTYPES.items() if known == dtype)
    header, end = dict[str, Any](__metadata__=FORMAT), 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for number, (name, shape) in enumerate(shapes.items()):
            for piece in _values(name, shape, block, STRIDE * number % BLOCK, dtype):
                stream.write(memoryview(piece.view(torch.uint8).numpy()))
        stream.flush()
        os.fsync(stream.fileno())


def _shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, most: int) -> list[Shapes]:
    """Split tensors, in their order, into files of at most `most` bytes, or of one tensor."""
    shards, size = list[Shapes](), 0
    for name, shape in shapes.items():
        nbytes = prod(shape) * itemsize
        if not shards or size + nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    return shards
