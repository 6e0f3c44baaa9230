"""The calls of a pipeline that run now, each with its own state, in any number of threads.

A callback gets the pipeline, and the reference's callbacks set `pipe._guidance_scale` and `pipe._interrupt`:
both are the state of the call that the callback belongs to.
"""

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from kolors_core.devices import is_out_of_memory
from weights_convert.untrusted_files import one_line

P = ParamSpec("P")
R = TypeVar("R")


class Run:
    """State of one call of a pipeline."""

    def __init__(self, needs_alone: str | None = None) -> None:
        self.guidance_scale, self.num_timesteps, self.is_interrupted = 1.0, 0, False
        self.needs_alone = needs_alone  # why no call in another thread may run beside it


_own: ContextVar[tuple[Run, ...]] = ContextVar("the calls of this thread, the innermost last", default=())


class Runs:
    """The calls that run now on pipelines with the same models."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active: list[Run] = []
        self._last = Run()  # the call that began last, whose state can be read when it is over

    def __reduce__(self) -> tuple[type["Runs"], tuple[()]]:  # copies and pickles have no running calls
        return Runs, ()

    @contextmanager
    def begin(self, needs_alone: str | None = None) -> Iterator[Run]:
        """Begin a call; needs_alone: what it uses that calls in other threads must not use meanwhile.

        Raises RuntimeError if such a call is running in another thread.
        """
        run, before = Run(needs_alone), _own.get()
        try:
            with self._lock:
                self._check_others(needs_alone)
                self._active.append(run)
                self._last = run
            _own.set((*before, run))
            yield run
        finally:
            with self._lock:
                self._active = [other for other in self._active if other is not run]
            _own.set(before)

    def require_alone(self, reason: str) -> None:
        """Let this thread's call be the only one from now on; RuntimeError if another is running."""
        with self._lock:
            self._check_others(reason)
            for run in self._of_thread():
                run.needs_alone = reason

    def _check_others(self, needs_alone: str | None) -> None:
        own = self._of_thread()
        for other in self._active:
            if other not in own and (reason := needs_alone or other.needs_alone) is not None:
                why = f"is drawing in another thread, and {reason} cannot be shared by two threads"
                hint = "wait until that call is over, or load a second pipeline"
                raise RuntimeError(f"this pipeline {why}: {hint}")

    def _of_thread(self) -> list[Run]:
        return [run for run in _own.get() if run in self._active]

    def current(self) -> Run:
        """Return this thread's innermost call, or else the call of any thread that began last."""
        own = self._of_thread()
        return own[-1] if own else self._last

    def interrupt(self, is_asked: bool = True) -> None:
        """End this thread's call after its step; outside of a call, all that are running."""
        with self._lock:
            for run in self._of_thread()[-1:] or [*self._active, self._last]:
                run.is_interrupted = is_asked


def inference_call(call: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Decorate a pipeline's `__call__`: no gradients, a `Run`, all models offloaded however it ends.

    Lack of memory, also a CPU's, is raised as `OutOfMemory`.
    """

    @wraps(call)
    @torch.no_grad()
    def guarded(self: Any, *arguments: P.args, **named: P.kwargs) -> R:
        with self.runs.begin(self._needs_alone()):
            try:
                return call(self, *arguments, **named)
            except (KeyboardInterrupt, RuntimeError, MemoryError) as error:
                is_full = is_out_of_memory(error)
                if is_full or isinstance(error, KeyboardInterrupt):
                    traceback.clear_frames(error.__traceback__)  # a session would keep all tensors
                if is_full:
                    raise OutOfMemory(self.device, error) from None
                raise
            finally:
                self._enter_stage()

    return guarded


class OutOfMemory(torch.OutOfMemoryError, MemoryError):
    """Lack of memory on any device, with what helps against it."""

    def __init__(self, device: torch.device, error: BaseException) -> None:
        offload = "" if device.type == "cpu" else "enable_model_cpu_offload(), "
        hints = f"fewer images in a call, smaller ones, enable_vae_tiling(), {offload}quantized models"
        super().__init__(f"not enough memory on {device}; what helps: {hints}. {one_line(error)}")


class Interrupt:
    """Value of `pipe.interrupt`: called, it ends a call after its step; true if that was asked for."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs

    def __call__(self) -> None:
        """End this thread's call, or outside of one all that are running."""
        self.runs.interrupt()

    def __bool__(self) -> bool:
        return self.runs.current().is_interrupted

    def __repr__(self) -> str:
        return f"<interrupt of a pipeline, {'asked for' if self else 'not asked for'}>"
