"""A small random pipeline whose inside is measured."""

from pathlib import Path
from typing import Any

import torch

from kolors_core.pipelines.text_to_image import KolorsPipeline
from tests.support.lora_recipes import shallow_pipe

QUESTION = "a {thing: cat|dog}"
QUICK: dict[str, Any] = {"steps": 2, "guidance_scale": 3.0, "height": 32, "width": 32}
ATTENTION = "up.0.attentions.0.blocks.0.cross_attention"


def small_pipe(tokenizer: Path) -> KolorsPipeline:
    """Of float64, so that what must be equal is so to many digits."""
    pipe = shallow_pipe(tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float64)
