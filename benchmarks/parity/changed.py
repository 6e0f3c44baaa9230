"""Parity of a changed UNet: yours beside the reference's, whose weights are those that yours started from.

Modules of yours that the reference lacks are compared with nothing, but listed (`Measured.unpaired`).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.full_size import run_unet, run_unet_reference
from benchmarks.parity.checkpoint import Checkpoint
from benchmarks.parity.components import Inputs, plain
from benchmarks.parity.layers import our_modules
from benchmarks.parity.measure import Result, Side, measure
from kolors_core.checkpoint import EMBEDDED


def measure_unet(
    unet: nn.Module, folder: str | Path = EMBEDDED, dtypes: Sequence[torch.dtype] = (torch.float64,)
) -> Result:
    """Compare a UNet on the CPU, which stays as it is, with the reference's of a checkpoint folder.

    dtypes: float64 first. The inputs are those of the parity page; `report.verdict` puts the result in words.
    """
    places = {name: Path(folder) / name for name in ("text_encoder", "unet", "vae")}
    checkpoint = Checkpoint(Path(folder), places, frozenset(), torch.device("cpu"))
    inputs, runs = Inputs(checkpoint).condition, (run_unet, run_unet_reference)

    def ours() -> Side:
        return Side(models=(unet,), modules=our_modules(unet), run=partial(run_unet, unet))

    case = replace(plain("UNet", "unet", checkpoint, inputs, runs), ours=ours)
    return measure(case, checkpoint.device, dtypes)
