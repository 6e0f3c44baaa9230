"""Optional attributes of an `nn.Module` that describe it to caches, compilers and checkpoints.

    is_block      True: repeated in a model, and compiled, offloaded, checkpointed and sharded as one
    is_adapter    True: attached to a model, and not part of the model's own checkpoint
    state_key()   settings, besides weights and inputs, that change what this module itself computes
    not_plain     why weights cannot be loaded, saved or changed as those of a plain module can
    reads_counts  True: a text encoder obeys `TokenBatch.counts`, so that equal pads may be merged
    prediction_type   of a denoiser: what it has learned to predict (targets.py), where that is known

A feature sets them on its own classes; the core reads them without knowing the feature.
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from kolors_core.devices import check_dtype

T = TypeVar("T")
SAMPLES = 64  # values of a tensor that tell weights apart: training, fusing and quantizing change them


def is_block(module: nn.Module) -> bool:
    """Return whether a module is a block."""
    return getattr(module, "is_block", False) is True


def reads_counts(encoder: Any) -> bool:
    """Return whether a text encoder obeys the counts of its tokens."""
    return bool(getattr(encoder, "reads_counts", False))


def find_blocks(model: nn.Module, action: str) -> list[nn.Module]:
    """List a model's blocks; ValueError that says how blocks are marked if it has none to `action`."""
    if not (blocks := [module for module in model.modules() if is_block(module)]):
        how = "set is_block = True in the class of the layers that repeat, see kolors_core/module.py"
        raise ValueError(f"this {type(model).__name__} has no blocks to {action}: {how}")
    return blocks


def first_weight(model: nn.Module) -> Tensor:
    """Return a model's first floating-point tensor, whose device and dtype are the model's."""
    tensors = chain(model.parameters(), model.buffers())
    if (weight := next((one for one in tensors if one.is_floating_point()), None)) is None:
        raise ValueError(f"this {type(model).__name__} has no floating-point weights")
    return weight


class Model(nn.Module):
    """Base of whole models; `to` refuses dtypes that models cannot compute in."""

    def to(self, *targets: Any, **named: Any) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move or cast as `nn.Module.to`; TypeError for integers and float8, before anything is cast."""
        for target in (*targets, *named.values()):
            if isinstance(dtype := target.dtype if isinstance(target, Tensor) else target, torch.dtype):
                check_dtype(dtype)
        return super().to(*targets, **named)


class ReplacedModule(nn.Module):
    """Module that replaces another, with the same parameters, sizes, mode and hooks; `plain` restores it."""

    def __init__(self, base: nn.Module) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(base))  # the parameters are shared, not copied
        self._parameters, self._modules = dict(base._parameters), {}
        self.base = (base,)  # in a tuple, so that it is not a submodule

    def plain(self) -> nn.Module:
        """Return the replaced module itself, with the present parameters."""
        base = self.base[0]
        base._parameters.update(self._parameters)
        return base.train(self.training)


@contextmanager
def all_or_nothing(*models: nn.Module) -> Iterator[None]:
    """Restore which modules, tensors and attributes the models have if the block raises, as on Ctrl-C.

    What a block writes into tensors, or into attributes' own values such as lists, is not restored.
    """
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in (module for model in models for module in model.modules()):
        dicts = (vars(module), module._modules, module._parameters, module._buffers)
        before += [(own, dict(own)) for own in dicts]
    try:
        yield
    except BaseException:
        for own, entries in before:
            own.clear()
            own.update(entries)
        raise


def apply_to_all(action: Callable[[T], object], items: Collection[T]) -> None:
    """Call an action, which may be repeated, with every item; an interrupt is raised after the last."""
    try:
        for item in items:
            action(item)
    except BaseException:
        for item in items:
            action(item)
        raise


def settings(model: nn.Module) -> tuple[Any, ...]:
    """Return the settings that change a model's output: (path, state key) of its modules."""
    keys = ((path, getattr(module, "state_key", tuple)()) for path, module in model.named_modules())
    return tuple((path, key) for path, key in keys if key)


def sample_weights(tensors: Mapping[str, Tensor], whole: Sequence[Tensor] = ()) -> bytes:
    """Return each tensor's name, shape and `SAMPLES` of its values: the same in any order, on any device.

    A dtype that holds the same values gives the same bytes. whole: tensors whose values follow, all of them.
    An accelerator is waited for once for each dtype, not for each tensor.
    """
    ordered = sorted(tensors.items())
    samples = [t.detach().flatten()[:: max(1, t.numel() // SAMPLES)] for _, t in ordered]
    on_cpu = _to_cpu([*samples, *(t.detach().flatten() for t in whole)])
    values = [v.double().numpy().tobytes() for v in on_cpu]  # after the copy: MPS has no float64
    names = [f"{name} {list(tensor.shape)} ".encode() for name, tensor in ordered]
    named = chain.from_iterable(zip(names, values[: len(names)], strict=True))
    return b"".join([*named, *values[len(names) :]])


def _to_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors of one axis to the CPU, all of one device and dtype at once."""
    groups: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    found = list(tensors)
    for (device, _), members in groups.items():
        if device.type != "cpu":
            sizes = [found[i].numel() for i in members]
            together = torch.cat([found[i] for i in members]).cpu()
            for i, part in zip(members, together.split(sizes), strict=True):
                found[i] = part
    return found


def require_plain(model: nn.Module, action: str) -> None:
    """Raise ValueError if a module, such as a quantized layer, has `not_plain` set: cannot do `action`."""
    why = next((found for module in model.modules() if (found := getattr(module, "not_plain", None))), None)
    if why is not None:
        raise ValueError(f"this {type(model).__name__} is {why}: cannot {action}")


class WrapStep(Protocol):
    """Function that replaces a run's step by another, such as performance/cuda_graphs.py's.

    Called once a run with `step(constant, *changing)`, whose `constant` tensors, in any nesting, stay the
    same within the run; the modules that the step calls; and a key of all else that the step depends on.
    """

    def __call__(
        self, step: Callable[..., Any], constant: Any, nets: Sequence[nn.Module], key: Hashable = ()
    ) -> Callable[..., Any]:
        """Return the step as a function of the tensors `changing`."""
        ...
