"""Scales by the UNet's blocks, as `set_adapters` (LoRA) and `set_ip_adapter_scale` take them.

`{"down": 0.5, "mid": 1.0, "up": {"block_0": [0.0, 1.0, 0.0]}}` becomes one value for each transformer.
Source: `_maybe_expand_lora_scales` in diffusers' loaders/unet_loader_utils.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from kolors_core.unet import Transformer, UNet
from kolors_core.validation import check_float

BlockScale = float | Sequence[float] | Mapping[str, Any]  # a list: a scale for each image of an IP-Adapter
PARTS = ("down", "mid", "up")


def block_scales(scale: BlockScale, unet: UNet, default: float) -> dict[str, Any]:
    """Expand a scale to one value for each transformer of the UNet, by paths like "down.1.attentions.0".

    scale: a value for all, or by "down", "mid" and "up" a value or, for "down" and "up", a mapping from
    "block_<level>" to a value or a list with one for each transformer (or one). Blocks that a mapping leaves
    out get `default`. Raises ValueError naming the blocks that exist, the expected length, or a bad value.
    """
    blocks: dict[str, list[str]] = {}  # paths of transformers by "down.block_<level>", "mid" and so on
    for path, module in unet.named_modules():
        if isinstance(module, Transformer):
            part, level, *_ = path.split(".")
            blocks.setdefault("mid" if part == "mid" else f"{part}.block_{level}", []).append(path)
    if not isinstance(scale, Mapping):
        return _per_transformer("the scale", [scale], [path for paths in blocks.values() for path in paths])
    values = dict.fromkeys(blocks, default) | _flatten(scale, blocks)
    parts = (_per_transformer(block, values[block], paths) for block, paths in blocks.items())
    return {path: number for part in parts for path, number in part.items()}


def _flatten(scale: Mapping[str, Any], blocks: Mapping[str, list[str]]) -> dict[str, Any]:
    """Flatten {"up": {"block_0": 1.0}} to {"up.block_0": 1.0}; ValueError for a block that does not exist."""
    flat: dict[str, Any] = {}
    for part, value in scale.items():
        _check_exists(part, PARTS)
        existing = [block for block in blocks if block.split(".")[0] == part]
        if part == "mid" or not isinstance(value, Mapping):
            flat |= dict.fromkeys(existing, value)
            continue
        for name, block_value in value.items():
            _check_exists(f"{part}.{name}", existing)
            flat[f"{part}.{name}"] = block_value
    return flat


def _check_exists(block: str, existing: Sequence[str]) -> None:
    if block not in existing:
        raise ValueError(f"the UNet has no transformers in {block}, it has them in {', '.join(existing)}")


def _per_transformer(where: str, value: Any, paths: Sequence[str]) -> dict[str, Any]:
    """Assign a block's value to its transformers: one for all, or a list with one for each."""
    values, count = list(value) if _is_list(value) else [value], len(paths)
    if len(values) not in (1, count):
        raise ValueError(f"{where} has {count} transformers and takes one scale or {count}, got {values}")
    name = f"{where}: a scale"
    numbers = [
        [check_float(name, one) for one in given] if _is_list(given) else check_float(name, given)
        for given in values
    ]
    return dict(zip(paths, numbers * (count // len(values)), strict=True))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
