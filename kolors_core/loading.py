"""Loading of a checkpoint's tensors into a model: strictly, or in part with a report of what does not fit.

Everything is checked by names and shapes from the file headers first; only then are tensors read, each
copied from the memory-mapped file at most once, and the model gets all of them in one step or none. On a CPU
each is aligned as torch would allocate it, so that the same weights compute the same bits from any file.
"""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from kolors_core.devices import check_dtype
from kolors_core.module import require_plain
from weights_convert import TABLES, detect_component
from weights_convert.key_mapping import UNUSED, Table, compare, summarize
from weights_convert.safetensors_files import Source, Tensors, aligned

RELEASE_AFTER = 2**26  # bytes copied from a mapped file, after which its pages are released

# (the model's shape, the checkpoint's tensor of another shape or None) -> a tensor of the model's shape
Initializer = Callable[[torch.Size, Tensor | None], Tensor]
# (a model name, the file's tensor) -> what the model has in its place, by name; None for the tensor as usual
Converter = Callable[[str, Tensor], Mapping[str, Tensor] | None]


@dataclass(frozen=True)
class LoadReport:
    """Report of a load: tensors by the model's names, in `unexpected` by the checkpoint's."""

    loaded: list[str]
    missing: list[str]  # created by the initializers given for them, as the misshapen
    unexpected: list[str]
    misshapen: list[str]

    def __str__(self) -> str:
        rest = summarize(missing=self.missing, unexpected=self.unexpected, misshapen=self.misshapen)
        return f"{len(self.loaded)} loaded" + (f"; {rest}" if rest else "")

    def __repr__(self) -> str:
        """Return the text, without the names of all tensors."""
        return f"<{type(self).__name__}: {self}>"


def zeros(shape: torch.Size, found: Tensor | None) -> Tensor:
    """Initialize with zeros, whatever the checkpoint has."""
    return torch.zeros(shape)


def zero_padded(shape: torch.Size, found: Tensor | None) -> Tensor:
    """Initialize with the checkpoint's tensor, zeros after it on each axis; ValueError if it does not fit."""
    if found is None or found.ndim != len(shape) or any(map(int.__gt__, found.shape, shape)):
        got = "none" if found is None else f"one of {list(found.shape)}"
        raise ValueError(f"cannot pad to {list(shape)}: expected a tensor no larger, got {got}")
    whole = torch.zeros(shape, dtype=found.dtype)
    whole[tuple(slice(size) for size in found.shape)] = found
    return whole


def load(
    model: nn.Module, source: Source | Tensors, component: str, *, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu", partial: Mapping[str, Initializer] | None = None,
    table: Table | None = None,
) -> LoadReport:  # fmt: skip
    """Load a checkpoint into a model, strictly. The model may be on the meta device; no tensor stays there.

    table: of the file's names; None for that of `TABLES` which they fit.
    partial: load what fits. Each tensor of the model that the checkpoint lacks, or has in another shape, must
    match one of these names or patterns (`"conv_in.weight"`, `"up.*.bias"`, by our names), and is created by
    its initializer, such as `zeros` or `zero_padded`; the first match counts. Unknown tensors are reported.
    Raises ValueError naming the first tensors that are missing, unexpected or misshapen, an initializer that
    matches no such tensor or returns another shape, or a quantized model; the model is then unchanged.
    """
    check_dtype(dtype)
    require_plain(model, f"load {source.where} into it; load a plain model, then quantize")
    if partial is None:
        names = check(model, source, component, table)
        assign_weights(model, source, names, dtype=dtype, device=device)
        return LoadReport(sorted(names.values()), [], [], [])
    return _load_what_fits(model, source, component, dtype, device, partial, table)


def check(
    model: nn.Module, source: Source | Tensors, component: str, table: Table | None = None
) -> dict[str, str]:
    """Check by headers that a checkpoint fits; return checkpoint name -> model name, without dropped ones.

    table: as for `load`.
    """
    where = source.where
    table, is_ours = detect_component(source.keys(), where) if table is None else (table, False)
    if table.component != component:
        raise ValueError(f"{where}: expected the {component} of a Kolors checkpoint, got a {table.component}")
    internal = {name: name if is_ours else table.to_ours(name) for name in source}
    target = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if mismatch := compare(table, {internal[name]: source.shape(name) for name in source}, target):
        raise ValueError(f"{where}: {mismatch}")
    names = {public: name for public, name in internal.items() if not name.startswith(UNUSED)}
    _reject_duplicates(names, where)
    _reject_integers(source, names)
    return names


def assign_weights(
    model: nn.Module, source: Source | Tensors, names: Mapping[str, str], *, dtype: torch.dtype,
    device: torch.device | str, initialized: Mapping[str, Tensor] | None = None,
    convert: Converter | None = None,
) -> None:  # fmt: skip
    """Assign a checkpoint's tensors (checkpoint name -> model name) and initialized ones to a model."""
    state, copied = dict(initialized or {}), 0
    for public, name in names.items():
        tensor = source.mapped(public)
        converted = None if convert is None else convert(name, tensor)
        if converted is None:
            converted = {name: aligned(tensor.to(device=device, dtype=dtype))}
        state |= converted
        copied += tensor.nbytes if converted.get(name) is not tensor else 0
        if isinstance(source, Source) and copied > RELEASE_AFTER:
            source.release(public)
            copied = 0
    model.load_state_dict(state, strict=True, assign=True)


def _load_what_fits(
    model: nn.Module, source: Source | Tensors, component: str, dtype: torch.dtype,
    device: torch.device | str, partial: Mapping[str, Initializer], table: Table | None
) -> LoadReport:  # fmt: skip
    target = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tables = [own for own in TABLES.values() if own.component == component] if table is None else [table]
    internal = _best_key_mapping(source, component, target, tables)  # checkpoint name -> model name
    public = {name: stored for stored, name in internal.items()}
    fitting = {stored: name for stored, name in internal.items() if source.shape(stored) == target.get(name)}
    missing = sorted(target.keys() - public.keys())
    misshapen = sorted(target.keys() & public.keys() - set(fitting.values()))
    _reject_integers(source, [*fitting, *(public[name] for name in misshapen)])
    patterns = dict[str, str]()
    for name in (*missing, *misshapen):
        if (pattern := next((key for key in partial if fnmatchcase(name, key)), None)) is None:
            got = f"is {list(source.shape(public[name]))}" if name in public else "is missing"
            expected = f"the model wants {list(target[name])}: give an initializer for it in partial"
            raise ValueError(f"{source.where}: {name} {got}, {expected}")
        patterns[name] = pattern
    if unmatched := [pattern for pattern in partial if pattern not in patterns.values()]:
        raise ValueError(f"partial: {unmatched[0]!r} matches no tensor that is missing or misshapen")
    initialized = {}
    for name, pattern in patterns.items():
        try:
            value = partial[pattern](target[name], source[public[name]] if name in public else None)
        except ValueError as error:
            raise ValueError(f"{source.where}: {name}: {error}") from None
        if not isinstance(value, Tensor) or value.shape != target[name] or value.is_meta:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the initializer of {name} made {got}, the model wants {list(target[name])}")
        initialized[name] = value.detach().to(device=device, dtype=dtype, copy=True)
    assign_weights(model, source, fitting, dtype=dtype, device=device, initialized=initialized)
    known = target.keys() | {name for name in internal.values() if name.startswith(UNUSED)}
    unexpected = sorted(stored for stored, name in internal.items() if name not in known)
    return LoadReport(sorted(fitting.values()), missing, unexpected, misshapen)


def _best_key_mapping(
    source: Source | Tensors, component: str, target: Container[str], tables: Iterable[Table]
) -> dict[str, str]:
    """Map the checkpoint's names to the model's, read as public or ours, whichever match more tensors."""
    readers = [table.to_ours for table in tables]
    mappings = [{name: read(name) for name in source} for read in (*readers, str)]  # str: ours already
    best = max(mappings, key=lambda names: sum(name in target for name in names.values()))
    if not any(name in target for name in best.values()):
        raise ValueError(f"{source.where}: has no tensor of the model, a {component}")
    _reject_duplicates(best, source.where)
    return best


def _reject_duplicates(names: Mapping[str, str], where: str) -> None:
    counts = Counter(names.values())
    if twice := [stored for stored, name in names.items() if counts[name] > 1]:
        raise ValueError(f"{where}: {twice[-1]} is there under two names")


def _reject_integers(source: Source | Tensors, names: Iterable[str]) -> None:
    for name in names:
        if not (dtype := source.dtype(name)).is_floating_point:
            raise ValueError(f"{source.where}: {name} holds {dtype}, expected floating-point weights")
