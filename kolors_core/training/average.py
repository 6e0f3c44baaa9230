"""Moving average of the trained weights: in tensors of its own, or in modules that a loss computes with."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def check_copies(loss: nn.Module, copies: Mapping[str, nn.Module]) -> None:
    """Raise ValueError unless each is a frozen module of the loss, with the trained parameters of another.

    copies: by the name that the module to average has in the loss.
    """
    modules, trained = set(loss.modules()), {n: p for n, p in loss.named_parameters() if p.requires_grad}
    for name, module in copies.items():
        own = {f"{name}.{n}": p for n, p in module.named_parameters()}
        of_it = {n: p.shape for n, p in trained.items() if n.startswith(f"{name}.")}
        if not of_it:
            raise ValueError(f"average: {name!r} has no parameter that is trained")
        if module not in modules or any(parameter.requires_grad for parameter in own.values()):
            expected = "a module of the loss that is frozen, requires_grad_(False)"
            raise ValueError(f"average of {name!r}: expected {expected}")
        if unlike := [n for n, shape in of_it.items() if n not in own or own[n].shape != shape]:
            raise ValueError(f"average of {name!r}: expected a copy of it, whose {unlike[0]} differs")


@torch.no_grad()
def make_average(named: Mapping[str, nn.Parameter], copies: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """List the average of each trained parameter, now equal to it: a parameter of a copy, or a new tensor."""
    held = {f"{name}.{n}": p for name, module in copies.items() for n, p in module.named_parameters()}
    for name in held.keys() & named.keys():
        held[name].copy_(named[name])
    return {name: held[name] if name in held else p.detach().clone() for name, p in named.items()}


@contextmanager
def averaged(named: Mapping[str, nn.Parameter], average: Mapping[str, Tensor]) -> Iterator[None]:
    """Exchange the weights and their average within the block."""
    _exchange(named, average)
    try:
        yield
    finally:
        _exchange(named, average)


@torch.no_grad()
def _exchange(named: Mapping[str, nn.Parameter], average: Mapping[str, Tensor]) -> None:
    for name, tensor in average.items():
        kept = named[name].detach().clone()
        named[name].copy_(tensor)
        tensor.copy_(kept)
