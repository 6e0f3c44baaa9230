"""Changed attention maps: in the place of a layer's map stands what a function makes of it; see README.md.

The layer computes its result by the fast kernel as before, and (changed map - map) v is added to it: a
function that changes nothing changes no bit. Image branches keep their own maps.
Shapes: B rows, H heads, N pixels, S keys, C channels.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kolors_core.attention import split_heads
from kolors_core.context import Context, KnownOutput
from kolors_core.devices import unwrap_compiled
from kolors_core.inspection.attention_maps import softmax
from kolors_core.inspection.features import CallCounter, Steps, check_steps, match_modules
from kolors_core.unet import Attention, UNetEncoder

MapFunction = Callable[[Tensor, int], Tensor]  # (map [B, H, N, S], step) -> map


class MapChange:
    """Change of one attention's maps; the three hooks are called in the order in which they stand here."""

    def __init__(self, attention: Attention, function: MapFunction, calls: CallCounter) -> None:
        self.attention, self.function, self.calls = attention, function, calls
        self.values: Tensor | None = None  # [B, H, S, C/H]
        self.added: Tensor | None = None  # [B, H, N, C/H]

    def see_values(self, _module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Store the values that the layer is about to read: its hook before a call."""
        context = inputs[1] if len(inputs) > 1 else named["context"]
        if isinstance(context, KnownOutput):
            raise ValueError(f"{self.calls.name} has no map in this step: its output is of a cache")
        is_new = isinstance(context, Context)
        self.values = self.project(context.tokens) if is_new else context.v

    def project(self, tokens: Tensor) -> Tensor:
        """Compute the values of tokens [B, S, C]: [B, H, S, C/H]."""
        return split_heads(self.attention.to_v(tokens), self.attention.heads)

    def observe(self, q: Tensor, k: Tensor, bias: Tensor | None, perturbed: int) -> None:
        """Compute what the changed map adds to the result: an observer, see `unet.Attention`."""
        self.added, values, self.values = None, self.values, None
        if (step := self.calls.next()) is None or values is None:
            return
        heads = [softmax(q[:, i], k[:, i], bias, perturbed) for i in range(q.shape[1])]
        before = torch.stack(heads, dim=1)  # [B, H, N, S]
        after = self.function(before.clone(), step)
        if not isinstance(after, Tensor) or (after.shape, after.dtype) != (before.shape, before.dtype):
            is_tensor = isinstance(after, Tensor)
            got = f"{[*after.shape]} of {after.dtype}" if is_tensor else type(after).__name__
            expected = f"a map {[*before.shape]} of {before.dtype}"
            raise ValueError(f"{self.calls.name}, step {step}: expected {expected}, got {got}")
        self.added = (after - before) @ values.to(before.dtype)  # [B, H, N, C/H]

    def add(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Add it to the result [B, N, C], before the last projection: the projection's hook."""
        if (added := self.added) is None:
            return None
        self.added = None
        return (inputs[0] + added.transpose(1, 2).flatten(2).to(inputs[0].dtype), *inputs[1:])


@contextmanager
def inject_attention(
    net: UNetEncoder, changes: Mapping[str, MapFunction], steps: Steps = None
) -> Iterator[None]:
    """Change attention maps of a UNet's or ControlNet's layers while the block lasts: {pattern: function}.

    A pattern is a glob over names such as "up.1.attentions.2.blocks.0.cross_attention", as in
    `record_attention`. A function gets a map [B, heads, h * w, S], in float32 at least, and the number of the
    call, and returns the map to use, whose rows need not sum to 1: in all steps, or in these. B: under
    guidance the unconditional rows, then the conditional ones; S: in cross-attention the text's tokens, of
    which one may stand for all pads; see `record_attention`. Functions of several patterns that match a layer
    each change the layer's own map, and add up.
    TypeError for another net; ValueError for a pattern that matches nothing, a compiled net, a map of another
    shape or dtype, and on leaving for a step that never came.
    """
    if not isinstance(unwrap_compiled(net), UNetEncoder):
        raise TypeError(f"expected a UNet or a ControlNet, such as pipe.unet, got {type(net).__name__}")
    if not isinstance(changes, Mapping) or not changes or not all(map(callable, changes.values())):
        raise TypeError(f"expected functions by pattern, such as {{'*cross_attention': f}}, got {changes!r}")
    named = unwrap_compiled(net).named_modules()
    modules = {name: module for name, module in named if isinstance(module, Attention)}
    counters = list[CallCounter]()
    with ExitStack() as stack:
        for pattern, function in changes.items():
            for name, module in match_modules(net, modules, pattern).items():
                counters.append(CallCounter(name, check_steps(steps)))
                change = MapChange(modules[name], function, counters[-1])
                hook = module.register_forward_pre_hook(change.see_values, with_kwargs=True)
                stack.callback(hook.remove)
                modules[name].observers.append(change.observe)
                stack.callback(partial(modules[name].observers.remove, change.observe))
                stack.callback(modules[name].to_out.register_forward_pre_hook(change.add).remove)
        yield
        for counter in counters:
            counter.check()
