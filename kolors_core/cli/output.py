"""Image files of the command line: PNG, JPEG and WebP with their metadata, and PNG on standard output.

A PNG keeps the metadata as text chunks; JPEG and WebP as JSON in EXIF's UserComment. WebP is lossless, so its
pixels are the PNG's; JPEG has quality 95 and full chroma.
"""

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kolors_core.checkpoint import logger
from kolors_core.image import open_image
from kolors_core.pipelines.png_metadata import read_metadata
from weights_convert.atomic_write import write_bytes
from weights_convert.untrusted_files import parse_object

if TYPE_CHECKING:
    from PIL.Image import Image

STANDARD_OUTPUT = Path("-")
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True},
}  # fmt: skip
EXIF, USER_COMMENT, UTF_16 = 0x8769, 0x9286, b"UNICODE\0"
MOST_COMMENT_BYTES = 65_000  # a JPEG's EXIF ends at 65,533


def save_image(image: "Image", out: Path) -> None:
    """Write an image in the format of its name, whole or not at all; print the path. OSError naming it."""
    kind = FORMATS.get(out.suffix.lower(), "PNG")
    content = io.BytesIO()  # on a full disk PIL's JPEG encoder would end early, without an error
    image.save(content, kind, **({} if kind == "PNG" else {"exif": _exif(image, out), **OPTIONS[kind]}))
    if out == STANDARD_OUTPUT:
        sys.stdout.buffer.write(content.getvalue())
        sys.stdout.flush()
        return
    write_bytes(content.getvalue(), out)
    print(out, flush=True)


def read_image_metadata(file: Path) -> dict[str, str]:
    """Read the metadata of a file of `save_image`. FileNotFoundError or ValueError naming the file."""
    with open_image(file) as image:
        if image.format not in OPTIONS:
            return read_metadata(file)
        comment = image.getexif().get_ifd(EXIF).get(USER_COMMENT)
    if not isinstance(comment, bytes) or not comment.startswith(UTF_16):
        return {}
    text = comment.removeprefix(UTF_16).decode("utf-16-be", errors="replace")
    return {name: str(value) for name, value in parse_object(text.encode(), str(file)).items()}


def _exif(image: "Image", out: Path) -> bytes:
    from PIL.Image import Exif

    metadata = {name: value for name, value in image.info.items() if isinstance(value, str)}
    comment = UTF_16 + json.dumps(metadata, ensure_ascii=False).encode("utf-16-be", errors="replace")
    if len(comment) > MOST_COMMENT_BYTES:
        logger.warning("%s is written without metadata, which is too long for EXIF: a .png takes it", out)
        return b""
    exif = Exif()
    exif.get_ifd(EXIF)[USER_COMMENT] = comment
    return exif.tobytes()
