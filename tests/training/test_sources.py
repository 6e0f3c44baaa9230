"""Sources of records: what each reads of an image, its captions and all else, and that it reads no more."""

import io
import json
import logging
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image

from kolors_core.training.sources import (
    Record,
    Stored,
    dataset_records,
    folder_records,
    stored_image,
    tar_records,
)
from tests.support.images import MODES, noise_image
from tests.training.test_data import write_pictures


def png(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def write_tar(file: Path, parts: dict[str, bytes], kind: str = "w") -> Path:
    with tarfile.open(file, kind) as archive:
        for name, content in parts.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


RED, MASK = png(Image.new("RGB", (16, 8), "red")), png(Image.new("L", (16, 8), 255))
PARTS = {
    "a/1.jpg": RED,
    "a/1.txt": "first\n第二\n".encode(),
    "a/1.mask.png": MASK,
    "a/2.png": RED,
    "a/2.json": b'{"text": ["x", "y"], "score": 3}',
    "a/2.cls": b"7",
    "b/2.json": b'{"caption": "z", "width": 8}',
    "b/2.webp": RED,
    "c/3.png": RED,
    "c/4.txt": b"no image",
}


def test_a_tar_s_records_are_its_neighbors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_tar(tmp_path / "a.tar", PARTS)
    with caplog.at_level(logging.WARNING, "kolors_core"):
        first, second, third = tar_records(file)
    assert first.captions == ("first", "第二") and first.image.name == f"{file}, a/1.jpg"
    assert first.image.open().getpixel((0, 0)) == (255, 0, 0)
    assert list(first.more) == ["mask"] and first.more["mask"].open().size == (16, 8)
    assert second.captions == ("x", "y") and second.more["score"] == 3 and second.more["cls"].read() == b"7"
    assert third.captions == ("z",) and third.more == {"width": 8}
    assert caplog.messages == [f"2 without an image or a caption are left out, such as {file}, c/3"]
    assert len({record.stamp() for record in (first, second, third)}) == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda content: content[: len(RED) + 512 + 100],
            "expected a whole tar file, not compressed: ",
        ),
        (lambda content: content[: -content.count(b"") % 512 + 1024], "without its end marker"),
        (lambda content: content + content, "more follows the end marker, as of tar files"),
        (lambda content: b"\x1f\x8b" + content[2:], "expected a whole tar file, not compressed: "),
    ],
    ids=["cut", "cut between", "two", "other"],
)
def test_a_damaged_tar_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", {"1.png": RED, "1.txt": b"a", "2.png": RED, "2.txt": b"b"})
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message):
        list(tar_records(file))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"1.png": RED, "1.jpg": RED, "1.txt": b"a"}, "a.tar, 1: expected one image, got png, jpg"),
        ({"1.png": RED, "1.json": b"{"}, "a.tar, 1.json: not JSON"),
        (
            {"1.png": RED, "1.json": b'{"text": 3}'},
            "a.tar, 1: text must be a caption or a list",
        ),
        ({"1.png": RED, "1.txt": b"\xff"}, "a.tar, 1.txt: 'utf-8' codec"),
        ({"1.png": RED, "1.txt": b"a" * (2**20 + 1)}, "a.tar, 1.txt: 1,048,577 bytes, expected at most"),
    ],
    ids=["images", "json", "text", "bytes", "long"],
)
def test_a_bad_part_of_a_tar_is_named(parts: dict[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        list(tar_records(write_tar(tmp_path / "a.tar", parts)))


def test_a_folder_is_listed_without_opening_images(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    (tmp_path / "3.png").write_bytes(b"no image")
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    rows[0] |= {"depth_file_name": "1.png", "score": 0.5}
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = folder_records(tmp_path)
    records = list(source)
    assert len(records) == 6 and [record.stamp() for record in source] == [r.stamp() for r in records]
    assert records[0].more["score"] == 0.5 and records[0].more["depth"].name.endswith("1.png")
    with pytest.raises(ValueError, match="3.png: not an image"):
        records[3].image.open()
    (tmp_path / "metadata.jsonl").write_text(json.dumps(rows[0] | {"depth_file_name": "../1.png"}))
    with pytest.raises(ValueError, match="1.png is outside of"):
        list(folder_records(tmp_path))


def test_stamps_and_contents_tell_what_changed(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(RED)
    os.utime(file, ns=(1, 1))

    def known(captions: tuple[str, ...] = ("a",), **more: Any) -> tuple[str, str]:
        record = Record(stored_image(file), captions, more)
        return record.stamp(), record.contents()

    first = known()
    os.utime(file, ns=(2, 2))
    touched = known()
    assert touched[0] != first[0] and touched[1] == first[1]
    file.write_bytes(MASK + bytes(len(RED) - len(MASK)) if len(MASK) < len(RED) else MASK[: len(RED)])
    other = known()
    assert other[0] != touched[0] and other[1] != touched[1]
    more = stored_image(Image.new("L", (4, 4)))
    all_known = [first, other, known(("a", "b")), known(score=1), known(score=2), known(mask=more)]
    assert all(len({each[i] for each in all_known}) == 6 for i in range(2))


@pytest.mark.parametrize("mode", MODES)
def test_images_in_memory_are_known_by_what_they_show(mode: str) -> None:
    image, other = noise_image(mode), noise_image(mode, seed=1)
    stamps = [stored_image(each).stamp for each in (image, image.copy(), other)]
    assert stamps[0] == stamps[1] != stamps[2]
    assert stored_image(image).open().mode == "RGB"


def test_a_turned_image_in_memory_is_another_one() -> None:
    image = noise_image()
    before = stored_image(image).stamp
    image.getexif()[ExifTags.Base.Orientation] = 6
    assert stored_image(image).stamp != before and stored_image(image).open().size == image.size[::-1]


def test_rows_of_a_table_or_a_stream_are_records() -> None:
    image = noise_image()

    def rows() -> Iterator[dict[str, Any]]:
        yield {"picture": image, "text": "a", "mask": image, "score": 1}
        yield {"picture": image, "text": ["a", "b"]}

    first, second = dataset_records(rows(), image="picture")
    assert first.captions == ("a",) and second.captions == ("a", "b") and first.more["score"] == 1
    assert isinstance(first.more["mask"], Stored) and first.image.open().size == image.size
    with pytest.raises(ValueError, match="row 0: expected the columns image and text, image is not"):
        list(dataset_records(rows()))
    with pytest.raises(ValueError, match="row 0: score must be an image, got 1"):
        list(dataset_records(rows(), image="score"))
    with pytest.raises(ValueError, match="row 0: text must be a caption or a list of them, got None"):
        list(dataset_records([{"image": image, "text": None}]))


def test_a_dataset_of_hugging_face_is_decoded_when_it_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the optional package datasets")
    import pyarrow
    from pyarrow.parquet import write_table

    kinds = {"image": pyarrow.struct({"bytes": pyarrow.binary()}), "text": pyarrow.string()}
    rows = [{"image": {"bytes": RED}, "text": "a"}, {"image": {"bytes": b"no image"}, "text": "b"}]
    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(kinds))
    write_table(table.append_column("score", pyarrow.array([1, 2])), tmp_path / "a.parquet")
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "score": datasets.Value("int64")}
    )
    table = datasets.Dataset.from_parquet(
        str(tmp_path / "a.parquet"), features=features, cache_dir=str(tmp_path / "hf")
    )
    source = dataset_records(table)
    records = list(source)
    assert [record.captions for record in records] == [("a",), ("b",)] and records[1].more == {"score": 2}
    assert records[0].image.open().getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ValueError, match="image of row 1: not an image"):
        records[1].image.open()
    assert [record.stamp() for record in source] == [record.stamp() for record in records]
    first, second = dataset_records(table.to_iterable_dataset())
    assert first.captions == ("a",) and first.image.open().size == (16, 8) and second.more == {"score": 2}
    with pytest.raises(ValueError, match="image of row 1: not an image"):
        second.image.open()


class Undecoded:
    """A feature of images as that of `datasets`, and a stream of rows that has it."""

    def __init__(self, decode: bool = True) -> None:
        self.decode = decode

    def decode_example(self, value: Any) -> Image.Image:
        return Image.open(value["path"])


class Stream:
    def __init__(self, rows: list[dict[str, Any]], feature: Any) -> None:
        self.rows, self.features = rows, {"image": feature, "text": object()}

    def cast_column(self, name: str, feature: Any) -> "Stream":
        assert name == "image" and not feature.decode
        return Stream(self.rows, feature)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.features["image"].decode:
            raise OSError("cannot identify image file <_io.BytesIO object>")
        return iter(self.rows)


def test_a_streams_damaged_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    feature = type("Image", (Undecoded,), {})()
    (file := tmp_path / "a.png").write_bytes(RED)
    rows = [{"image": {"bytes": RED, "path": None}, "text": "a"}, {"image": {"bytes": b"no"}, "text": "b"},
            {"image": {"bytes": None, "path": str(file)}, "text": "c"},
            {"image": {"bytes": None, "path": "gone.png"}, "text": "d"}]  # fmt: skip
    records = list(dataset_records(Stream(rows, feature)))
    for i in (0, 2):
        assert records[i].image.open().getpixel((0, 0)) == (255, 0, 0)
    assert records[0].contents() != records[1].contents() and records[2].stamp() != records[3].stamp()
    for i, message in ((1, "image of row 1: not an image"), (3, "image of row 3: no such file")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            records[i].image.open()
    with pytest.raises(ValueError, match="row 0: image must be an image, got None"):
        list(dataset_records(Stream([{"image": None, "text": "a"}], feature)))
