"""Components of a pipeline: some may be left out."""

import pytest
import torch

from kolors_core import KolorsPipeline
from tests.support.pipelines import Pair


def test_a_pipeline_without_unet_or_vae_encodes_and_says_what_it_cannot(pipes: Pair) -> None:
    ours, parts = pipes[0], pipes[0].components
    alone = KolorsPipeline(**parts | {"unet": None, "vae": None})
    assert (alone.device, alone.dtype) == (ours.device, ours.dtype)
    for a, b in zip(alone.encode_prompt("cat"), ours.encode_prompt("cat"), strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
    for without in ("unet", "vae", "scheduler"):
        with pytest.raises(ValueError, match=f"this pipeline has no {without}: it encodes prompts, and cann"):
            KolorsPipeline(**parts | {without: None})("cat")
        with pytest.raises(ValueError, match=f"this pipeline has no {without} and cannot be saved whole"):
            KolorsPipeline(**parts | {without: None}).save_pretrained("nowhere")
