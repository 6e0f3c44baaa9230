"""The cache of latents and embeddings: its batches are those of memory, whoever wrote it and how often."""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
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
from kolors_core.training.data import Batch, Batches, LatentDataset, MaskedLatentDataset, read_folder
from kolors_core.training.prefetch import Prefetched
from kolors_core.training.record_tensors import ControlImages, GivenMasks, store_pixels
from kolors_core.training.run_record import differences
from kolors_core.training.sources import Record, folder_records
from kolors_core.training.step import Step
from kolors_core.training.trainer import Trainer
from tests.support.cache_worker import (
    CPU,
    SIZES,
    batches_of_a_rank,
    hold_first_shard,
    models,
    write,
    write_or_die,
)
from tests.support.train_worker import CONFIG, Killed, make_trainer
from tests.support.two_processes import CONTEXT, start_two
from tests.training.test_data import write_pictures
from weights_convert.safetensors_files import Source

WHOLE = slice(0, 4)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def written(pictures: Path, small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    assert write(folder, folder_records(pictures), small_tokenizer) == 6
    return folder


@pytest.fixture
def cache(written: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written, tmp_path / "cache"))


@pytest.fixture(scope="module")
def in_memory(pictures: Path, small_tokenizer: Path) -> LatentDataset:
    return memory(LatentDataset, pictures, small_tokenizer)


def memory(kind: type[LatentDataset], pictures: Path, tokenizer: Path, **more: Any) -> LatentDataset:
    (vae, text), examples = models(), read_folder(pictures)
    batches = Batches(examples, SIZES, CONFIG.batch_size, CONFIG.seed)
    return kind(examples, batches, vae, Tokenizer(tokenizer), CONFIG, text, **more)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".locks"}


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors of a batch, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value if isinstance(value, Mapping) else vars(value) if hasattr(value, "__dict__") else {}
    return [tensor for name in sorted(parts) for tensor in tensors_of(parts[name])]


def same(one: Batch, other: Batch) -> bool:
    pairs = list(zip(tensors_of(one), tensors_of(other), strict=True))
    return len(pairs) >= 7 and all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in pairs)


def test_batches_are_those_of_memory_bit_for_bit(written: Path, in_memory: LatentDataset) -> None:
    data = CachedDataset(written, CONFIG)
    for step in range(20):
        assert same(data.batch(step, WHOLE, CPU), in_memory.batch(step, WHOLE, CPU))
    assert same(data.batch(3, slice(1, 3), CPU), in_memory.batch(3, slice(1, 3), CPU))
    assert not same(data.batch(3, WHOLE, CPU), in_memory.batch(4, WHOLE, CPU))
    assert isinstance(data.batches.members[(64, 64)][0], int), "and of little memory"


def test_workers_resuming_and_other_orders_change_no_batch(
    written: Path, in_memory: LatentDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, two micro-batches a step; then from another step, and what nobody expects."""
    data, parts = Prefetched(CachedDataset(written, CONFIG)), (slice(0, 2), slice(2, 4))
    asked = [(step, rows) for step in (*range(4), *range(7, 10)) for rows in parts]
    asked += [(9, slice(1, 4)), (2, WHOLE), (3, WHOLE), (4, WHOLE)]
    own = list[int]()  # of batches made in this process
    batch, state = data.source.batch, torch.get_rng_state()
    monkeypatch.setattr(data.source, "batch", lambda step, *rest: own.append(step) or batch(step, *rest))
    for step, rows in asked:
        assert same(data.batch(step, rows, CPU), in_memory.batch(step, rows, CPU)), (step, rows)
    assert own == [0, 0, 7, 7, 9, 2], "workers made the others"
    assert torch.equal(torch.get_rng_state(), state), "a model's dropout is not disturbed"
    assert data.record() == data.source.record()


def test_ranks_have_the_rows_of_one_process(
    written: Path, in_memory: LatentDataset, tmp_path: Path
) -> None:  # fmt: skip
    """Each with two workers."""
    ranks = [CONTEXT.Process(target=batches_of_a_rank, args=(rank, written, tmp_path)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    for step in range(3):
        whole = in_memory.batch(step, WHOLE, CPU)
        for row in range(4):
            part = Source([tmp_path / f"{step}-{row}.safetensors"])
            assert torch.equal(part["latents"][0], whole.latents[row])
            assert torch.equal(part["noise"][0], whole.noise[row])
            assert torch.equal(part["pooled"][0], whole.text.pooled[row])


def test_a_run_on_a_cache_has_the_losses_of_one_in_memory_and_resumes(
    pictures: Path, written: Path, small_tokenizer: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, steps=3, save_every=2, gradient_accumulation_steps=2)
    expected = make_trainer(tmp_path / "memory", pictures, small_tokenizer, config).fit()
    data, losses = Prefetched(CachedDataset(written, config), 1), list[float]()

    def killed(step: Step) -> None:
        losses.append(step.loss)
        if step.step == 2:
            raise Killed

    for on_step in (killed, lambda step: losses.append(step.loss)):
        trainer = make_trainer(tmp_path / "none", pictures, small_tokenizer, config)
        with suppress(Killed):
            Trainer(trainer.loss, data, config, tmp_path / "disk", on_step).fit(progress=False)
    assert losses == [*expected, expected[2]], "killed in its third step, and resumed from the second"


def test_a_killed_process_s_shards_are_written_by_another(
    written: Path, pictures: Path, small_tokenizer: Path, tmp_path: Path
) -> None:
    """Killed with the lock of a shard; and the files are the same as one process's."""
    killed, other = start_two(write_or_die, tmp_path / "log", pictures, small_tokenizer, tmp_path)
    killed.join(120)
    other.join(120)
    assert (killed.exitcode, other.exitcode) == (-9, 0), (tmp_path / "log").read_text()[-3000:]
    assert (tmp_path / "encoded.txt").read_text() == "6"
    assert files(tmp_path / "cache") == files(written)


def test_a_shard_that_another_process_has_is_waited_for(
    written: Path, pictures: Path, small_tokenizer: Path, tmp_path: Path
) -> None:
    """It ends without the first shard, which is then written last; a stream cannot be read for it again."""
    for kind in ("stream", "folder"):
        folder = tmp_path / kind
        folder.mkdir()
        other = CONTEXT.Process(target=hold_first_shard, args=(folder, tmp_path / f"{kind}.ready"))
        other.start()
        while not (tmp_path / f"{kind}.ready").exists():
            assert other.is_alive()
            time.sleep(0.01)
        if kind == "stream":
            with pytest.raises(OSError, match="another process ended before its shards: run this again"):
                write(folder, iter(folder_records(pictures)), small_tokenizer)
            assert len(files(folder)) == 2
        else:
            assert write(folder, folder_records(pictures), small_tokenizer) == 6
            times = [file.stat().st_mtime_ns for file in sorted(folder.glob("*.safetensors"))]
            assert max(times) == times[0] and files(folder) == files(written)
        other.join(120)


def test_an_interrupted_cache_goes_on_and_is_not_read_before(
    written: Path, pictures: Path, small_tokenizer: Path, tmp_path: Path
) -> None:
    def interrupted() -> Iterator[Record]:
        yield from list(folder_records(pictures))[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cache", interrupted(), small_tokenizer)
    with pytest.raises(FileNotFoundError, match="index.json: no such file: `write_cache` writes it when"):
        CachedDataset(tmp_path / "cache", CONFIG)
    before = files(tmp_path / "cache")
    assert write(tmp_path / "cache", folder_records(pictures), small_tokenizer) == 2, "two shards were there"
    assert len(before) == 2 and files(tmp_path / "cache") == files(written)
    assert write(tmp_path / "cache", folder_records(pictures), small_tokenizer) == 0


def test_what_changed_is_encoded_again_and_nothing_else(
    pictures: Path, cache: Path, small_tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, known = Path(shutil.copytree(pictures, tmp_path / "p")), CachedDataset(cache, CONFIG).record()

    def encoded(**settings: Any) -> int:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "kolors_core"):
            return write(cache, folder_records(folder), small_tokenizer, **settings)

    def differ() -> list[str]:
        return differences(json.dumps(known), CachedDataset(cache, CONFIG).record())

    os.utime(folder / "2.png", (1, 1))
    assert encoded() == 0 and not caplog.messages and not differ(), "another time, the same image"
    times = [file.stat().st_mtime_ns for file in cache.iterdir()]
    assert encoded() == 0 and times == [file.stat().st_mtime_ns for file in cache.iterdir()], "and is known"
    Image.new("RGB", (64, 64), "red").save(folder / "3.png")
    assert encoded() == 1 and "images or captions are others, or in another order" in caplog.text
    assert differ() == ["shards: 1 of 3 are new, 1 of the 3 there are gone"]
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    shutil.copy(folder / "0.png", folder / "new.png")
    first = json.dumps({"file_name": "new.png", "text": "a new one"})
    (folder / "metadata.jsonl").write_text("\n".join([first, *lines]))
    assert encoded() == 1, "all others moved by one place"
    assert "7 records, 1 encoded, 6 taken from older shards" in caplog.text
    assert sum(map(len, CachedDataset(cache, CONFIG).batches.members.values())) == 7
    (folder / "metadata.jsonl").write_text("\n".join(lines[1:]))
    assert encoded() == 0 and len(files(cache)) == 1 + 3, "fewer, and older shards are gone"
    assert encoded(max_tokens=11) == 5
    assert "shards of other models or settings are made again: max_tokens: 12 there, 11 here" in caplog.text
    with pytest.raises(ValueError, match="max_tokens must be the cache's, 11, got 12"):
        CachedDataset(cache, CONFIG)
    assert encoded(tensors=store_pixels) == 5 and "tensors: None there" in caplog.text


def test_another_model_s_cache_is_made_again(
    pictures: Path, cache: Path, small_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, text = map(deepcopy, models())
    with torch.no_grad():
        vae.encoder.conv_out.bias[0] += 0.1
    monkeypatch.setattr("tests.support.cache_worker.models", lambda: (vae, text))
    before = CachedDataset(cache, CONFIG)
    assert write(cache, folder_records(pictures), small_tokenizer) == 6
    after = CachedDataset(cache, CONFIG)
    assert not same(before.batch(0, WHOLE, CPU), after.batch(0, WHOLE, CPU))
    assert before.made_by["vae"] != after.made_by["vae"]


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


def place_of(file: Path, name: str) -> int:
    """Where a tensor's bytes begin."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return 8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][0]


@pytest.mark.parametrize("what", ["latents.64x64", "tokens", "contents", "cut", "renamed"])
def test_a_damaged_shard_is_refused_and_made_again(
    what: str, pictures: Path, cache: Path, written: Path, small_tokenizer: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """A flipped bit in a record, an embedding and the index; half a file, and another's."""
    file = sorted(cache.glob("*.safetensors"))[1]
    if what == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif what == "renamed":
        shutil.copy(sorted(cache.glob("*.safetensors"))[0], file)
    else:
        flip(file, place_of(file, what) + 5)
    faults = {"cut": "not a whole safetensors", "renamed": "another digest", "contents": "its index"}
    fault = faults.get(what, "does not have its checksum")
    with pytest.raises(ValueError, match=f"{file.name}: .*{fault}.*renamed, and `write_cache` makes"):
        data = CachedDataset(cache, CONFIG)
        for step in range(20):
            data.batch(step, WHOLE, CPU)
    with pytest.raises(FileNotFoundError, match="no such file: `write_cache` makes it"):
        CachedDataset(cache, CONFIG)
    assert write(cache, folder_records(pictures), small_tokenizer) == 2
    assert files(cache) == files(written)
    if what in ("cut", "contents"):  # what can be seen without reading all
        shutil.copy(cache.parent / "cache" / file.name, cache / "kept")
        flip(file, place_of(file, "contents"))
        with caplog.at_level(logging.WARNING, "kolors_core"):
            assert write(cache, folder_records(pictures), small_tokenizer) == 2
        assert f"{file}: not a whole shard: its index does not have its checksum, and encoded" in caplog.text


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
    with pytest.raises(ValueError, match="workers must be a positive whole number, got 0"):
        Prefetched(CachedDataset(written, CONFIG), workers=0)
