"""Guidance on a UNet that somebody has changed: what they changed is what runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kolors_core.guidance import Conditioning, guided
from kolors_core.schedule import EulerDiscreteScheduler
from kolors_core.unet import UNet
from tests.parity import EXACT, SMALL, pair, relative_error
from tests.test_unet import inputs


class Doubling(UNet):
    """A UNet whose forward is another."""

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        return 2 * super().forward(*arguments, **named)


def subclassed(unet: UNet) -> UNet:
    changed = Doubling(SMALL.unet).to(torch.float64)
    changed.load_state_dict(unet.state_dict())
    return changed


def patched(unet: UNet) -> UNet:
    plain = unet.forward
    unet.forward = lambda *arguments: 2 * plain(*arguments)
    return unet


def hooked(unet: UNet) -> UNet:
    unet.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    return unet


def compiled(unet: UNet) -> Any:
    return torch.compile(hooked(unet), backend="eager")


@pytest.mark.parametrize("change", [subclassed, patched, hooked, compiled])
@torch.no_grad()
def test_a_changed_unet_is_called_as_a_whole(change: Callable[[UNet], UNet]) -> None:
    unet, _ = pair("unet", torch.float64)
    assert isinstance(unet, UNet)
    given = inputs(1, 8, 8, torch.float64)
    told = Conditioning(given["text_tokens"], given["pooled_text"], given["size_ids"])
    schedule = EulerDiscreteScheduler().schedule(3)
    x, sigma = given["latents"], schedule.sigmas[1].item()
    plain = guided(unet, schedule, told)(x, sigma)
    assert relative_error(guided(unet, schedule, told, read_once=False)(x, sigma), plain) < EXACT
    changed = guided(change(unet), schedule, told)(x, sigma)
    assert relative_error(x - changed, 2 * (x - plain)) < EXACT
    torch.compiler.reset()
