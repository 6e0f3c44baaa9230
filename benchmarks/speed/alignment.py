"""Copying misaligned weights when they are loaded: `python -m benchmarks.speed.alignment OUT`.

A file puts its tensors where its header ends, and `load` copies those of float32 that torch would have
allocated at another alignment (64 bytes): the same weights then compute the same bits from every file.
Measured are the cost of the copy, against weights left in the mapped file with every page touched, and the
gain of a step. The UNet has Kolors' widths and a few of its transformer blocks; its tensors lie at 40 modulo
64.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.side_by_side import Race, Row, below, race, timed
from benchmarks.speed import arguments
from kolors_core.config import KOLORS, TINY, UNetConfig
from kolors_core.loading import load
from kolors_core.unet import UNet
from weights_convert.safetensors_files import ALIGNMENT, Source

OFFSET, SEED, DTYPE = 40, 20241129, torch.float32
MAPPED, COPIED = "mapped", "copied"
PAGE = 4096 // DTYPE.itemsize  # elements


def write(config: UNetConfig, file: Path) -> None:
    """Write random weights, with a header of such a length that no tensor is aligned."""
    torch.manual_seed(SEED)
    state = UNet(config).to(DTYPE).state_dict()
    for filler in range(0, ALIGNMENT, 8):
        save_file(state, file, metadata={"format": "pt", "filler": " " * filler})
        size = int.from_bytes(file.open("rb").read(8), "little")
        if (8 + size) % ALIGNMENT == OFFSET:
            return
    raise AssertionError("no header ends there")


def empty(config: UNetConfig) -> UNet:
    """A UNet without weights."""
    with torch.device("meta"):
        return UNet(config).eval()


def load_mapped(config: UNetConfig, file: Path) -> UNet:
    """Leave every weight where it lies in the mapped file, and touch each page of it."""
    unet, source = empty(config), Source([file])
    unet.load_state_dict({name: source.mapped(name) for name in source}, assign=True)
    for parameter in unet.parameters():
        parameter.detach().flatten()[::PAGE].sum()
    return unet


def load_copied(config: UNetConfig, file: Path) -> UNet:
    """Load as the library does."""
    unet = empty(config)
    load(unet, Source([file]), "unet", dtype=DTYPE)
    return unet


@torch.no_grad()
def measure(config: UNetConfig, side: int, file: Path, rounds: int) -> tuple[Race, Race]:
    """Race both ways of loading, then a forward of both UNets on the same inputs."""
    ways = {MAPPED: load_mapped, COPIED: load_copied}
    loading = race({name: timed(lambda way=way: way(config, file)) for name, way in ways.items()}, rounds)
    unets = {name: way(config, file) for name, way in ways.items()}
    first = {name: next(unet.parameters()).data_ptr() % ALIGNMENT for name, unet in unets.items()}
    assert first[MAPPED] and not first[COPIED], first
    text, pooled = torch.randn(2, 21, config.text_dim), torch.randn(2, config.text_dim)
    inputs = [t.to(DTYPE) for t in (torch.randn(2, 4, side, side), text, pooled)]

    def step(unet: UNet) -> Tensor:
        return unet(inputs[0], torch.tensor(500.0), inputs[1], inputs[2], torch.full((2, 6), 512.0))

    return loading, race({name: timed(lambda u=unet: step(u)) for name, unet in unets.items()}, rounds)


def main() -> None:
    """Measure and write."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--small", action="store_true", help="rehearse with the embedded model's sizes")
    options = parser.parse_args()
    config = TINY.unet if options.small else replace(KOLORS.unet, depths=(0, 1, 3))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "unet.safetensors"
        write(config, file)
        loading, step = measure(config, 16 if options.small else 64, file, options.rounds)
        gib = file.stat().st_size / 2**30
    for name, work, result in (
        (
            "alignment_load",
            f"load a UNet of {gib:.2f} GiB, its weights copied, against mapped and read",
            loading,
        ),
        ("alignment_step", "a UNet forward at 512x512 with aligned weights, against misaligned ones", step),
    ):
        row = Row(
            name=name, work=work, goal=below(1.1, "times the time"), value=result.ratio(COPIED, MAPPED),
            is_rehearsal=options.small, race=result,
        )  # fmt: skip
        row.write(options.out)


if __name__ == "__main__":
    main()
