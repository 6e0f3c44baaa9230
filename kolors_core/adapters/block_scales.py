"""Scales by the UNet's blocks, as `set_adapters` (LoRA) and `set_ip_adapter_scale` take them.

`{"down": 0.5, "mid": 1.0, "up": {"block_0": [0.0, 1.0, 0.0]}}` becomes one value for each transformer.
Source: `_maybe_expand_lora_scales` in diffusers' loaders/unet_loader_utils.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kolors_core.unet import Transformer, UNet
from kolors_core.validation import check_float

Value = float | Sequence[float]  # a list where there is a scale for each image of an IP-Adapter
BlockScale = Value | Mapping[str, Any]


def block_scales(scale: BlockScale, unet: UNet, default: float) -> dict[str, Any]:
    """One value for each transformer of the UNet, by its path, such as "down.1.attentions.0".

    scale: a value for all, or by "down", "mid" and "up" a value or, for "down" and "up", a mapping from
    "block_<level>" to a value or a list with one for each transformer; in a mapping, a list of one is for all
    of a block. What a mapping leaves out gets `default`. Raises ValueError naming the blocks there are, the
    length expected, or what is no number.
    """
    blocks = _transformers(unet)
    if not isinstance(scale, Mapping):
        paths = [path for block in blocks.values() for of_block in block.values() for path in of_block]
        return dict(zip(paths, _spread("the scale", [scale], len(paths)), strict=True))
    _refuse_unknown("", scale, blocks)
    scales = {}
    for way, of_way in blocks.items():
        given = scale.get(way, default)
        if way == "mid" or not isinstance(given, Mapping):
            given = dict.fromkeys(of_way, given)
        _refuse_unknown(f"{way}.", given, of_way)
        for block, paths in of_way.items():
            value = given.get(block, default)
            where = f"{way}.{block}".rstrip(".")
            scales |= zip(paths, _spread(where, value, len(paths)), strict=True)
    return scales


def _transformers(unet: UNet) -> dict[str, dict[str, list[str]]]:
    """The transformers' paths by way ("down", "mid", "up") and block ("block_1"; "" in the middle)."""
    found: dict[str, dict[str, list[str]]] = {"down": {}, "mid": {}, "up": {}}
    for path, module in unet.named_modules():
        if isinstance(module, Transformer):
            way, number, *_ = path.split(".")
            found[way].setdefault("" if way == "mid" else f"block_{number}", []).append(path)
    return found


def _spread(where: str, value: Any, count: int) -> list[Any]:
    """One value for each of a block's `count` transformers."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if len(values) not in (1, count):
        raise ValueError(f"{where} has {count} transformers and takes one scale or {count}, got {values}")
    for one in values:
        for number in one if isinstance(one, Sequence) and not isinstance(one, str) else [one]:
            check_float(f"{where}: a scale", number)
    return values * count if len(values) == 1 else values


def _refuse_unknown(where: str, given: Iterable[Any], known: Iterable[str]) -> None:
    if unknown := [name for name in given if name not in known]:
        have = ", ".join(f"{where}{name}" for name in known)
        raise ValueError(f"the UNet has no transformers in {where}{unknown[0]}, it has them in {have}")
