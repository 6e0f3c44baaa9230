"""Who draws a line, and what became of it: claims that end with their process, and a manifest.

A claim is a lock on one byte of a file. The system takes it back when its process ends, however that ends:
there are no stale claims, no time after which a claim counts as stale, and nothing that must live on (a
counter in a store dies with the process that holds it, and forgets who had what). So processes may come, go
and be killed, and even two runs at once on one folder share the work. Locks of bytes hold across machines
that mount one folder by NFS 4, Lustre, CephFS, GPFS and the like; where they do not, a line may be drawn
twice, to the same file.
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


class Claims:
    """One process's claims. Byte 0 is the manifest's, byte n is line n's: 1 while it is being drawn."""

    def __init__(self, file: Path) -> None:
        self.file, self.descriptor = file, os.open(file, os.O_RDWR | os.O_CREAT, 0o666)

    def take(self, number: int) -> bool:
        """Claim a line; False if another process has it. OSError where the folder has no locks."""
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise OSError(f"{self.file}: wanted a folder with file locks, got {error}") from None
        return True

    def mark(self, number: int, is_at_work: bool) -> None:
        """Leave a trace that a line is being drawn, for when this process does not live to take it away."""
        os.pwrite(self.descriptor, b"\1" if is_at_work else b"\0", number)

    def was_cut_short(self, number: int) -> bool:
        """Whether a process began to draw the line and did not say that it ended."""
        return os.pread(self.descriptor, 1, number) == b"\1"

    def give(self, number: int) -> None:
        """Let a line go."""
        fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, number)

    @contextmanager
    def of_manifest(self) -> Iterator[None]:
        """Within it no other process writes the manifest."""
        fcntl.lockf(self.descriptor, fcntl.LOCK_EX, 1, 0)
        try:
            yield
        finally:
            self.give(0)

    def close(self) -> None:
        """Let everything go."""
        os.close(self.descriptor)


class Manifest:
    """JSON lines, of which the last one about a line counts.

    Appended to as lines end; at a run's end sorted, with one for each line.
    """

    def __init__(self, file: Path, claims: Claims) -> None:
        self.file, self.claims = file, claims
        self.records: dict[int, Record] = {}
        self.inode, self.offset = -1, 0
        self.refresh()

    def refresh(self) -> list[Record]:
        """Read what was written since; returns that. What a process left half written is passed over."""
        if not self.file.exists():
            return []
        with self.file.open("rb") as file:
            state = os.fstat(file.fileno())
            if state.st_ino != self.inode or state.st_size < self.offset:
                self.inode, self.offset = state.st_ino, 0
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
        """Append a record, and see it on the disk."""
        with self.claims.of_manifest(), self.file.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            is_torn = file.read(1) not in (b"", b"\n")
            file.write((b"\n" if is_torn else b"") + _text(record))
            file.flush()
            os.fsync(file.fileno())

    def settle(self, complete: Callable[[dict[int, Record]], None]) -> None:
        """Write it anew, whole or not at all: one record for each line, in their order.

        complete: puts records right while nobody else writes.
        """
        with self.claims.of_manifest():
            self.refresh()
            complete(self.records)
            write_bytes(b"".join(_text(self.records[number]) for number in sorted(self.records)), self.file)


def _text(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")
