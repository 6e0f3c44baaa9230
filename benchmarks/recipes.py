"""Training recipes at full size: `python -m benchmarks.recipes OUT` writes OUT/recipes.md.

Nothing is trained. Memory of one process by `plan_training`, for 1, 8 and 64 GPUs; time by arithmetic:
forward passes' worth, at `RATE`. Images of 1024x1024, bfloat16 autocast, blocks recomputed.
Five minutes of a core.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from kolors_core.adapters.controlnet import ControlNet, ControlNetConfig
from kolors_core.adapters.lora import attach
from kolors_core.adapters.textual_inversion import add_words, learn_words
from kolors_core.chatglm import ChatGLM, TextEmbedding
from kolors_core.config import KOLORS
from kolors_core.pipelines.training_plan import plan_training
from kolors_core.registry import SkipInit
from kolors_core.training.config import TrainingConfig
from kolors_core.training.distillation import ConsistencyLoss
from kolors_core.training.loss import DiffusionLoss
from kolors_core.unet import UNet
from weights_convert.atomic_write import write_bytes

RATE, SIDE = 300e12, 1024  # FLOP/s of one H100, of 790e12 that its largest product reaches; pixels
FORWARD = 6.96e12  # FLOPs of the UNet for one image
VAE_ENCODE = 4.9e12  # FLOPs of encoding an image, in each step of an inpainting run
ENCODER = 0.3e12  # FLOPs of ChatGLM for a caption of usual length
SIGMAS = torch.linspace(0.03, 14.6, 1100)  # their values change neither time nor memory
SHARDED = (8, 64)  # processes
BASE = TrainingConfig(steps=1000, batch_size=16, dtype=torch.bfloat16, checkpoint_blocks=True)


@dataclass(frozen=True)
class Recipe:
    """Recipe as it is usually run. make: of the loss.

    forwards: of the UNet, whose work an image is: one, one that recomputes blocks, one for gradients of
    activations and one for those of weights, where there are any. extra: FLOPs of an image beside them.
    """

    name: str
    make: Callable[[TrainingConfig], nn.Module]
    steps: int
    batch_size: int
    forwards: float
    ema_decay: float = 0.0
    extra: float = 0.0


def unet(channels: int = 4) -> UNet:
    """Make a UNet of the released size."""
    return UNet(replace(KOLORS.unet, in_channels=channels))


def adapted(rank: int, dora: bool = False) -> UNet:
    """Make a frozen UNet with an adapter to train."""
    model = unet().requires_grad_(False)
    attach(model, rank, dora=dora)
    return model


def distilled(config: TrainingConfig, model: UNet, teacher: UNet | None = None) -> ConsistencyLoss:
    """Make the loss of a student with guidance."""
    width = KOLORS.unet.text_dim
    negative = TextEmbedding(torch.empty(1, 256, width), torch.empty(1, width))
    return ConsistencyLoss(model, SIGMAS, config, teacher=teacher, guidance_scale=5.0, negative=negative)


def inverted(config: TrainingConfig) -> DiffusionLoss:
    """Make the loss of a word of four vectors; the encoder is in bfloat16."""
    encoder = ChatGLM(KOLORS.text_encoder).to(torch.bfloat16)
    add_words(encoder, {"<zorp>": torch.zeros(4, KOLORS.text_encoder.hidden_size, device="cpu")})
    loss = DiffusionLoss(unet(), encoder, SIGMAS, config)
    learn_words(loss, "<zorp>")
    return loss


def controlled(config: TrainingConfig) -> DiffusionLoss:
    """Make the loss of a ControlNet of the released size, on a frozen UNet."""
    size = ControlNetConfig(**vars(KOLORS.unet))
    return DiffusionLoss(unet().requires_grad_(False), None, SIGMAS, config, ControlNet(size))


def plain(channels: int = 4) -> Callable[[TrainingConfig], nn.Module]:
    """Return a maker of a whole UNet's loss."""
    return lambda config: DiffusionLoss(unet(channels), None, SIGMAS, config)


RECIPES = (
    Recipe("DreamBooth, prior preservation", lambda c: DiffusionLoss(adapted(16), None, SIGMAS, c), 400, 16,
           3),
    Recipe("LoRA, rank 64", lambda c: DiffusionLoss(adapted(64), None, SIGMAS, c), 2000, 16, 3),
    Recipe("DoRA, rank 64", lambda c: DiffusionLoss(adapted(64, dora=True), None, SIGMAS, c), 2000, 16, 3.2),
    Recipe("textual inversion", inverted, 2000, 8, 3, extra=3 * ENCODER),
    Recipe("ControlNet", controlled, 20_000, 64, 3.9),
    Recipe("inpainting, 9 channels", plain(9), 20_000, 64, 4, ema_decay=0.9999, extra=VAE_ENCODE),
    Recipe("distillation, LoRA", lambda c: distilled(c, adapted(64)), 1500, 16, 6),
    Recipe("distillation, whole", lambda c: distilled(c, unet(), unet().requires_grad_(False)), 10_000, 64, 7,
           ema_decay=0.9999),
    Recipe("full fine-tuning", plain(), 20_000, 64, 4, ema_decay=0.9999),
)  # fmt: skip


def made(recipe: Recipe, config: TrainingConfig) -> nn.Module:
    """Make a recipe's loss without weights."""
    with torch.device("meta"), SkipInit():
        return recipe.make(config)


def peaks(recipe: Recipe) -> Iterator[float]:
    """Plan the GiB of a process that computes one image at a time: alone or by DDP, by FSDP2 as `SHARDED`.

    Alone and by DDP in two parts a step, by FSDP2, where parts would keep gradients whole, in one.
    """
    config = replace(BASE, batch_size=2, gradient_accumulation_steps=2, ema_decay=recipe.ema_decay)
    alone = plan_training(made(recipe, config), config, SIDE, SIDE, device="cuda", is_printed=False)
    yield alone.total  # and of DDP, with any number of processes
    for processes in SHARDED:
        config = replace(BASE, batch_size=processes, shard=True, ema_decay=recipe.ema_decay)
        loss = made(recipe, config)
        yield plan_training(
            loss, config, SIDE, SIDE, processes=processes, device="cuda", is_printed=False
        ).total


def table() -> Iterator[str]:
    """Yield the table's lines."""
    heads = ["recipe", "steps of images", "TFLOP an image", "H100 hours", "GiB: 1 GPU or DDP"]
    heads += [f"FSDP2 on {count}" for count in SHARDED]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for recipe in RECIPES:
        flops = recipe.forwards * FORWARD + recipe.extra
        hours = flops * recipe.steps * recipe.batch_size / RATE / 3600
        cells = [recipe.name, f"{recipe.steps:,} of {recipe.batch_size}", f"{flops / 1e12:.0f}"]
        sizes = [f"{size:.1f}" for size in peaks(recipe)]
        yield f"| {' | '.join([*cells, f'{hours:.1f}', *sizes])} |"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for line in table():
        print(line, flush=True)
        lines.append(line)
    write_bytes(("\n".join(lines) + "\n").encode(), options.out / "recipes.md")


if __name__ == "__main__":
    main()
