"""How many threads and processes run the tests; the fixtures are in support/fixtures.py."""

import gc
import os
import warnings

import pytest

# One thread unless the environment says otherwise: the models are tiny, a second costs more than it brings.
# Processes that tests start inherit it.
THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))
warnings.filterwarnings("ignore", module="diffusers")
gc.disable()  # until all is imported: a sixth of the time went into looking for garbage among modules


def pytest_xdist_auto_num_workers() -> int:
    """Two processes of one thread, or one of more: two of two wait for each other, 20 times as long."""
    return max(1, 2 // THREADS)


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, and with them torch and the reference, in the processes that run tests alone."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        import torch

        torch.set_num_threads(THREADS)
        if not torch.cuda.is_available():  # then its interpreter runs Triton's kernels
            os.environ.setdefault("TRITON_INTERPRET", "1")
        config.pluginmanager.import_plugin("tests.support.fixtures")


def pytest_collection_finish() -> None:
    """Collect garbage from here on, of what tests make: modules stay."""
    gc.freeze()
    gc.enable()
