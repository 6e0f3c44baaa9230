"""Rename tables as data: public tensor names <-> ours, both ways, and the check that nothing is left over.

A rule is a pair of dotted name parts, matched on whole segments: `("mid_block", "mid")` turns
`mid_block.resnets.0.conv1.weight` into `mid.resnets.0.conv1.weight` and touches no other name. Rules are
applied in order, and undone in the opposite order. A tensor we do not use keeps its public name behind
`unused.`, with a written reason, so that a converted checkpoint can always be turned back into the file it
came from.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

UNUSED = "unused."


def both(*names: str) -> tuple[str, ...]:
    """The weight and the bias of each."""
    return tuple(f"{name}.{kind}" for name in names for kind in ("weight", "bias"))


def weights(*names: str) -> tuple[str, ...]:
    """The weight of each, for layers without a bias."""
    return tuple(f"{name}.weight" for name in names)


@dataclass(frozen=True)
class Block:
    """A kind of block in the public format: what its paths look like, and the tensors that each one has."""

    path: str  # regular expression; "" is the top
    tensors: tuple[str, ...]
    optional: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Table:
    """One component's names.

    blocks: every kind of block that the public format has, its grammar.
    rules: ordered (public, ours) pairs of dotted parts.
    dropped: public names that the model never reads, each with its reason; one that ends with a dot is of all
    names that start so.
    odd: paths whose blocks are numbered 1, 3, 5, ... and not 0, 1, 2, ...
    required: public names without which a checkpoint is another model, each with what its absence means.
    """

    component: str
    blocks: tuple[Block, ...]
    rules: tuple[tuple[str, str], ...]
    dropped: Mapping[str, str] = field(default_factory=dict)
    required: Mapping[str, str] = field(default_factory=dict)
    odd: tuple[str, ...] = ()

    def to_ours(self, public: str) -> str:
        """Our name of a public tensor; dropped ones come back as `unused.<public name>`."""
        if self.why_dropped(public) is not None:
            return UNUSED + public
        return rename(public, self.rules)

    def why_dropped(self, public: str) -> str | None:
        """Why the model never reads this public tensor; None if it does."""
        starts = (start for start in self.dropped if start.endswith(".") and public.startswith(start))
        return self.dropped.get(next(starts, public))

    def to_public(self, ours: str) -> str:
        """The public name of one of our tensors, the exact inverse of `to_ours`."""
        if ours.startswith(UNUSED):
            return ours.removeprefix(UNUSED)
        return rename(ours, inverse(self.rules))

    def faults(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """What is wrong with a set of public names and shapes, by the format alone.

        A name that the format does not have, a block that lacks a tensor, numbers with a gap, a bias that is
        not as long as its weight. How many blocks there are and how wide is for `compare` to check against a
        model.
        """
        found, missing, numbers = list[str](), dict[str, dict[str, None]](), dict[str, set[int]]()
        for name in shapes:
            if self.why_dropped(name) is not None:
                continue
            place = self._place(name)
            if place is None:
                found.append(f"{name} is no tensor of Kolors' {self.component}")
                continue
            path, block, tensor = place
            missing.setdefault(path, dict.fromkeys(block.tensors)).pop(tensor, None)
            segments = path.split(".")
            for i, segment in enumerate(segments):
                if segment.isdigit():
                    numbers.setdefault(".".join(segments[:i]), set()).add(int(segment))
            weight = shapes.get(name.removesuffix("bias") + "weight")
            if name.endswith(".bias") and weight is not None and shapes[name] != weight[:1]:
                found.append(f"{name} is {list(shapes[name])}, which does not fit its weight, {list(weight)}")
        for path, absent in missing.items():
            found += [f"{path}.{tensor} is missing".lstrip(".") for tensor in absent]
        for path, seen in numbers.items():
            wanted = range(1, max(seen), 2) if path in self.odd else range(max(seen))
            gaps = (i for i in wanted if i not in seen)  # the first is told: a name may have any number
            found += [f"{path}.{gap} is missing" for gap in islice(gaps, 1)]
        return found

    def reject_faults(self, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        """ValueError naming the first of the `faults`, if there are any."""
        if faults := self.faults(shapes):
            more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
            raise ValueError(f"{where}: {faults[0]}{more}")

    def has(self, public: str) -> bool:
        """Whether the public format has a tensor of this name."""
        return self._place(public) is not None

    def _place(self, name: str) -> tuple[str, Block, str] | None:
        """A block's path, its kind, and the tensor's name in it; None for no tensor of the format."""
        for block in self.blocks:
            for tensor in (*block.tensors, *block.optional):
                path = name.removesuffix(tensor).rstrip(".")
                if name.endswith(tensor) and re.fullmatch(block.path, path):
                    return path, block, tensor
        return None

    def unused_rules(self, public: Iterable[str]) -> list[tuple[str, str]]:
        """The rules that change none of the names: in a full-size table there must be none."""
        dotted = [f".{name}." for name in public]
        return [(old, new) for old, new in self.rules if not any(f".{old}." in name for name in dotted)]


def rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """The name with each rule's first parts turned to its second, in order."""
    dotted = f".{name}."
    for old, new in rules:
        dotted = dotted.replace(f".{old}.", f".{new}.")
    return dotted[1:-1]


def inverse(rules: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """The rules that undo these."""
    return tuple((new, old) for old, new in reversed(rules))


@dataclass(frozen=True)
class Mismatch:
    """What stands between a checkpoint and a model; with all lists empty the mapping is closed."""

    component: str
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        told = listed(missing=self.missing, unexpected=self.unexpected, misshapen=self.misshapen)
        return f"{self.component}: the tensors do not fit the model: {told}"


def listed(**kinds: list[str]) -> str:
    """How many names of each kind, and the first three: "1 missing: a; 5 unexpected: b, c, d and 2 more"."""
    return "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else "")
        for kind, names in kinds.items()
        if names
    )


def compare(
    table: Table, source: Mapping[str, tuple[int, ...]], target: Mapping[str, tuple[int, ...]]
) -> Mismatch:
    """The closed check: every source tensor used or dropped with a reason, every target filled, shapes equal.

    source: our name (see `Table.to_ours`) -> shape, of the checkpoint. target: our name -> shape, of the
    model.
    """
    offered = {name: shape for name, shape in source.items() if not name.startswith(UNUSED)}
    return Mismatch(
        component=table.component,
        missing=sorted(target.keys() - offered.keys()),
        unexpected=sorted(offered.keys() - target.keys()),
        misshapen=[
            f"{name} is {list(offered[name])}, the model wants {list(shape)}"
            for name, shape in sorted(target.items())
            if name in offered and tuple(offered[name]) != tuple(shape)
        ],
    )
