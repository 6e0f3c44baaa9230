"""What is compared: TINY's UNet with fields of its config changed, or the module that a function makes.

A function takes the `UNetConfig` of TINY's UNet and returns a module, which is called as `UNet.forward` is.
Shapes: B images, h and w latents of a side.
"""

import ast
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kolors_core.chatglm import TextEmbedding
from kolors_core.config import TINY, UNetConfig
from kolors_core.training.data import Batch
from kolors_core.unet import UNet
from kolors_core.validation import check_float, check_int

FIXED = ("sample_size", "in_channels", "out_channels", "text_dim")  # by TINY's encoders and the images
WANTED = 'fields of the UNet\'s config such as "depths=(0, 0, 1)", or file.py:function'
MANY = 256  # values of a tensor, from which on their scale says how they were drawn


@dataclass(frozen=True)
class Architecture:
    """A module to be trained. text: how it was asked for. config: what `make` is given."""

    text: str
    config: UNetConfig
    make: Callable[[UNetConfig], Any] = UNet

    def build(self, seed: int) -> nn.Module:
        """A new module; ValueError if none is made."""
        torch.manual_seed(seed)
        try:
            net = self.make(self.config)
        except Exception as error:
            raise ValueError(f"{self.text}: made no module: {_told(error)}") from error
        if not isinstance(net, nn.Module):
            raise ValueError(f"{self.text}: returned {type(net).__name__}, expected a torch.nn.Module")
        return net.train()


def read(text: str, latents: int) -> Architecture:
    """An architecture as it is asked for on the command line; "" is TINY's UNet. latents: of a side.

    ValueError or FileNotFoundError names what is wrong.
    """
    config = replace(TINY.unet, sample_size=latents)
    if not text.strip():
        return Architecture("TINY", config)
    if match := re.fullmatch(r"(.+\.py):(\w+)", text):
        return Architecture(text, config, _function(Path(match[1]), match[2]))
    return Architecture(text, _changed(config, text))


def _changed(config: UNetConfig, text: str) -> UNetConfig:
    try:
        call = ast.parse(f"config({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        changes = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(f"{text!r}: expected {WANTED}") from None
    free = [field.name for field in fields(UNetConfig) if field.name not in FIXED]
    for name, value in changes.items():
        if name not in free:
            why = "is given by TINY's encoders and the images" if name in FIXED else "is no field"
            raise ValueError(f"{name} {why}: the config's fields to change are {', '.join(free)}")
        if isinstance(getattr(config, name), tuple):
            for number in value if isinstance(value, tuple) else ():
                check_int(name, number, least=0 if name == "depths" else 1)
        elif name == "norm_eps":
            check_float(name, value, 0)
        else:
            check_int(name, value)
    config = replace(config, **changes)
    levels = len(config.channels) if isinstance(config.channels, tuple) else 3
    for name in ("channels", "heads", "depths"):
        value = getattr(config, name)
        if not isinstance(value, tuple) or len(value) != levels:
            raise ValueError(f"{name} is {value}, expected {levels} whole numbers, one a level")
    return config


def _function(file: Path, name: str) -> Callable[[UNetConfig], Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    spec = importlib.util.spec_from_file_location(str(file.resolve()), file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.resolve().parent))  # it may import its neighbours, as a script may
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file}: cannot be run: {_told(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{file}: has no function {name}")
    return function


def example(latents: int) -> Batch:
    """Nothing in particular, of the right shapes: two images."""
    zeros, width = torch.zeros(2, 4, latents, latents), TINY.unet.text_dim
    text = TextEmbedding(torch.zeros(2, 5, width), torch.zeros(2, width), torch.ones(2, 5))
    return Batch(zeros, text, torch.zeros(2, 6), torch.tensor([100, 900]), zeros)


def predict(net: nn.Module, batch: Batch) -> Any:
    """What the module makes of a batch, called as `DiffusionLoss` calls a UNet."""
    text, times = batch.text, batch.timesteps.float()
    assert isinstance(text, TextEmbedding)
    return net(batch.latents, times, text.tokens, text.pooled, batch.size_ids, text.counts, residuals=())


def check(architecture: Architecture, batch: Batch) -> list[str]:
    """ValueError unless a new module predicts noise for the batch; the parameters that it does not use."""
    net = architecture.build(0)
    try:
        found = predict(net, batch)
    except Exception as error:
        raise ValueError(
            f"{architecture.text}: failed on what UNet.forward is given: {_told(error)}"
        ) from error
    shape = list(batch.latents.shape)
    if not isinstance(found, Tensor) or list(found.shape) != shape:
        got = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"{architecture.text}: its forward returned {got}, expected one of {shape}, the noise"
        )
    if not found.requires_grad:
        raise ValueError(f"{architecture.text}: its forward depends on no parameter")
    found.sum().backward()
    return [name for name, each in net.named_parameters() if each.requires_grad and each.grad is None]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """parameters: how many. flops: of matrix products, convolutions and attention, for one image once."""

    parameters: int
    flops: int


def cost(architecture: Architecture, batch: Batch) -> Cost:
    """Counted on a batch. Written out, since torch counts nothing for its fused attention on a CPU."""
    net = architecture.build(0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        predict(net, batch)
    parameters = sum(each.numel() for each in net.parameters())
    return Cost(parameters=parameters, flops=counter.get_total_flops() // len(batch.latents))


@torch.no_grad()
def build_both(a: Architecture, b: Architecture, seed: int) -> tuple[nn.Module, nn.Module, list[str]]:
    """Both with the same first values where names and shapes agree; the names of B's that keep B's own.

    Those of another scale in B, or constant in one only, were meant to start otherwise: they too keep B's.
    """
    first, second = a.build(seed), b.build(seed)
    known, own = dict(first.named_parameters()), []
    for name, parameter in second.named_parameters():
        if name in known and _drawn_alike(known[name], parameter):
            parameter.copy_(known[name])
        else:
            own.append(name)
    return first, second, own


def _drawn_alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if any(bool((each == each.flatten()[:1]).all()) for each in (a, b)):
        return torch.equal(a, b)
    ratio = (a.square().mean() / b.square().mean()).sqrt().item()
    return a.numel() < MANY or 0.8 < ratio < 1.25


def _told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
