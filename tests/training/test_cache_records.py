"""Records of the cache: captions as tokens, control images, masks, tensors of one's own, and wrong ones."""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from kolors_core.image import to_grayscale
from kolors_core.tokenizer import Tokenizer
from kolors_core.training.cache import digest_function
from kolors_core.training.cached_data import CachedDataset, RandomMasks
from kolors_core.training.data import Batches, LatentDataset, MaskedLatentDataset, read_folder
from kolors_core.training.prefetch import Prefetched
from kolors_core.training.record_tensors import ControlImages, GivenMasks, store_pixels
from kolors_core.training.sources import Record, folder_records
from tests.support.cache_worker import (
    CPU,
    SIZES,
    models,
    write,
)
from tests.support.caches import memory, same
from tests.support.train_worker import CONFIG

WHOLE = slice(0, 4)


def test_captions_are_tokens_where_the_text_encoder_is_trained(
    pictures: Path, small_tokenizer: Path, tmp_path: Path
) -> None:
    write(tmp_path, folder_records(pictures), small_tokenizer, has_text=False)
    vae, _ = models()
    examples, tokenizer = read_folder(pictures), Tokenizer(small_tokenizer)
    batches = Batches(examples, SIZES, CONFIG.batch_size, CONFIG.seed)
    expected = LatentDataset(examples, batches, vae, tokenizer, CONFIG, None)
    data = CachedDataset(tmp_path, CONFIG, tokenizer=tokenizer)
    for step in range(5):
        assert same(data.batch(step, WHOLE, CPU), expected.batch(step, WHOLE, CPU))
    with pytest.raises(ValueError, match="a tokenizer is needed: the cache has no embeddings"):
        CachedDataset(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="made with another tokenizer, or other words"):
        CachedDataset(tmp_path, CONFIG, tokenizer=tokenizer, words={"zorp": [7]})


def edges(image: Image.Image) -> Image.Image:
    return Image.fromarray(255 - to_grayscale(image, (image.height, image.width)).numpy()).convert("RGB")


def test_control_images_and_random_masks_are_those_of_memory(
    pictures: Path, small_tokenizer: Path, tmp_path: Path
) -> None:
    write(tmp_path / "c", folder_records(pictures), small_tokenizer, tensors=ControlImages(edges))
    expected = memory(LatentDataset, pictures, small_tokenizer, control=edges).batch(1, WHOLE, CPU)
    assert expected.control is not None
    assert same(CachedDataset(tmp_path / "c", CONFIG).batch(1, WHOLE, CPU), expected)

    write(tmp_path / "m", folder_records(pictures), small_tokenizer, tensors=store_pixels)
    data = RandomMasks(CachedDataset(tmp_path / "m", CONFIG), models()[0], CONFIG)
    expected = memory(MaskedLatentDataset, pictures, small_tokenizer).batch(1, WHOLE, CPU)
    assert expected.extra is not None and same(data.batch(1, WHOLE, CPU), expected)
    assert data.record().items() > data.source.record().items()
    with pytest.raises(ValueError, match="expected batches with pixels and without extra"):
        RandomMasks(CachedDataset(tmp_path / "c", CONFIG), models()[0], CONFIG).batch(0, WHOLE, CPU)


class Scored(GivenMasks):
    """The masks of a source, and a score as an added condition."""

    def __call__(self, record: Record, pixels: Tensor) -> Mapping[str, Tensor]:
        added = torch.full((8,), record.more["score"], dtype=torch.float32)
        return {"added": added, **super().__call__(record, pixels)}


def test_masks_and_conditions_of_the_source_are_carried(
    pictures: Path, small_tokenizer: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "p"))
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        with Image.open(folder / row["file_name"]) as image:
            mask = Image.new("L", image.size)
        mask.paste(255, (0, 0, 8 * (i + 1), mask.height))
        mask.save(folder / f"mask{i}.png")
        row |= {"mask_file_name": f"mask{i}.png", "score": i / 2}
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    vae, _ = models()
    write(tmp_path / "c", folder_records(folder), small_tokenizer, tensors=Scored(vae))
    data = CachedDataset(tmp_path / "c", CONFIG)
    size, picks = data.batches.picks(2)
    batch = Prefetched(data).batch(2, WHOLE, CPU)
    assert batch.extra is not None and batch.extra.shape == (4, 5, size[0] // 8, size[1] // 8)
    for row, (i, _) in enumerate(picks):
        assert (batch.more["added"][row] == i / 2).all() and batch.more["added"].shape == (4, 8)
        white = 8 * (i + 1) * size[1] / (128 if i % 2 == 0 else 64)  # pixels of the bucket's width
        assert batch.extra[row, 0].mean().item() == pytest.approx(white / size[1], abs=0.13)
    assert len(batch.extra[:, 1:].flatten(1).unique(dim=0)) > 1

    Image.new("L", (8, 8)).save(folder / "mask3.png")
    with pytest.raises(ValueError, match=r"mask3.png: 8 x 8, expected 64 x 64 .*, as of .*3.png"):
        write(tmp_path / "c", folder_records(folder), small_tokenizer, tensors=Scored(vae))
    with pytest.raises(ValueError, match=r"0.png: expected an image 'mask' beside it, got nothing"):
        write(tmp_path / "d", folder_records(pictures), small_tokenizer, tensors=GivenMasks(vae))


def test_images_that_cannot_be_decoded_are_named_or_left_out(
    pictures: Path, small_tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "p"))
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="2.png: "):
        write(tmp_path / "c", folder_records(folder), small_tokenizer)
    with caplog.at_level(logging.WARNING, "kolors_core"):
        assert write(tmp_path / "c", folder_records(folder), small_tokenizer, skip_damaged=True) == 3
    assert f"left out: {folder}/2.png" in caplog.text
    data = CachedDataset(tmp_path / "c", CONFIG)
    assert sorted(i for part in data.batches.members.values() for i in part) == [0, 1, 3, 4, 5]
    for step in range(8):
        data.batch(step, WHOLE, CPU)


def test_functions_are_known_by_their_text_and_state() -> None:
    def one(record: Record, pixels: Tensor) -> Mapping[str, Tensor]:
        return {"a": pixels}

    first = digest_function(one)

    def one(record: Record, pixels: Tensor) -> Mapping[str, Tensor]:
        return {"a": 2 * pixels}

    vae, _ = models()
    keys = [first, *map(digest_function, (one, GivenMasks(vae), GivenMasks(vae, "other"), store_pixels))]
    assert len(set(keys)) == 5 and digest_function(GivenMasks(vae)) == keys[2]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            {"latents": torch.ones(1)},
            "by names without a dot, other than latents and size_ids",
        ),
        ({"a.b": torch.ones(1)}, "got 'a.b', a Tensor"),
        ({"a": 3}, "0.png: expected tensors .*, got 'a', a int"),
    ],
    ids=["latents", "dot", "number"],
)
def test_what_is_no_tensor_of_a_record_is_refused(
    found: dict[str, Any], message: str, pictures: Path, small_tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, folder_records(pictures), small_tokenizer, tensors=lambda *_: found)


def test_wrong_settings_are_named(
    written: Path, pictures: Path, cache: Path, small_tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="the source has no records"):
        write(tmp_path / "none", [], small_tokenizer)
    with pytest.raises(ValueError, match="tensors.64x64|a.64x64: records have different tensors"):
        lengths = iter(range(1, 9))
        write(tmp_path / "c", [*folder_records(pictures)][1::2], small_tokenizer,
              tensors=lambda *_: {"a": torch.ones(next(lengths))})  # fmt: skip
    (cache / "index.json").write_text('{"shards": ["../x"]}')
    with pytest.raises(ValueError, match="index.json: not an index of a cache"):
        CachedDataset(cache, CONFIG)
    with pytest.raises(ValueError, match="batch_size must be a positive whole number"):
        replace(CONFIG, batch_size=0)
    with pytest.raises(ValueError, match="data's batches have 4 images, rows 0 to 7 are asked for"):
        CachedDataset(written, CONFIG).batch(0, slice(0, 8), CPU)
    with pytest.raises(ValueError, match="workers must be a positive whole number, got 0"):
        Prefetched(CachedDataset(written, CONFIG), workers=0)
