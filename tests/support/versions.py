"""Marks of tests that older releases of torch cannot pass; run with 2.6.0, 2.10.0, 2.13.0 and 2.14.1."""

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
exports_chatglm = pytest.mark.skipif(
    (2, 10) <= TORCH < (2, 13), reason="torch 2.10 cannot prove, for strides, that min(16 S, 32 S) is 16 S"
)
exports_programs = pytest.mark.skipif(
    TORCH < (2, 13), reason="before 2.13 torch cannot leave open some sizes of group_norm and of strides"
)
