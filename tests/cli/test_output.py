"""Image files of the command line: formats, their metadata, and what may be overwritten."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kolors_core.__main__ import main
from kolors_core.cli.output import read_image_metadata, save_image
from kolors_core.pipelines.png_metadata import attach_metadata
from tests.support.pipelines import picture

SMALL = ["--height", "64", "--width", "64", "--steps", "1", "--seed", "3", "--device", "cpu", "-q"]
FACTS = {"prompt": "一张瓢虫的照片 🐞", "seed": "3", "other": 'a "b"\n\x1b[31m'}


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.webp"])
def test_every_format_keeps_the_metadata(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    image, file = picture(1, 64, 64), tmp_path / name
    attach_metadata(image, FACTS)
    save_image(image, file)
    assert capsys.readouterr().out == f"{file}\n"
    assert read_image_metadata(file) == FACTS
    assert Image.open(file).format == {"a.png": "PNG", "a.webp": "WEBP"}.get(name, "JPEG")
    difference = abs(pixels(file) - np.asarray(image).astype(int))
    assert difference.max() == 0 if file.suffix in (".png", ".webp") else 0 < difference.mean() < 2
    assert main(["info", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "prompt: 一张瓢虫的照片 🐞" in printed and "\x1b" not in printed
    assert len(list(tmp_path.iterdir())) == 1


def test_metadata_that_exif_cannot_hold_are_left_out_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = picture(1, 64, 64)
    attach_metadata(image, {"prompt": "x" * 40_000})
    save_image(image, tmp_path / "a.jpg")
    assert "a.jpg is written without metadata" in caplog.text
    assert read_image_metadata(tmp_path / "a.jpg") == {}


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_the_command_writes_other_formats(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / f"cat.{kind}"
    assert main(["a cat", *SMALL, "-o", str(out), "--images", "2"]) == 0
    assert capsys.readouterr() == (f"{tmp_path}/cat-1.{kind}\n{tmp_path}/cat-2.{kind}\n", "")
    assert read_image_metadata(tmp_path / f"cat-2.{kind}")["prompt"] == "a cat"


@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "link to /dev/null"])
def test_what_is_no_file_is_neither_read_nor_replaced(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """At once: a FIFO would wait for its other end for ever, and a device would be gone."""
    place = tmp_path / "x.png"
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(place))
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to("/dev/null")
    before = place.lstat()
    for arguments in (["info", str(place)], ["--info", str(place)], ["a cat", "-o", str(place), "--force"]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and "x.png" in error and len(error.splitlines()) == 1
    assert place.lstat().st_ino == before.st_ino and place.lstat().st_mode == before.st_mode


def test_a_full_disk_names_the_users_path(tmp_path: Path) -> None:
    import resource

    image = picture(1, 256, 256)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        for name in ("a.png", "a.jpg", "a.webp"):
            with pytest.raises(OSError) as raised:
                save_image(image, tmp_path / name)
            assert str(tmp_path / name) in str(raised.value) and ".partial" not in str(raised.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
