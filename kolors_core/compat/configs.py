"""Configs that answer to the reference's names too, as attributes and items, such as `cross_attention_dim`.

Each has the fields of the plain config that it extends, and equals it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from kolors_core import config
from kolors_core.adapters import controlnet
from kolors_core.config import ConfigDict


class ReadOnlyConfig(ConfigDict):
    """Config that is computed from what it describes, and cannot be changed."""

    hint: ClassVar[str]  # what to write instead, with {} for the field

    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError(f"this config is read only: {self.hint.format(name)}")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __reduce__(self) -> tuple[Any, ...]:  # a copy sets no items
        return type(self), (dict(self),)


class PublicNames(Mapping[str, Any]):
    """Mapping of the names and values that a plain config writes to its `config.json`."""

    plain: ClassVar[type]  # the plain config
    to_public: Callable[[], dict[str, Any]]

    def __getitem__(self, name: str) -> Any:
        return self.to_public()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_public())

    def __len__(self) -> int:
        return len(self.to_public())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self:  # a copy asks for dunder names before it has fields
            raise AttributeError(f"the config has no field {name!r}")
        return self[name]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, self.plain) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))  # as of the plain config


@dataclass(frozen=True, kw_only=True, eq=False)
class ChatGLMConfig(PublicNames, config.ChatGLMConfig):
    """Config of a `ChatGLMModel`."""

    plain = config.ChatGLMConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class UNetConfig(PublicNames, config.UNetConfig):
    """Config of a `UNet2DConditionModel`."""

    plain = config.UNetConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class VAEConfig(PublicNames, config.VAEConfig):
    """Config of an `AutoencoderKL`."""

    plain = config.VAEConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlNetConfig(PublicNames, controlnet.ControlNetConfig):
    """Config of a `ControlNetModel`."""

    plain = controlnet.ControlNetConfig


_KINDS = {kind.plain: kind for kind in (ChatGLMConfig, UNetConfig, VAEConfig, ControlNetConfig)}


def with_public_names(config: Any) -> Any:
    """Return a plain config as one that has the public names too; another class of config as it is."""
    kind = _KINDS.get(type(config))
    return config if kind is None else kind(**vars(config))
