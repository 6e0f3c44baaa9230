"""Step of a run as its observer gets it, and means of what a loss measures on the way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a run.

    step: its number, from 0. loss: of the whole batch. learning_rates: of each parameter group.
    gradient_norm: of all trained parameters, before it is limited. seconds: with making the batch. samples:
    of the whole batch. memory: bytes, see `peak_memory`. means: of what the loss measured in this step, by
    name. held_out: the same of the held-out batches, and their "loss", in steps after which it is measured.
    images: drawn after this step, if any. resumed: whether this call of `fit` went on from a saved state.
    """

    step: int
    loss: float
    learning_rates: tuple[float, ...]
    gradient_norm: float
    seconds: float
    samples: int
    memory: int | None = None
    means: Mapping[str, float] = field(default_factory=dict)
    held_out: Mapping[str, float] = field(default_factory=dict)
    images: "Sequence[Image]" = ()
    resumed: bool = False

    @property
    def learning_rate(self) -> float:
        """Rate of the first parameter group."""
        return self.learning_rates[0]

    @property
    def samples_per_second(self) -> float:
        """Samples of the whole batch in a second."""
        return self.samples / self.seconds

    def values(self) -> dict[str, float]:
        """List all numbers by name, for a log."""
        rates = {f"learning_rate_{i}": rate for i, rate in enumerate(self.learning_rates) if i}
        held_out = {f"held_out_{name}": value for name, value in self.held_out.items()}
        return {
            "loss": self.loss, "learning_rate": self.learning_rate, **rates,
            "gradient_norm": self.gradient_norm, "seconds": self.seconds,
            "samples_per_second": self.samples_per_second,
            **({} if self.memory is None else {"memory": self.memory}), **self.means, **held_out,
        }  # fmt: skip


OnStep = Callable[[Step], None]


class Means:
    """Means of values that a loss adds in its forward, over the parts of a batch and over all ranks.

    A loss that has one as its `means` is logged with it. All ranks must add the same names.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # sum and count [2] of each name

    def add(self, name: str, values: Tensor, among: Tensor | None = None) -> None:
        """Add values of any shape, or only those where `among`, of the same shape, is True."""
        kept = torch.ones_like(values, dtype=torch.bool) if among is None else among
        values = values.detach().float().where(kept, 0)
        found = torch.stack([values.sum(), kept.sum().to(values.dtype)])
        self.sums[name] = self.sums[name] + found if name in self.sums else found

    def take(self) -> dict[str, Tensor]:
        """Return sum and count [2] of each name, and begin anew."""
        sums, self.sums = self.sums, {}
        return sums


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that this rank had: of an accelerator's memory, or of its process's; or None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows
        return None
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
