"""Version of a model: whether modules, weights or settings have changed since it was read last."""

from itertools import chain
from typing import Any

from torch import nn


class ModelVersion:
    """Counter of a model's changes between reads, also of those that a callback makes in the midst of a run.

    Weights that are offloaded and copied back have not changed. It is read in every step: the dictionaries
    that list modules and weights are kept, as walking through all modules takes several times as long.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.number, self.state = model, 0, None
        self._list_modules()

    def read(self) -> int:
        """Return the present version; it is another one if a module or weight is, or a value was written."""
        if self._list_children() != self.children:
            self._list_modules()
        weights = [weight for named in self.weights_by_name for weight in named.values()]
        versions = [0 if weight is None else weight._version for weight in weights]
        settings = [module.state_key() for module in self.with_settings]
        state = self.children, [*map(id, weights)], versions, settings
        if state != self.state:
            self.number, self.state = self.number + 1, state
            self.weights = weights  # kept alive, so that no other has the identity of one
        return self.number

    def _list_modules(self) -> None:
        modules = [*self.model.modules()]
        self.children_by_name = [module._modules for module in modules]  # modules change these in place
        dicts = ((module._parameters, module._buffers) for module in modules)  # quantized weights are buffers
        self.weights_by_name = [*chain.from_iterable(dicts)]
        self.with_settings: list[Any] = [module for module in modules if hasattr(module, "state_key")]
        self.children = self._list_children()

    def _list_children(self) -> list[nn.Module | None]:
        return [child for named in self.children_by_name for child in named.values()]
