"""Metadata of a PNG; what the pipelines and command lines write into it is tested with them."""

import os
import tracemalloc
import zlib
from pathlib import Path

import pytest

from kolors_core.pipelines.png_metadata import attach_metadata, read_metadata, save_png
from tests.support.bombs import chunk, png
from tests.support.images import noise_image


def test_metadata_come_back_from_the_file(tmp_path: Path) -> None:
    image, metadata = noise_image(), {"prompt": "一张瓢虫的照片", "seed": 7}
    attach_metadata(image, metadata)
    save_png(image, tmp_path / "new" / "a.png")
    assert (
        image.info == read_metadata(tmp_path / "new" / "a.png") == {"prompt": "一张瓢虫的照片", "seed": "7"}
    )


def test_what_is_no_png_is_named_in_one_line(tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("not an image")
    with pytest.raises(ValueError, match="text.png: not an image"):
        read_metadata(text)
    noise_image().save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="a.jpg: expected a PNG, got JPEG"):
        read_metadata(tmp_path / "a.jpg")


def text(kind: bytes, value: bytes) -> bytes:
    return chunk(kind, {b"tEXt": b"a\0", b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0"}[kind] + value)


ZEROS = zlib.compress(bytes(2**24))
HOSTILE = {
    "a bomb of pixels": (png(30_000, 30_000), "900,000,000 pixels, expected at most 89,478,485"),
    "compressed text": (png(4, 1, text(b"zTXt", ZEROS)), "Decompressed data too large"),
    "compressed text, any language": (png(4, 1, text(b"iTXt", ZEROS)), "Decompressed data too large"),
    "plain text": (png(4, 1, text(b"tEXt", b"a" * 2**23)), "8,388,609 letters of text, expected at most 4,19"),
    "many texts": (png(4, 1, *[text(b"zTXt", zlib.compress(bytes(2**20 - 9)))] * 99), "Too much memory used"),
    "cut short": (png(40, 40)[:45], "truncated"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_would_fill_the_memory_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    file = tmp_path / "a.png"
    file.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"^{file}: .*{message}") as caught:
        read_metadata(file)
    assert tracemalloc.get_traced_memory()[1] < 2**27 and "\n" not in str(caught.value)
    tracemalloc.stop()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png: not a file"):
        read_metadata(tmp_path / "a.png")
