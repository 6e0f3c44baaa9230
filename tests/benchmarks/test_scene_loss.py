"""The loss of the embedded model's UNet: readers of its features, and how much noise weighs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.tiny.scene_data import SceneBatch
from benchmarks.tiny.scene_loss import HEARD, READERS_WEIGHT, TOLD, FeatureReader, SceneLoss
from benchmarks.tiny.text import SEEN, SIDE
from kolors_core.chatglm import TextEmbedding
from kolors_core.conditioning import size_ids
from kolors_core.config import TINY
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.training.data import Batch
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import TrainingConfig
from kolors_core.unet import UNet
from tests.support.small import randomise

CONFIG = TrainingConfig(steps=1, batch_size=2)
SIGMAS = EulerDiscreteScheduler().training_sigmas()


@pytest.fixture
def loss() -> SceneLoss:
    torch.manual_seed(0)
    loss = SceneLoss(UNet(TINY.unet), SIGMAS, CONFIG)
    randomise(loss.unet)
    return loss


def a_batch(timesteps: list[int]) -> SceneBatch:
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    grid = torch.full((2, SIDE**2), len(SEEN))
    grid[0, :8], grid[1, 60] = 3, len(SEEN) - 1
    return SceneBatch(
        normal(2, 4, 16, 16), TextEmbedding(normal(2, 5, 192), normal(2, 192)),
        size_ids((128, 128), (0, 0), (128, 128)).expand(2, -1), torch.tensor(timesteps), normal(2, 4, 16, 16),
        grid=grid,
    )  # fmt: skip


def told(loss: SceneLoss, batch: SceneBatch) -> Tensor:
    """What the readers add to the loss of each image."""
    sigma = SIGMAS[batch.timesteps]
    plain = DiffusionLoss(loss.unet, None, SIGMAS, CONFIG).each(batch)
    return (loss.each(batch) - plain * sigma.clamp(min=1)) / (sigma**2 / (sigma**2 + 1)) / READERS_WEIGHT


@torch.no_grad()
def test_readers_that_know_the_scene_add_nothing(loss: SceneLoss) -> None:
    """Each reader counts: with three that tell all, the loss is what the fourth adds."""
    batch = a_batch([900, 500])
    before = told(loss, batch)
    assert (before > 1).all()
    assert batch.grid is not None
    answer = torch.zeros(2, SIDE**2, TOLD)
    answer.scatter_(2, batch.grid[..., None], 100.0)
    answer[..., -3] = 100.0 * (batch.grid < len(SEEN)) - 50
    answer[..., -2:] = loss.here
    answers = answer.transpose(1, 2).unflatten(2, (SIDE, SIDE))
    for number, reader in enumerate(loss.readers):
        assert isinstance(reader, FeatureReader)
        loss.hooks[number].remove()
        reader.read = answers.flatten(2).transpose(1, 2)
        after = told(loss, batch)
        assert (after < before - 0.1).all()
        before = after
    assert before.abs().max() < 1e-3


@torch.no_grad()
def test_places_of_readers_are_those_of_the_page(loss: SceneLoss) -> None:
    """A map of 4 x 4 tells of 2 x 2 places in each cell; the page's left and top are -1."""
    reader = FeatureReader(6, SIDE // 2)
    features = torch.zeros(2, 6, SIDE // 2, SIDE // 2)
    features[1, 0, 3, 0] = 1.0  # at the bottom left
    reader.hear(reader, (), features)
    assert reader.read is not None and reader.read.shape == (2, SIDE**2, TOLD)
    differs = (reader.read[0] - reader.read[1]).abs().amax(-1).view(SIDE, SIDE) > 1e-3
    assert differs.nonzero().tolist() == [[6, 0], [6, 1], [7, 0], [7, 1]]
    assert loss.here.view(SIDE, SIDE, 2)[0, -1].tolist() == [-1, 1], "down, then across"


def test_gradients_reach_every_level_from_the_readers(loss: SceneLoss) -> None:
    batch = a_batch([1000, 1000])
    for name, _ in HEARD:
        loss.zero_grad()
        loss.each(batch).sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in loss.unet.get_submodule(name).parameters())
    assert all(p.grad is not None and p.grad.any() for p in loss.readers.parameters())


def test_a_batch_without_its_scenes_is_refused_and_the_unet_is_left_as_it_was(loss: SceneLoss) -> None:
    batch = a_batch([10, 20])
    plain = Batch(*(getattr(batch, name) for name in ("latents", "text", "size_ids", "timesteps", "noise")))
    for wrong in (plain, replace(batch, grid=None)):
        with pytest.raises(ValueError, match="SceneBatch"):
            loss.each(wrong)
    loss.stop_hearing()
    assert not any(module._forward_hooks for module in loss.unet.modules())
