"""A checkpoint's tensors -> a model: strictly, or in part with a word on every tensor that does not fit.

Everything is checked by names and shapes from the file headers first; only then are tensors read, each from
the memory-mapped file to its place once, and the model gets all of them in one step or none. On a CPU each
lies as torch would allocate it, so that the same weights compute the same bits whichever file they came from.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from kolors_core.module import require_plain
from weights_convert import TABLES, detect_component
from weights_convert.key_mapping import UNUSED, compare, listed
from weights_convert.safetensors_files import Source, Tensors, aligned

RELEASE_AFTER = 2**26  # bytes that were copied out of a mapped file, whose pages are then let go

# (shape that the model wants, the checkpoint's tensor of another shape or None) -> a tensor of that shape
Initializer = Callable[[torch.Size, Tensor | None], Tensor]


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor: by the model's names, but the checkpoint's for `unexpected`.

    missing and misshapen were made by the initialisers that were given for them.
    """

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    def __str__(self) -> str:
        rest = listed(missing=self.missing, unexpected=self.unexpected, misshapen=self.misshapen)
        return f"{len(self.loaded)} loaded" + (f"; {rest}" if rest else "")


def zeros(shape: torch.Size, found: Tensor | None) -> Tensor:
    """An initialiser: zeros, whatever the checkpoint has."""
    return torch.zeros(shape)


def padded(shape: torch.Size, found: Tensor | None) -> Tensor:
    """An initialiser: the checkpoint's tensor in the first places of each axis, zeros after it.

    So a convolution with new input channels computes at first what it did without them. Raises ValueError for
    a tensor that is missing or does not fit in.
    """
    if found is None or found.ndim != len(shape) or any(map(int.__gt__, found.shape, shape)):
        got = "none" if found is None else f"one of {list(found.shape)}"
        raise ValueError(f"cannot pad to {list(shape)}: expected a tensor no larger, got {got}")
    whole = torch.zeros(shape, dtype=found.dtype)
    whole[tuple(slice(size) for size in found.shape)] = found
    return whole


def load(
    model: nn.Module,
    source: Source | Tensors,
    component: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    partial: Mapping[str, Initializer] | None = None,
) -> LoadReport:
    """Fill a model from a checkpoint, strictly. The model may be on the meta device; nothing is left on it.

    partial: load what fits. Each tensor of the model that the checkpoint lacks, or has in another shape, must
    match one of these names or patterns (`"conv_in.weight"`, `"up.*.bias"`, by our names), and its
    initialiser, such as `zeros` or `padded`, makes it; the first that matches counts. What the checkpoint has
    beyond the model is reported.

    Raises ValueError naming the first tensors that are missing, unexpected or misshapen, an initialiser that
    no such tensor matches or that makes another shape, or a quantised model, which is then untouched.
    """
    if partial is None:
        names = check(model, source, component)
        fill(model, source, names, dtype=dtype, device=device)
        return LoadReport(sorted(names.values()), [], [], [])
    return _load_what_fits(model, source, component, dtype, device, partial)


def check(model: nn.Module, source: Source | Tensors, component: str) -> dict[str, str]:
    """The model's name for each of a checkpoint's tensors that it reads, all of which fit; no tensor is read.

    Raises ValueError as `load` does.
    """
    where = source.where
    require_plain(model, f"load {where} into it; load a plain model, then quantise")
    table, is_ours = detect_component(source.keys(), where)
    if table.component != component:
        raise ValueError(f"{where}: expected the {component} of a Kolors checkpoint, got a {table.component}")
    ours = {name: name if is_ours else table.to_ours(name) for name in source}
    target = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if mismatch := compare(table, {ours[name]: source.shape(name) for name in source}, target):
        raise ValueError(f"{where}: {mismatch}")
    names = {name: own for name, own in ours.items() if not own.startswith(UNUSED)}
    _reject_duplicates(names, where)
    _refuse_whole_numbers(source, names)
    return names


def fill(
    model: nn.Module,
    source: Source | Tensors,
    names: Mapping[str, str],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    made: Mapping[str, Tensor] | None = None,
) -> None:
    """Give a model its tensors: those of a checkpoint by their names in the model, and those made already."""
    state, copied = dict(made or {}), 0
    for name, own in names.items():
        tensor = source.mapped(name)
        state[own] = aligned(tensor.to(device=device, dtype=dtype))
        copied += tensor.nbytes if state[own] is not tensor else 0
        if isinstance(source, Source) and copied > RELEASE_AFTER:
            source.release(name)
            copied = 0
    model.load_state_dict(state, strict=True, assign=True)


def _load_what_fits(
    model: nn.Module,
    source: Source | Tensors,
    component: str,
    dtype: torch.dtype,
    device: torch.device | str,
    partial: Mapping[str, Initializer],
) -> LoadReport:
    """See `load`. By name, `ours` is the model's for each of the file's, and `theirs` the other way round."""
    require_plain(model, f"load {source.where} into it; load a plain model, then quantise")
    target = {name: tensor.shape for name, tensor in model.state_dict().items()}
    ours = _best_key_mapping(source, component, target)
    theirs = {own: name for name, own in ours.items()}
    fitting = {name: own for name, own in ours.items() if own in target and source.shape(name) == target[own]}
    missing = sorted(target.keys() - theirs.keys())
    misshapen = sorted(target.keys() & theirs.keys() - set(fitting.values()))
    _refuse_whole_numbers(source, [*fitting, *(theirs[own] for own in misshapen)])
    patterns = dict[str, str]()
    for own in (*missing, *misshapen):
        pattern = next((pattern for pattern in partial if fnmatchcase(own, pattern)), None)
        if pattern is None:
            had = f"is {list(source.shape(theirs[own]))}" if own in theirs else "is missing"
            wanted = f"the model wants {list(target[own])}: give an initialiser for it in partial"
            raise ValueError(f"{source.where}: {own} {had}, {wanted}")
        patterns[own] = pattern
    if idle := [pattern for pattern in partial if pattern not in patterns.values()]:
        raise ValueError(f"partial: {idle[0]!r} matches no tensor that is missing or misshapen")
    made = {}
    for own, pattern in patterns.items():
        try:
            value = partial[pattern](target[own], source[theirs[own]] if own in theirs else None)
        except ValueError as error:
            raise ValueError(f"{source.where}: {own}: {error}") from None
        if not isinstance(value, Tensor) or value.shape != target[own] or value.is_meta:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the initialiser of {own} made {got}, the model wants {list(target[own])}")
        made[own] = value.detach().to(device=device, dtype=dtype, copy=True)
    fill(model, source, fitting, dtype=dtype, device=device, made=made)
    unexpected = sorted(
        name for name, own in ours.items() if own not in target and not own.startswith(UNUSED)
    )
    return LoadReport(sorted(fitting.values()), missing, unexpected, misshapen)


def _best_key_mapping(
    source: Source | Tensors, component: str, target: Mapping[str, object]
) -> dict[str, str]:
    """Our name of each tensor, read as public or as ours, whichever the model knows more of."""
    tables = [table for table in TABLES.values() if table.component == component]
    ways = [{name: table.to_ours(name) for name in source} for table in tables]
    ways.append({name: name for name in source})
    best = max(ways, key=lambda names: sum(own in target for own in names.values()))
    if not any(own in target for own in best.values()):
        raise ValueError(f"{source.where}: has no tensor of the model, a {component}")
    _reject_duplicates(best, source.where)
    return best


def _reject_duplicates(names: Mapping[str, str], where: str) -> None:
    """ValueError for two tensors that have one name in the model."""
    seen = set[str]()
    for name, own in names.items():
        if own in seen:
            raise ValueError(f"{where}: {name} is there under two names")
        seen.add(own)


def _refuse_whole_numbers(source: Source | Tensors, names: Iterable[str]) -> None:
    for name in names:
        if not (dtype := source.dtype(name)).is_floating_point:
            raise ValueError(f"{source.where}: {name} holds {dtype}, expected floating-point weights")
