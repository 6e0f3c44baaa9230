"""Measurements between steps, by which no step changes: held-out losses, the best of them, and the end."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kolors_core.validation import short_repr

if TYPE_CHECKING:
    from PIL.Image import Image


@contextmanager
def undisturbed(loss: nn.Module, device: torch.device) -> Iterator[None]:
    """Compute without gradients and dropout within the block; modes and random numbers stay as they were."""
    modes = {module: module.training for module in loss.modules()}
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        loss.eval()
        try:
            yield
        finally:
            for module, is_training in modes.items():
                module.training = is_training


def as_images(found: Any) -> "tuple[Image, ...]":
    """Return what a run's `draw` returned, images or one of them, as a tuple; TypeError for anything else."""
    images = tuple(found) if isinstance(found, Sequence) else (found,)
    if odd := [image for image in images if not hasattr(image, "save")]:
        raise TypeError(f"draw must return images of pillow, got {short_repr(odd[0])}")
    return images


def is_best(loss: float, before: Mapping[int, float]) -> bool:
    """Return whether a held-out loss is below all earlier ones."""
    return loss < min(map(_or_infinity, before.values()), default=math.inf)


def _or_infinity(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


def best_step(losses: Mapping[int, float]) -> int:
    """Return the step of the lowest loss, the first of equal ones."""
    return min(sorted(losses), key=lambda step: _or_infinity(losses[step]))


def is_over(losses: Mapping[int, float], patience: int | None) -> bool:
    """Return whether so many held-out losses follow the best one, by the steps that were done."""
    if patience is None or not losses:
        return False
    steps = sorted(losses)
    return len(steps) - 1 - steps.index(best_step(losses)) >= patience
