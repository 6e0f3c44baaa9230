"""The base of our modules, torch's, whose `help` shows what is written here and not torch's own 60 pages; and
of those that stand in another's place."""

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn


class OwnNames(type):
    """Lets `dir` of a class, by which `help` goes, name what its own files define."""

    def __dir__(cls) -> Iterable[str]:
        kinds = (kind for kind in cls.__mro__ if kind not in Module.__mro__)
        return {name for kind in kinds for name in vars(kind) if not name.startswith("__")}


class Module(nn.Module, metaclass=OwnNames):
    """A module; `dir` of an instance is as of any of torch's.

    is_block: whether modules of this class are compiled, offloaded, sharded and checkpointed each as one.
    """

    is_block: ClassVar[bool] = False

    def state_key(self) -> tuple[Any, ...]:
        """Return the settings, beside the weights, that decide the output, such as an adapter's scale."""
        return ()

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(nn.Module)})


def is_block(module: nn.Module) -> bool:
    """Return whether a module is a block; one of no class of ours is a block if it says `is_block = True`."""
    return getattr(module, "is_block", False) is True


def settings(model: nn.Module) -> tuple[Any, ...]:
    """Return `(path, module.state_key())` of every module that has a non-empty `state_key()`."""
    keys = ((path, getattr(module, "state_key", tuple)()) for path, module in model.named_modules())
    return tuple((path, key) for path, key in keys if key)


class StandIn(nn.Module):
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
