"""Kolors on GPUs of 8 to 80 GB, Macs and CPUs: `python -m benchmarks.cards OUT` writes OUT/cards.md.

The released sizes without weights, one image of 1024x1024 with guidance. Counted by the memory plan, which is
within a tenth of what is allocated (tests/pipelines/test_memory_plan.py). A card is taken to have `RESERVED`
less than its name says: the driver, CUDA's context and what the allocator cannot use. Locked is the memory of
the computer that offloaded weights take. Seconds are reckoned, not measured: see `Option.seconds`. Four
minutes of a core.
"""

import argparse
import io
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kolors_core import EulerDiscreteScheduler, KolorsPipeline
from kolors_core.chatglm import ChatGLM
from kolors_core.config import KOLORS
from kolors_core.performance.offload import as_unit, blocks_of, bytes_of, tensors_of
from kolors_core.performance.pinned_memory import place
from kolors_core.performance.quantize import Format, quantize
from kolors_core.pipelines.memory_plan import GIB, Plan, plan
from kolors_core.registry import SkipInit
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from weights_convert.atomic_write import write_bytes

# GB by their names, which are GiB; one of each, with its TFLOP/s in float16 by its maker's data sheet (dense,
# summed in float32).
CARDS = {
    8: ("RTX 4060", 30), 12: ("RTX 3060", 25), 16: ("RTX 4080", 97), 24: ("RTX 4090", 165),
    48: ("RTX 6000 Ada", 182), 80: ("A100", 312),
}  # fmt: skip
RESERVED = 1.0  # GiB
SIDE, STEPS = 1024, 25  # pixels; of the sampler
# TFLOP of a guided step, and of two prompts and the VAE together, as benchmarks/speed/gpu/counting.py counts.
STEP_WORK, OTHER_WORK = 13.4, 11.0
# The reference's 50 steps take 6.55 s on an RTX 4090, 109 of its 165 TFLOP/s, and 5.38 s on an A100, 132:
# https://github.com/siliconflow/onediff/tree/main/onediff_diffusers_extensions/examples/kolors
REACHED = {"A100": 0.42}
REACHED_ELSEWHERE = 0.66
BUS = 12e9 / GIB  # GiB a second that copies reach in a PCIe slot of 16 lanes of version 3, or 8 of version 4


@dataclass(frozen=True)
class Option:
    """Way to run Kolors: the models' formats, placement (a field of `Plan`), the VAE in tiles, and its flags.

    images: how near they are to those of all models in float16.
    """

    text_encoder: Format | None
    unet: Format | None
    placement: str
    is_tiled: bool
    images: str
    flags: str

    @property
    def peak(self) -> float:
        """GiB at most on the card."""
        return getattr(self._planned()[0], self.placement)

    @property
    def locked(self) -> float:
        """GiB of the computer's memory that offloaded weights lock, in chunks; 0 if all are on the card."""
        return {"resident": 0.0, "by_model": self._planned()[1], "by_block": self._planned()[2]}[
            self.placement
        ]

    def seconds(self, name: str, rate: float) -> float:
        """Reckon an image's seconds on a card: arithmetic, and copies of weights that do not fit beside it.

        Model by model each is copied once, before it runs. Block by block the UNet's are in every step, and
        once more for the text's keys and values, while others run: counted on a simulated device.
        """
        weights = {stage: one.weights for stage, one in self._planned()[0].stages.items()}
        work = (STEPS * STEP_WORK + OTHER_WORK) / (rate * REACHED.get(name, REACHED_ELSEWHERE))
        once = sum(weights.values()) / BUS
        if self.placement == "resident":
            return work
        if self.placement == "by_model":
            return work + once
        return max(work, once + STEPS * weights["unet"] / BUS)

    def _planned(self) -> tuple[Plan, float, float]:
        return planned(self.text_encoder, self.unet, self.is_tiled, "cuda", torch.float16)


# Of those whose images are alike the first that fits is taken: models that stay, then models that take turns.
OPTIONS = (
    Option(None, None, "resident", False, "the same", ""),
    Option(None, None, "by_model", False, "the same", "--offload model"),
    Option(None, None, "by_block", False, "the same", "--offload block"),
    Option(8, None, "resident", False, "nearly", "--text-encoder-bits 8"),
    Option(8, None, "by_model", False, "nearly", "--text-encoder-bits 8 --offload model"),
    Option(8, 8, "resident", True, "nearly", "--text-encoder-bits 8 --unet-bits 8 --vae-tiling"),
    Option(4, "fp8", "resident", True, "others", "--text-encoder-bits 4 --unet-bits fp8 --vae-tiling"),
)


# Machines without such a card: device, dtype, format of both models, whether the VAE is in tiles, flags.
EIGHT_BITS = "--text-encoder-bits 8 --unet-bits 8 --vae-tiling"
MACHINES: dict[str, tuple[str, torch.dtype, Format | None, bool, str]] = {
    "Mac, 32 GB": ("mps", torch.float16, None, True, "--vae-tiling"),
    "Mac, 16 GB": ("mps", torch.float16, 8, True, EIGHT_BITS),
    "CPU, 32 GB": ("cpu", torch.bfloat16, None, False, "--dtype bfloat16"),
    "CPU, 16 GB": ("cpu", torch.bfloat16, 8, True, f"--dtype bfloat16 {EIGHT_BITS}"),
    "CPU without AVX-512, 16 GB": ("cpu", torch.float32, 8, True, EIGHT_BITS),
}


@cache
def planned(
    text_encoder: Format | None, unet: Format | None, is_tiled: bool, device: str, dtype: torch.dtype
) -> tuple[Plan, float, float]:  # fmt: skip
    """Plan an image with these formats, dtype if None; and GiB locked if offloaded by model, and by block."""
    with torch.device("meta"), SkipInit():
        models: dict[str, Any] = {
            "text_encoder": ChatGLM(KOLORS.text_encoder), "unet": UNet(KOLORS.unet), "vae": VAE(KOLORS.vae),
        }  # fmt: skip
    for name, model in models.items():
        model.to(torch.float32 if name == "vae" and dtype == torch.float16 else dtype).eval()
    for name, weight_format in (("text_encoder", text_encoder), ("unet", unet)):
        if weight_format is not None:
            quantize(models[name], weight_format)
    pipe = KolorsPipeline(**models, tokenizer=None, scheduler=EulerDiscreteScheduler())
    if is_tiled:
        pipe.enable_vae_tiling()
    by_model = [as_unit([model]) for model in models.values()]
    by_block = [as_unit([block]) for model in models.values() for block in blocks_of(model).values()]
    with redirect_stdout(io.StringIO()):  # the plan, for people
        return plan(pipe, SIDE, SIDE, device=device), _locked(by_model), _locked(by_block)


def _locked(units: list[Any]) -> float:
    sizes = ([tensor.nbytes for tensor in tensors_of(unit).values()] for unit in units if bytes_of(unit))
    return sum(sum(place(listed)[0]) for listed in sizes) / GIB


def ways(card: int, options: Sequence[Option] = OPTIONS) -> list[Option]:
    """Choose the ways for a card: the first of each kind of images, until one has all models on the card."""
    chosen: list[Option] = []
    for one in (one for one in options if one.peak <= card - RESERVED):
        is_done = any(other.placement == "resident" for other in chosen)
        is_new = one.placement == "resident" or one.images not in {other.images for other in chosen}
        if is_new and not is_done:
            chosen.append(one)
    return chosen


def rows() -> Iterator[str]:
    """Yield the table's lines."""
    yield "| card, such as | options | images | GiB of the card | GiB locked | seconds, reckoned |"
    yield "|---|---|---|---|---|---|"
    for card, (name, rate) in CARDS.items():
        for number, one in enumerate(ways(card)):
            first = f"{card} GB, {name}" if number == 0 else ""
            locked = f"{one.locked:.1f}" if one.locked else ""
            flags = f"`{one.flags}`" if one.flags else "none"
            numbers = [f"{one.peak:.1f}", locked, f"{one.seconds(name, rate):.0f}"]
            yield f"| {' | '.join([first, flags, one.images, *numbers])} |"


def other_rows() -> Iterator[str]:
    """Yield the lines of the table of machines without such a card."""
    yield "| machine | options | GiB |"
    yield "|---|---|---|"
    for name, (device, dtype, bits, is_tiled, flags) in MACHINES.items():
        yield f"| {name} | `{flags}` | {planned(bits, bits, is_tiled, device, dtype)[0].resident:.1f} |"


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join([*rows(), "", *other_rows()]) + "\n"
    write_bytes(text.encode(), options.out / "cards.md")
    print(text)


if __name__ == "__main__":
    main()
