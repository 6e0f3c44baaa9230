"""Features of a model's modules, by name: `capture` records them, `inject` changes them; see README.md.

A pattern is a glob (`fnmatch`, whose * also matches dots) over the names of `model.named_modules()` that can
be called; "" is the model itself, which no other pattern matches.
Features are a module's output, or with what="in" its first argument: a tensor, or tensors in lists, tuples
and dicts, such as the list of skip connections that a level of the down path returns.
A step is a call of the module since the block began, from 0: for most modules of a UNet one of a run's steps,
for a ControlNet's one in which it is active. Modules whose output is computed once a run are called once
(`Savings.precompute`: `text_proj`, `add_embedding`, a cross-attention's `to_k` and `to_v`, and for all
timesteps at once `time_embedding` and `time_proj`), unless the UNet or ControlNet itself, "", has a hook.
A prompt in the pipeline's cache is not encoded again, and a module that gradient checkpointing computes again
is called again. Modules in compiled blocks cannot be hooked. A step with hooks is no CUDA graph.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from itertools import accumulate
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from kolors_core.devices import unwrap_compiled
from kolors_core.inspection.thumbnails import features_html
from kolors_core.validation import check_int

Patterns = str | Sequence[str]
Calls = Collection[int]
Steps = Calls | None
Where = Literal["in", "out"]
Visitor = Callable[[str, Any, int], Any]  # (name, features, step) -> new features, or None to keep them


def match_modules(
    model: nn.Module, modules: Mapping[str, nn.Module], patterns: Patterns
) -> dict[str, nn.Module]:
    """Select a model's modules that one of the patterns matches, in their order.

    ValueError for a pattern that matches none, and for a module in a compiled one, where no hook is called.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, Sequence) or not patterns or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"expected a pattern of modules' names or several, got {patterns!r}")
    selected = set[str]()
    for pattern in patterns:
        matches = {name for name in modules if (fnmatchcase(name, pattern) if name else pattern == "")}
        if not matches:
            kinds = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in modules if name}
            near = ", ".join(difflib.get_close_matches(pattern, kinds, 8, 0.0))
            raise ValueError(f"no module is named {pattern!r}; there are {near}")
        selected |= matches
    for name in selected:
        for path in ("", *accumulate(name.split("."), "{}.{}".format)):  # from the model down
            if unwrap_compiled(model) is not model or model.get_submodule(path)._compiled_call_impl:
                what = f"{path or 'the model'}, which is compiled"
                raise ValueError(f"{name!r} cannot be seen in {what}: load a model that is not")
    return {name: module for name, module in modules.items() if name in selected}


def check_steps(steps: Steps) -> Steps:
    """Return the argument `steps`; TypeError or ValueError unless it is None or has integers from 0."""
    if steps is not None:
        if not isinstance(steps, Collection) or isinstance(steps, str | Mapping) or not len(steps):
            raise TypeError(f"steps must be some whole numbers, such as range(5), or None, got {steps!r}")
        for step in steps:
            check_int("a step", step, least=0)
    return steps


def list_lines(title: str, lines: Sequence[str], most: int = 12) -> str:
    """Format a title and the first lines of a list, indented, with the number of the others."""
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return "\n  ".join([title, *lines[:most], *more])


class CallCounter:
    """Counter of a module's calls, of which `steps`, or all, are selected; required: calls that must come."""

    def __init__(self, name: str, steps: Steps, required: Calls = (0,)) -> None:
        self.name, self.steps, self.count = name or "the model", steps, 0
        self.required_calls = required if steps is None else steps

    def next(self) -> int | None:
        """Count a call, and return its number; None if it is not selected."""
        step, self.count = self.count, self.count + 1
        return step if self.steps is None or step in self.steps else None

    def check(self) -> None:
        """Raise ValueError if a required call never came."""
        if not self.count:
            raise ValueError(f"{self.name} never ran")
        if missing := ", ".join(str(step) for step in sorted(self.required_calls) if step >= self.count):
            raise ValueError(f"{self.name} ran {self.count} times: step {missing} never came")


class Features(dict[str, list[Any]]):
    """Recorded features: module -> an entry for each call."""

    def __repr__(self) -> str:
        """Return a line for each module: the number of its calls and the shape of the first's features."""
        lines = [
            f"{name or 'the model'}: {len(self[name])} calls{', first ' if text else ''}{text}"
            for name, text in self._shapes().items()
        ]
        return list_lines(self._title(), lines)

    def _repr_html_(self) -> str:  # in notebooks
        return features_html(self._title(), self, self._shapes())

    def _title(self) -> str:
        return f"{type(self).__name__} of {len(self)} modules"

    def _shapes(self) -> dict[str, str]:
        """Describe the shapes of each module's first call; "" for none."""
        shapes = {}
        for name, kept in self.items():
            first = tree_map_only(Tensor, lambda x: f"{list(x.shape)} {str(x.dtype)[6:]}", kept[:1])
            shapes[name] = str(first[0]).replace("'", "") if kept else ""
        return shapes


@contextmanager
def capture(
    model: nn.Module, patterns: Patterns, what: Where = "out", steps: Steps = None, *,
    keep: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Iterator[Features]:  # fmt: skip
    """Record features of the matched modules: {name: list}, an entry for each call, or each of `steps`.

    keep: converts a tensor, as in `lambda x: x.half().cpu()`; by default it is detached. Anything else than a
    tensor, or a list, tuple or dict of them, is kept unchanged (a `TextEmbedding`). ValueError for a pattern
    that matches nothing, and on leaving for a step or module that never came.
    """
    modules = _callable_modules(model, patterns)
    kept = Features({name: [] for name in modules})

    def visit(name: str, features: Any, _step: int) -> None:
        kept[name].append(tree_map_only(Tensor, keep, features))

    with _hooked(modules, what, check_steps(steps), visit):
        yield kept


@contextmanager
def inject(
    model: nn.Module, changes: Mapping[str, Any], what: Where = "out", steps: Steps = None
) -> Iterator[None]:
    """Change features of modules: {pattern: change}, in all steps or in these.

    A change is a tensor that replaces the features; a list with an entry for each step, as `capture` records;
    or a function (features, step) -> features. Changes of several patterns that match a module are applied in
    turn. ValueError for a pattern that matches nothing, features of another shape, dtype, device or structure
    than the module's own, a list that is too short, and on leaving a step, entry or module that never came.
    """
    if not isinstance(changes, Mapping) or not changes:
        raise TypeError(f"expected changes by pattern, such as {{'mid': tensor}}, got {changes!r}")
    ordered = sorted(check_steps(steps) or ())
    with ExitStack() as stack:
        for pattern, change in changes.items():
            required: Calls = range(len(change)) if isinstance(change, list) else (0,)
            if isinstance(change, list):
                if not change or (ordered and len(change) != len(ordered)):
                    count = len(ordered) or "at least one"
                    raise ValueError(f"{pattern!r}: expected features of {count} steps, got {len(change)}")
            elif not isinstance(change, Tensor) and not callable(change):
                got = type(change).__name__
                raise TypeError(f"{pattern!r}: expected a tensor, a list of them or a function, got {got}")
            modules, visit = _callable_modules(model, pattern), partial(_change, change, ordered)
            stack.enter_context(_hooked(modules, what, steps, visit, required))
        yield


def _callable_modules(model: nn.Module, patterns: Patterns) -> dict[str, nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, such as pipe.unet, got {type(model).__name__}")
    named = unwrap_compiled(model).named_modules()
    modules = {name: module for name, module in named if type(module).forward is not nn.Module.forward}
    return match_modules(model, modules, patterns)


def _change(change: Any, ordered: list[int], name: str, features: Any, step: int) -> Any:
    where = f"{name or 'the model'}, step {step}"
    new, entry = change, ordered.index(step) if ordered else step
    if isinstance(change, list):
        if entry >= len(change):
            raise ValueError(f"{where}: there are features of {len(change)} steps; name the steps")
        new = change[entry]
    elif not isinstance(change, Tensor):
        new = change(features, step)
    expected, got = (str(tree_map(_describe, tree)) for tree in (features, new))
    if expected != got:
        raise ValueError(f"{where}: expected {expected} to put in, got {got}")
    return new


def _describe(leaf: Any) -> Any:
    return f"{leaf.dtype} {list(leaf.shape)} on {leaf.device}" if isinstance(leaf, Tensor) else type(leaf)


@contextmanager
def _hooked(
    modules: Mapping[str, nn.Module], what: Where, steps: Steps, visit: Visitor, required: Calls = (0,)
) -> Iterator[None]:
    if what not in ("in", "out"):
        raise ValueError(f'what must be "in" or "out", got {what!r}')
    calls = {name: CallCounter(name, steps, required) for name in modules}

    def before(name: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        step, first = calls[name].next(), next(iter(inspect.signature(module.forward).parameters))
        new = None if step is None else visit(name, inputs[0] if inputs else named[first], step)
        if new is None:
            return None
        return ((new, *inputs[1:]), named) if inputs else ((), named | {first: new})

    def after(name: str, _module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
        return None if (step := calls[name].next()) is None else visit(name, output, step)

    with ExitStack() as stack:
        for name, module in modules.items():
            if what == "in":
                handle = module.register_forward_pre_hook(partial(before, name), with_kwargs=True)
            else:
                handle = module.register_forward_hook(partial(after, name))
            stack.callback(handle.remove)
        yield
        for counter in calls.values():
            counter.check()
