"""Where the reference is wrong about LoRA: it fails, or does nothing, and ours does not."""

from typing import Any

import diffusers
import pytest
import torch

from kolors_core.pipelines.image_to_image import KolorsImg2ImgPipeline
from tests.adapters.test_lora_files import ALPHA, written
from tests.support.loras import (
    ATTENTION,
    TEXT,
    Factors,
    Models,
    assert_weights,
    factors,
    fused,
    peft_names,
    weights,
    with_deltas,
)
from tests.support.pipelines import Pair
from tests.support.small import EXACT

pytestmark = pytest.mark.numerical


@pytest.fixture
def models(pipes: Pair) -> Models:
    """Our models, as the pipelines have them."""
    return Models(pipes[0].unet, pipes[0].text_encoder)


def assert_loads(models: Any, state: dict[str, torch.Tensor], scale: float = 1.0) -> None:
    """Ours gives the written-out sum, and is then as it was."""
    base, made = weights(models.unet), factors(models.unet, "unet", ATTENTION)
    report = models.load_lora_weights(state)
    assert len(report.matched) == len(state) and not report.unmatched
    wanted = with_deltas(base, "unet", made, lambda one: one.delta(scale))
    assert_weights(fused(models), wanted, EXACT)
    models.unload_lora_weights()


def test_image_to_image_takes_loras(pipes: Pair, models: Models) -> None:
    """The reference asks for a second text encoder, and leaves the UNet's part behind."""
    theirs = diffusers.KolorsImg2ImgPipeline(**pipes[1].components)
    state = peft_names("unet", factors(models.unet, "unet", ATTENTION), "unet.")
    with pytest.raises(AttributeError, match="text_encoder_2"):
        theirs.load_lora_weights(dict(state))
    pipes[1].unload_lora_weights()

    assert_loads(KolorsImg2ImgPipeline(**pipes[0].components), state)


@pytest.mark.parametrize("spelling", ["kohya, SGM's names", "SGM's names with dots"])
def test_sgm_names_are_read(spelling: str, pipes: Pair, models: Models) -> None:
    """The reference looks for SGM's numbers among diffusers' blocks, or calls the file invalid."""
    state = written(spelling, factors(models.unet, "unet", ATTENTION))
    with pytest.raises(ValueError, match="not found in the base model|Invalid LoRA checkpoint"):
        pipes[1].load_lora_weights(dict(state))
    assert pipes[1].get_list_adapters() == {}
    assert_loads(models, state, ALPHA / 2)


@pytest.mark.parametrize("spelling", ["bare", "base_model."])
def test_names_without_the_component_are_read(spelling: str, pipes: Pair, models: Models) -> None:
    """The reference matches none of them, and only warns."""
    state = written(spelling, factors(models.unet, "unet", ATTENTION))
    pipes[1].load_lora_weights(dict(state))
    assert pipes[1].get_list_adapters() == {}
    assert_loads(models, state)


def test_chatglm_takes_loras(pipes: Pair, models: Models) -> None:
    """The reference refuses them: it knows CLIP's layers only."""
    assert models.text_encoder is not None
    made = factors(models.text_encoder, "text_encoder", TEXT)
    state = peft_names("text_encoder", made, "text_encoder.")
    with pytest.raises(ValueError, match="Could not automatically infer state dict type"):
        pipes[1].load_lora_weights(dict(state))
    base = weights(models.text_encoder)
    models.load_lora_weights(state)
    wanted = with_deltas(base, "text_encoder", made, Factors.delta)
    assert_weights(fused(models, "text_encoder"), wanted, EXACT)
    models.unload_lora_weights()
