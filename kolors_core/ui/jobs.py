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

MOST_WAITING, KEPT = 32, 20  # jobs in line, and finished ones that are remembered
logger = logging.getLogger("kolors_core")


class Cancelled(KeyboardInterrupt):
    """Ends the job that is running."""


@dataclass
class Job:
    """Job in line, running or finished. work: called with the job, returns its result as JSON.

    state: "waiting", "running", "done", "failed" or "cancelled". step, steps: of the part that runs, such as
    "image 2 of 6". preview: the latents after the last step, as a PNG's address. left: seconds, of all parts,
    judged by the steps after the first, before which models are loaded. notes: warnings.
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
    left: float | None = None
    first: tuple[float, float] | None = None
    is_cancelled: bool = False

    def report(
        self, step: int, steps: int, part: str = "", preview: str = "", done: float | None = None
    ) -> None:
        """Say how far it is. done: the share of the whole job, step / steps if it has one part."""
        done, now = step / steps if done is None else done, time.monotonic()
        with self.queue.changed:
            self.step, self.steps, self.part = step, steps, part
            self.preview, self.first = preview or self.preview, self.first or (done, now)
            if done > self.first[0]:
                self.left = (now - self.first[1]) / (done - self.first[0]) * (1 - done)
            self.queue.note()

    def finish(self, cleanup: Callable[[], None]) -> None:
        """Call what may not be ended in its middle; raises `Cancelled` after it if that was asked for."""
        try:
            with self.queue.changed:
                self.queue.is_interruptible = False
        finally:  # though a cancellation from before may be raised above
            cleanup()
        with self.queue.changed:
            if self.is_cancelled:
                raise Cancelled
            self.queue.is_interruptible = True

    def seen(self, place: int) -> dict[str, Any]:
        """Return what the page shows of it. place: how many jobs run or wait before it."""
        shown = "id title state part step steps left preview notes result error"
        return {name: getattr(self, name) for name in shown.split()} | {"place": place}


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
            elif job.state == "running":
                job.is_cancelled = True
                if not self.is_interruptible:  # once is enough; in `finish`, it comes after the cleanup
                    return
                self.is_interruptible = False
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
            with self.changed:
                self.changed.wait_for(lambda: self._waiting() or self.is_closed)
                job = next(iter(self._waiting()), None)
            if job is not None:
                self._run_one(job)

    def _run_one(self, job: Job) -> None:
        handler = _Notes(job)
        logger.addHandler(handler)
        try:
            with self.changed:
                if job.state != "waiting":
                    return
                job.state, self.is_interruptible = "running", True
                self.note()
            self._end(job, *_outcome(job))
        except Cancelled:  # it comes once a job, and may come while the job begins or ends
            self._end(job, "cancelled")
        finally:
            logger.removeHandler(handler)

    def _end(self, job: Job, state: str, error: str = "", result: Mapping[str, Any] | None = None) -> None:
        with self.changed:
            self.is_interruptible = False
            if job.state == "running":
                job.state, job.error, job.result = state, error, result
                self.note()


def _outcome(job: Job) -> tuple[str, str, Mapping[str, Any] | None]:
    """Do a job's work; return its state, error and result. `Cancelled` if it was cancelled."""
    try:
        return "done", "", job.work(job)
    except Exception as fault:  # of any kind: the thread goes on with the next job
        if isinstance(fault, FAULTS) and (is_out_of_memory(fault) or not isinstance(fault, RuntimeError)):
            return "failed", one_line(fault, None), None
        logger.exception("a fault of the library, please report it")
        told = f"{type(fault).__name__}: {one_line(fault, None)}"
        return "failed", f"a fault of the library, please report it: {told}", None


class _Notes(logging.Handler):
    """Keeps a job's warnings, which are logged in the worker's thread."""

    def __init__(self, job: Job) -> None:
        super().__init__(logging.WARNING)
        self.job, self.thread = job, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning."""
        if record.thread == self.thread and record.exc_info is None:
            self.job.notes.append(record.getMessage())
