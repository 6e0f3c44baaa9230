"""Work distribution: one lock a job, released when its process exits, and a manifest of results.

A lock is one byte of a file (filelock would need a file a job). The system releases it when its process ends,
also by a kill, so there are no stale locks, no timeouts and no server that must stay alive. Processes may
join, leave and be killed, and several runs on one folder share the work. Byte locks work across machines that
mount one folder by NFS 4, Lustre, CephFS or GPFS; where they do not, a job may run twice, to the same file.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weights_convert.atomic_write import write_bytes

Record = dict[str, Any]


class JobLocks:
    """Locks of one process. Byte 0 is the manifest's; byte n is job n's, and is 1 while the job runs."""

    def __init__(self, file: Path) -> None:
        self.file, self.descriptor = file, os.open(file, os.O_RDWR | os.O_CREAT, 0o666)

    def acquire(self, number: int) -> bool:
        """Lock a job; False if another process holds it. OSError if the file system has no locks."""
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise OSError(f"{self.file}: expected a folder with file locks, got {error}") from None
        return True

    def mark_running(self, number: int, is_running: bool) -> None:
        """Record whether a job is running; the record remains if this process is killed."""
        os.pwrite(self.descriptor, b"\1" if is_running else b"\0", number)

    def was_interrupted(self, number: int) -> bool:
        """Return whether a process started the job and did not record its end."""
        return os.pread(self.descriptor, 1, number) == b"\1"

    def release(self, number: int) -> None:
        """Unlock a job."""
        fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, number)

    @contextmanager
    def manifest_lock(self) -> Iterator[None]:
        """Lock the manifest against writes of other processes, within a `with` block."""
        fcntl.lockf(self.descriptor, fcntl.LOCK_EX, 1, 0)
        try:
            yield
        finally:
            self.release(0)

    def close(self) -> None:
        """Release all locks."""
        os.close(self.descriptor)


class Manifest:
    """JSON Lines file of results, appended to as jobs end; a job's last record counts."""

    def __init__(self, file: Path, locks: JobLocks) -> None:
        self.file, self.locks = file, locks
        self.records: dict[int, Record] = {}
        self.inode, self.offset = -1, 0
        self.refresh()

    def refresh(self) -> list[Record]:
        """Read and return the records written since the last call; skip truncated ones."""
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
        """Append a record and flush it to the disk."""
        with self.locks.manifest_lock(), self.file.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            is_truncated = file.read(1) not in (b"", b"\n")
            file.write((b"\n" if is_truncated else b"") + _to_line(record))
            file.flush()
            os.fsync(file.fileno())

    def compact(self, complete: Callable[[dict[int, Record]], None]) -> None:
        """Rewrite the file atomically with one record a job, sorted by number.

        complete: corrects the records while the manifest is locked.
        """
        with self.locks.manifest_lock():
            self.refresh()
            complete(self.records)
            write_bytes(
                b"".join(_to_line(self.records[number]) for number in sorted(self.records)), self.file
            )


def _to_line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")
