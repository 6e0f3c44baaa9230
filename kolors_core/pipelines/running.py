"""What surrounds a run: it can be interrupted, and whatever becomes of it, its models go to rest.

Ctrl-C, lack of memory and every other exception pass through here; the pipeline works again afterwards.
"""

import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def run(call: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A task's `__call__` without gradients, that nobody has interrupted yet and that leaves all at rest."""

    @wraps(call)
    @torch.no_grad()
    def guarded(self: Any, *arguments: P.args, **named: P.kwargs) -> R:
        self._interrupt = False
        try:
            return call(self, *arguments, **named)
        except (KeyboardInterrupt, torch.OutOfMemoryError) as error:
            traceback.clear_frames(error.__traceback__)  # or an interactive session keeps all their tensors
            raise
        finally:
            self._on_device()

    return guarded


class Interrupt:
    """`pipe.interrupt`: called, it ends the run after its step, from any thread; as a truth value, it says
    whether that was asked for. The reference has the second only, and asks by `pipe._interrupt = True`.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def __call__(self) -> None:
        """Ask for the end."""
        self.pipe._interrupt = True

    def __bool__(self) -> bool:
        return self.pipe._interrupt

    def __repr__(self) -> str:
        return f"<interrupt of a pipeline, {'asked for' if self else 'not asked for'}>"


class RunState:
    """What a pipeline tells of its run, by the reference's names."""

    def __init__(self) -> None:
        self._progress: dict[str, Any] = {}
        self._guidance_scale, self._interrupt, self._num_timesteps = 1.0, False, 0

    @property
    def guidance_scale(self) -> float:
        """Of the run; a callback that sets `_guidance_scale` to 1 or less ends guidance."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the run computes the negative half."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the run."""
        return self._num_timesteps

    @property
    def interrupt(self) -> Interrupt:
        """Called, from a callback or another thread, it ends the run after its step: the pictures are decoded
        as they are by then. As a truth value, whether that was asked for since the run began.
        """
        return Interrupt(self)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm's bar, such as `disable=True`."""
        self._progress = options

    def _progress_bar(self, total: int) -> Any:
        from tqdm.auto import tqdm

        return tqdm(total=total, **self._progress)
