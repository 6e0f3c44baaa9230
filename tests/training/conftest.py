"""A folder of images and its cache; a test file that wants others has fixtures of these names."""

import shutil
from pathlib import Path

import pytest

from kolors_core.training.sources import folder_records
from tests.support.cache_worker import write
from tests.training.test_data import write_pictures


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
