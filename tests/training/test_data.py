"""Training data: folders and their faults, buckets, and batches that depend on seed and step alone."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from kolors_core.training.data import (
    Batches,
    Example,
    IndexBatches,
    buckets,
    derive_seed,
    load_pixels,
    nearest_bucket,
    read_folder,
)


def write_pictures(folder: Path) -> Path:
    """Six captioned images in two shapes, by metadata.jsonl."""
    rows = []
    for i in range(6):
        size = (64, 64) if i % 2 else (128, 64)
        pixels = np.full((size[1], size[0], 3), 40 * i, dtype=np.uint8)
        pixels[: 10 * i + 5, :, 0] = 255
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": [f"a photo {i}", f"一张照片 {i}"]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def test_both_layouts_are_read(tmp_path: Path) -> None:
    examples = read_folder(write_pictures(tmp_path))
    assert [example.file.name for example in examples] == [f"{i}.png" for i in range(6)]
    assert examples[1].captions == ("a photo 1", "一张照片 1")
    assert (examples[0].height, examples[0].width) == (64, 128)
    (tmp_path / "metadata.jsonl").unlink()
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"first {i}\n\nsecond\n")
    assert read_folder(tmp_path)[2].captions == ("first 2", "second")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "metadata.jsonl, line 2: not JSON: Expecting property name"),
        ("[1]", "metadata.jsonl, line 2: expected a JSON object, got list"),
        ("[" * 100_000, "metadata.jsonl, line 2: not JSON: .*recursion"),
        ('{"text": "a", "text": "b"}', "metadata.jsonl, line 2: not JSON: 'text' is given twice"),
        (
            "{}",
            "metadata.jsonl, line 2: expected a JSON object with file_name and text, file_name is missing",
        ),
        ('{"file_name": 3, "text": "a"}', "line 2: file_name must be a string, got 3"),
        ('{"file_name": "0.png", "text": [["a"]]}', "line 2: text must be a caption or a list of them"),
        ('{"file_name": "0.png", "text": []}', "line 2: text must be a caption or a list of them"),
        ('{"file_name": "9.png", "text": "x"}', "line 2: .*9.png does not exist"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    write_pictures(tmp_path)
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    (tmp_path / "metadata.jsonl").write_text("\n".join([lines[0], line]))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_folder(tmp_path)


def test_captions_of_metadata_may_hold_what_else_ends_a_line(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    row = json.dumps({"file_name": "0.png", "text": "one\u2028caption"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(f"\ufeff{row}\n\n", encoding="utf-8")
    assert [example.captions for example in read_folder(tmp_path)] == [("one\u2028caption",)]
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="metadata.jsonl: 'utf-8' codec"):
        read_folder(tmp_path)


def test_missing_captions_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no images with captions"):
        read_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_folder(tmp_path / "nothing")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    found = r"no images with captions .*; images without a caption: 1 .'a.png'.$"
    with pytest.raises(FileNotFoundError, match=found):
        read_folder(tmp_path)
    assert [example.captions for example in read_folder(tmp_path, default_captions=["a"])] == [("a",)]


FORMATS = {  # as pillow names them, and a suffix of each
    "PNG": ".png", "JPEG": ".JPG", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif", "AVIF": ".avif",
    "GIF": ".gif", "PPM": ".ppm", "TGA": ".tga", "PCX": ".pcx", "QOI": ".qoi", "JPEG2000": ".jp2",
}  # fmt: skip


def test_every_format_that_pillow_decodes_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """JPEG by its other name too, and whatever the case of the suffix."""
    files = {f"{name}{suffix}": name for name, suffix in FORMATS.items()} | {
        "e.jfif": "JPEG",
        "f.TIFF": "TIFF",
    }
    for file, name in files.items():
        Image.new("RGB", (64, 32), "red").save(tmp_path / file, name)
        (tmp_path / file).with_suffix(".txt").write_text(f"a caption of {file}")
    with caplog.at_level(logging.WARNING, "kolors_core"):
        examples = read_folder(tmp_path)
    assert {example.file.name: example.captions for example in examples} == {
        file: (f"a caption of {file}",) for file in files
    }
    assert all((example.height, example.width) == (32, 64) for example in examples)
    assert not caplog.messages, "nothing is left out"


@pytest.mark.parametrize("has_metadata", [False, True])
def test_what_is_left_out_is_said_with_numbers(
    has_metadata: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_pictures(tmp_path)
    if not has_metadata:
        (tmp_path / "metadata.jsonl").unlink()
        for i in range(6):
            (tmp_path / f"{i}.txt").write_text("a thing")
        (tmp_path / "alone.txt").write_text("no image")
    for name in ("x.png", "y.BMP", "raw.heic", "notes.md"):
        (tmp_path / name).write_bytes(b"not read")
    (tmp_path / "more").mkdir()
    with caplog.at_level(logging.WARNING, "kolors_core"):
        assert len(read_folder(tmp_path)) == 6
    captions = [] if has_metadata else ["captions without an image: 1 ('alone.txt')"]
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}: 6 captioned images are read, others left out; ")
    found = sorted(line.split("; ")[1:])
    assert found == [*captions, "images without a caption: 2 ('x.png')", "other files or folders: 3 ('more')"]


def outside(folder: Path, place: Path) -> dict[str, Callable[[], object]]:
    """Ways by which a file of the dataset in `folder` may lie at `place`, outside of it."""
    image, text = folder / "a.png", folder / "a.txt"
    row = '{"file_name": %s, "text": "a"}'
    return {
        "a link to an image": lambda: (image.symlink_to(place / "a.png"), text.write_text("a")),
        "a link to a caption": lambda: (Image.new("RGB", (8, 8)).save(image),
                                        text.symlink_to(place / "a.txt")),
        "a link to the metadata": lambda: (Image.new("RGB", (8, 8)).save(image), (folder / "metadata.jsonl")
                                           .symlink_to(place / "metadata.jsonl")),
        "a folder's name": lambda: (folder / "metadata.jsonl").write_text(row % '"../place/a.png"'),
        "a whole path": lambda: (folder / "metadata.jsonl").write_text(row % json.dumps(f"{place}/a.png")),
        "a link to a folder": lambda: ((folder / "in").symlink_to(place),
                                       (folder / "metadata.jsonl").write_text(row % '"in/a.png"')),
    }  # fmt: skip


@pytest.mark.parametrize("way", outside(Path(), Path()))
def test_a_file_that_leaves_the_folder_is_refused_unless_asked_for(way: str, tmp_path: Path) -> None:
    folder, place = tmp_path / "data", tmp_path / "place"
    folder.mkdir()
    place.mkdir()
    Image.new("RGB", (8, 8)).save(place / "a.png")
    (place / "a.txt").write_text("a")
    (place / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}')
    outside(folder, place)[way]()
    with pytest.raises(ValueError, match=f": {place}/.* is outside of {folder}: allow_outside=True reads"):
        read_folder(folder)
    assert [example.captions for example in read_folder(folder, allow_outside=True)] == [("a",)]


def test_a_link_to_itself_is_no_file(tmp_path: Path) -> None:
    """Python before 3.13 resolves it with a RuntimeError."""
    (tmp_path / "a.png").symlink_to("a.png")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(FileNotFoundError, match="a.png: no such file"):
        read_folder(tmp_path)


def test_links_within_the_folder_and_a_hub_cache_s_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = (
        tmp_path / "datasets--a--b" / "blobs",
        tmp_path / "datasets--a--b" / "snapshots" / "c0ffee",
    )
    for folder in (blobs, snapshot / "train"):
        folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(blobs / "1a", "PNG")
    (blobs / "2b").write_text('{"file_name": "train/a.png", "text": "a"}')
    (snapshot / "train" / "a.png").symlink_to("../../../blobs/1a")
    (snapshot / "metadata.jsonl").symlink_to("../../blobs/2b")
    assert [example.file.name for example in read_folder(snapshot)] == ["a.png"]
    (snapshot / "train" / "a.txt").write_text("b")
    (snapshot / "train" / "z.png").symlink_to("a.png")
    (snapshot / "train" / "z.txt").symlink_to("a.txt")
    assert [example.captions for example in read_folder(snapshot / "train")] == [("b",), ("b",)]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
@pytest.mark.parametrize("name", ["a.png", "a.txt", "metadata.jsonl"])
def test_a_pipe_in_the_folder_is_not_waited_for(name: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: not a file"):
        read_folder(tmp_path)


def test_a_damaged_image_and_one_too_long_for_its_bucket_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("L", (8, 200_000)).save(file)
    with pytest.raises(
        ValueError, match=f"{file}: 6400000 x 256 .* is 1,638,400,000 pixels, expected at most"
    ):
        load_pixels(Example(file, ("",), 200_000, 8), (256, 256))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{file}: .*"):
        load_pixels(Example(file, ("",), 200_000, 8), (256, 256))
    Image.fromarray(np.full((8, 8), -1, np.int32)).save(tmp_path / "b.tif")
    with pytest.raises(ValueError, match=f"{tmp_path}/b.tif: mode 'I': expected values .*, got -1 to -1"):
        load_pixels(Example(tmp_path / "b.tif", ("",), 8, 8), (8, 8))


def test_buckets_keep_the_area_and_take_the_nearest_aspect() -> None:
    sizes = buckets(1024)
    assert (1024, 1024) in sizes and (704, 1408) not in sizes
    assert all(h % 64 == w % 64 == 0 and 0.85 < h * w / 1024**2 <= 1 for h, w in sizes)
    assert all(max(h, w) <= 2 * min(h, w) for h, w in sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)
    wide = Example(Path("x"), ("",), 500, 900)
    height, width = nearest_bucket(wide, sizes)
    assert abs(height / width - 500 / 900) < 0.05
    assert nearest_bucket(Example(Path("x"), ("",), 7, 7), sizes) == (1024, 1024)


def test_pixels_cover_the_bucket(tmp_path: Path) -> None:
    image = Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    image.putpixel((20, 10), (0, 0, 0, 0))
    image.save(tmp_path / "a.png")
    pixels, crop = load_pixels(Example(tmp_path / "a.png", ("",), 20, 40), (20, 20))
    assert pixels.shape == (3, 20, 20) and crop == (0, 10)
    assert pixels[:, 0, 0].tolist() == [1.0, -1.0, -1.0]
    assert pixels[:, 10, 10].tolist() == [1.0, 1.0, 1.0], "transparency is white"


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    """It lies on its side in the file, left below; the tag says so."""
    image = Image.new("RGB", (40, 20), "white")
    image.paste("red", (0, 0, 20, 20))
    tag = Image.Exif()
    tag[ExifTags.Base.Orientation] = 6  # turn it clockwise
    image.save(tmp_path / "a.png", exif=tag)
    (tmp_path / "a.txt").write_text("a photo", encoding="utf-8-sig")
    (example,) = read_folder(tmp_path)
    assert (example.height, example.width, example.captions) == (40, 20, ("a photo",))
    pixels, crop = load_pixels(example, (40, 20))
    assert crop == (0, 0) and pixels[:, 0, 10].tolist() == [1.0, -1.0, -1.0] and pixels.sum((0, 2))[-1] == 60


def test_batches_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    examples = read_folder(write_pictures(tmp_path))

    def batches(seed: int, size: int = 3) -> Batches:
        return Batches(examples, [(64, 64), (32, 64)], size, seed, caption_dropout=0.25)

    first, again, other = batches(0), batches(0), batches(1)
    drawn = [first.samples(step) for step in range(200)]
    assert [again.samples(step) for step in reversed(range(200))] == drawn[::-1]
    assert [other.samples(step) for step in range(200)] != drawn
    for size, samples in drawn:
        members = first.members[size]
        assert {i for i, _ in samples} <= set(members)
        assert len({i for i, _ in samples}) == 3
    captions = [caption for _, samples in drawn for _, caption in samples]
    assert 0.15 < captions.count("") / len(captions) < 0.35
    assert len(set(captions)) == 13, "every caption of every image, and the empty one"
    assert len(batches(0, 7).samples(0)[1]) == 7, "a batch larger than its bucket goes round again"
    with pytest.raises(ValueError, match="batch_size must be a positive whole number"):
        batches(0, 0)


def test_a_batch_of_very_many_needs_no_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kolors_core.training.data.MANY", 50)
    batches = IndexBatches({(64, 64): range(60)}, [1] * 60, 20, 0)
    drawn = [[i for i, _ in batches.picks(step)[1]] for step in range(200)]
    assert drawn == [[i for i, _ in batches.picks(step)[1]] for step in range(200)]
    assert all(len(set(each)) == 20 for each in drawn)
    counts = torch.tensor(drawn).flatten().bincount(minlength=60)
    assert counts.min() > 35 and counts.max() < 100, "each about 67 times"


def test_mixed_seeds_differ() -> None:
    seeds = {derive_seed(seed, step, part) for seed in range(10) for step in range(100) for part in range(2)}
    assert len(seeds) == 2000 and all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))
