"""One process of two: `python -m tests.split_worker OUT BATCH ARGUMENTS...` measures split guidance.

Writes to OUT how far its latents are from those of one process in float64 and float32, and then runs a batch.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from kolors_core import KolorsPipeline
from kolors_core.batch import main
from kolors_core.guidance import guided
from kolors_core.placement import join_processes
from kolors_core.split_guidance import Pair


def latents(pipe: KolorsPipeline) -> torch.Tensor:
    return pipe(
        ["一张瓢虫的照片", "a red apple"], 64, 72, 4, negative_prompt="cat", output_type="latent",
        generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    join_processes("cpu")
    pair, errors = Pair(), []
    for dtype in (torch.float64, torch.float32):
        pipe = KolorsPipeline.from_pretrained(torch_dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        expected = latents(pipe)
        pipe.guided = pair.guided
        errors.append(((latents(pipe) - expected).abs().max() / expected.abs().max()).item())
        pipe.guided = guided
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text("\n".join(map(str, errors)))
    sys.exit(main(sys.argv[2:]))
