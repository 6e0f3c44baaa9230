"""The cache of latents and embeddings: its batches are those of memory, whoever wrote it and how often."""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kolors_core.training.cached_data import CachedDataset
from kolors_core.training.data import LatentDataset
from kolors_core.training.prefetch import Prefetched
from kolors_core.training.record_tensors import store_pixels
from kolors_core.training.run_record import differences
from kolors_core.training.sources import Record, folder_records
from kolors_core.training.step import Step
from kolors_core.training.trainer import Trainer
from tests.support.cache_worker import (
    CPU,
    batches_of_a_rank,
    hold_first_shard,
    models,
    write,
    write_or_die,
)
from tests.support.caches import files, memory, same
from tests.support.train_worker import CONFIG, Killed, make_trainer
from tests.support.two_processes import CONTEXT, start_two
from weights_convert.safetensors_files import Source

WHOLE = slice(0, 4)


@pytest.fixture(scope="module")
def in_memory(pictures: Path, small_tokenizer: Path) -> LatentDataset:
    return memory(LatentDataset, pictures, small_tokenizer)


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
