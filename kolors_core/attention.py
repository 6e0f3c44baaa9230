"""Attention: the only call in the library, and the choice of its kernel at run time.

Shapes: B batch, H heads, L queries, S keys, D width of a head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# On a CPU the "matmul" kernel is faster than torch's flash kernel within these limits:
CPU_MAX_SCORES = 2**18  # scores of a head that stay in the cache, with
CPU_MIN_KEYS = 64  # at least this many keys;
CPU_WIDE_HEAD_MAX_SCORES = 2**24  # scores of a head wider than 128, with any number of keys
# On MPS a larger score matrix is computed in chunks of queries, to fit in memory.
MPS_SCORE_ELEMENTS = 2**28

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute softmax(q k^T / sqrt(D) + bias) v with the forced kernel, or else `select_kernel`'s.

    q: [B, H, L, D]; k, v: [B, H, S, D]; bias: None, or broadcastable to [B, H, L, S]: bool (True attends) or
    floats added to the logits, converted to q's dtype. Returns [B, H, L, D]. RuntimeError if a forced kernel
    cannot run these inputs.
    """
    name = _forced if _forced is not None else select_kernel(q, k)
    if bias is not None and bias.dtype != q.dtype and bias.dtype != torch.bool:
        bias = bias.to(q.dtype)  # cuDNN reads float32 as if it were q's half
    try:
        return KERNELS[name](q, k, v, bias)
    except RuntimeError as error:
        if _forced is None:
            raise
        inputs = f"q {list(q.shape)}, k {list(k.shape)}, {q.dtype} on {q.device}"
        inputs += f", {'without' if bias is None else 'with'} bias"
        raise RuntimeError(f"the forced attention kernel {name!r} cannot run {inputs}: {error}") from error


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Split channels into heads: [B, N, C] -> [B, heads, N, C/heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def log_multiplicity_bias(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the logit bias [B, 1, 1, S] that weighs each key as `counts` [B, S] equal keys."""
    return counts.to(torch.promote_types(dtype, torch.float32)).log().to(dtype)[:, None, None]


def select_kernel(q: Tensor, k: Tensor, device_type: str | None = None) -> str:
    """Select a kernel by name for these inputs on a type of device, their own if None.

    MPS: chunks of queries if there are many scores. CPU in bfloat16 without gradients: matrix products and a
    softmax where they are faster, by 1.6 on short rows and 1.7 on the VAE's wide head (benchmarks/NOTES.md).
    Otherwise: torch's choice. On Hopper GPUs torch 2.13 prefers cuDNN, earlier ones flash; whether the forced
    "cudnn_first" is faster there is not measured yet: `python -m benchmarks.speed.gpu OUT --only variants`.
    """
    device = q.device.type if device_type is None else device_type
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    if device == "mps" and batch * heads * queries * keys > MPS_SCORE_ELEMENTS:
        return "chunked"
    if device == "cpu" and q.dtype == torch.bfloat16 and not torch.is_grad_enabled():
        is_wide = width > 128 and queries * keys <= CPU_WIDE_HEAD_MAX_SCORES
        if is_wide or (keys >= CPU_MIN_KEYS and queries * keys <= CPU_MAX_SCORES):
            return "matmul"
    return "sdpa"


@contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """Force the kernel of this name in `KERNELS` within the block; ValueError for another name."""
    before = _forced
    force_kernel(name)
    try:
        yield
    finally:
        force_kernel(before)


def force_kernel(name: str | None) -> None:
    """Force the kernel of this name in `KERNELS`, of all models, or none; ValueError for another name."""
    global _forced
    if name is not None and name not in KERNELS:
        raise ValueError(f"attention kernel {name!r} is not one of {', '.join(KERNELS)}")
    _forced = name


def forced_kernel() -> str | None:
    """Return the name of the forced kernel, or None."""
    return _forced


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _with_backends(*backends: SDPBackend) -> Kernel:
    """Return a kernel that runs the first of torch's backends to accept its inputs."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        with sdpa_kernel(list(backends), set_priority=True):
            return _sdpa(q, k, v, bias)

    return kernel


def _chunked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a chunk of queries at a time: a softmax's rows are independent, so the result is the same."""
    queries = max(1, MPS_SCORE_ELEMENTS // (q.shape[0] * q.shape[1] * k.shape[2]))
    if bias is not None:
        bias = bias.expand(*bias.shape[:-2], q.shape[2], k.shape[2])  # [.., L, S]
    biases = repeat(None) if bias is None else bias.split(queries, dim=-2)
    parts = zip(q.split(queries, dim=2), biases, strict=False)
    return torch.cat([_sdpa(part, k, v, rows) for part, rows in parts], dim=2)  # [B, H, L, D]


def _matmul(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, H, L, S]
    if bias is not None:
        logits = logits.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else logits + bias
    return logits.softmax(dim=-1) @ v  # [B, H, L, D]


KERNELS: dict[str, Kernel] = {
    "sdpa": _sdpa, "flash": _with_backends(SDPBackend.FLASH_ATTENTION),
    "cudnn": _with_backends(SDPBackend.CUDNN_ATTENTION),
    "efficient": _with_backends(SDPBackend.EFFICIENT_ATTENTION),
    "cudnn_first": _with_backends(
        SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
    ),
    "chunked": _chunked, "matmul": _matmul,
}  # fmt: skip
_forced: str | None = None
