"""Guidance on a UNet that somebody has changed: what they changed is what runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kolors_core.conditioning import Conditioning
from kolors_core.guidance import guided
from kolors_core.ip_adapter import cross_attentions
from kolors_core.sampling import dpmpp_2m
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


@torch.no_grad()
def test_equal_rows_are_read_once_and_latents_not_doubled() -> None:
    """Two pictures of each of two prompts with one negative prompt: three texts, four latents, eight rows."""
    unet, _ = pair("unet", torch.float64)
    assert isinstance(unet, UNet)
    given = inputs(3, 8, 8, torch.float64)
    latents = inputs(4, 8, 8, torch.float64)["latents"]
    parts = (given["text_tokens"], given["pooled_text"], given["size_ids"])
    positive = Conditioning(*(part[[0, 0, 1, 1]] for part in parts))
    negative = Conditioning(*(part[[2, 2, 2, 2]] for part in parts))
    schedule = EulerDiscreteScheduler().schedule(3)
    rows: dict[str, int] = {}
    layers = {"to_k": next(iter(cross_attentions(unet).values())).to_k, "conv_in": unet.conv_in}
    hooks = [
        layer.register_forward_hook(lambda _, given, __, name=name: rows.update({name: len(given[0])}))
        for name, layer in layers.items()
    ]
    sigma = schedule.sigmas[1].item()
    once, always = (
        guided(unet, schedule, positive, negative, 5.0, read_once=read_once)(latents, sigma)
        for read_once in (False, True)
    )
    assert relative_error(once, always) < EXACT
    assert rows == {"to_k": 3, "conv_in": 4}
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_a_sampler_step_compiles_whole() -> None:
    """UNet, guidance and the solver's arithmetic of two steps are one graph."""
    unet, _ = pair("unet", torch.float64)
    assert isinstance(unet, UNet)
    given = inputs(2, 8, 8, torch.float64)
    told = [
        Conditioning(*(given[name][i : i + 1] for name in ("text_tokens", "pooled_text", "size_ids")))
        for i in range(2)
    ]
    schedule = EulerDiscreteScheduler().schedule(3)
    denoise, sigmas = guided(unet, schedule, *told, 5.0), schedule.sigmas.tolist()[:3]

    def steps(x: Tensor) -> Tensor:
        return dpmpp_2m(denoise, x, sigmas)

    x = given["latents"][:1]
    compiled = torch.compile(steps, backend="eager", fullgraph=True)
    assert relative_error(compiled(x), steps(x)) < EXACT
    torch.compiler.reset()
