"""Optimizers by parameter groups, and their state as named tensors, whichever optimizer it is.

A parameter is in the first group whose pattern matches its name; those that no pattern matches are in one of
the config's own rate and decay. The trainer sets each group's rate to its own times the schedule's factor.
State is what an optimizer keeps of a parameter: tensors, or numbers, such as AdamW's exp_avg, exp_avg_sq and
step. A group's numbers that change while it trains, such as the distance of Prodigy, are state too.
"""

import logging
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from kolors_core.training.config import ParameterGroup, TrainingConfig
from kolors_core.training.run_record import Record
from kolors_core.validation import short_repr

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]  # a class of torch.optim, or a function
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, the only state of states that are saved without "step"
TAKEN = ("weights", "ema")  # beginnings of other tensors' names in a state
logger = logging.getLogger("kolors_core")


def freeze(loss: nn.Module, groups: Sequence[ParameterGroup]) -> None:
    """Set `requires_grad` of frozen groups' parameters to False; ValueError for a group without any."""
    members = _members([name for name, p in loss.named_parameters() if p.requires_grad], groups)
    for group, own in zip(groups, members, strict=False):
        for name in own if group.frozen else ():
            loss.get_parameter(name).requires_grad_(False)


def make_optimizer(
    named: Mapping[str, nn.Parameter], config: TrainingConfig, make: MakeOptimizer | None
) -> Optimizer:
    """Make an optimizer of the groups of these parameters; ValueError if it does not have each of them once.

    make: called with the groups, dicts with "params", "lr" and "weight_decay"; None: AdamW.
    """
    low = [name for name, parameter in named.items() if parameter.dtype in (torch.float16, torch.bfloat16)]
    if low:
        how = "load it in float32 and set TrainingConfig(dtype=torch.bfloat16)"
        logger.warning("%d of %d trained tensors are %s, such as %s, and small updates round to nothing: %s",
                       len(low), len(named), named[low[0]].dtype, low[0], how)  # fmt: skip
    groups = [group for group in config.groups if not group.frozen]
    members = _members(list(named), groups)
    rates = [*(group.learning_rate for group in groups), None]
    decays = [*(group.weight_decay for group in groups), None]
    settings = [
        {
            "params": [named[name] for name in own],
            "lr": config.learning_rate if rate is None else rate,
            "weight_decay": config.weight_decay if decay is None else decay,
        }
        for own, rate, decay in zip(members, rates, decays, strict=True) if own
    ]  # fmt: skip
    if make is None:
        return torch.optim.AdamW(settings, betas=(0.9, config.adam_beta2))
    if config.adam_beta2 != TrainingConfig.adam_beta2:
        raise ValueError(f"adam_beta2 is of the AdamW that is used without `optimizer`, which is {make!r}")
    optimizer = make(settings) if callable(make) else make
    if not isinstance(optimizer, Optimizer):
        expected = "a torch.optim class, or a function of parameter groups that returns an optimizer"
        got = f"it returned a {type(optimizer).__name__}" if callable(make) else f"got {short_repr(make)}"
        raise ValueError(f"optimizer must be {expected}; {got}")
    trained = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    if sorted(trained) != sorted(map(id, named.values())):
        got = f"{len(trained)} of the {len(named)} parameters to train"
        raise ValueError(f"optimizer must train each parameter of the groups that it gets once; it has {got}")
    return optimizer


def _members(names: Sequence[str], groups: Sequence[ParameterGroup]) -> list[list[str]]:
    """List the names of each group, and of none at last; ValueError for a pattern that selects nothing."""
    members: list[list[str]] = [[] for _ in range(len(groups) + 1)]
    for name in names:
        matching = (i for i, group in enumerate(groups) if fnmatchcase(name, group.pattern))
        members[next(matching, len(groups))].append(name)
    for group, own in zip(groups, members, strict=False):
        if not own:
            is_covered = any(fnmatchcase(name, group.pattern) for name in names)
            why = "only parameters of groups before it" if is_covered else "no parameter that is trained"
            raise ValueError(f"group {group.pattern!r} matches {why}; there are {', '.join(names[:8])}, ...")
    return members


def record_optimizer(optimizer: Optimizer) -> Record:
    """Record the class of an optimizer and the settings of its groups."""
    groups = [{key: _plain(value) for key, value in group.items() if key != "params"}
              for group in optimizer.param_groups]  # fmt: skip
    return {"optimizer": type(optimizer).__qualname__, "parameter groups": groups}


def _plain(value: Any) -> Any:
    """Return a setting as JSON has it; of others their type, as what they show may be of this process."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return value if isinstance(value, bool | int | float | str | None) else type(value).__name__


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set a group's rate, in its tensor if the optimizer keeps it in one."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def group_numbers(optimizer: Optimizer) -> list[dict[str, bool | int | float]]:
    """List the numbers of each group, without the rate, which the trainer sets."""
    return [
        {key: value for key, value in group.items() if key != "lr" and isinstance(value, bool | int | float)}
        for group in optimizer.param_groups
    ]


def set_group_numbers(optimizer: Optimizer, numbers: Sequence[Mapping[str, Any]]) -> None:
    """Set numbers of each group, also those that a step adds; ValueError for others than numbers."""
    own = group_numbers(optimizer)
    if len(numbers) != len(own) or not all(map(_are_numbers, numbers, optimizer.param_groups, own)):
        raise ValueError(f"expected numbers of {len(own)} parameter groups, got {short_repr(numbers)}")
    for group, values in zip(optimizer.param_groups, numbers, strict=True):
        group.update(values)


def _are_numbers(values: Any, group: dict[str, Any], numbers: dict[str, Any]) -> bool:
    """Return whether values may be set in a group with these numbers: they replace no setting."""
    return isinstance(values, Mapping) and all(
        isinstance(value, bool | int | float) and (name in numbers or name not in group)
        for name, value in values.items()
    )


def create_state(optimizer: Optimizer) -> None:
    """Create the state that an optimizer has after a first step, by one of rate 0 and gradients of 0."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        set_rate(group, 0.0)
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        set_rate(group, rate)


def state_tensors(optimizer: Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """List the state by names in a file, "exp_avg.unet.conv_in.weight"; numbers are copied to new tensors."""
    return {name: _as_tensor(value) for name, _, _, value in _entries(optimizer, named)}


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def forget_state(optimizer: Optimizer, named: Mapping[str, nn.Parameter], saved: Container[str]) -> None:
    """Remove the state of each parameter of which none is saved: it had no gradient there."""
    for name, parameter in named.items():
        if not any(entry in saved for entry, *_ in _entries(optimizer, {name: parameter})):
            optimizer.state.pop(parameter, None)


def set_numbers(
    optimizer: Optimizer, named: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Set the numbers of the state to those of `state_tensors`."""
    for name, state, key, value in list(_entries(optimizer, named)):
        if not isinstance(value, Tensor):
            state[key] = type(value)(tensors[name].item())


def _entries(
    optimizer: Optimizer, named: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, dict[str, Any], str, Any]]:
    """Yield names in a file, and the state of a parameter with the key that each stands for."""
    for name, parameter in named.items():
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            own = f"optimizer.{key}" if key in TAKEN else key
            if isinstance(value, Tensor) and not isinstance(value, DTensor) and type(value) is not Tensor:
                # A subclass of several tensors, such as 8-bit values and their scales.
                for part in value.__tensor_flatten__()[0]:  # pyright: ignore[reportAttributeAccessIssue]
                    yield f"{own}.{part}.{name}", state, key, getattr(value, part)
            elif isinstance(value, Tensor | bool | int | float):
                yield f"{own}.{name}", state, key, value
