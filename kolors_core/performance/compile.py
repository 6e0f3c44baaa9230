"""Compilation by block: each kind of repeated block is compiled once, for all blocks of its kind.

The code between blocks is not compiled, so a changed forward, another image size or an attached adapter needs
no new compilation of the whole model. Kolors' UNet has 14 kinds among 87 blocks (see `module.is_block`).
"""

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

from kolors_core.module import find_blocks

# torch's modes that replay CUDA graphs, and the same modes without: cuda_graphs.py records whole steps.
CUDA_GRAPH_MODES: dict[str | None, str] = {
    "reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs",
}  # fmt: skip
MODES = (None, "default", "max-autotune-no-cudagraphs", *CUDA_GRAPH_MODES)
RECOMPILE_LIMIT = 64  # of one kind: batches, sizes, precisions, adapters on and off


def compile_blocks(model: nn.Module, mode: str | None = None, backend: str = "inductor") -> int:
    """Compile a model's blocks when they first run, and return the number of kinds.

    mode, backend: as for `torch.compile`. A block is compiled whole or not at all, and again for new sizes,
    precisions or adapters; the second image size compiles for all sizes. Blocks that FSDP2 shards are
    compiled after they are, without their hooks. ValueError for an unknown mode, and for a model without
    blocks; torch's own error, and no fallback to a slower path, where a block cannot be compiled.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(str, MODES))}, got {mode!r}")
    options = dict[str, Any](fullgraph=True, mode=CUDA_GRAPH_MODES.get(mode, mode), backend=backend)
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = RECOMPILE_LIMIT
    else:
        _raise_recompile_limit()
    compiled: dict[Any, Callable[..., Any]] = {}  # by kind
    for block in find_blocks(model, "compile"):
        is_sharded = hasattr(block, "unshard")  # a method of FSDPModule, whose import takes a second
        kind = type(block), tuple(tensor.shape for tensor in block.state_dict().values())
        if kind not in compiled:
            # torch finds, and limits, compiled variants by code object: each kind gets its own.
            code = (_forward if is_sharded else _call).__code__.replace()
            compiled[kind] = torch.compile(FunctionType(code, globals()), **options)
        if is_sharded:  # hooks that gather its weights stay outside, as they cannot be compiled
            block.forward = partial(compiled[kind], block)
        else:
            block._compiled_call_impl = partial(compiled[kind], block)
    return len(compiled)


def _raise_recompile_limit() -> None:
    """Allow the whole process as many variants: torch before 2.13 knows no other limit, and has 8."""
    from torch._dynamo import config

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before torch 2.7
    setattr(config, name, max(getattr(config, name), RECOMPILE_LIMIT))


def _forward(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    return type(block).forward(block, *inputs, **named)


def _call(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    return block._call_impl(*inputs, **named)  # with hooks, as calling the block does
