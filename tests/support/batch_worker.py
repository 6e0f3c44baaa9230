"""What one process of two does with a batch; tests/support/two_processes.py starts them."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from kolors_core import KolorsPipeline
from kolors_core.batch.__main__ import main
from kolors_core.guidance import guided
from kolors_core.performance.processes import join_processes
from kolors_core.performance.split_guidance import GuidancePair


def draw_unlike(*arguments: list[str]) -> int:
    """A batch with as many threads as the rank + 1, and its own arguments if there are several."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(rank + 1)
    return main(arguments[rank % len(arguments)])


def measure_split(out: Path, arguments: list[str]) -> int:
    """Write how far split guidance is from whole in float64 and float32 latents; then run a batch."""
    join_processes("cpu")
    pair, errors = GuidancePair(), []
    pipe = KolorsPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    for dtype in (torch.float64, torch.float32):
        pipe.to(dtype)
        pipe.guided = guided
        expected = _latents(pipe)
        pipe.guided = pair.guided
        errors.append(((_latents(pipe) - expected).abs().max() / expected.abs().max()).item())
    if dist.get_rank() == 0:
        out.write_text("\n".join(map(str, errors)))
    return main(arguments)


def _latents(pipe: KolorsPipeline) -> torch.Tensor:
    return pipe(
        ["一张瓢虫的照片", "a red apple"], 64, 72, 4, negative_prompt="cat", output_type="latent",
        generator=torch.Generator().manual_seed(1),
    )[0]  # fmt: skip
