"""Features inside a model by the names of modules: `capture` keeps them, `inject` changes them.

    with capture(pipe.unet, "up.1.resnets.[0-9]") as kept:  # name -> an entry for each step
        pipe("a cat")
    with inject(pipe.unet, {"mid": lambda x, step: 0.9 * x, **kept}):
        pipe("a dog")

A pattern is a glob (`fnmatch`, whose * passes over dots) over the names of `model.named_modules()` that can
be called; "" is the model itself, which no other pattern means.
Features are what comes out of a module, or with what="in" its first argument: a tensor, or tensors in lists,
tuples and dicts, such as the list of skips that a level on the way down gives.
A step is a call of the module since the block began, 0 the first: for most modules of a UNet one of a run's
steps, for a ControlNet's one of those in which it acts. What a run computes once (`Savings.precompute`) is
called once a run: `text_proj`, `add_embedding`, a cross-attention's `to_k` and `to_v`, and for all times at
once `time_embedding` and `time_proj`. With a hook on the UNet or ControlNet itself, "", that saving ends: it
is called as a whole in each step. A prompt that the pipeline's cache knows is not encoded again, and what
gradient checkpointing computes again is called again.
Of compiled blocks nothing can be seen, only what stands between them. A step with hooks is no CUDA graph.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from kolors_core.devices import plain
from kolors_core.validation import check_int

Patterns = str | Sequence[str]
Steps = Collection[int] | None
Where = Literal["in", "out"]
Expected = Collection[int]
Visit = Callable[[str, Any, int], Any]


def match_modules(
    model: nn.Module, modules: Mapping[str, nn.Module], patterns: Patterns
) -> dict[str, nn.Module]:
    """Those of a model's modules that one of the patterns means, in their order.

    ValueError for a pattern that means none, and for a module that no hook reaches, since what it is part of
    is compiled. TypeError for what is no pattern.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, Sequence) or not patterns or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"expected a pattern of modules' names or several, got {patterns!r}")
    found = set[str]()
    for pattern in patterns:
        hits = {name for name in modules if (fnmatchcase(name, pattern) if name else pattern == "")}
        if not hits:
            kinds = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in modules if name}
            near = ", ".join(difflib.get_close_matches(pattern, kinds, 8, 0.0))
            raise ValueError(f"no module is named {pattern!r}; there are {near}")
        found |= hits
    for name in found:
        parts = name.split(".") if name else []
        for path in (".".join(parts[:i]) for i in range(len(parts) + 1)):
            if plain(model) is not model or model.get_submodule(path)._compiled_call_impl:
                what = f"{path or 'the model'}, which is compiled"
                raise ValueError(f"{name!r} cannot be seen in {what}: load a model that is not")
    return {name: module for name, module in modules.items() if name in found}


def checked_steps(steps: Steps) -> Steps:
    """The argument `steps`, checked."""
    if steps is not None:
        if not isinstance(steps, Collection) or isinstance(steps, str | Mapping) or not len(steps):
            raise TypeError(f"steps must be some whole numbers, such as range(5), or None, got {steps!r}")
        for step in steps:
            check_int("a step", step, least=0)
    return steps


class CallCounter:
    """Counts a module's calls and says which of them are meant: `steps`, or all. expected: what must come."""

    def __init__(self, name: str, steps: Steps, expected: Expected = (0,)) -> None:
        self.name, self.steps, self.count = name, steps, 0
        self.expected = expected if steps is None else steps

    def next(self) -> int | None:
        """The number of the call that comes now; None if it is not meant."""
        step, self.count = self.count, self.count + 1
        return step if self.steps is None or step in self.steps else None

    def check(self) -> None:
        """ValueError if an expected call never came."""
        if not self.count:
            raise ValueError(f"{self.name or 'the model'} never ran")
        if late := [step for step in sorted(self.expected) if step >= self.count]:
            these = ", ".join(map(str, late))
            raise ValueError(f"{self.name or 'the model'} ran {self.count} times: step {these} never came")


@contextmanager
def capture(
    model: nn.Module,
    patterns: Patterns,
    what: Where = "out",
    steps: Steps = None,
    *,
    keep: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Iterator[dict[str, list[Any]]]:
    """Keep features of the modules that are meant: a mapping from names to lists, entry i of the i-th call,
    or of the i-th of `steps`.

    keep: what to keep of a tensor, such as `lambda x: x.half().cpu()`; by default itself, detached. What is
    no tensor, nor a list, tuple or dict of them, is kept as it is (a `TextEmbedding`).
    Raises ValueError for a pattern that means nothing, and on leaving for a step or module that never came.
    """
    found = _found(model, patterns)
    kept: dict[str, list[Any]] = {name: [] for name in found}

    def visit(name: str, features: Any, _step: int) -> None:
        kept[name].append(tree_map(lambda leaf: keep(leaf) if isinstance(leaf, Tensor) else leaf, features))

    with _visited(found, what, checked_steps(steps), visit):
        yield kept


@contextmanager
def inject(
    model: nn.Module, changes: Mapping[str, Any], what: Where = "out", steps: Steps = None
) -> Iterator[None]:
    """Change features of modules: {pattern: change}, in all steps or in these.

    A change is a tensor in place of the features; a list with an entry for each step, as `capture` gives; or
    a function (features, step) -> features. A module that several patterns mean has all changes, in turn.
    Raises ValueError for a pattern that means nothing, for features of another shape, dtype, device or
    structure than the module's own, where a list is too short, and on leaving for a step, an entry or a
    module that never came.
    """
    if not isinstance(changes, Mapping) or not changes:
        raise TypeError(f"expected changes by pattern, such as {{'mid': tensor}}, got {changes!r}")
    ordered = sorted(checked_steps(steps) or ())
    with ExitStack() as stack:
        for pattern, change in changes.items():
            expected: Expected = (0,)
            if isinstance(change, list):
                expected = range(len(change))
                if not change or (steps is not None and len(change) != len(ordered)):
                    wanted = "at least one" if steps is None else len(ordered)
                    raise ValueError(f"{pattern!r}: expected features of {wanted} steps, got {len(change)}")
            elif not isinstance(change, Tensor) and not callable(change):
                got = type(change).__name__
                raise TypeError(f"{pattern!r}: expected a tensor, a list of them or a function, got {got}")
            visit = partial(_changed, change=change, ordered=ordered)
            stack.enter_context(_visited(_found(model, pattern), what, steps, visit, expected))
        yield


def _found(model: nn.Module, patterns: Patterns) -> dict[str, nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, such as pipe.unet, got {type(model).__name__}")
    every = plain(model).named_modules()
    return match_modules(
        model, {n: m for n, m in every if type(m).forward is not nn.Module.forward}, patterns
    )


def _changed(name: str, features: Any, step: int, *, change: Any, ordered: list[int]) -> Any:
    where = f"{name or 'the model'}, step {step}"
    if isinstance(change, list):
        entry = ordered.index(step) if ordered else step
        if entry >= len(change):
            raise ValueError(f"{where}: there are features of {len(change)} steps; name the steps")
        new = change[entry]
    else:
        new = change if isinstance(change, Tensor) else change(features, step)
    wanted, got = (str(tree_map(_kind, tree)) for tree in (features, new))
    if wanted != got:
        raise ValueError(f"{where}: expected {wanted} to put in, got {got}")
    return new


def _kind(leaf: Any) -> Any:
    return f"{leaf.dtype} {list(leaf.shape)} on {leaf.device}" if isinstance(leaf, Tensor) else type(leaf)


@contextmanager
def _visited(
    modules: Mapping[str, nn.Module], what: Where, steps: Steps, visit: Visit, expected: Expected = (0,)
) -> Iterator[None]:
    """Let `visit(name, features, step)` see the features, and change them if it returns others than None."""
    if what not in ("in", "out"):
        raise ValueError(f'what must be "in" or "out", got {what!r}')
    calls = {name: CallCounter(name, steps, expected) for name in modules}

    def before(name: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if (step := calls[name].next()) is None:
            return None
        if inputs:
            new = visit(name, inputs[0], step)
            return None if new is None else ((new, *inputs[1:]), named)
        first = next(iter(inspect.signature(module.forward).parameters))
        new = visit(name, named[first], step)
        return None if new is None else ((), named | {first: new})

    def after(name: str, _module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
        step = calls[name].next()
        return None if step is None else visit(name, output, step)

    with ExitStack() as stack:
        for name, module in modules.items():
            if what == "in":
                handle = module.register_forward_pre_hook(partial(before, name), with_kwargs=True)
            else:
                handle = module.register_forward_hook(partial(after, name))
            stack.callback(handle.remove)
        yield
        for each in calls.values():
            each.check()
