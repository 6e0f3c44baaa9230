"""Work distribution: one lock a job, released when its process exits, and a manifest of results.

A lock is one byte of a file. The system releases it when its process ends, also by a kill: no stale locks, no
timeouts, no server. Processes may join and leave, and several runs on one folder share the work. Byte locks
work across machines on NFS 4, Lustre, CephFS or GPFS; elsewhere a job may run twice, to the same file.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weights_convert.atomic_write import naming, write_bytes

Record = dict[str, Any]


class JobLocks:
    """Locks of one process. Byte 0 is the manifest's; byte n is job n's, and is 1 while the job runs."""

    def __init__(self, file: Path) -> None:
        _check_regular(file)
        self.file, self.descriptor = file, os.open(file, os.O_RDWR | os.O_CREAT, 0o666)

    @contextmanager
    def lock(self, number: int, is_waiting: bool = False) -> Iterator[bool]:
        """Lock a byte in a `with` block; False if another process holds it. OSError if there are no locks."""
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | (0 if is_waiting else fcntl.LOCK_NB), 1, number)
        except OSError as error:
            if is_waiting or not isinstance(error, BlockingIOError | PermissionError):
                raise OSError(f"{self.file}: expected a folder with file locks, got {error}") from None
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, number)

    def mark_running(self, number: int, is_running: bool) -> None:
        """Record whether a job is running; the record remains if this process is killed."""
        with naming(self.file):
            os.pwrite(self.descriptor, b"\1" if is_running else b"\0", number)

    def was_interrupted(self, number: int) -> bool:
        """Return whether a process started the job and did not record its end."""
        return os.pread(self.descriptor, 1, number) == b"\1"

    def close(self) -> None:
        """Release all locks."""
        os.close(self.descriptor)


class Manifest:
    """JSON Lines file of results, appended to as jobs end; a job's last record counts."""

    def __init__(self, file: Path, locks: JobLocks) -> None:
        self.file, self.locks, self.records = file, locks, dict[int, Record]()
        self.inode, self.offset = -1, 0
        self.refresh()

    def refresh(self) -> list[Record]:
        """Read and return the records written since the last call; skip truncated ones."""
        _check_regular(self.file)
        if not self.file.exists():
            return []
        with self.file.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self.inode or status.st_size < self.offset:
                self.inode, self.offset = status.st_ino, 0
            file.seek(self.offset)
            written = file.read()
        written = written[: written.rfind(b"\n") + 1]
        self.offset += len(written)
        records = []
        for text in written.splitlines():
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and type(record.get("line")) is int:
                records.append(record)
        self.records.update({record["line"]: record for record in records})
        return records

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record, on a line of its own, and flush it to the disk."""
        with self.locks.lock(0, is_waiting=True), naming(self.file), self.file.open("a+b") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            file.write((b"" if file.read(1) in (b"", b"\n") else b"\n") + _to_line(record))
            file.flush()
            os.fsync(file.fileno())

    def compact(self, complete: Callable[[dict[int, Record]], None]) -> None:
        """Rewrite the file atomically, sorted; `complete` corrects the records, with the manifest locked."""
        with self.locks.lock(0, is_waiting=True):
            self.refresh()
            complete(self.records)
            write_bytes(b"".join(_to_line(record) for _, record in sorted(self.records.items())), self.file)


def _check_regular(file: Path) -> None:
    """Raise OSError for a FIFO, which would wait for another process, a folder, socket or device."""
    if file.exists() and not file.is_file():
        raise OSError(f"{file}: expected a file, got a folder, FIFO, socket or device")


def _to_line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")
