"""Scales by the UNet's blocks, as `set_adapters` (LoRA) and `set_ip_adapter_scale` take them.

`{"down": 0.5, "mid": 1.0, "up": {"block_0": [0.0, 1.0, 0.0]}}` becomes one value for each transformer.
Source: `_maybe_expand_lora_scales` in diffusers' loaders/unet_loader_utils.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from kolors_core.unet import Transformer, UNet
from kolors_core.validation import check_float

Value = float | Sequence[float]  # a list: one scale for each image of an IP-Adapter
BlockScale = Value | Mapping[str, Any]
PARTS = ("down", "mid", "up")


def block_scales(scale: BlockScale, unet: UNet, default: float) -> dict[str, Any]:
    """Expand a scale to one value for each transformer of the UNet, by paths like "down.1.attentions.0".

    scale: a value for all, or by "down", "mid" and "up" a value or, for "down" and "up", a mapping from
    "block_<level>" to a value or a list with one for each transformer; in a mapping, a list of one applies to
    the whole block. Blocks that a mapping leaves out get `default`. Raises ValueError naming the blocks that
    exist, the expected length, or a value that is no number.
    """
    blocks = _transformers_by_block(unet)
    if not isinstance(scale, Mapping):
        return _per_transformer("the scale", [scale], [path for paths in blocks.values() for path in paths])
    values = dict.fromkeys(blocks, default) | _flatten(scale, blocks)
    scales: dict[str, Any] = {}
    for block, paths in blocks.items():
        scales |= _per_transformer(block, values[block], paths)
    return scales


def _transformers_by_block(unet: UNet) -> dict[str, list[str]]:
    """Group the transformers' paths by block: "down.block_<level>", "mid" and "up.block_<level>"."""
    blocks: dict[str, list[str]] = {}
    for path, module in unet.named_modules():
        if isinstance(module, Transformer):
            part, level, *_ = path.split(".")
            blocks.setdefault("mid" if part == "mid" else f"{part}.block_{level}", []).append(path)
    return blocks


def _flatten(scale: Mapping[str, Any], blocks: Mapping[str, list[str]]) -> dict[str, Any]:
    """Flatten {"up": {"block_0": 1.0}} to {"up.block_0": 1.0}; ValueError for a block that does not exist."""
    flat: dict[str, Any] = {}
    for part, value in scale.items():
        if part not in PARTS:
            raise ValueError(f"the UNet has no transformers in {part}, it has them in {', '.join(PARTS)}")
        existing = [block for block in blocks if block.split(".")[0] == part]
        if part == "mid" or not isinstance(value, Mapping):
            flat |= dict.fromkeys(existing, value)
            continue
        for name, block_value in value.items():
            if (block := f"{part}.{name}") not in existing:
                have = ", ".join(existing)
                raise ValueError(f"the UNet has no transformers in {block}, it has them in {have}")
            flat[block] = block_value
    return flat


def _per_transformer(where: str, value: Any, paths: Sequence[str]) -> dict[str, Any]:
    """Assign a block's value to its transformers: one for all, or a list with one for each."""
    values = list(value) if _is_list(value) else [value]
    if len(values) not in (1, len(paths)):
        count = len(paths)
        raise ValueError(f"{where} has {count} transformers and takes one scale or {count}, got {values}")
    for given in values:
        for number in given if _is_list(given) else [given]:
            check_float(f"{where}: a scale", number)
    return dict(zip(paths, values * len(paths) if len(values) == 1 else values, strict=True))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
