"""PNG metadata of generated images: text chunks, attached, written and read."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kolors_core.image import open_image
from kolors_core.validation import as_path
from weights_convert.atomic_write import atomic_file

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_TEXT = 2**22  # letters of all text chunks; pillow alone bounds one that is compressed, at 2**20


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
    """Read the text chunks of a PNG, which end after its pixels.

    FileNotFoundError or ValueError naming the file if it is none, is damaged, or has over `MAX_TEXT` letters.
    """
    with open_image(as_path("path", path)) as image:
        if image.format != "PNG":
            raise ValueError(f"expected a PNG, got {image.format}")
        image.load()
        texts = {str(name): value for name, value in image.info.items() if isinstance(value, str)}
        if (size := sum(len(name) + len(value) for name, value in texts.items())) > MAX_TEXT:
            raise ValueError(f"{size:,} letters of text, expected at most {MAX_TEXT:,}")
    return texts
