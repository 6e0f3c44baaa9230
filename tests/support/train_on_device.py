"""Train a LoRA on the CPU and on a simulated device, and say how far apart they are: a process of its own."""

import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from kolors_core.adapters import lora
from kolors_core.attention import attention_kernel
from kolors_core.chatglm import TextEmbedding
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.training.data import Batch
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer, TrainingConfig
from kolors_core.unet import UNet
from tests.support.simulated_device import simulate_for_training
from tests.support.small import SHALLOW, randomise, relative_error


class Batches:
    """Random batches; left_behind: of which the noise stays on the CPU."""

    def __init__(self, left_behind: bool) -> None:
        self.left_behind = left_behind

    def batch(self, step: int, rows: slice, device: torch.device) -> Batch:
        draw = torch.Generator().manual_seed(step)
        latents, noise = (torch.randn(2, 4, 4, 5, generator=draw) for _ in range(2))
        tokens = torch.randn(2, 3, SHALLOW.unet.text_dim, generator=draw)
        text = TextEmbedding(tokens.to(device), tokens[:, -1].to(device))
        timesteps, sizes = torch.tensor([44, 1000]), torch.full((2, 6), 64.0)
        noise = noise if self.left_behind else noise.to(device)
        return Batch(latents.to(device), text, sizes.to(device), timesteps.to(device), noise)

    def record(self) -> dict[str, Any]:
        return {}


def train(device: str, folder: Path, left_behind: bool) -> list[list[torch.Tensor]]:
    """The first step's loss; its gradients; the LoRA's weights after three steps and their averages."""
    unet = deepcopy(BASE).to(device).requires_grad_(False)
    handle = lora.attach(unet, rank=2)
    for seed, parameter in enumerate(handle.parameters()):
        draws = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        parameter.data.copy_(draws / 8)
    config = TrainingConfig(
        steps=3, batch_size=2, learning_rate=1e-2, checkpoint_blocks=True, ema_decay=0.9, save_every=2,
        max_grad_norm=0.0,
    )  # fmt: skip
    sigmas = EulerDiscreteScheduler().training_sigmas()
    trainer = Trainer(DiffusionLoss(unet, None, sigmas, config), Batches(left_behind), config, folder)
    gradients = list[torch.Tensor]()

    def keep(*_: Any) -> None:
        if not gradients:
            gradients.extend(p.grad.clone() for p in trainer.named.values() if p.grad is not None)

    trainer.optimizer.register_step_pre_hook(keep)
    with attention_kernel("matmul"):  # torch's own is another on a CPU
        losses = trainer.fit(progress=False)
    assert len(trainer.named) > 10 and all(p.device.type == device for p in trainer.named.values())
    after = [parameter.detach() for parameter in trainer.named.values()]
    return [[torch.tensor(losses[0])], gradients, [*after, *trainer.ema.values()]]


simulate_for_training()
BASE = UNet(SHALLOW.unet)
randomise(BASE)
with tempfile.TemporaryDirectory() as scratch:
    runs = [train(name, Path(scratch) / name, False) for name in ("cpu", "sim")]
    for one, other in zip(*runs, strict=True):  # the loss, the gradients, the weights
        print(max(relative_error(a, b.cpu()) for a, b in zip(one, other, strict=True)))
    try:
        train("sim", Path(scratch) / "left", True)
    except RuntimeError as error:
        print(error)
