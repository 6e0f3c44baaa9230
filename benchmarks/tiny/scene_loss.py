"""The loss of the embedded model's UNet: the noise's error, and what its inner features tell of the scene.

A page of 16 by 16 latents says little of places to its squared error: a thing half a page off costs less
than a colour that is a little wrong. So readers, linear maps that are thrown away, ask some feature maps what
stands where, as the text encoder's reader asks the tokens; they ask each cell too where on the page it is.
Shapes: b images of one rank, C channels, P places of a grid, S of all that may be at a place.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tiny.scene_data import SceneBatch
from benchmarks.tiny.text import NOTHING_WEIGHT, SEEN, SIDE
from kolors_core.training.data import Batch
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import TrainingConfig
from kolors_core.unet import UNet

# Modules that are read, and their levels.
HEARD = (("down.1.attentions.0", 1), ("mid", 2), ("up.0.attentions.1", 2), ("up.1.attentions.1", 1))
READERS_WEIGHT = 0.03
OCCUPIED_WEIGHT = 4.0
TOLD = len(SEEN) + 1 + 1 + 2  # what is there or nothing, whether anything is, and the place itself


class FeatureReader(nn.Module):
    """A norm and a linear map, of a feature map [b, C, h, w] to what is told of each place, [b, P, TOLD]."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.cells = (SIDE // side) ** 2  # places in one of the map's
        self.norm, self.linear = nn.LayerNorm(channels), nn.Linear(channels, self.cells * TOLD)
        self.read: Tensor | None = None

    def hear(self, module: nn.Module, inputs: object, features: Tensor) -> None:
        """Read a module's output; a forward hook."""
        del module, inputs
        told = self.linear(self.norm(features.permute(0, 2, 3, 1))).float()
        told = F.pixel_shuffle(told.permute(0, 3, 1, 2), round(self.cells**0.5))  # [b, TOLD, SIDE, SIDE]
        self.read = told.flatten(2).transpose(1, 2)


class SceneLoss(DiffusionLoss):
    """Diffusion loss of scenes; noise of sigma above 1, where layout is decided, is weighed by sigma."""

    def __init__(self, unet: UNet, sigmas: Tensor, config: TrainingConfig) -> None:
        super().__init__(unet, None, sigmas, config)
        channels = unet.config.channels
        heard = [(unet.get_submodule(name), level) for name, level in HEARD]
        self.readers = nn.ModuleList(
            [FeatureReader(channels[level], 2 * SIDE >> level) for _, level in heard]
        )
        self.hooks = [module.register_forward_hook(reader.hear)
                      for (module, _), reader in zip(heard, self.readers, strict=True)]  # fmt: skip
        line = torch.linspace(-1, 1, SIDE)
        self.here = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).flatten(0, 1)  # [P, 2]
        self.kind_weights = torch.tensor([1.0] * len(SEEN) + [NOTHING_WEIGHT])

    def stop_hearing(self) -> None:
        """Leave the UNet as it was, without the readers' hooks."""
        for hook in self.hooks:
            hook.remove()

    def each(self, batch: Batch) -> Tensor:
        """Compute the loss of each of the rank's images: [b]; ValueError for a batch without its grid."""
        if not isinstance(batch, SceneBatch) or batch.grid is None:
            raise ValueError("expected a SceneBatch, whose grid says what stands where")
        sigma = self.sigmas.to(batch.latents.device)[batch.timesteps]  # [b]
        loss = super().each(batch) * sigma.clamp(min=1)
        told = [self._told(cast(Tensor, reader.read), batch.grid) for reader in self.readers]
        return loss + READERS_WEIGHT * torch.stack(told).sum(0) * sigma**2 / (sigma**2 + 1)

    def _told(self, read: Tensor, grid: Tensor) -> Tensor:
        """The cross-entropies of what one reader tells: [b]."""
        kinds, occupied, here = read[..., : len(SEEN) + 1], read[..., -3], read[..., -2:]
        weights = self.kind_weights.to(grid.device)[grid]  # [b, P]
        of_kinds = F.cross_entropy(kinds.transpose(1, 2), grid, reduction="none") * weights
        is_occupied = (grid < len(SEEN)).float()
        of_occupied = F.binary_cross_entropy_with_logits(occupied, is_occupied, reduction="none")
        of_places = (here - self.here.to(here)).square().mean((1, 2))
        return of_kinds.sum(1) / weights.sum(1) + OCCUPIED_WEIGHT * of_occupied.mean(1) + of_places
