"""PNG metadata of generated images: text chunks, attached, written and read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kolors_core.image import image_errors
from kolors_core.validation import as_path
from weights_convert.atomic_write import atomic_file

if TYPE_CHECKING:
    from PIL.Image import Image


def as_json(value: Any) -> str:
    """Format a value as JSON in one line, with Chinese characters as they are."""
    return json.dumps(value, ensure_ascii=False, default=str)


def attach_metadata(image: "Image", metadata: Mapping[str, Any]) -> None:
    """Attach metadata to an image: `image.info` holds it, `image.save("x.png")` writes it as text chunks."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for name, value in metadata.items():
        image.info[name] = str(value)
        chunks.add_itxt(name, str(value))
    image.encoderinfo = {"pnginfo": chunks}


def save_png(image: "Image", path: str | Path) -> None:
    """Write a PNG with its metadata, whole or not at all. OSError naming the file."""
    path = as_path("path", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as scratch:
        image.save(scratch, format="PNG")


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the text chunks of a PNG. FileNotFoundError or ValueError naming the file if it is none."""
    from PIL import Image

    with image_errors(path), Image.open(as_path("path", path)) as image:
        if image.format == "PNG":
            image.load()
    if image.format != "PNG":
        raise ValueError(f"{path}: expected a PNG, got {image.format}")
    return {str(name): value for name, value in image.info.items() if isinstance(value, str)}
