"""Guidance split over two processes: one computes the unconditional half of every step, one the conditional.

Half the work in a step for each, and latents [B, 4, H/8, W/8] exchanged after it. Both go through the same
steps; guidance is linear in the noise and so in x0: x0 = x0_u + scale * (x0_c - x0_u).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kolors_core.conditioning import Conditioning
from kolors_core.guidance import guided
from kolors_core.module import WrapStep
from kolors_core.sampling import Denoise
from kolors_core.schedule import Schedule
from kolors_core.unet import UNet
from weights_convert.untrusted_files import one_line


class PartnerLost(RuntimeError):
    """The other process of a pair, or of a run that begins, is gone or no longer in step."""


class PartnerFailed(ValueError):
    """The other process of a pair cannot do its half, and says why."""


class Pair:
    """Two processes, ranks 2n and 2n + 1. half: 0 for the unconditional half, which also leads, or 1."""

    def __init__(self) -> None:
        """Every process must make its pair. ValueError for an odd number of them, or none."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world % 2:
            raise ValueError(f"--split-guidance needs an even number of processes, got {world}")
        groups: list[Any] = [dist.new_group([rank, rank + 1]) for rank in range(0, world, 2)]
        self.group, self.half = groups[dist.get_rank() // 2], dist.get_rank() % 2
        self.has_met = False

    def tell(self, word: Any = None) -> Any:
        """What the leader says to the other."""
        box = [word]
        self._exchange(lambda: dist.broadcast_object_list(box, group_src=0, group=self.group))
        return box[0]

    def meet(self, trouble: str | None = None) -> None:
        """Wait for the other before a run; raises PartnerFailed if it says that it has trouble."""
        self.has_met = True
        said: list[str | None] = [None, None]
        self._exchange(lambda: dist.all_gather_object(said, trouble, group=self.group))
        if trouble is None and said[1 - self.half] is not None:
            raise PartnerFailed(said[1 - self.half])

    def gather(self, compute: Callable[[], Tensor]) -> list[Tensor]:
        """Both halves' tensors, of one shape; raises PartnerFailed if the other could not compute its own."""
        try:
            own = compute().contiguous()
        except Exception:  # the other must not wait for what will not come
            self._are_both_well(False)
            raise
        if not self._are_both_well(True):
            raise PartnerFailed("the other process of the pair failed in a step")
        both = [torch.empty_like(own) for _ in range(2)]
        self._exchange(lambda: dist.all_gather(both, own, group=self.group))
        return both

    def guided(
        self,
        unet: UNet,
        schedule: Schedule,
        positive: Conditioning,
        negative: Conditioning | None = None,
        scale: float = 1.0,
        *,
        precompute: bool = True,
        wrap_step: WrapStep | None = None,
    ) -> Denoise:
        """As `guidance.guided`, equal within rounding; both processes get the result.

        Without guidance there is nothing to split, and both compute the same.
        """
        is_guided = negative is not None and scale > 1
        told = (negative, positive)[self.half] if negative is not None and is_guided else positive
        own = guided(unet, schedule, told, precompute=precompute, wrap_step=wrap_step)
        self.meet()

        def denoise(x: Tensor, sigma: float) -> Tensor:
            unconditional, conditional = self.gather(lambda: own(x, sigma))
            return unconditional + scale * (conditional - unconditional)

        return denoise if is_guided else own

    def _are_both_well(self, is_well: bool) -> bool:
        told = [torch.zeros(1), torch.zeros(1)]
        self._exchange(lambda: dist.all_gather(told, torch.tensor([float(is_well)]), group=self.group))
        return all(told)

    def _exchange(self, call: Callable[[], object]) -> None:
        try:
            call()
        except RuntimeError as error:
            raise PartnerLost(f"the other process of this pair is gone: {one_line(error)}") from error
