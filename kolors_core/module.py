"""Optional attributes by which a module, which is torch's own, tells the library what it is.

    is_block      True: repeated in a model, and compiled, offloaded, checkpointed and sharded as one
    is_adapter    True: attached to a model, and no part of the model's own checkpoint
    state_key()   settings, beside weights and inputs, that decide what this module itself computes
    not_plain     why weights cannot be loaded, saved or changed as those of a plain module can

A feature that changes a model sets them on its own classes; a cache, a compiler or a checkpoint asks for them
and need not know the feature.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

from torch import nn


def is_block(module: nn.Module) -> bool:
    """Return whether a module is a block."""
    return getattr(module, "is_block", False) is True


class ReplacedModule(nn.Module):
    """A module in another's place, with its very parameters, sizes, mode and hooks; `plain` is that other."""

    def __init__(self, base: nn.Module) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(base))  # the parameters are taken over, none is made
        self._parameters, self._modules = dict(base._parameters), {}
        self.base = (base,)  # in a tuple, since it is no submodule

    def plain(self) -> nn.Module:
        """The very module that this one replaced, with the present parameters."""
        base = self.base[0]
        base._parameters.update(self._parameters)
        return base.train(self.training)


def settings(model: nn.Module) -> tuple[Any, ...]:
    """Return what decides a model's output beside weights and inputs: (path, state key) of its modules."""
    keys = ((path, getattr(module, "state_key", tuple)()) for path, module in model.named_modules())
    return tuple((path, key) for path, key in keys if key)


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """Return what changes when a weight of the model is written or replaced, or a setting changes.

    A write through `.data` goes unnoticed.
    """
    weights = tuple((parameter.data_ptr(), parameter._version) for parameter in model.parameters())
    return weights, settings(model)


def require_plain(model: nn.Module, wish: str) -> None:
    """Raise ValueError if a module of the model cannot be read, written or changed as the plain one could.

    Such a module, a quantized layer for example, says in `not_plain` what it is.
    """
    why = next((found for module in model.modules() if (found := getattr(module, "not_plain", None))), None)
    if why is not None:
        raise ValueError(f"this {type(model).__name__} is {why}: cannot {wish}")


class WrapStep(Protocol):
    """Another way to run a step of a denoising run, such as performance/cuda_graphs.py's.

    Called once a run with `step(constant, *changing)`, whose `constant` tensors, nested as they like, stay
    the same within the run; the modules that the step calls; and a key of all else that is baked into it.
    """

    def __call__(
        self, step: Callable[..., Any], constant: Any, nets: Sequence[nn.Module], key: Hashable = ()
    ) -> Callable[..., Any]:
        """Return the step as a function of `changing`, which are tensors."""
        ...
