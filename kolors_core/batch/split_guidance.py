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


class PeerLost(RuntimeError):
    """The other process of a pair, or of a run that begins, is gone or no longer in step."""


class PeerFailed(ValueError):
    """The other process of a pair cannot do its half, and says why."""


class GuidancePair:
    """Two processes, ranks 2n and 2n + 1. role: 0 for the unconditional half, which also leads, or 1."""

    def __init__(self) -> None:
        """Every process must make its pair. ValueError for an odd number of them, or none."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world % 2:
            raise ValueError(f"--split-guidance needs an even number of processes, got {world}")
        groups: list[Any] = [dist.new_group([rank, rank + 1]) for rank in range(0, world, 2)]
        self.group, self.role = groups[dist.get_rank() // 2], dist.get_rank() % 2
        self.handshake_done = False

    def broadcast(self, message: Any = None) -> Any:
        """Send the leader's message to the other process; returns it in both."""
        messages = [message]
        self._communicate(lambda: dist.broadcast_object_list(messages, group_src=0, group=self.group))
        return messages[0]

    def handshake(self, trouble: str | None = None) -> None:
        """Wait for the other process before a run; raises PeerFailed if it reports trouble."""
        self.handshake_done = True
        troubles: list[str | None] = [None, None]
        self._communicate(lambda: dist.all_gather_object(troubles, trouble, group=self.group))
        if trouble is None and troubles[1 - self.role] is not None:
            raise PeerFailed(troubles[1 - self.role])

    def all_gather(self, compute: Callable[[], Tensor]) -> list[Tensor]:
        """Return both halves' tensors, of one shape; raises PeerFailed if the other process failed."""
        try:
            own = compute().contiguous()
        except Exception:  # the other must not wait for what will not come
            self._both_succeeded(False)
            raise
        if not self._both_succeeded(True):
            raise PeerFailed("the other process of the pair failed in a step")
        both = [torch.empty_like(own) for _ in range(2)]
        self._communicate(lambda: dist.all_gather(both, own, group=self.group))
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
        conditioning = (negative, positive)[self.role] if negative is not None and is_guided else positive
        own = guided(unet, schedule, conditioning, precompute=precompute, wrap_step=wrap_step)
        self.handshake()

        def denoise(x: Tensor, sigma: float) -> Tensor:
            unconditional, conditional = self.all_gather(lambda: own(x, sigma))
            return unconditional + scale * (conditional - unconditional)

        return denoise if is_guided else own

    def _both_succeeded(self, is_successful: bool) -> bool:
        succeeded = [torch.zeros(1), torch.zeros(1)]
        self._communicate(
            lambda: dist.all_gather(succeeded, torch.tensor([float(is_successful)]), group=self.group)
        )
        return all(succeeded)

    def _communicate(self, call: Callable[[], object]) -> None:
        try:
            call()
        except RuntimeError as error:
            raise PeerLost(f"the other process of this pair is gone: {one_line(error)}") from error
