"""Training data: folders and their faults, buckets, and batches that depend on seed and step alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from kolors_core.training.data import (
    Batches,
    Example,
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
        ("{", "metadata.jsonl, line 2: expected a JSON object"),
        ("{}", "metadata.jsonl, line 2: expected a JSON object with file_name and text"),
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
    with pytest.raises(FileNotFoundError, match="a.txt: no such file, expected the captions of a.png"):
        read_folder(tmp_path)


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


def test_mixed_seeds_differ() -> None:
    seeds = {derive_seed(seed, step, part) for seed in range(10) for step in range(100) for part in range(2)}
    assert len(seeds) == 2000 and all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))
