"""The release of torch that runs, and marks of tests for what older releases cannot do (run: 2.6, 2.10)."""

import pytest
import torch
from torch.torch_version import TorchVersion

TORCH = TorchVersion(torch.__version__)
traces_whole = pytest.mark.skipif(
    TORCH < (2, 10), reason="torch 2.6's compiler cannot trace next() with a default or NamedTuple._replace"
)
shards_on_cpu = pytest.mark.skipif(TORCH < (2, 10), reason="torch 2.6 shards on accelerators only")
draws_rounded = pytest.mark.skipif(
    TORCH < (2, 13), reason="torch 2.10 draws other numbers in half precision than in float32"
)
