"""Compilation by block: each kind of repeated block is compiled once and serves all of its kind.

What stands between blocks stays as it is, so that a changed forward, another picture size or an attached
adapter needs no new compilation of the whole. A UNet of 2.58 billion parameters has 14 kinds among 87 blocks.
"""

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

from kolors_core.adapters.clip_vision import Layer as CLIPLayer
from kolors_core.adapters.ip_adapter import ResamplerLayer
from kolors_core.chatglm import Layer as ChatGLMLayer
from kolors_core.unet import ResBlock, TransformerBlock
from kolors_core.vae import Attention as VAEAttention
from kolors_core.vae import ResBlock as VAEResBlock

# What is compiled as one, comes to the accelerator as one, and in training is gathered (FSDP2) and recomputed
# (checkpointing) as one.
BLOCKS = (ResBlock, TransformerBlock, ChatGLMLayer, VAEResBlock, VAEAttention, CLIPLayer, ResamplerLayer)

# torch's modes that replay CUDA graphs, with those that compile the same without: here the whole step is one
# graph, see graphs.py.
GRAPHED: dict[str | None, str] = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
MODES = (None, "default", "max-autotune-no-cudagraphs", *GRAPHED)

VARIANTS = 64  # of one kind: batches, sizes, precisions, adapters on and off


def compile_blocks(model: nn.Module, mode: str | None = None, backend: str = "inductor") -> int:
    """Compile a model's blocks when they first run; returns how many kinds there are.

    mode, backend: as for `torch.compile`. A block is compiled whole or not at all, and anew where sizes,
    precision or adapters ask for it: the second picture size compiles for all sizes. ValueError for an
    unknown mode; torch's own error, never a slow path in silence, where a block cannot be compiled.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(str, MODES))}, got {mode!r}")
    options: dict[str, Any] = {"fullgraph": True, "mode": GRAPHED.get(mode, mode), "backend": backend}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # torch 2.13; before, 8 are allowed
        options["recompile_limit"] = VARIANTS
    kinds: dict[Any, Callable[..., Any]] = {}
    for block in model.modules():
        if isinstance(block, BLOCKS):
            kind = type(block), tuple(tensor.shape for tensor in block.state_dict().values())
            if kind not in kinds:
                kinds[kind] = torch.compile(_own_call(), **options)
            block._compiled_call_impl = partial(kinds[kind], block)
    return len(kinds)


def _call(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    return block._call_impl(*inputs, **named)  # with hooks, as calling the block does


def _own_call() -> Callable[..., Any]:
    """`_call` with a code object of its own: torch searches, and limits, compiled variants by code object."""
    return FunctionType(_call.__code__.replace(), _call.__globals__)
