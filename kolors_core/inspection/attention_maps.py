"""Attention maps: how much each pixel attends to each token or pixel, recorded in a run; see README.md.

The layer computes its result by the fast kernel as before; the map is computed additionally.
Shapes: B rows, h and w of the feature map, S keys.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kolors_core.context import ImageKeysValues
from kolors_core.devices import unwrap_compiled
from kolors_core.inspection.features import (
    CallCounter,
    Patterns,
    Steps,
    check_steps,
    list_lines,
    match_modules,
)
from kolors_core.inspection.thumbnails import maps_html
from kolors_core.unet import Attention, UNetEncoder


class MapRecorder:
    """Recorder of one attention's maps."""

    def __init__(self, name: str, steps: Steps, whole: bool) -> None:
        self.calls, self.whole, self.num_steps = CallCounter(name, steps), whole, 0  # recorded steps
        self.size = 0, 0  # h, w
        self.maps: list[Tensor] = []  # of each step, or their mean alone

    def record_size(self, _transformer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Store h and w: a transformer's hook, before the feature map [B, C, h, w] is flattened."""
        self.size = inputs[0].shape[-2:]

    def observe_images(self, _m: nn.Module, inputs: tuple[Tensor, Tensor, ImageKeysValues], _o: Any) -> None:
        """Record an image branch: its hook. With masks, each image has a softmax of its own."""
        k, *more = [k for k, _ in inputs[2].keys_values]
        self.observe(inputs[1], k, None, 0, *more)

    @torch.no_grad()
    def observe(self, q: Tensor, k: Tensor, bias: Tensor | None, perturbed: int, *more: Tensor) -> None:
        """Record a step's q [B, heads, h * w, D] and k [B, heads, S, D]: an observer, see `unet.Attention`.

        bias, perturbed: see `softmax`. more: keys with a softmax of their own. ValueError for a new shape.
        """
        if (step := self.calls.next()) is None:
            return
        heads = (  # [B, h * w, S] each, one after another, for memory
            torch.cat([softmax(q[:, i], keys[:, i], bias, perturbed) for keys in (k, *more)], dim=-1)
            for i in range(q.shape[1])
        )
        new: Any = torch.stack(list(heads), dim=1) if self.whole else sum(heads) / q.shape[1]
        new = new.unflatten(-2, self.size)  # [B, heads, h, w, S] or [B, h, w, S]
        if self.maps and new.shape != self.maps[0].shape:
            got = f"in step {step} {list(new.shape)}, and before {list(self.maps[0].shape)}"
            raise ValueError(f"{self.calls.name}: the map is {got}; name steps in which it is of one shape")
        self.num_steps += 1
        if self.maps and not self.whole:
            self.maps[0] = torch.lerp(self.maps[0], new, 1 / self.num_steps)  # the running mean
        else:
            self.maps.append(new)


def softmax(q: Tensor, k: Tensor, bias: Tensor | None, perturbed: int) -> Tensor:
    """Compute one head's map [B, L, S] of q [B, L, D] and k [B, S, D], in float32 at least.

    bias: None or [B, 1, 1, S]. perturbed: how many of the last rows have the identity as their map.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(dtype) * q.shape[-1] ** -0.5 @ k.to(dtype).transpose(-1, -2)  # [B, L, S]
    rows = (logits if bias is None else logits + bias[:, 0]).softmax(dim=-1)
    if perturbed:
        rows[-perturbed:] = torch.eye(rows.shape[-1], dtype=dtype, device=rows.device)
    return rows


class AttentionMaps(Mapping[str, Tensor]):
    """Mapping from an attention's name to its map: [B, h, w, S], or whole, [steps, B, heads, h, w, S]."""

    def __init__(self, recorders: Mapping[str, MapRecorder]) -> None:
        self.recorders = recorders

    def __getitem__(self, name: str) -> Tensor:
        recorder = self.recorders[name]
        if not recorder.maps:
            raise ValueError(f"{name} has no map yet")
        return torch.stack(recorder.maps) if recorder.whole else recorder.maps[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.recorders)

    def __len__(self) -> int:
        return len(self.recorders)

    def __repr__(self) -> str:
        """Return a line for each attention: its name, and its map's shape."""
        lines = []
        for name, recorder in self.recorders.items():
            shape = [*recorder.maps[0].shape] if recorder.maps else "none yet"
            lines.append(f"{name}: {f'{recorder.num_steps} steps of ' if recorder.whole else ''}{shape}")
        return list_lines(self._title(), lines)

    def _repr_html_(self) -> str:  # in notebooks
        return maps_html(self._title(), {name: one.maps for name, one in self.recorders.items()})

    def _title(self) -> str:
        return f"{type(self).__name__} of {len(self)} attentions"


@contextmanager
def record_attention(
    net: UNetEncoder, patterns: Patterns, steps: Steps = None, *, whole: bool = False
) -> Iterator[AttentionMaps]:
    """Record the attention maps of a UNet's or ControlNet's layers while the block lasts.

    patterns: globs (`fnmatch`) over the names of its attentions: "up.1.attentions.2.blocks.0" and so on with
    ".self_attention", ".cross_attention" or, of the first IP-Adapter, ".cross_attention.image_branches.0".
    steps: which calls of the net are recorded, from 0; all if None. whole: keep each step's and head's map,
    stacked at each access; if not, keep the mean over both.
    Each map is [B, h, w, S] (whole: [steps, B, heads, h, w, S]) on the layer's device, in float32, of a
    float64 model in float64. B: under guidance the unconditional rows, then the conditional, then perturbed
    ones, whose self-attention is the identity. h, w: of the layer's feature map. S: in self-attention its
    h * w pixels, row by row; in cross-attention the net's text tokens: one column for all equal pads, and
    columns of 0 on the left for a text shorter than the longest, on an accelerator than the next multiple of
    32; in an image branch the tokens of all its images.
    A row's sum is 1, in a masked image branch 1 for each image; neither scale nor masks are included.
    The results are those without recording, to the bit. ValueError for a pattern that matches nothing, a
    compiled net, steps where a map changes shape (as guidance begins or ends), and on leaving missing steps.
    """
    if not isinstance(unwrap_compiled(net), UNetEncoder):
        raise TypeError(f"expected a UNet or a ControlNet, such as pipe.unet, got {type(net).__name__}")
    modules = dict[str, nn.Module]()
    for name, module in unwrap_compiled(net).named_modules():
        if isinstance(module, Attention):
            branches = {f"{name}.image_branches.{i}": b for i, b in enumerate(module.image_branches)}
            modules |= {name: module, **branches}
    matches = match_modules(net, modules, patterns)
    recorders = {name: MapRecorder(name, check_steps(steps), whole) for name in matches}
    with ExitStack() as stack:
        for name, module in matches.items():
            recorder, transformer = recorders[name], net.get_submodule(name.partition(".blocks.")[0])
            stack.callback(transformer.register_forward_pre_hook(recorder.record_size).remove)
            if isinstance(module, Attention):
                module.observers.append(recorder.observe)
                stack.callback(partial(module.observers.remove, recorder.observe))
            else:
                stack.callback(module.register_forward_hook(recorder.observe_images).remove)
        yield AttentionMaps(recorders)
        for recorder in recorders.values():
            recorder.calls.check()
