"""Opt-in ways to compute the same image, raced against the plain pipeline: one entry each adds a row.

An entry is the work in words, the most of the plain pipeline's time that it is to take, and a context within
which a pipeline runs so; methods of a pipeline are `switched`. The stage `variants` writes
`gpu_NAME`: the share of the plain pipeline's time at 1024x1024, with that at 512x512 and the error beside it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from kolors_core.attention import attention_kernel

Context = Callable[[Any], AbstractContextManager[None]]


def switched(enable: str, disable: str) -> Context:
    """Methods of a pipeline as a context."""

    @contextmanager
    def context(pipe: Any) -> Iterator[None]:
        getattr(pipe, enable)()
        try:
            yield
        finally:
            getattr(pipe, disable)()

    return context


VARIANTS: dict[str, tuple[str, float, Context]] = {
    "attention": ("attention by cuDNN first", 1.0, lambda pipe: attention_kernel("cudnn_first")),
    "vae_tiling": ("the VAE in tiles", 1.1, switched("enable_vae_tiling", "disable_vae_tiling")),
    "fused_kernels": ("fused kernels", 1.0, switched("enable_fused_kernels", "disable_fused_kernels")),
    "fused_projections": (
        "fused projections",
        1.0,
        switched("fuse_qkv_projections", "unfuse_qkv_projections"),
    ),
    "half_vae": (
        "the VAE in half precision",
        1.0,
        switched("enable_vae_half_precision", "disable_vae_half_precision"),
    ),
}
