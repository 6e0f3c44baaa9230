"""The only attention call of the library, and the choice of its kernel at run time.

Shapes: B batch, H heads, L queries, S keys, D width of a head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# On a CPU the scores of a head are written out where that is faster than torch's flash kernel:
CPU_SCORES = 2**18  # up to so many, which stay in its cache,
CPU_FEWEST_KEYS = 64  # of at least so many keys;
CPU_WIDE_SCORES = 2**24  # or up to so many, of heads wider than 128

# On MPS a score matrix of more elements than this is computed in chunks of queries, to fit in memory.
MPS_SCORE_ELEMENTS = 2**28

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, by the kernel that suits device and shapes or the one forced.

    q: [B, H, L, D]; k, v: [B, H, S, D]; bias: None, or broadcastable to [B, H, L, S]: bool (True attends) or
    floats added to the logits. Returns [B, H, L, D]. RuntimeError if a forced kernel cannot run these inputs.
    """
    name = _forced if _forced is not None else choose(q, k)
    try:
        return KERNELS[name](q, k, v, bias)
    except RuntimeError as error:
        if _forced is None:
            raise
        with_bias = "with" if bias is not None else "without"
        what = f"q {list(q.shape)}, k {list(k.shape)}, {q.dtype} on {q.device}, {with_bias} bias"
        raise RuntimeError(f"the forced attention kernel {name!r} cannot run {what}: {error}") from error


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, C] -> [B, heads, N, C/heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def count_bias(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to the logits of keys that each stand for `counts` [B, S] equal ones: [B, 1, 1, S]."""
    return counts.to(torch.promote_types(dtype, torch.float32)).log().to(dtype)[:, None, None]


def choose(q: Tensor, k: Tensor) -> str:
    """Name of the kernel for these inputs.

    CUDA: what shapes, precision and bias allow; cuDNN's before flash on Hopper, where alone it is the faster
    (six GPUs in https://github.com/huggingface/transformers/pull/48163). MPS: query chunks where the scores
    are many. CPU: in bfloat16, without gradients, matrix products and a softmax where they are faster:
    1.6 times on short rows and 1.7 on the VAE's wide head (benchmarks/NOTES.md). Else torch's own.
    """
    device, (batch, heads, queries, width), keys = device_type(q), q.shape, k.shape[2]
    if q.device.type == "cuda" and torch.cuda.get_device_properties(q.device).major == 9:
        return "cudnn_first"
    if device == "mps" and batch * heads * queries * keys > MPS_SCORE_ELEMENTS:
        return "chunked"
    if device == "cpu" and q.dtype == torch.bfloat16 and not torch.is_grad_enabled():
        is_wide = width > 128 and queries * keys <= CPU_WIDE_SCORES
        if is_wide or (keys >= CPU_FEWEST_KEYS and queries * keys <= CPU_SCORES):
            return "written_out"
    return "sdpa"


@contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """Force the kernel of this name in `KERNELS` within the block; ValueError if there is none such."""
    global _forced
    if name not in KERNELS:
        raise ValueError(f"attention kernel {name!r} is not one of {', '.join(KERNELS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced_kernel() -> str | None:
    """The name of the kernel that is forced here, if one is."""
    return _forced


@contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Within the block, tensors on the meta device get the kernels and the memory of this type of device."""
    global _planned_for
    before, _planned_for = _planned_for, device
    try:
        yield
    finally:
        _planned_for = before


def device_type(x: Tensor) -> str:
    """What kind of device a tensor is on, or on the meta device, which kind it is planned for."""
    kind = x.device.type
    return _planned_for if kind == "meta" and _planned_for is not None else kind


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    if q.is_meta and _planned_for is not None:
        return _memory_of(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _first_of(*backends: SDPBackend) -> Kernel:
    """The first of torch's kernels that can."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        with sdpa_kernel(list(backends), set_priority=True):
            return _sdpa(q, k, v, bias)

    return kernel


def _chunked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Rows of a softmax are independent: some queries at a time give the same result in less memory."""
    queries = max(1, MPS_SCORE_ELEMENTS // (q.shape[0] * q.shape[1] * k.shape[2]))
    if bias is not None:
        bias = bias.expand(*bias.shape[:-2], q.shape[2], k.shape[2])  # [.., L, S]
    parts = []
    for start in range(0, q.shape[2], queries):
        rows = slice(start, start + queries)
        parts.append(_sdpa(q[:, :, rows], k, v, None if bias is None else bias[..., rows, :]))
    return torch.cat(parts, dim=2)  # [B, H, L, D]


def _memory_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What torch's fused kernels allocate, and on MPS, which has none, its one matrix of scores."""
    rows = (*q.shape[:-1], k.shape[2]) if _planned_for == "mps" else q.shape[:-1]
    kept = q.new_empty(rows, dtype=None if _planned_for == "mps" else torch.float32)  # scores, or logsumexp
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)  # [B, H, L, D]
    del kept
    return out


def _written_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, H, L, S]
    if bias is not None:
        logits = logits.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else logits + bias
    return logits.softmax(dim=-1) @ v  # [B, H, L, D]


KERNELS: dict[str, Kernel] = {
    "sdpa": _sdpa,
    "flash": _first_of(SDPBackend.FLASH_ATTENTION),
    "cudnn": _first_of(SDPBackend.CUDNN_ATTENTION),
    "efficient": _first_of(SDPBackend.EFFICIENT_ATTENTION),
    "cudnn_first": _first_of(
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ),
    "chunked": _chunked,
    "written_out": _written_out,
}
_forced: str | None = None
_planned_for: str | None = None  # a device's type
