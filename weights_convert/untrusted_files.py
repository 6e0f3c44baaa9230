"""Untrusted files: regular files, JSON objects and safetensors headers, checked before use.

A damaged file is rejected with one line that names the file and the fault, before any tensor is read. The
format has no checksum: a flipped bit in a tensor's values goes undetected.
"""

import json
import os
import re
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any
from unicodedata import category

import torch
from safetensors import SafetensorError, safe_open

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
# The largest header of Kolors is a tenth of this; LoRA trainers write much about their data in theirs.
MAX_HEADER_BYTES = 2**24
MAX_EXPLAINED_BYTES = 2**20  # a longer faulty header is not searched for the fault
MAX_NAME_LENGTH = 500  # characters
MAX_TENSORS = 2**14  # in one file; all of Kolors has under 3,000
MAX_AXES = 16  # of a tensor; those of Kolors have at most 4
_LIST = re.compile(rb'\w"\s*:\s*\[')  # a field whose value is a list, however its name is escaped


def read_json_object(file: Path, longest: int) -> dict[str, Any]:
    """Read a JSON object of at most `longest` bytes. FileNotFoundError or ValueError naming the file."""
    check_file(file, longest)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: not JSON: {one_line(error)}") from None
    return parse_object(content, str(file))


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object from bytes; ValueError naming `where` they are from."""
    try:
        found = json.loads(content.decode("utf-8-sig"), object_pairs_hook=reject_duplicate_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(found).__name__}")
    return found


def open_safetensors(file: Path) -> Any:
    """Open a safetensors file and check its header against the file's length; return a handle.

    Raises FileNotFoundError, or ValueError naming the file and the faulty tensor or number, also for a dtype
    that is not in `DTYPES`.
    """
    size, header = check_file(file), b""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if fault := _length_fault(length, size):
                stream.seek(0)
                raise ValueError(_sniff_other_format(stream.read(64)) or fault)
            header = stream.read(length)
        handle = safe_open(file, framework="pt")
        names = handle.keys()
        # Each tensor has two lists. The library's reader takes the last of several tensors of one name.
        if sum(1 for _ in _LIST.finditer(header)) != 2 * len(names):
            raise ValueError(_header_fault(header, size) or "its header has unexpected lists")
        if len(names) > MAX_TENSORS:
            raise ValueError(f"it has {len(names):,} tensors, expected at most {MAX_TENSORS:,}")
    except (SafetensorError, OSError, ValueError) as error:
        fault = _header_fault(header, size) if isinstance(error, SafetensorError) else None
        raise ValueError(f"{file}: not a whole safetensors file: {fault or one_line(error)}") from None
    for name in names:
        if len(name) > MAX_NAME_LENGTH or not name.isprintable():
            raise ValueError(f"{file}: a tensor has the name {name[:100]!r}, expected a short, printable one")
        entry = handle.get_slice(name)
        if (dtype := entry.get_dtype()) not in DTYPES:
            raise ValueError(f"{file}: tensor {name} has dtype {dtype}, expected one of {', '.join(DTYPES)}")
        if (axes := len(entry.get_shape())) > MAX_AXES:
            raise ValueError(f"{file}: tensor {name} has {axes} axes, expected at most {MAX_AXES}")
    return handle


def metadata_of(file: Path) -> dict[str, str] | None:
    """Read the text metadata of a safetensors file that `open_safetensors` accepted, in the header's order.

    The library's reader returns them in another order in every process.
    """
    with file.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
    return json.loads(header).get("__metadata__")


def check_file(file: Path, longest: int | None = None) -> int:
    """Return the size of a regular file, or of a link's target, in bytes, before it is opened.

    A folder, pipe, socket or device raises ValueError, as more than `longest` bytes do; nothing there raises
    FileNotFoundError. Both name the file.
    """
    if not file.is_file():
        if file.exists():
            raise ValueError(f"{file}: not a file")
        raise FileNotFoundError(f"{file}: no such file")
    size = file.stat().st_size
    if longest is not None and size > longest:
        raise ValueError(f"{file}: {size:,} bytes, expected at most {longest:,}")
    return size


def check_inside(file: Path, folder: Path) -> None:
    """Raise ValueError for a file that leaves the folder, by its path or by a link.

    Links of a Hugging Face cache, from snapshots/ to blobs/, are followed.
    """
    real, root = (
        Path(os.path.realpath(path)) for path in (file, folder)
    )  # `resolve` fails at a link to itself
    blobs = (parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots")
    if not any(real.is_relative_to(allowed) for allowed in (root, *blobs)):
        raise ValueError(f"{file}: {real} is outside of {folder}")


def _length_fault(length: int, size: int) -> str | None:
    """Return the fault of a header's length in a file of `size` bytes, or None."""
    if size < 10:
        return f"it is {'empty' if size == 0 else f'{size} bytes long'}"
    if length > size - 8:
        return f"its header is {length:,} bytes by the first eight, and {size - 8:,} follow"
    if length > MAX_HEADER_BYTES:
        return f"its header is {length:,} bytes, expected at most {MAX_HEADER_BYTES:,}"
    return None


def _sniff_other_format(start: bytes) -> str | None:
    """Name the format of a file that is not safetensors by its first bytes, or return None."""
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer to the file, which `git lfs pull` fetches"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "it is a pickle under another name, which can run code and is never opened"
    return None


def _header_fault(header: bytes, size: int) -> str | None:
    """Return the fault of a header in a file of `size` bytes, by tensor and field; None if not found."""
    if len(header) > MAX_EXPLAINED_BYTES:
        return None
    try:
        entries = json.loads(header, object_pairs_hook=reject_duplicate_keys)
    except (ValueError, RecursionError) as error:
        return f"its header: {one_line(error)}"
    if not isinstance(entries, dict):
        return f"its header is {type(entries).__name__}, expected an object"
    entries.pop("__metadata__", None)
    spans = []
    for name, entry in entries.items():
        name = repr(name[:100])
        if not isinstance(entry, dict):
            return f"tensor {name} is {type(entry).__name__}, expected dtype, shape and data_offsets"
        for field in ("dtype", "shape", "data_offsets"):
            if field not in entry:
                return f"tensor {name}: {field} is missing"
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str):
            return f"tensor {name}: dtype is {type(dtype).__name__}, expected a name"
        if not _are_sizes(shape):
            return f"tensor {name}: shape is {repr(shape)[:100]}, expected sizes"
        if not _are_sizes(offsets) or len(offsets) != 2:
            return f"tensor {name}: data_offsets is {repr(offsets)[:100]}, expected two places in the file"
        if dtype in DTYPES and offsets[1] - offsets[0] != (need := prod(shape) * DTYPES[dtype].itemsize):
            return f"tensor {name}: data_offsets {offsets} do not span the {need:,} bytes of {dtype} {shape}"
        spans.append((*offsets, name))
    last = 0
    for start, end, name in sorted(spans):
        if start != last:
            expected = f"expected {last:,}, where the one before ends"
            return f"tensor {name}: data_offsets start at {start:,}, {expected}"
        last = end
    data = size - 8 - len(header)
    return None if last == data else f"its tensors end at {last:,}, and the data are {data:,} bytes"


def _are_sizes(value: Any) -> bool:
    is_short = isinstance(value, list) and len(value) < 64
    return is_short and all(type(size) is int and 0 <= size < 2**63 for size in value)


def reject_duplicate_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object (an `object_pairs_hook`); ValueError for a name that is given twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:100]!r} is given twice")
        found[name] = value
    return found


def printable(text: object) -> str:
    """Format a text for a terminal: controls, bidirectional overrides and what has no glyph are escaped.

    All letters, such as Chinese ones, spaces of any width and emoji, also joined ones, stay as they are.
    """
    kept = "\u200d"  # the joiner of emoji
    return "".join(
        char if char.isprintable() or char == kept or category(char) == "Zs"
        else char.encode("unicode_escape").decode()
        for char in str(text)
    )  # fmt: skip


def one_line(error: BaseException, most: int | None = 300) -> str:
    """Format an error's message, or its class if it has none, in one printable line of `most` characters."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"  # without "[Errno 28]"
    return printable(" ".join(text.split()))[:most] or type(error).__name__
