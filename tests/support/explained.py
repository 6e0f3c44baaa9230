"""An explanation of the embedded model's image: for the tests of what is computed, and of the page."""

from functools import cache

import torch

from kolors_core import KolorsPipeline
from kolors_core.checkpoint import EMBEDDED
from kolors_core.inspection.attention_report import Explanation
from kolors_core.inspection.token_attention import explain_prompt

TINY = EMBEDDED / "tokenizer"
PROMPT = "一张瓢虫的照片 🐞"


@cache
def tiny() -> KolorsPipeline:
    pipe = KolorsPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def explained() -> Explanation:
    """Four steps, so that their thirds are of 1, 2 and 1; of an image that is wider than high."""
    return explain_prompt(tiny(), PROMPT, 4, height=64, width=96, generator=torch.Generator().manual_seed(0))
