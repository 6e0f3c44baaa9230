"""Ctrl-C at any line: a KeyboardInterrupt as a signal would raise it, wherever a call has got to."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import kolors_core

# The package, and the file in which torch sets a module's attributes, moves and casts it.
TRACED = (str(Path(kolors_core.__file__).parent), torch.nn.modules.module.__file__)


@contextmanager
def interrupted(at: int | None) -> Iterator[list[int]]:
    """Within it the n-th line that runs raises KeyboardInterrupt, for None none; yields their count."""
    count, before = [0], sys.gettrace()

    def on_line(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            count[0] += 1
            if count[0] == at:
                raise KeyboardInterrupt
        return on_line

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        return on_line if frame.f_code.co_filename.startswith(TRACED) else None

    sys.settrace(on_call)
    try:
        yield count
    finally:
        sys.settrace(before)
