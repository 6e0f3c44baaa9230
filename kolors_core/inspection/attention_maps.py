"""Attention maps: which pixel looked at which token or pixel, and how much, kept while a UNet works.

    with record_attention(pipe.unet, "*cross_attention", steps=range(5, 15)) as maps:
        pipe("一张瓢虫的照片")
    maps["mid.attentions.0.blocks.0.cross_attention"]  # [2, 32, 32, S]: rows, height, width, text tokens

The layer computes its result as ever, by the fast kernel; the map is computed beside it.
Shapes: B rows, h and w of the feature map, S keys.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kolors_core.context import ImageKeysValues
from kolors_core.devices import plain
from kolors_core.inspection.features import CallCounter, Patterns, Steps, checked_steps, match_modules
from kolors_core.unet import Attention, Encoder


class MapRecorder:
    """The maps of one attention."""

    def __init__(self, name: str, steps: Steps, whole: bool) -> None:
        self.calls, self.whole = CallCounter(name, steps), whole
        self.size = 0, 0  # h, w
        self.maps: list[Tensor] = []  # of each step, or their mean alone
        self.kept = 0  # steps

    def record_size(self, _transformer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """The hook that sees the feature map [B, C, h, w] before it becomes pixels in a row."""
        self.size = inputs[0].shape[-2:]

    def observe(self, q: Tensor, k: Tensor, bias: Tensor | None, perturbed: int) -> None:
        """What an attention looks from and at; see `unet.Attention`."""
        self.accumulate(q, [k], bias, perturbed)

    def observe_images(
        self, _branch: nn.Module, inputs: tuple[Tensor, Tensor, ImageKeysValues], _out: Tensor
    ) -> None:
        """The hook of an image branch: with masks, each image has a softmax of its own."""
        _, q, images = inputs
        self.accumulate(q, [k for k, _ in images.keys_values])

    @torch.no_grad()
    def accumulate(
        self, q: Tensor, keys: list[Tensor], bias: Tensor | None = None, perturbed: int = 0
    ) -> None:
        """q: [B, heads, h * w, D]; keys: [B, heads, S, D] of each softmax; others as in the attention."""
        if (step := self.calls.next()) is None:
            return
        heads = (  # one after another, for memory
            torch.cat([softmax(q[:, i], k[:, i], bias, perturbed) for k in keys], dim=-1)  # [B, h * w, S]
            for i in range(q.shape[1])
        )
        new = torch.stack(list(heads), dim=1) if self.whole else sum(heads) / q.shape[1]
        assert isinstance(new, Tensor)
        new = new.unflatten(-2, self.size)  # [B, heads, h, w, S] or [B, h, w, S]
        if self.maps and new.shape != self.maps[0].shape:
            got = f"in step {step} {list(new.shape)}, and before {list(self.maps[0].shape)}"
            raise ValueError(f"{self.calls.name}: the map is {got}; name steps in which it is of one shape")
        self.kept += 1
        if self.maps and not self.whole:
            self.maps[0] = torch.lerp(self.maps[0], new, 1 / self.kept)  # the running mean
        else:
            self.maps.append(new)


def softmax(q: Tensor, k: Tensor, bias: Tensor | None, perturbed: int) -> Tensor:
    """One head's map [B, L, S] of q [B, L, D] and k [B, S, D], in float32 at least.

    bias: None or [B, 1, 1, S]. perturbed: of how many of the last rows it is the identity.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(dtype) * q.shape[-1] ** -0.5 @ k.to(dtype).transpose(-1, -2)  # [B, L, S]
    rows = (logits if bias is None else logits + bias[:, 0]).softmax(dim=-1)
    if perturbed:
        rows[-perturbed:] = torch.eye(rows.shape[-1], dtype=dtype, device=rows.device)
    return rows


class AttentionMaps(Mapping[str, Tensor]):
    """From an attention's name to its map: [B, h, w, S], or whole, [steps, B, heads, h, w, S]."""

    def __init__(self, layers: Mapping[str, MapRecorder]) -> None:
        self.layers = layers

    def __getitem__(self, name: str) -> Tensor:
        layer = self.layers[name]
        if not layer.maps:
            raise ValueError(f"{name} has no map yet")
        return torch.stack(layer.maps) if layer.whole else layer.maps[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


@contextmanager
def record_attention(
    net: Encoder, patterns: Patterns, steps: Steps = None, *, whole: bool = False
) -> Iterator[AttentionMaps]:
    """Keep the attention maps of a UNet's or ControlNet's layers while the block lasts.

    patterns: one or several globs (`fnmatch`) over the names of its attentions, as in
    "up.1.attentions.2.blocks.0.self_attention", "...cross_attention" and, of the first IP-Adapter,
    "...cross_attention.image_branches.0".
    steps: which calls of the net are kept, 0 the first; all if None. whole: each step's and head's map by
    itself, made one tensor at each look; if not, the mean over both.
    Each map is [B, h, w, S] (whole: [steps, B, heads, h, w, S]) where the layer is, in float32, of a float64
    model in float64. B: under guidance the unconditional rows, then the conditional, then perturbed ones,
    whose self-attention is the identity. h, w: of the layer's feature map. S: in self-attention its h * w
    pixels, row by row; in cross-attention the text tokens as the net is given them: one column stands for all
    equal pads, and a text shorter than the longest has columns of 0 on its left; in an image branch the
    tokens of all its images, of which with masks each image's add up to 1. Elsewhere a row adds up to 1.
    An image branch's map says nothing of its scale, nor of masks.
    The results are those without recording, to the bit. Raises ValueError for a pattern that means nothing,
    for a net that is compiled, for steps in which a map has other shapes (as where guidance begins or ends)
    and, on leaving, for steps that never came.
    """
    if not isinstance(plain(net), Encoder):
        raise TypeError(f"expected a UNet or a ControlNet, such as pipe.unet, got {type(net).__name__}")
    modules: dict[str, nn.Module] = {}
    for name, module in plain(net).named_modules():
        if isinstance(module, Attention):
            modules[name] = module
            modules |= {f"{name}.image_branches.{i}": b for i, b in enumerate(module.image_branches)}
    found = match_modules(net, modules, patterns)
    layers = {name: MapRecorder(name, checked_steps(steps), whole) for name in found}
    with ExitStack() as stack:
        for name, module in found.items():
            layer, transformer = layers[name], net.get_submodule(name.partition(".blocks.")[0])
            stack.callback(transformer.register_forward_pre_hook(layer.record_size).remove)
            if isinstance(module, Attention):
                module.observers.append(layer.observe)
                stack.callback(partial(module.observers.remove, layer.observe))
            else:
                stack.callback(module.register_forward_hook(layer.observe_images).remove)
        yield AttentionMaps(layers)
        for layer in layers.values():
            layer.calls.check()
