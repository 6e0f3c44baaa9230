"""Metadata of a PNG; what the pipelines and command lines write into it is tested with them."""

from pathlib import Path

import pytest

from kolors_core.pipelines.png_metadata import attach_metadata, read_metadata, save_png
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
