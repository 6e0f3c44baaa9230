"""Atomic writes, the one place where files are written: each appears whole under its name, or not at all.

Content is written to a scratch folder next to its target, flushed (fsync), and then renamed to the target in
one step. A full disk, an error or a killed process leaves the old file. A writer holds a lock on its scratch
folder; that of a killed one is unlocked, and the next write into the same folder removes it.
"""

import ctypes
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from weights_convert.untrusted_files import one_line

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed
    fcntl = None


SCRATCH = re.compile(r"\..*\.[0-9a-f]{16}\.partial")  # names of scratch folders


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Yield a scratch path that is renamed to `file`, replacing it, if the block succeeds.

    Raises OSError naming `file` if it cannot be written, such as on a full disk.
    """
    with naming(file), locked_scratch_dir(file) as scratch:
        path = scratch / file.name  # in a folder: safetensors writes a scratch file of its own next to it
        yield path
        _fsync(path)
        path.replace(file)
        _fsync(file.parent)


@contextmanager
def atomic_folder(folder: Path, may_replace: Callable[[Path], bool] = lambda folder: False) -> Iterator[Path]:
    """Yield a scratch folder that is renamed to `folder` if the block succeeds, and removed if not.

    may_replace: asked of an existing folder that is not empty; if it agrees, the folder is exchanged for the
    new one in one step. Raises FileExistsError for a folder that may not be replaced.
    """
    folder = Path(os.path.realpath(folder)) if folder.is_symlink() else folder
    if (aside := _aside(folder)).is_dir():  # of a writer that was killed, see `_exchange`
        _remove(aside) if folder.exists() else aside.replace(folder)
    is_full = folder.is_dir() and any(folder.iterdir())
    if not folder.is_dir() or (is_full and not may_replace(folder)):
        check_absent(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked_scratch_dir(folder) as scratch:
        yield scratch
        for path, _, _ in os.walk(scratch):
            _fsync(Path(path))
        if is_full:
            _exchange(scratch, folder)
        else:
            scratch.replace(folder)
        _fsync(folder.parent)


def _exchange(scratch: Path, folder: Path) -> None:
    """Exchange two folders in one step, or where the system cannot, such as on NFS, by renaming one by one.

    A writer killed between those renames leaves the old folder `_aside`; the next write moves it back.
    """
    if _exchange_in_one_step(scratch, folder):
        return
    folder.replace(aside := _aside(folder))
    try:
        scratch.replace(folder)
    except BaseException:
        aside.replace(folder)
        raise
    aside.replace(scratch)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _exchange_in_one_step(one: Path, other: Path) -> bool:
    """Exchange two folders by the system's own call; return whether it could."""
    names: tuple[bytes, bytes] = os.fsencode(one), os.fsencode(other)
    libc: Any = ctypes.CDLL(None) if fcntl is not None else None
    if hasattr(libc, "renameat2"):  # Linux; -100: relative to the working directory, 2: exchange
        return libc.renameat2(-100, names[0], -100, names[1], 2) == 0
    if hasattr(libc, "renamex_np"):  # macOS; 2: swap
        return libc.renamex_np(*names, 2) == 0
    return False


def check_absent(path: Path, suffix: str = "") -> None:
    """Raise ValueError for a path without the suffix, FileExistsError for one that exists."""
    if not path.name.endswith(suffix):
        raise ValueError(f"{path}: must end in {suffix}")
    if path.exists():
        raise FileExistsError(f"{path}: exists already, and is not overwritten")


def write_bytes(content: bytes, file: Path) -> None:
    """Write bytes to a file."""
    with atomic_file(file) as scratch:
        scratch.write_bytes(content)


def copy_file(source: Path, file: Path) -> None:
    """Copy a file."""
    with atomic_file(file) as scratch:
        shutil.copyfile(source, scratch)


def remove_stale_scratch(folder: Path) -> None:
    """Remove the scratch folders of this user's killed writers from a folder; without locks, none."""
    if fcntl is None:
        return
    with suppress(LocksUnsupported):
        for path in (folder / name for name in filter(SCRATCH.fullmatch, os.listdir(folder))):
            if (path.is_dir() or path.is_file()) and (lock := _lock(path)) is not None:
                if os.fstat(lock).st_uid == os.geteuid():
                    _remove(path)
                os.close(lock)


class LocksUnsupported(OSError):
    """Error of a file system without locks: scratch folders of living and killed writers look alike."""


@contextmanager
def locked_scratch_dir(target: Path) -> Iterator[Path]:
    """Yield a new locked folder next to the target, removed at the end; remove those of killed writers.

    An OSError that names a path in it names the target's instead, such as on a full disk.
    """
    remove_stale_scratch(target.parent)
    while True:
        # File names have at most 255 bytes.
        scratch = target.with_name(f".{target.name[:32]}.{secrets.token_hex(8)}.partial")
        scratch.mkdir()
        try:
            lock = _lock(scratch)
        except LocksUnsupported:
            lock = os.open(os.devnull, os.O_RDONLY)
        if lock is not None:
            break  # else another writer removed it before it was locked
    try:
        yield scratch
    except OSError as error:
        if str(scratch) not in str(error):
            raise
        text, name = (str(part).replace(str(scratch), str(target)) for part in (error, error.filename))
        raise (OSError(text) if error.errno is None else OSError(error.errno, error.strerror, name)) from None
    finally:
        _remove(scratch)
        os.close(lock)


def _lock(path: Path) -> int | None:
    """Lock a path: return a descriptor that holds the lock; None if another writer holds it or removed it.

    Raises LocksUnsupported if the file system has no locks.
    """
    if fcntl is None:
        return os.open(os.devnull, os.O_RDONLY)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # no FIFO, no link elsewhere
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(path), os.fstat(descriptor)):
            return descriptor
    except (BlockingIOError, PermissionError, FileNotFoundError):
        pass
    except OSError as error:
        os.close(descriptor)
        raise LocksUnsupported from error
    os.close(descriptor)
    return None


def _remove(path: Path) -> None:
    """Remove a file or folder if it exists and may be removed."""
    with suppress(OSError):
        path.unlink() if not path.is_dir() else shutil.rmtree(path)


def _fsync(path: Path) -> None:
    """Flush a file's bytes, or a folder's names, to the disk."""
    if fcntl is None and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Convert write errors to OSError that names the file, not its scratch path."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{file}: cannot be written: {one_line(error, None)}") from None
    except OSError as error:
        if error.errno is None:
            raise
        reason = str(error.strerror).removeprefix("cannot be written: ")  # of a block in this one
        raise OSError(error.errno, f"cannot be written: {reason}", str(file)) from None
