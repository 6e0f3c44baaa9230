"""Guidance split over two processes: one computes the unconditional half of every step, one the conditional.

Each process does half the work of a step, then they exchange latents [B, 4, H/8, W/8] and both take the step.
Guidance is linear in the noise, and so in x0: x0 = x0_u + scale * (x0_c - x0_u).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kolors_core.conditioning import Conditioning
from kolors_core.guidance import guided
from kolors_core.module import WrapStep
from kolors_core.sampling import Denoiser
from kolors_core.schedule import Schedule
from kolors_core.unet import UNet
from weights_convert.untrusted_files import one_line


class PeerLost(ConnectionError):
    """Error: another process of the pair, or of the starting run, is gone or no longer in step."""


class GuidancePair:
    """Pair of ranks 2n and 2n + 1; role 0 leads (unconditional half). ValueError if one process is left."""

    def __init__(self) -> None:
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world % 2:
            raise ValueError(f"--split-guidance needs an even number of processes, got {world}")
        groups: list[Any] = [dist.new_group([rank, rank + 1]) for rank in range(0, world, 2)]
        self.group, self.role, self.handshake_done = groups[dist.get_rank() // 2], dist.get_rank() % 2, False

    def broadcast(self, message: Any = None) -> Any:
        """Send the leader's message to the other process; return it in both."""
        messages = [message]
        self._communicate(dist.broadcast_object_list, messages, group_src=0)
        return messages[0]

    def handshake(self, error: str | None = None) -> None:
        """Wait for the other process before a run; raise ValueError if it reports an error."""
        self.handshake_done = True
        errors: list[str | None] = [None, None]
        self._communicate(dist.all_gather_object, errors, error)
        if error is None and (reason := errors[1 - self.role]) is not None:
            raise ValueError(reason)

    def all_gather(self, compute: Callable[[], Tensor]) -> list[Tensor]:
        """Gather both halves' tensors, of one shape; raise ValueError if the other process failed."""
        try:
            own = compute().contiguous()
        except Exception:  # the other process must not wait for this half
            self._both_succeeded(False)
            raise
        if not self._both_succeeded(True):
            raise ValueError("the other process of the pair failed in a step")
        both = [torch.empty_like(own) for _ in range(2)]
        self._communicate(dist.all_gather, both, own)
        return both

    def guided(
        self, unet: UNet, schedule: Schedule, positive: Conditioning, negative: Conditioning | None = None,
        scale: float = 1.0, *, precompute: bool = True, wrap_step: WrapStep | None = None,
    ) -> Denoiser:  # fmt: skip
        """Build the denoiser of `guidance.guided`, equal within rounding; unguided, both do the whole."""
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
        self._communicate(dist.all_gather, succeeded, torch.tensor([float(is_successful)]))
        return all(succeeded)

    def _communicate(self, collective: Callable[..., object], *arguments: Any, **keywords: int) -> None:
        try:
            collective(*arguments, group=self.group, **keywords)
        except RuntimeError as error:
            raise PeerLost(f"the other process of this pair is gone: {one_line(error)}") from error
