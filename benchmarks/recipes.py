"""Training recipes at full size: `python -m benchmarks.recipes OUT` writes OUT/recipes.md.

Nothing is trained. Memory of one process by `plan_training`, for 1, 8 and 64 GPUs; time by arithmetic:
FLOPs counted on the meta device, at `RATE`. Images of 1024x1024, bfloat16 autocast, blocks recomputed.
Five minutes of a core.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kolors_core.adapters.controlnet import ControlNet
from kolors_core.adapters.lora import attach
from kolors_core.adapters.textual_inversion import add_words, learn_words
from kolors_core.chatglm import ChatGLM, TextEmbedding
from kolors_core.config import KOLORS
from kolors_core.module import is_block
from kolors_core.pipelines.training_plan import example_batch, plan_training
from kolors_core.registry import SkipInit
from kolors_core.tokenizer import TokenBatch
from kolors_core.training.config import TrainingConfig
from kolors_core.training.distillation import ConsistencyLoss
from kolors_core.training.loss import DiffusionLoss
from kolors_core.unet import UNet
from weights_convert.atomic_write import write_bytes

RATE, SIDE = 300e12, 1024  # FLOP/s of one H100, of 790e12 that its largest product reaches; pixels
VAE_ENCODE = 4.9e12  # FLOPs of encoding an image, in each step of an inpainting run
SIGMAS = torch.linspace(0.03, 14.6, 1100)  # their values change neither time nor memory
DIVIDED = ((8, "DDP"), (8, "FSDP2"), (64, "FSDP2"))
BASE = TrainingConfig(steps=1000, batch_size=16, dtype=torch.bfloat16, checkpoint_blocks=True)


@dataclass(frozen=True)
class Recipe:
    """Recipe as it is usually run. make: of the loss; extra: FLOPs of an image beside it."""

    name: str
    make: Callable[[TrainingConfig], nn.Module]
    steps: int
    batch_size: int
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
    return DiffusionLoss(unet().requires_grad_(False), None, SIGMAS, config, ControlNet(KOLORS.unet))


def plain(channels: int = 4) -> Callable[[TrainingConfig], nn.Module]:
    """Return a maker of a whole UNet's loss."""
    return lambda config: DiffusionLoss(unet(channels), None, SIGMAS, config)


RECIPES = (
    Recipe("DreamBooth, prior preservation", lambda c: DiffusionLoss(adapted(16), None, SIGMAS, c), 400, 16),
    Recipe("LoRA, rank 64", lambda c: DiffusionLoss(adapted(64), None, SIGMAS, c), 2000, 16),
    Recipe("DoRA, rank 64", lambda c: DiffusionLoss(adapted(64, dora=True), None, SIGMAS, c), 2000, 16),
    Recipe("textual inversion", inverted, 2000, 8),
    Recipe("ControlNet", controlled, 20_000, 64),
    Recipe("inpainting, 9 channels", plain(9), 20_000, 64, ema_decay=0.9999, extra=VAE_ENCODE),
    Recipe("distillation, LoRA", lambda c: distilled(c, adapted(64)), 1500, 16),
    Recipe("distillation, whole", lambda c: distilled(c, unet(), unet().requires_grad_(False)), 10_000, 64,
           ema_decay=0.9999),
    Recipe("full fine-tuning", plain(), 20_000, 64, ema_decay=0.9999),
)  # fmt: skip


def made(recipe: Recipe, config: TrainingConfig) -> nn.Module:
    """Make a recipe's loss without weights."""
    with torch.device("meta"), SkipInit():
        return recipe.make(config)


def flops_of_an_image(recipe: Recipe) -> float:
    """Count the FLOPs of a step for one image: forward, recomputed and backward, of products alone."""
    loss = made(recipe, BASE)
    for block in loss.modules():
        if is_block(block):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    batch = example_batch(loss, BASE, 1, SIDE, SIDE)
    if isinstance(batch.text, TokenBatch):  # captions of 24 tokens, with merged pads
        batch = replace(batch, text=TokenBatch(*(one[:, :24] for one in (batch.text.ids, batch.text.mask,
                                                                         batch.text.positions))))  # fmt: skip
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss(batch).backward()
    return counter.get_total_flops() + recipe.extra


def peak(recipe: Recipe, processes: int, shard: bool) -> float:
    """Plan the GiB of one process that computes one image at a time, with FSDP2 one a step."""
    parts = 1 if shard else 2
    config = replace(
        BASE, batch_size=parts * processes, gradient_accumulation_steps=parts, shard=shard,
        ema_decay=recipe.ema_decay,
    )  # fmt: skip
    loss = made(recipe, config)
    return plan_training(loss, config, SIDE, SIDE, processes=processes, device="cuda", is_printed=False).total


def table() -> Iterator[str]:
    """Yield the table's lines."""
    heads = ["recipe", "steps of images", "TFLOP an image", "H100 hours", "GiB: 1 GPU"]
    yield f"| {' | '.join([*heads, *(f'{count}, {how}' for count, how in DIVIDED)])} |"
    yield "|---" * (len(heads) + len(DIVIDED)) + "|"
    for recipe in RECIPES:
        flops = flops_of_an_image(recipe)
        hours = flops * recipe.steps * recipe.batch_size / RATE / 3600
        sizes = [peak(recipe, count, how == "FSDP2") for count, how in [(1, "DDP"), *DIVIDED]]
        cells = [recipe.name, f"{recipe.steps:,} of {recipe.batch_size}", f"{flops / 1e12:.0f}"]
        yield f"| {' | '.join([*cells, f'{hours:.1f}', *(f'{size:.1f}' for size in sizes)])} |"


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
