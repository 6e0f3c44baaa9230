"""Fingerprints of weights: the same for the same weights, from whatever file, in whatever dtype holds them.

A fingerprint is of every tensor's name and shape and of 64 of its values: another training, fusing or
quantizing changes it, a change between these values does not. It is computed once for a model's state.
"""

import hashlib
from collections.abc import Callable, Mapping
from itertools import chain
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from kolors_core.checkpoint import base_state
from kolors_core.module import sample_weights

DIGITS = 16  # hexadecimal, of a fingerprint
_known: WeakKeyDictionary[nn.Module, tuple[object, str]] = WeakKeyDictionary()


def fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of a model's own weights, without those of attached adapters."""
    return _cached(model, model, lambda: base_state(model))


def adapter_fingerprint(parts: Mapping[str, nn.Module]) -> str:
    """Return the fingerprint of an adapter's modules, by their paths in the model."""
    whole = nn.ModuleList(parts.values())

    def state() -> dict[str, Tensor]:
        modules = zip(parts, whole, strict=True)
        states = ((path, part.state_dict()) for path, part in modules)
        return {f"{path}.{name}": tensor for path, state in states for name, tensor in state.items()}

    return _cached(next(iter(parts.values())), whole, state)


def _cached(owner: nn.Module, model: nn.Module, state: Callable[[], Mapping[str, Tensor]]) -> str:
    """Return what is known of the owner, or the digest of a state where a tensor is new or was written."""
    tensors = chain(model.parameters(), model.buffers())
    key = tuple((id(tensor), tensor._version, tensor.dtype) for tensor in tensors)
    if owner not in _known or _known[owner][0] != key:
        _known[owner] = key, hashlib.sha256(sample_weights(state())).hexdigest()[:DIGITS]
    return _known[owner][1]
