"""Jobs of the page: one runs at a time, the others wait in line, and each can be cancelled.

A running job is cancelled as Ctrl-C ends a command: an exception is raised in the worker's thread, which ends
the step under way at torch's next operation, and the pipeline is as it was.
"""

import ctypes
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kolors_core.cli.options import FAULTS
from kolors_core.devices import is_out_of_memory
from weights_convert.untrusted_files import one_line

MOST_WAITING, KEPT = 32, 200  # jobs in line, and finished ones that are remembered
logger = logging.getLogger("kolors_core")


class Cancelled(KeyboardInterrupt):
    """Ends the job that is running."""


@dataclass
class Job:
    """Job in line, running or finished. work: called with the job, returns its result as JSON.

    state: "waiting", "running", "done", "failed" or "cancelled". step, steps: of the part that runs, such as
    "image 2 of 6". preview: the latents after the last step, as a PNG's address. notes: warnings.
    """

    title: str
    work: Callable[["Job"], Mapping[str, Any]]
    queue: "Queue"
    id: str = field(default_factory=lambda: secrets.token_urlsafe(8))
    state: str = "waiting"
    part: str = ""
    step: int = 0
    steps: int = 0
    preview: str = ""
    notes: list[str] = field(default_factory=list)
    result: Mapping[str, Any] | None = None
    error: str = ""
    began: float = 0.0
    seconds: float = 0.0

    def report(self, step: int, steps: int, part: str = "", preview: str = "") -> None:
        """Say how far it is; `Cancelled` if it was cancelled."""
        with self.queue.changed:
            self.step, self.steps, self.part = step, steps, part
            self.preview, self.seconds = preview or self.preview, time.monotonic() - self.began
            self.queue.note()

    def seen(self, place: int) -> dict[str, Any]:
        """Return what the page shows of it. place: how many jobs run or wait before it."""
        names = ("id", "title", "state", "part", "step", "steps", "preview", "notes", "result", "error")
        left = self.seconds / self.step * (self.steps - self.step) if self.step else None
        return {name: getattr(self, name) for name in names} | {"place": place, "left": left}


class Queue:
    """Line of jobs and the thread that runs them. changed: notified at each change, and the lock of all."""

    def __init__(self) -> None:
        self.changed, self.version, self.jobs = threading.Condition(), 0, dict[str, Job]()
        self.is_interruptible, self.is_closed = False, False
        self.worker = threading.Thread(target=self._run, name="kolors ui", daemon=True)
        self.worker.start()

    def note(self) -> None:
        """Wake those who wait for a change; the lock is held."""
        self.version += 1
        self.changed.notify_all()

    def add(self, title: str, work: Callable[[Job], Mapping[str, Any]]) -> Job:
        """Put a job at the end of the line; ValueError if that is too long."""
        with self.changed:
            if len(self._waiting()) >= MOST_WAITING:
                raise ValueError(f"{MOST_WAITING} jobs are waiting: cancel some, or try again later")
            job = Job(title, work, self)
            self.jobs[job.id] = job
            finished = [old for old in self.jobs.values() if old.state not in ("waiting", "running")]
            for old in finished[:-KEPT]:
                del self.jobs[old.id]
            self.note()
        return job

    def cancel(self, name: str) -> None:
        """Take a job out of the line, or end it if it runs; a finished one stays. KeyError without it."""
        with self.changed:
            job = self.jobs[name]
            if job.state == "waiting":
                job.state = "cancelled"
                self.note()
            elif job.state == "running" and self.is_interruptible:
                self.is_interruptible = False  # once is enough
                thread, kind = ctypes.c_ulong(self.worker.ident or 0), ctypes.py_object(Cancelled)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, kind)

    def wait(self, name: str, version: int, seconds: float = 20.0) -> tuple[int, dict[str, Any]]:
        """Wait until anything has changed since `version`; return the new one and what is seen of a job.

        KeyError for a job that is not there.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.version != version or self.is_closed, seconds)
            job = self.jobs[name]
            line = [other for other in self.jobs.values() if other.state == "running"] + self._waiting()
            place = line.index(job) if job in line else 0
            return self.version, job.seen(place)

    def close(self) -> None:
        """Cancel all jobs and end the thread."""
        for name in list(self.jobs):
            self.cancel(name)
        with self.changed:
            self.is_closed = True
            self.note()
        self.worker.join(60)

    def _waiting(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.state == "waiting"]

    def _run(self) -> None:
        while not self.is_closed:
            try:
                with self.changed:
                    self.changed.wait_for(lambda: self._waiting() or self.is_closed)
                    job = next(iter(self._waiting()), None)
                if job is not None:
                    self._run_one(job)
            except Cancelled:  # of a job that ended before it came
                continue

    def _run_one(self, job: Job) -> None:
        state, error, result = "cancelled", "", None
        with self.changed:
            if job.state != "waiting":
                return
            job.state, job.began, self.is_interruptible = "running", time.monotonic(), True
            self.note()
        handler = _Notes(job)
        logger.addHandler(handler)
        try:
            result, state = job.work(job), "done"
        except Cancelled:
            pass
        except FAULTS as fault:
            if isinstance(fault, RuntimeError) and not is_out_of_memory(fault):
                logger.exception("a fault of the library, please report it")
            state, error = "failed", one_line(fault, None)
        finally:
            logger.removeHandler(handler)
            with self.changed:
                self.is_interruptible = False
                job.state, job.error, job.result = state, error, result
                job.seconds = time.monotonic() - job.began
                self.note()


class _Notes(logging.Handler):
    """Keeps a job's warnings, which are logged in the worker's thread."""

    def __init__(self, job: Job) -> None:
        super().__init__(logging.WARNING)
        self.job, self.thread = job, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning."""
        if record.thread == self.thread and record.exc_info is None:
            self.job.notes.append(record.getMessage())
