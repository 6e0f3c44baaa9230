"""Kolors on GPUs of 8 to 80 GB, by the memory plan: `python -m benchmarks.cards OUT` writes OUT/cards.md.

The released sizes without weights, 1024x1024 with guidance, the VAE in tiles. Counted by the plan, which is
within a tenth of what is allocated (tests/pipelines/test_memory_plan.py). A card is taken to have `RESERVED`
less than its name says: the driver, CUDA's context and what the allocator cannot use. Ten minutes of a core.
"""

import argparse
import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kolors_core import EulerDiscreteScheduler, KolorsPipeline
from kolors_core.chatglm import ChatGLM
from kolors_core.checkpoint import SkipInit
from kolors_core.config import KOLORS
from kolors_core.performance.quantize import Format, quantize
from kolors_core.pipelines.memory_plan import Plan, plan
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from weights_convert.atomic_write import write_bytes

CARDS = (8, 12, 16, 24, 48, 80)  # GB by their names, which are GiB
RESERVED = 1.0  # GiB
SIDE, MOST = 1024, 64  # pixels; images at once


@dataclass(frozen=True)
class Option:
    """Way to run Kolors: formats of the models, placement (a field of `Plan`), and its flags."""

    text_encoder: Format | None
    unet: Format | None
    placement: str
    flags: str

    @property
    def is_exact(self) -> bool:
        """Whether images are those of all models in float16."""
        return self.text_encoder is None and self.unet is None

    def peak(self, images: int = 1) -> float:
        """GiB at most."""
        return getattr(planned(self.text_encoder, self.unet, images), self.placement)


# The first that fits is taken, so the fastest stands first: weights that stay, then models that take turns.
OPTIONS = (
    Option(None, None, "resident", ""),
    Option(None, None, "by_model", "--offload model"),
    Option(None, None, "by_block", "--offload block"),
    Option(8, None, "resident", "--text-encoder-bits 8"),
    Option(8, "fp8", "resident", "--text-encoder-bits 8 --unet-bits fp8"),
    Option(4, "fp8", "resident", "--text-encoder-bits 4 --unet-bits fp8"),
    Option(8, "fp8", "by_model", "--text-encoder-bits 8 --unet-bits fp8 --offload model"),
)


@cache
def planned(text_encoder: Format | None, unet: Format | None, images: int) -> Plan:
    """Plan a number of images at once with these formats, float16 if None."""
    with torch.device("meta"), SkipInit():
        models: dict[str, Any] = {
            "text_encoder": ChatGLM(KOLORS.text_encoder), "unet": UNet(KOLORS.unet), "vae": VAE(KOLORS.vae),
        }  # fmt: skip
    for name, model in models.items():
        model.to(torch.float32 if name == "vae" else torch.float16).eval()
    for name, weight_format in (("text_encoder", text_encoder), ("unet", unet)):
        if weight_format is not None:
            quantize(models[name], weight_format)
    pipe = KolorsPipeline(**models, tokenizer=None, scheduler=EulerDiscreteScheduler())
    pipe.enable_vae_tiling()
    with redirect_stdout(io.StringIO()):  # the plan, for people
        return plan(pipe, SIDE, SIDE, num_images_per_prompt=images, device="cuda")


def most_images(option: Option, room: float) -> int:
    """Find how many images fit at once, up to `MOST`, by doubling and halving."""
    low, high = 1, 2
    while high <= MOST and option.peak(high) <= room:
        low, high = high, 2 * high
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if option.peak(middle) <= room else (low, middle)
    return min(low, MOST)


def rows() -> Iterator[str]:
    """Yield the table's lines."""
    yield "| card | the same images | GiB | images at once | faster, approximate | GiB |"
    yield "|---|---|---|---|---|---|"
    for card in CARDS:
        room = card - RESERVED
        exact = next(one for one in OPTIONS if one.is_exact and one.peak() <= room)
        count = most_images(exact, room)
        images = f"{count} or more" if count == MOST else str(count)
        cells = [f"{card} GB", cell(exact.flags), f"{exact.peak():.1f}", images]
        other = next((one for one in OPTIONS if not one.is_exact and one.peak() <= room), None)
        needs_other = exact.placement != "resident" and other is not None
        cells += [cell(other.flags), f"{other.peak():.1f}"] if needs_other and other else ["", ""]
        yield f"| {' | '.join(cells)} |"


def cell(flags: str) -> str:
    """Format flags, beside those that all have."""
    return f"`{flags}`" if flags else "all models resident"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(rows()) + "\n"
    write_bytes(text.encode(), options.out / "cards.md")
    print(text)


if __name__ == "__main__":
    main()
