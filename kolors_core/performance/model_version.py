"""Version of a model: whether modules, weights or settings have changed since it was read last."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class ModelListing:
    """Modules of models, and the dictionaries that hold their parts, to be read in every step.

    A callback may change a model in the midst of a run. Modules change the dictionaries in place; walking
    through all modules takes several times as long, and is done where one has come or gone.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.models = models
        self.list_modules()

    def list_modules(self) -> None:
        """Walk through all modules."""
        self.modules = [module for model in self.models for module in model.modules()]
        self.own = [vars(module) for module in self.modules]  # asking a module takes longer than reading it
        self._submodules = [own["_modules"] for own in self.own]
        # Quantized weights are buffers.
        self._tensors = [own[name] for own in self.own for name in ("_parameters", "_buffers")]
        self._with_settings: list[Any] = [module for module in self.modules if hasattr(module, "state_key")]
        self.children = self._list_children()

    def refresh(self) -> None:
        """List the modules anew if they are others."""
        if self.children != self._list_children():
            self.list_modules()

    def tensors(self) -> list[Tensor | None]:
        """Return the present parameters and buffers."""
        return [tensor for named in self._tensors for tensor in named.values()]

    def settings(self) -> list[Any]:
        """Return the present settings, see `module.settings`."""
        return [module.state_key() for module in self._with_settings]

    def _list_children(self) -> list[nn.Module | None]:
        return [child for children in self._submodules for child in children.values()]


class ModelVersion(ModelListing):
    """Counter of a model's changes between reads. Weights that are offloaded and copied back are the same."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__([model])
        self.number, self.state = 0, None

    def read(self) -> int:
        """Return the present version; it is another one if a module or weight is, or a value was written."""
        self.refresh()
        weights = self.tensors()
        versions = [0 if weight is None else weight._version for weight in weights]
        state = self.children, [*map(id, weights)], versions, self.settings()
        if state != self.state:
            self.number, self.state = self.number + 1, state
            self.weights = weights  # kept alive, so that no other has the identity of one
        return self.number
