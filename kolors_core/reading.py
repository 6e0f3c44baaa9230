"""What a UNet or a ControlNet makes of its conditions, once for all steps of a run.

Shapes: B pictures, T width of the time embedding, C channels.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kolors_core.conditioning import Conditioning
from kolors_core.context import ImagePrompt
from kolors_core.schedule import Schedule
from kolors_core.unet import Encoder, ResBlock, Shift


class Told:
    """What a UNet or ControlNet makes of all that is the same in every step, or known of every step.

    reads: keys and values of each cross-attention, in the order in which they run.
    """

    def __init__(
        self, net: Encoder, schedule: Schedule, told: Conditioning, images: Sequence[ImagePrompt] = ()
    ) -> None:
        rows, where = net.context(told.text_tokens, told.text_counts, images).distinct()
        self.net, self.reads = net, [read.rows(where) for read in net.read(rows)]
        self.condition = net.embed_condition(told.pooled_text, told.size_ids)  # [B, T]
        self.widths = [block.time_proj.out_features for block in net.modules() if isinstance(block, ResBlock)]
        timesteps = schedule.timesteps.tolist()
        self.known = dict(zip(timesteps, self._shifts(timesteps), strict=True))

    def shifts(self, timestep: float) -> Tensor:
        """What all blocks add at a timestep: [B, all blocks' C]."""
        return self.known[timestep] if timestep in self.known else self._shifts([timestep])[0]

    def _shifts(self, timesteps: list[float]) -> list[Tensor]:
        times = torch.tensor(timesteps, dtype=torch.float32, device=self.condition.device)
        every = self.net.shifts(self.net.embed_time(times)[:, None] + self.condition)  # each [n, B, C]
        return list(torch.cat([shift.added for shift in every], dim=-1))  # n of [B, all blocks' C]

    def split(self, shifts: Tensor) -> Iterator[Shift]:
        """One for each block."""
        return map(Shift, shifts.split(self.widths, dim=-1))
