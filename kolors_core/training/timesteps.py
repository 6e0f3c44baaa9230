"""Timesteps of one's own distribution, in the batches of any source of data.

`TrainingConfig.logit_normal` and `timestep_weights` are distributions that need none of this.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kolors_core.training.config import TrainingConfig
from kolors_core.training.data import Batch, derive_seed
from kolors_core.training.run_record import digest
from kolors_core.training.trainer import BatchSource
from kolors_core.validation import short_repr

DrawTimesteps = Callable[[int, int, torch.Generator], Tensor]  # (step, count, generator) -> int64 [count]
STREAM = 3  # of a step's random numbers; data.py has those before
RECORDED = 64  # timesteps of step 0, which every run has


class OwnTimesteps:
    """Source of another source's batches with the timesteps that a function draws.

    draw: called as draw(step, count, generator) for the whole batch, with a generator of the config's seed
    and the step; returns int64 [count] from 0 to timesteps - 1, on the CPU. The run's record has what it
    draws in step 0. ValueError for a config that has a distribution too, and for other timesteps.
    """

    def __init__(
        self, data: BatchSource, config: TrainingConfig, draw: DrawTimesteps, timesteps: int = 1100
    ) -> None:
        for name in ("logit_normal", "timestep_weights"):
            if (value := getattr(config, name)) is not None:
                raise ValueError(f"{name} has no effect on timesteps that are drawn here, got {value}")
        self.data, self.config, self.draw, self.timesteps = data, config, draw, timesteps

    def batch(self, step: int, rows: slice, device: torch.device) -> Batch:
        """Build the batch of the source with timesteps [b] of its own."""
        batch = self.data.batch(step, rows, device)
        return replace(batch, timesteps=self._draw(step, self.config.batch_size)[rows].to(device))

    def record(self) -> Mapping[str, Any]:
        """Record the source's data and some timesteps."""
        return {**self.data.record(), "timesteps": digest(self._draw(0, RECORDED))}

    def _draw(self, step: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, step, STREAM))
        found = self.draw(step, count, generator)
        if not isinstance(found, Tensor) or found.dtype != torch.int64 or list(found.shape) != [count]:
            got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else short_repr(found)
            raise ValueError(f"expected timesteps as an int64 tensor [{count}], got {got}")
        if not 0 <= int(found.min()) <= int(found.max()) < self.timesteps:
            span = f"{int(found.min())} to {int(found.max())}"
            raise ValueError(f"timesteps must be from 0 to {self.timesteps - 1}, got {span}")
        return found
