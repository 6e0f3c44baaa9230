"""A small training run, and the same on two processes, killed and resumed; without the reference, which is
slow to import."""

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from kolors_core.chatglm import ChatGLM
from kolors_core.performance.processes import join_processes
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.tokenizer import Tokenizer
from kolors_core.training.data import Batches, LatentDataset, read_folder
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.step import Step
from kolors_core.training.trainer import Trainer, TrainingConfig
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.small import SHALLOW, SMALL, randomise

CONFIG = TrainingConfig(
    steps=6,
    batch_size=4,
    learning_rate=1e-3,
    warmup=2,
    max_tokens=12,
    save_every=3,
    ema_decay=0.9,
    schedule="cosine",
)


def make_trainer(
    folder: Path, pictures: Path, tokenizer: Path, config: TrainingConfig = CONFIG, train_text: bool = False
) -> Trainer:
    """A small run; weights and data are the same for every call."""
    unet, vae, text = UNet(SHALLOW.unet), VAE(SMALL.vae), ChatGLM(SMALL.text_encoder)
    for seed, model in enumerate((unet, vae, text)):
        randomise(model, seed)
    examples = read_folder(pictures)
    batches = Batches(examples, [(64, 64), (32, 64)], config.batch_size, config.seed)
    data = LatentDataset(examples, batches, vae, Tokenizer(tokenizer), config, None if train_text else text)
    sigmas = EulerDiscreteScheduler().training_sigmas()
    objective = DiffusionLoss(unet, text if train_text else None, sigmas, config)
    return Trainer(objective, data, config, folder)


class Killed(Exception):
    """The end of a run from outside."""


def kill(step: Step) -> None:
    """End the run in its fifth step, two steps after it saved its state."""
    if step.step == 4:
        raise Killed


def train_killed_and_resumed(shard: bool, pictures: Path, tokenizer: Path, out: Path) -> int:
    """One process of two: killed in its fifth step, it goes on from the state saved after three, and writes
    the losses from there."""
    join_processes()
    config = replace(CONFIG, shard=shard)
    first = make_trainer(out, pictures, tokenizer, config)
    first.on_step = kill
    try:
        first.fit()
    except Killed:
        losses = make_trainer(out, pictures, tokenizer, config).fit()
        if dist.get_rank() == 0:
            (out / "losses.txt").write_text("\n".join(map(repr, losses)))
    return 0
