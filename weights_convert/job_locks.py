"""Locks of jobs that many processes share: one byte of a file for each, released when its process exits.

The system releases a lock when its process ends, also by a kill: no stale locks, no timeouts, no server.
Processes may join and leave, and several runs on one folder share the work. Byte locks work across machines
on NFS 4, Lustre, CephFS or GPFS; elsewhere a job may run twice, to the same file.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weights_convert.atomic_write import naming


class JobLocks:
    """Locks of one process. Byte 0 is of all jobs; byte n is job n's, and is 1 while the job runs."""

    def __init__(self, file: Path) -> None:
        check_regular(file)
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


def check_regular(file: Path) -> None:
    """Raise OSError for a FIFO, which would wait for another process, a folder, socket or device."""
    if file.exists() and not file.is_file():
        raise OSError(f"{file}: expected a file, got a folder, FIFO, socket or device")
