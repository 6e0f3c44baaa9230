"""Key tables as data: public tensor names <-> ours, both ways, and the check that nothing is left over.

A rule is a pair of dotted name parts, matched on whole segments: `("mid_block", "mid")` turns
`mid_block.resnets.0.conv1.weight` into `mid.resnets.0.conv1.weight` and touches no other name. Rules are
applied in order, and undone in reverse order. A tensor we do not use keeps its public name after the prefix
`unused.`, with a written reason, so that a converted checkpoint can always be converted back to the original.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

UNUSED = "unused."


def weight_and_bias(*names: str) -> tuple[str, ...]:
    """Name the weight and the bias of each layer."""
    return tuple(f"{name}.{kind}" for name in names for kind in ("weight", "bias"))


def weight_only(*names: str) -> tuple[str, ...]:
    """Name the weight of each layer without a bias."""
    return tuple(f"{name}.weight" for name in names)


@dataclass(frozen=True)
class Block:
    """Block type of the public format: a pattern of its paths, and the tensors in each."""

    path: str  # regular expression; "" is the top level
    tensors: tuple[str, ...]
    optional: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Table:
    """Table of one component's names.

    blocks: every block type of the public format.
    rules: ordered (public, ours) pairs of dotted parts.
    dropped: public names that the model never reads, each with its reason; one that ends with a dot is a
    prefix.
    odd_numbered: paths whose blocks are numbered 1, 3, 5, ... instead of 0, 1, 2, ...
    required: public names that identify the model, each with what its absence means.
    """

    component: str
    blocks: tuple[Block, ...]
    rules: tuple[tuple[str, str], ...]
    dropped: Mapping[str, str] = field(default_factory=dict)
    required: Mapping[str, str] = field(default_factory=dict)
    odd_numbered: tuple[str, ...] = ()

    def to_ours(self, public: str) -> str:
        """Convert a public name to ours; dropped ones become `unused.<public name>`."""
        if self.why_dropped(public) is not None:
            return UNUSED + public
        return rename(public, self.rules)

    def why_dropped(self, public: str) -> str | None:
        """Return why the model never reads a public tensor; None if it does."""
        prefixes = (name for name in self.dropped if name.endswith(".") and public.startswith(name))
        return self.dropped.get(next(prefixes, public))

    def to_public(self, ours: str) -> str:
        """Convert our name to the public one, the exact inverse of `to_ours`."""
        if ours.startswith(UNUSED):
            return ours.removeprefix(UNUSED)
        return rename(ours, inverse(self.rules))

    def faults(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """List the faults of public names and shapes that the format alone shows.

        These are unknown names, missing tensors of a block, gaps in numbers, and biases that do not fit their
        weights. `compare` checks the number of blocks and their widths against a model.
        """
        faults, missing, numbers = list[str](), dict[str, dict[str, None]](), dict[str, set[int]]()
        for name in shapes:
            if self.why_dropped(name) is not None:
                continue
            match = self._match(name)
            if match is None:
                faults.append(f"{name} is no tensor of Kolors' {self.component}")
                continue
            path, block, tensor = match
            missing.setdefault(path, dict.fromkeys(block.tensors)).pop(tensor, None)
            segments = path.split(".")
            for i, segment in enumerate(segments):
                if segment.isdigit():
                    numbers.setdefault(".".join(segments[:i]), set()).add(int(segment))
            weight = shapes.get(name.removesuffix("bias") + "weight")
            if name.endswith(".bias") and weight is not None and shapes[name] != weight[:1]:
                faults.append(
                    f"{name} is {list(shapes[name])}, which does not fit its weight, {list(weight)}"
                )
        for path, absent in missing.items():
            faults += [f"{path}.{tensor} is missing".lstrip(".") for tensor in absent]
        for path, seen in numbers.items():
            expected = range(1, max(seen), 2) if path in self.odd_numbered else range(max(seen))
            gap = next((i for i in expected if i not in seen), None)  # the first alone: numbers may be huge
            faults += [] if gap is None else [f"{path}.{gap} is missing"]
        return faults

    def reject_faults(self, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Raise ValueError naming the first of the `faults`, if any."""
        if faults := self.faults(shapes):
            more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
            raise ValueError(f"{where}: {faults[0]}{more}")

    def has(self, public: str) -> bool:
        """Return whether the public format has a tensor of this name."""
        return self._match(public) is not None

    def _match(self, name: str) -> tuple[str, Block, str] | None:
        """Split a name into a block's path, its type, and the tensor's name in it; None if unknown."""
        for block in self.blocks:
            for tensor in (*block.tensors, *block.optional):
                path = name.removesuffix(tensor).rstrip(".")
                if name.endswith(tensor) and re.fullmatch(block.path, path):
                    return path, block, tensor
        return None

    def unused_rules(self, public: Iterable[str]) -> list[tuple[str, str]]:
        """List the rules that change none of the names: for a full-size model there must be none."""
        dotted = [f".{name}." for name in public]
        return [(old, new) for old, new in self.rules if not any(f".{old}." in name for name in dotted)]


def rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """Replace each rule's first parts in a name by its second, in order."""
    dotted = f".{name}."
    for old, new in rules:
        dotted = dotted.replace(f".{old}.", f".{new}.")
    return dotted[1:-1]


def inverse(rules: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Return the rules that undo these."""
    return tuple((new, old) for old, new in reversed(rules))


@dataclass(frozen=True)
class Mismatch:
    """Mismatch of a checkpoint and a model; all lists are empty if they fit."""

    component: str
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        names = summarize(missing=self.missing, unexpected=self.unexpected, misshapen=self.misshapen)
        return f"{self.component}: the tensors do not fit the model: {names}"


def summarize(**kinds: list[str]) -> str:
    """Count the names of each kind and list three: "1 missing: a; 5 unexpected: b, c, d and 2 more"."""
    return "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else "")
        for kind, names in kinds.items()
        if names
    )


def compare(
    table: Table, source: Mapping[str, tuple[int, ...]], target: Mapping[str, tuple[int, ...]]
) -> Mismatch:
    """Check that every tensor of a checkpoint is used or dropped, every one of a model set, and shapes equal.

    source: our name (see `Table.to_ours`) -> shape, of the checkpoint. target: our name -> shape, of the
    model.
    """
    used = {name: shape for name, shape in source.items() if not name.startswith(UNUSED)}
    return Mismatch(
        component=table.component,
        missing=sorted(target.keys() - used.keys()),
        unexpected=sorted(used.keys() - target.keys()),
        misshapen=[
            f"{name} is {list(used[name])}, the model wants {list(shape)}"
            for name, shape in sorted(target.items())
            if name in used and tuple(used[name]) != tuple(shape)
        ],
    )
