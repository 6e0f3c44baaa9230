"""The base of our modules: torch's, whose `help` shows what is written here and not torch's own 60 pages."""

from collections.abc import Iterable

from torch import nn


class OwnNames(type):
    """Lets `dir` of a class, by which `help` goes, name what its own files define."""

    def __dir__(cls) -> Iterable[str]:
        kinds = (kind for kind in cls.__mro__ if isinstance(kind, OwnNames) and kind is not Module)
        return {name for kind in kinds for name in vars(kind) if not name.startswith("__")}


class Module(nn.Module, metaclass=OwnNames):
    """A module; `dir` of an instance is as of any of torch's."""

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(nn.Module)})
