"""Page-locked memory for many tensors, in chunks of which torch's allocator need not round up any.

torch takes a power of two of bytes for each page-locked tensor, for all of Kolors 21.7 GB in place of 17.3,
and keeps what is freed. So tensors share chunks whose sizes are powers of two already.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, of a tensor in its chunk: as of torch's own on a CPU
# Bytes, unless a tensor is larger. A chunk's tensors are in memory twice while it is filled or emptied.
LARGEST_CHUNK = 2**28


def place(sizes: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Place tensors of these numbers of bytes: the chunks' sizes, and the chunk and offset of each tensor.

    The largest first, each in the first chunk with room. A new chunk is no larger than what is left to place,
    so that the last ones are small.
    """
    rounded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    left, chunks, used = sum(rounded), list[int](), list[int]()
    places = [(0, 0)] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -rounded[i]):
        fitting = (c for c, size in enumerate(chunks) if size - used[c] >= rounded[i])
        if (chunk := next(fitting, None)) is None:
            chunk, room = len(chunks), min(1 << max(left, 1).bit_length() - 1, LARGEST_CHUNK)
            chunks.append(max(room, 1 << max(rounded[i] - 1, 0).bit_length()))
            used.append(0)
        places[i] = chunk, used[chunk]
        used[chunk], left = used[chunk] + rounded[i], left - rounded[i]
    return chunks, places


def pin(tensors: Sequence[Tensor]) -> None:
    """Move the data of tensors on the CPU to page-locked memory, chunk by chunk."""
    chunks, places = place([tensor.nbytes for tensor in tensors])
    for number, size in enumerate(chunks):
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        for tensor, (chunk, offset) in zip(tensors, places, strict=True):
            if chunk == number:
                flat = memory[offset : offset + tensor.nbytes].view(tensor.dtype)
                strides = torch.empty_like(tensor, device="meta").stride()  # its own, unless it has gaps
                tensor.data = flat.as_strided(tensor.shape, strides, flat.storage_offset()).copy_(tensor.data)


def unpin(tensors: Sequence[Tensor]) -> None:
    """Move the data of tensors from page-locked to ordinary memory, and free it chunk by chunk."""
    by_chunk: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_pinned():
            by_chunk.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    for group in by_chunk.values():
        for tensor in group:
            tensor.data = tensor.data.clone()
        _empty_host_cache()


def _empty_host_cache() -> None:
    """Return freed page-locked memory, which torch keeps, to the system."""
    # The first is in newer releases of torch, the second in older ones.
    free: Any = getattr(torch.accelerator, "empty_host_cache", None)
    free = free or getattr(torch._C, "_host_emptyCache", None)
    if free is not None:
        free()
