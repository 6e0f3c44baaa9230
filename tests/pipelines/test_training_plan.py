"""The plan of training: within a tenth of what a step then allocates, as torch's own profiler counts it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kolors_core.adapters.lora import attach
from kolors_core.chatglm import TextEmbedding
from kolors_core.config import UNetConfig
from kolors_core.pipelines.training_plan import plan_training
from kolors_core.training.config import TrainingConfig
from kolors_core.training.data import Batch
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer
from kolors_core.unet import UNet

GIB = 2**30
MEDIUM = UNetConfig(
    sample_size=16, channels=(64, 128, 192), heads=(1, 2, 3), depths=(0, 1, 2), resnets_per_level=1,
    text_dim=64, context_dim=96, size_dim=16,
)  # fmt: skip
SIZE = 256
CONFIG = TrainingConfig(steps=3, batch_size=4, ema_decay=0.9, max_tokens=24)
SIGMAS = torch.linspace(0.03, 14, 1100)


class Noise:
    """A source of random batches."""

    def batch(self, step: int, rows: slice, device: torch.device) -> Batch:
        count, side = len(range(CONFIG.batch_size)[rows]), SIZE // 8
        latents, tokens = torch.randn(count, 4, side, side), torch.randn(count, CONFIG.max_tokens, 64)
        text = TextEmbedding(tokens, tokens[:, 0].clone())
        timesteps = torch.randint(1100, (count,))
        return Batch(latents, text, torch.ones(count, 6), timesteps, torch.randn_like(latents))

    def record(self) -> dict[str, Any]:
        return {}


def make_loss(config: TrainingConfig, rank: int | None = None, dora: bool = False) -> DiffusionLoss:
    unet = UNet(MEDIUM)
    if rank is not None:
        attach(unet.requires_grad_(False), rank)
    return DiffusionLoss(unet, None, SIGMAS, config)


def measure(trainer: Trainer) -> float:
    """GiB of the most that a step allocates beside what was there before, weights and states among it."""
    with trainer._checkpointed_blocks():
        trainer.one_step()
        trainer.step += 1
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            trainer.one_step()
    now = most = 0
    result: Any = watched.profiler
    for event in sorted(result.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most / GIB


def held(trainer: Trainer) -> float:
    """GiB of weights, states and the moving average."""
    states = [t for state in trainer.optimizer.state.values() for t in state.values()]
    tensors = [*trainer.loss.parameters(), *states, *trainer.ema.values()]
    return sum(tensor.nbytes for tensor in tensors) / GIB


@pytest.mark.numerical
@pytest.mark.parametrize(
    ("rank", "settings"),
    [
        (None, {}),
        (None, {"checkpoint_blocks": True, "gradient_accumulation_steps": 2}),
        (None, {"dtype": torch.bfloat16}),
        (8, {"ema_decay": 0.0}),
        (8, {"ema_decay": 0.0, "checkpoint_blocks": True, "dtype": torch.bfloat16}),
    ],
    ids=["full", "full, in parts, recomputed", "full, bfloat16", "LoRA", "LoRA, recomputed, bfloat16"],
)
def test_a_step_takes_what_was_planned(rank: int | None, settings: dict[str, Any], tmp_path: Path) -> None:
    config = replace(CONFIG, **settings)
    loss = make_loss(config, rank)
    made = plan_training(loss, config, SIZE, SIZE, is_printed=False)
    trainer = Trainer(loss, Noise(), config, tmp_path)
    measured = measure(trainer)
    assert max(made.passes, made.update) == pytest.approx(measured, rel=0.1)
    assert made.total == pytest.approx(held(trainer) + measured, rel=0.1)
    assert made.weights + made.optimizer + made.average == pytest.approx(held(trainer), rel=1e-3)
