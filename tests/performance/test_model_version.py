"""A model's version: another number after every kind of change, and the same one after none."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn

from kolors_core.adapters import lora
from kolors_core.adapters.freeu import FreeU
from kolors_core.performance.model_version import ModelVersion
from kolors_core.unet import UNet, UpBlock
from tests.support.small import SHALLOW, randomise


@pytest.fixture
def unet() -> UNet:
    made = UNet(SHALLOW.unet)
    randomise(made)
    return made


def write(unet: UNet) -> None:
    with torch.no_grad():
        unet.mid.attentions[0].proj_in.weight.add_(1)


def replace_a_weight(unet: UNet) -> None:
    unet.conv_in.weight = nn.Parameter(unet.conv_in.weight.clone())


def replace_a_layer(unet: UNet) -> None:
    unet.conv_out = deepcopy(unet.conv_out)


def attach_lora(unet: UNet) -> None:
    lora.attach(unet, rank=2)


def set_freeu(unet: UNet) -> None:
    level = unet.up[0]
    assert isinstance(level, UpBlock)
    level.freeu = FreeU(0.9, 1.1)


@pytest.mark.parametrize("change", [write, replace_a_weight, replace_a_layer, attach_lora, set_freeu])
def test_a_change_is_another_version(unet: UNet, change: Callable[[UNet], None]) -> None:
    """Also one after a change that added modules."""
    version = ModelVersion(unet)
    first = version.read()
    change(unet)
    second = version.read()
    assert first != second == version.read()
    write(unet)
    assert version.read() != second


def test_weights_moved_and_back_are_no_change(unet: UNet) -> None:
    """As offloading does: another memory for the same parameter, without a write to it."""
    version = ModelVersion(unet)
    first = version.read()
    for parameter in unet.parameters():
        parameter.data = parameter.data.clone()
    assert version.read() == first
