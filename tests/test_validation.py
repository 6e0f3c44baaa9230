"""Numbers at the boundary: every real type is taken, everywhere a scale is, and becomes a plain float."""

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from kolors_core import KolorsControlNet, KolorsPipeline, SDXLCFGCutoffCallback
from kolors_core.adapters.block_scales import block_scales
from kolors_core.adapters.controlnet import ControlInput
from kolors_core.guidance import cfg_rescale
from kolors_core.pipelines.pag import check_scales
from kolors_core.pipelines.request import PipelineInputs
from kolors_core.unet import UNet
from kolors_core.validation import check_float, check_fraction
from tests.support.controlnets import NET
from tests.support.loras import factors, peft_names
from tests.support.small import SHALLOW

HALVES: list[Any] = [
    0.5, np.float64(0.5), np.float32(0.5), np.float16(0.5), np.array(0.5), Fraction(1, 2), torch.tensor(0.5),
    torch.tensor(0.5, dtype=torch.bfloat16),
]  # fmt: skip
WHOLE: list[Any] = [1, np.int64(1), np.uint8(1), torch.tensor(1), np.array(1)]
NONE: list[Any] = [
    "0.5", None, True, np.bool_(True), torch.tensor(True), 0.5j, np.complex64(0.5), Decimal("0.5"),
    [0.5], np.array([0.5]), torch.tensor([0.5]), torch.empty((), device="meta"), 10**400, float("nan"),
    np.float32("inf"), torch.tensor(float("nan")),
]  # fmt: skip
EACH = pytest.mark.parametrize("half", HALVES, ids=lambda value: f"{type(value).__name__}")


def test_every_real_type_is_a_number() -> None:
    for value in HALVES:
        for number in (check_float("x", value), check_fraction("x", value)):
            assert type(number) is float and number == 0.5, value
    for value in WHOLE:
        assert type(check_float("x", value)) is float and check_float("x", value) == 1, value


@pytest.mark.parametrize("value", NONE, ids=lambda value: f"{type(value).__name__} {value!s:.20}")
def test_nothing_else_is_one(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^x must be a number, got .{0,203}$"):
        check_float("x", value)
    with pytest.raises(ValueError, match=r"^x must be above 0 and at most 1, got .{0,203}$"):
        check_fraction("x", value)


@pytest.fixture(scope="module")
def unet() -> UNet:
    return UNet(SHALLOW.unet)


# Where a scale is taken, and what is kept of it.
BOUNDARIES: dict[str, Callable[[Any, UNet], Any]] = {
    "of blocks": lambda half, unet: set(block_scales({"up": half, "mid": [half]}, unet, 0.5).values()),
    "of all": lambda half, unet: set(block_scales(half, unet, 0.0).values()),
    "of each image": lambda half, unet: set(block_scales([half], unet, 0.0)["mid.attentions.0"]),
    "of a ControlNet": lambda half, unet: {
        value for control in [ControlInput(KolorsControlNet(NET), torch.zeros(1), half, half, 1)]
        for value in (control.scale, control.start)
    },
    "of guidance": lambda half, unet: {PipelineInputs(guidance_scale=half).guidance_scale},
    "of perturbed attention": lambda half, unet: set(check_scales(half, half)),
    "of the callback": lambda half, unet: {SDXLCFGCutoffCallback(half).ratio},
}  # fmt: skip


@EACH
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_scale_is_taken_as_a_plain_number(unet: UNet, boundary: str, half: Any) -> None:
    kept = BOUNDARIES[boundary](half, unet)
    assert kept == {0.5} and all(type(value) is float for value in kept)


def test_rescaling_takes_each() -> None:
    noise, conditional = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    wanted = cfg_rescale(0.5)(noise, conditional)
    assert all(torch.equal(cfg_rescale(half)(noise, conditional), wanted) for half in HALVES)


@pytest.fixture(scope="module")
def tiny() -> KolorsPipeline:
    pipe = KolorsPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    layers = ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    pipe.load_lora_weights(peft_names("unet", factors(pipe.unet, "unet", layers), "unet."), "one")
    return pipe


def test_a_run_takes_each(tiny: KolorsPipeline) -> None:
    """Guidance, LoRA weights and scale, FreeU: the images of plain numbers, bit for bit."""

    def draw(half: Any) -> torch.Tensor:
        tiny.set_adapters(["one"], [half])
        tiny.enable_freeu(half, half, half, half)
        return tiny(
            "a cat", 32, 32, num_inference_steps=1, guidance_scale=half + 1, output_type="latent",
            cross_attention_kwargs={"scale": half}, generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    wanted = draw(0.5)
    for half in HALVES[1:]:
        assert torch.equal(draw(half), wanted), half
