"""The benchmark of training on a large cache: its records are those in memory, pads of captions merged."""

from pathlib import Path

from benchmarks.big_data import CONFIG, CPU, InMemory, same, write
from kolors_core.training.cached_data import CachedDataset


def test_its_records_are_those_in_memory(tmp_path: Path) -> None:
    write(tmp_path, 48)
    cached, rows = CachedDataset(tmp_path, CONFIG), slice(0, CONFIG.batch_size)
    memory = InMemory(cached)
    for step in range(3):
        batch = cached.batch(step, rows, CPU)
        assert same(memory.batch(step, rows, CPU), batch)
        assert batch.text.counts is not None and batch.text.counts.sum(1).tolist() == 16 * [32.0]
        assert not same(memory.batch(step + 1, rows, CPU), batch)
