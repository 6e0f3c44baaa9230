"""Fixtures of the ablation's tests."""

from pathlib import Path

import pytest

from benchmarks.ablate.things import Things
from tests.support.ablations import small_lesson, write_modules


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of makers of denoisers."""
    return write_modules(tmp_path_factory.mktemp("modules"))


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Things:
    """The smallest lesson of images."""
    return small_lesson(tmp_path_factory.mktemp("images"))
