"""Causal patching: which heads and which tokens make the image of another prompt.

Two prompts of equally many tokens are denoised side by side from the same noise, and the UNet reads the first
one's latents for both, so that in each step their features differ by words alone. One part of the first
prompt's features, a head's output or a token's key and value, is replaced by that of the second (interchange
interventions: Vig et al. 2020, https://arxiv.org/abs/2004.12265; Meng et al. 2022, https://arxiv.org/abs/2202.05262).
Its effect is how far the final latents went from the first prompt's to the second's: the projection of the
change onto their difference, 0 if nothing changed and 1 if all that the words make was replaced.
Shapes: N seeds, H halves of the rows under guidance.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kolors_core.inspection.features import Patterns, Where, inject, match_modules
from kolors_core.inspection.prompt_template import Example, generate, in_batches
from kolors_core.inspection.token_attention import TextToImage, display_tokens
from kolors_core.tokenizer import Tokenizer
from kolors_core.unet import Attention

CHANNELS, TOKENS = -1, -2  # axes of features [rows, S, C]
ROUNDING = 1e-3
ALL, EVERY = "all", "all layers"


@dataclass(frozen=True)
class Part:
    """Part of the features: a module's output, or input, and where in it, a slice of an axis."""

    module: str
    what: Where
    axis: int
    where: slice


def swap(n: int, part: Part, x: Tensor, _step: int) -> Tensor:
    """Replace a part of the first prompt's rows by the second's, in x [H * 2 * n, ...]."""
    pairs = x.unflatten(0, (-1, 2, n)).clone()
    base, source = (pairs[:, i].movedim(part.axis, 0) for i in (0, 1))
    base[part.where] = source[part.where]
    return pairs.flatten(0, 2)


def same_latents(n: int, x: Tensor, _step: int) -> Tensor:
    """Give the second prompt's rows the first's latents, in x [H * 2 * n, ...]."""
    pairs = x.unflatten(0, (-1, 2, n))
    return pairs[:, :1].expand_as(pairs).flatten(0, 2)


class Patcher:
    """Pair of prompts drawn from each of some seeds; called with parts, it returns their effect."""

    def __init__(
        self, pipe: TextToImage, prompts: tuple[str, str], seeds: Sequence[int], steps: int, **arguments: Any
    ) -> None:  # fmt: skip
        """Draw both prompts; arguments: the pipeline call's others. ValueError if they draw the same."""
        self.pipe, self.prompts, self.steps, self.arguments = pipe, prompts, steps, arguments
        self.batches = in_batches(pipe, seeds, copies=2)
        self.source = torch.cat([self._draw_both(batch)[len(batch) :] for batch in self.batches]).double()
        self.base = self.draw([])  # computed as the patched runs are
        if (self.source - self.base).norm() < ROUNDING * self.base.norm():
            raise ValueError(f"the prompts draw the same: {prompts[0]!r} and {prompts[1]!r}")

    def _draw_both(self, seeds: Sequence[int], **arguments: Any) -> Any:
        examples = [Example(prompt, (), seed) for prompt in self.prompts for seed in seeds]
        return generate(self.pipe, examples, self.steps, **self.arguments, **arguments)[0]

    def draw(self, parts: Sequence[Part], **arguments: Any) -> Any:
        """Draw the first prompt with parts of the second: latents [N, C, H, W], or as `output_type` says."""
        drawn = []
        for seeds in self.batches:
            with ExitStack() as stack:
                latents = {"": partial(same_latents, len(seeds))}
                stack.enter_context(inject(self.pipe.unet, latents, "in"))
                for part in parts:
                    change = {part.module: partial(swap, len(seeds), part)}
                    stack.enter_context(inject(self.pipe.unet, change, part.what))
                drawn += list(self._draw_both(seeds, **arguments)[: len(seeds)])
        return torch.stack(drawn).double() if isinstance(drawn[0], Tensor) else drawn

    def __call__(self, parts: Sequence[Part]) -> Tensor:
        """Measure the effect of swapping parts, for each seed: [N]."""
        change, whole = (x.flatten(1) for x in (self.draw(parts) - self.base, self.source - self.base))
        return (change * whole).sum(1) / whole.square().sum(1)


def head_parts(unet: torch.nn.Module, layers: Patterns) -> dict[str, list[Part]]:
    """List the heads of attentions, as what `to_out` reads: layer -> the part of each head."""
    attentions = {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}
    found = {}
    for name in match_modules(unet, attentions, layers):
        width = attentions[name].to_out.in_features // attentions[name].heads
        found[name] = [Part(f"{name}.to_out", "in", CHANNELS, slice(i * width, (i + 1) * width))
                       for i in range(attentions[name].heads)]  # fmt: skip
    return found


def token_parts(
    tokenizer: Tokenizer, prompts: tuple[str, str], layers: Sequence[str]
) -> dict[str, dict[str, list[Part]]]:
    """List the tokens of two prompts: a layer, or `EVERY` -> a token's label, or `ALL` -> its parts.

    ValueError for prompts whose tokens do not stand at the same places.
    """
    batches = [tokenizer([prompt]).merge_padding() for prompt in prompts]
    base, source = (display_tokens(tokenizer, batch) for batch in batches)
    if [token.columns for token in base] != [token.columns for token in source]:
        counts = " and ".join(str(int(batch.mask.sum())) for batch in batches)
        raise ValueError(f"expected two prompts whose tokens stand at the same places, got {counts} tokens")
    columns, length = {ALL: slice(None)}, batches[0].ids.shape[1]
    for one, other in zip(base, source, strict=True):
        label = one.label if one.label == other.label else f"{one.label}>{other.label}"
        while label in columns:
            label += "'"
        # From the end: before the tokens there may be more pads than these, in the first column.
        start, stop = (
            (None if one.columns.start == 0 else one.columns.start - length),
            one.columns.stop - length,
        )
        columns[label] = slice(start, stop or None)
    modules = {EVERY: ["text_proj"]} | {name: [f"{name}.to_k", f"{name}.to_v"] for name in layers}
    return {
        row: {label: [Part(name, "out", TOKENS, where) for name in names] for label, where in columns.items()}
        for row, names in modules.items()
    }
