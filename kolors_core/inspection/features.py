"""Features of a model's modules, by name: `capture` records them, `inject` changes them.

    with capture(pipe.unet, "up.1.resnets.[0-9]") as kept:  # name -> an entry for each step
        pipe("a cat")
    with inject(pipe.unet, {"mid": lambda x, step: 0.9 * x, **kept}):
        pipe("a dog")

A pattern is a glob (`fnmatch`, whose * also matches dots) over the names of `model.named_modules()` that can
be called; "" is the model itself, which no other pattern matches.
Features are a module's output, or with what="in" its first argument: a tensor, or tensors in lists, tuples
and dicts, such as the list of skip connections that a level of the down path returns.
A step is a call of the module since the block began, from 0: for most modules of a UNet one of a run's steps,
for a ControlNet's one of those in which it is active. Modules whose output is computed once a run
(`Savings.precompute`) are called once: `text_proj`, `add_embedding`, a cross-attention's `to_k` and `to_v`,
and for all timesteps at once `time_embedding` and `time_proj`. A hook on the UNet or ControlNet itself, "",
disables that: it is called as a whole in each step. A prompt in the pipeline's cache is not encoded again,
and a module that gradient checkpointing computes again is called again.
Modules in compiled blocks cannot be hooked, only those between them. A step with hooks is no CUDA graph.
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
from torch.utils._pytree import tree_map, tree_map_only

from kolors_core.devices import unwrap_compiled
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
    TypeError for anything but patterns.
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
        parts = name.split(".") if name else []
        for path in (".".join(parts[:i]) for i in range(len(parts) + 1)):
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
        if missing := [step for step in sorted(self.required_calls) if step >= self.count]:
            steps = ", ".join(map(str, missing))
            raise ValueError(f"{self.name} ran {self.count} times: step {steps} never came")


@contextmanager
def capture(
    model: nn.Module,
    patterns: Patterns,
    what: Where = "out",
    steps: Steps = None,
    *,
    keep: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Iterator[dict[str, list[Any]]]:
    """Record features of the matched modules: {name: list}, an entry for each call, or each of `steps`.

    keep: converts a tensor, as in `lambda x: x.half().cpu()`; by default it is detached. Anything else than a
    tensor, or a list, tuple or dict of them, is kept unchanged (a `TextEmbedding`).
    Raises ValueError for a pattern that matches nothing, and on leaving for a step or module that never came.
    """
    modules = _callable_modules(model, patterns)
    kept: dict[str, list[Any]] = {name: [] for name in modules}

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
    turn. Raises ValueError for a pattern that matches nothing, for features of another shape, dtype, device
    or structure than the module's own, where a list is too short, and on leaving for a step, an entry or a
    module that never came.
    """
    if not isinstance(changes, Mapping) or not changes:
        raise TypeError(f"expected changes by pattern, such as {{'mid': tensor}}, got {changes!r}")
    ordered = sorted(check_steps(steps) or ())
    with ExitStack() as stack:
        for pattern, change in changes.items():
            required: Calls = (0,)
            if isinstance(change, list):
                required = range(len(change))
                if not change or (steps is not None and len(change) != len(ordered)):
                    count = "at least one" if steps is None else len(ordered)
                    raise ValueError(f"{pattern!r}: expected features of {count} steps, got {len(change)}")
            elif not isinstance(change, Tensor) and not callable(change):
                got = type(change).__name__
                raise TypeError(f"{pattern!r}: expected a tensor, a list of them or a function, got {got}")
            visit = partial(_change, change=change, ordered=ordered)
            stack.enter_context(_hooked(_callable_modules(model, pattern), what, steps, visit, required))
        yield


def _callable_modules(model: nn.Module, patterns: Patterns) -> dict[str, nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, such as pipe.unet, got {type(model).__name__}")
    modules = dict(unwrap_compiled(model).named_modules())
    modules = {name: m for name, m in modules.items() if type(m).forward is not nn.Module.forward}
    return match_modules(model, modules, patterns)


def _change(name: str, features: Any, step: int, *, change: Any, ordered: list[int]) -> Any:
    where = f"{name or 'the model'}, step {step}"
    if isinstance(change, list):
        entry = ordered.index(step) if ordered else step
        if entry >= len(change):
            raise ValueError(f"{where}: there are features of {len(change)} steps; name the steps")
        new = change[entry]
    else:
        new = change if isinstance(change, Tensor) else change(features, step)
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
    """Call `visit` with the features of these modules' calls while the block lasts."""
    if what not in ("in", "out"):
        raise ValueError(f'what must be "in" or "out", got {what!r}')
    calls = {name: CallCounter(name, steps, required) for name in modules}

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
        for counter in calls.values():
            counter.check()
