"""Record of a training run: all that determines its result, as JSON, and how two runs differ.

A trainer saves it with its state, and compares it before it goes on from one. Content is recorded as digests:
of a model (its names, shapes and a sample of its values), of each image and of each image's captions.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kolors_core.image import png_bytes
from kolors_core.module import sample_weights, settings
from kolors_core.training.loss_curve import draw_curve
from kolors_core.validation import short_repr
from weights_convert.untrusted_files import parse_object

DIGEST = "sha256:"  # start of a digest, which no setting has
Record = dict[str, Any]  # a setting, a digest, or the digests of a list's items, by name


class Losses(list[float]):
    """Losses of consecutive steps of a run, of which `first` is the first's number."""

    def __init__(self, losses: Iterable[float] = (), first: int = 0) -> None:
        super().__init__(losses)
        self.first = first

    def mean(self, part: slice = slice(None)) -> float:
        """Compute the mean of a part, of all if None."""
        return sum(self[part]) / len(self[part])

    def __repr__(self) -> str:
        if not self:
            return "Losses(no steps)"
        tenth = max(1, len(self) // 10)
        ends = f"{self.mean(slice(tenth)):.4f} -> {self.mean(slice(-tenth, None)):.4f}"
        return f"Losses(steps {self.first} to {self.first + len(self) - 1}: {ends}, means of {tenth})"

    def _repr_png_(self) -> bytes | None:  # in notebooks
        is_drawable = any(0 < loss < math.inf for loss in self)
        return png_bytes(draw_curve(self, self.first)) if is_drawable else None


def digest(*contents: bytes | Tensor) -> str:
    """Hash bytes and the values of tensors, on any device, to a short text."""
    found = hashlib.sha256()
    for content in contents:
        is_bytes = isinstance(content, bytes)
        found.update(content if is_bytes else content.detach().cpu().contiguous().numpy().tobytes())
    return DIGEST + found.hexdigest()[:16]


def digest_weights(tensors: Mapping[str, Tensor], key: object = None) -> str:
    """Hash names, shapes, dtypes and a sample of the values of a model's tensors, and a key of more."""
    dtypes = [(name, str(tensor.dtype)) for name, tensor in tensors.items()]
    return digest(repr((dtypes, key)).encode(), sample_weights(tensors))


def digest_model(model: nn.Module) -> str:
    """Hash a model: its weights, without those that train in an adapter, and its modules' settings."""
    adapters = tuple(
        f"{path}.{name}"
        for path, module in model.named_modules() if getattr(module, "is_adapter", False)
        for name, parameter in module.named_parameters() if parameter.requires_grad
    )  # fmt: skip
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in adapters}
    return digest_weights(state, (type(model).__name__, settings(model)))


def record_run(settings_of: Mapping[str, Any], loss: nn.Module, data: Mapping[str, Any]) -> Record:
    """Record a run of these settings, of the models of a loss, and of the data's own record."""
    trained = [(name, tuple(p.shape)) for name, p in loss.named_parameters() if p.requires_grad]
    own, keys = dict(loss.named_parameters(recurse=False)), [key for path, key in settings(loss) if not path]
    return {
        **settings_of,
        "objective": digest_weights(own, (type(loss).__name__, keys)),
        "trained weights": digest(repr(trained).encode()),
        **{name: digest_model(child) for name, child in loss.named_children()},
        **data,
    }


def differences(saved: str, record: Record) -> list[str]:
    """Describe how the run of a saved record differs from this one; ValueError for what is no record."""
    old = parse_object(saved.encode(), "the record of its run")
    new = json.loads(json.dumps(record))  # tuples are lists there
    names = [*new, *(name for name in old if name not in new)]
    values = ((name, old.get(name), new.get(name)) for name in names)
    return [_difference(name, before, now) for name, before, now in values if before != now]


def _difference(name: str, old: Any, new: Any) -> str:
    if isinstance(old, list) and isinstance(new, list):
        before, now = _counted(old), _counted(new)
        added, gone = (now - before).total(), (before - now).total()
        counts = f"{added} of {len(new)} are new, {gone} of the {len(old)} there are gone"
        text = counts if added or gone else "in another order"
    elif all(isinstance(value, str) and value.startswith(DIGEST) for value in (old, new)):
        text = "not the same"
    else:
        text = f"{short_repr(old)} there, {short_repr(new)} here"
    return f"{short_repr(name)[1:-1]}: {text}"


def _counted(items: Sequence[Any]) -> Counter[str]:
    return Counter(map(str, items))
