"""The one place where files are written: each appears under its name whole, or not at all.

What is written goes to a scratch file beside its target, then to the disk (fsync), and only then takes the
target's name, in one step. A full disk, an error or a killed process leaves what was there before. A writer
holds a lock on its scratch; what a killed one left has none, and the next write of that name takes it away.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from weights_convert.untrusted_files import one_line

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be taken away
    fcntl = None


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """A scratch path that takes the name `file` if the block ends well, in the place of one that is there.

    Raises OSError naming `file` for what cannot be written, such as on a full disk.
    """
    with _naming(file), locked_scratch_dir(file) as scratch:
        whole = scratch / file.name  # alone in a folder: safetensors writes by a scratch of its own beside it
        yield whole
        _fsync(whole)
        whole.replace(file)
        _fsync(file.parent)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder that takes the name `folder` if the block ends well, and vanishes if not.

    Raises FileExistsError for a folder that has something in it, and is not overwritten.
    """
    if not folder.is_dir() or any(folder.iterdir()):
        check_absent(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked_scratch_dir(folder) as scratch:
        yield scratch
        for inside, _, _ in os.walk(scratch):
            _fsync(Path(inside))
        scratch.replace(folder)
        _fsync(folder.parent)


def check_absent(path: Path, suffix: str = "") -> None:
    """ValueError for a path that does not end so, FileExistsError if something is there."""
    if not path.name.endswith(suffix):
        raise ValueError(f"{path}: must end in {suffix}")
    if path.exists():
        raise FileExistsError(f"{path}: exists already, and is not overwritten")


def write_bytes(content: bytes, file: Path) -> None:
    """Write a small file."""
    with atomic_file(file) as scratch:
        scratch.write_bytes(content)


def copy_file(source: Path, file: Path) -> None:
    """Write a copy of another file."""
    with atomic_file(file) as scratch:
        shutil.copyfile(source, scratch)


def remove_stale_scratch(folder: Path, start: str = ".") -> None:
    """Take away what killed writers left in a folder, of names that start so."""
    left = re.compile(re.escape(start) + r".*[0-9a-f]{16}\.partial")
    with suppress(LocksUnsupported):
        for name in filter(left.fullmatch, os.listdir(folder)):
            if (lock := _lock(folder / name)) is not None:
                _remove(folder / name)
                os.close(lock)


class LocksUnsupported(OSError):
    """The file system has none: scratches of living writers and of killed ones look alike."""


@contextmanager
def locked_scratch_dir(target: Path) -> Iterator[Path]:
    """A new folder beside the target, locked, and gone at the end; those of killed writers go too."""
    start = f".{target.name[:32]}."  # names of files end at 255 bytes
    remove_stale_scratch(target.parent, start)
    while True:
        scratch = target.with_name(f"{start}{secrets.token_hex(8)}.partial")
        scratch.mkdir()
        try:
            lock = _lock(scratch)
        except LocksUnsupported:
            lock = os.open(os.devnull, os.O_RDONLY)
        if lock is not None:
            break  # and no other writer took it away before it was locked
    try:
        yield scratch
    finally:
        _remove(scratch)
        os.close(lock)


def _lock(path: Path) -> int | None:
    """A descriptor that holds the path's lock; None if another writer has it or took the path away.

    Raises NoLocks where nobody can lock.
    """
    if fcntl is None:
        return os.open(os.devnull, os.O_RDONLY)
    try:
        opened = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(path), os.fstat(opened)):
            return opened
    except (BlockingIOError, PermissionError, FileNotFoundError):
        pass
    except OSError as error:
        os.close(opened)
        raise LocksUnsupported from error
    os.close(opened)
    return None


def _remove(path: Path) -> None:
    """Take a file or folder away, if it is there and may be taken."""
    with suppress(OSError):
        path.unlink() if not path.is_dir() else shutil.rmtree(path)


def _fsync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, survive a loss of power."""
    if fcntl is None and path.is_dir():
        return
    opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turn what cannot be written into OSError that names the file, and not the scratch."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{file}: cannot be written: {one_line(error, None)}") from None
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(file)) from None
