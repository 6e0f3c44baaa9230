"""Manifest of a run's results, which many processes write, with the locks of weights_convert/job_locks.py."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weights_convert.atomic_write import naming, write_bytes
from weights_convert.job_locks import JobLocks, check_regular

Record = dict[str, Any]


class Manifest:
    """JSON Lines file of results, appended to as jobs end; a job's last record counts."""

    def __init__(self, file: Path, locks: JobLocks) -> None:
        self.file, self.locks, self.records = file, locks, dict[int, Record]()
        self.inode, self.offset = -1, 0
        self.refresh()

    def refresh(self) -> list[Record]:
        """Read and return the records written since the last call; skip truncated ones."""
        check_regular(self.file)
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


def _to_line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")
