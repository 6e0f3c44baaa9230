"""Forms for people to look at: a pipeline as a line for each part, several images as a row."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from kolors_core.devices import unwrap_compiled
from kolors_core.image import png_bytes
from kolors_core.notebook import table_html

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_IMAGES, GAP, WIDEST = 8, 8, 1600  # of a row; the last two in pixels


def describe(pipe: Any) -> str:
    """Describe a pipeline: its class and checkpoint, its parts, adapters and settings, a line each."""
    return "\n".join(f"  {name:<14} {text}" if name else text for name, text in _lines(pipe))


def describe_html(pipe: Any) -> str:
    """Describe a pipeline as a table, for notebooks."""
    (_, title), *lines = _lines(pipe)
    return table_html(title, (), lines)


def _lines(pipe: Any) -> list[tuple[str, str]]:
    """List what `describe` says: the name of each part with a text, first "" with the title."""
    where = f" of {pipe.name_or_path}" if pipe.name_or_path else ""
    lines = [("", type(pipe).__name__ + where)]
    for name, part in pipe.components.items():
        if isinstance(part, list | tuple):
            lines += [(name, _part(one)) for one in part]
        elif part is not None and not isinstance(part, bool):
            lines.append((name, _part(part)))
    if pipe.unet is not None:
        lines += _adapters(pipe._adapter_metadata(None))
    if (device := getattr(getattr(pipe, "offload", None), "device", None)) is not None:
        unit = "block" if pipe.offload.by_block else "model"
        lines.append(("offload", f"{unit} by {unit} to {device}"))
    if (cache := getattr(pipe, "step_cache", None)) is not None:
        lines.append(("step_cache", cache.describe()))
    return lines


def _part(part: Any) -> str:
    model = unwrap_compiled(part)
    if not isinstance(model, nn.Module):
        return part.describe() if hasattr(part, "describe") else repr(part)
    tensors = [*model.parameters(), *model.buffers()]
    count, size = sum(p.numel() for p in model.parameters()), sum(t.nbytes for t in tensors)
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors})
    devices = sorted({str(t.device) for t in tensors})
    compiled = ", compiled" if model is not part else ""
    amount = f"{count / 1e6:,.1f} million parameters, {size / 2**20:,.1f} MiB"
    return f"{type(model).__name__}, {amount}, {' and '.join(dtypes)} on {' and '.join(devices)}{compiled}"


def _adapters(metadata: dict[str, str]) -> list[tuple[str, str]]:
    found = []
    for one in json.loads(metadata.get("lora", "[]")):
        fused = ", fused" if one.get("fused") else ""
        found.append(("lora", f"{one['name']}: {one['weight']}{fused}"))
    shown = ("ip_adapter_scale", "face_scale", "freeu", "learned_words")
    return found + [(name, metadata[name]) for name in shown if name in metadata]


def row_of_images(images: Sequence["Image"]) -> bytes:
    """Draw images side by side, the first `MOST_IMAGES` of them, as a PNG for a notebook."""
    from PIL import Image

    shown = [image.convert("RGB") for image in images[:MOST_IMAGES]]
    width = sum(image.width for image in shown) + GAP * (len(shown) - 1)
    row = Image.new("RGB", (width, max(image.height for image in shown)), "white")
    left = 0
    for image in shown:
        row.paste(image, (left, 0))
        left += image.width + GAP
    if width > WIDEST:
        row = row.resize((WIDEST, max(1, round(row.height * WIDEST / width))), Image.Resampling.LANCZOS)
    return png_bytes(row)
