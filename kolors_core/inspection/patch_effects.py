"""Effects of causal patching as tables, with intervals: every head, and every token in every layer.

The strongest heads of one half of the seeds are patched together on the other half, beside as many others.
Shapes: N seeds.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kolors_core.inspection.features import Patterns
from kolors_core.inspection.heat_map import HeatMap
from kolors_core.inspection.intervals import FEWEST, mean_interval
from kolors_core.inspection.patching import ALL, CHANNELS, EVERY, Part, Patcher, head_parts, token_parts
from kolors_core.inspection.prompt_template import Track
from kolors_core.inspection.token_attention import TextToImage
from kolors_core.validation import check_int

if TYPE_CHECKING:
    from PIL.Image import Image

LAYERS = "*cross_attention"
ROUNDING = 1e-6
STRONGEST = 5  # heads that are patched together
POOLED = Part("add_embedding", "out", CHANNELS, slice(None))  # of the text's pooled state and the sizes


Cells = dict[tuple[str, str], Tensor]  # (row, column) -> effects [N]


def measure(patcher: Patcher, rows: Mapping[str, Mapping[str, list[Part]]], track: Track = iter) -> Cells:
    """Measure the effect of each cell's parts. track: wraps the list of cells, for a progress bar."""
    cells = [(row, column) for row, parts in rows.items() for column in parts]
    return {(row, column): patcher(rows[row][column]) for row, column in track(cells)}


def has_effect(effects: Tensor) -> bool:
    """Return whether effects are more than rounding: those of a token whose state is the same are not."""
    return float(effects.abs().max()) > ROUNDING


def table(title: str, column_axis: str, effects: Cells) -> HeatMap:
    """Make the table of effects, whose intervals hold together; those without any change need none."""
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*effects, strict=True))
    values = torch.full((3, len(rows), len(columns)), torch.nan, dtype=torch.float64)
    count = sum(has_effect(each) for each in effects.values())
    for (row, column), each in effects.items():
        mean, half = mean_interval(each, max(1, count))
        values[:, rows.index(row), columns.index(column)] = torch.stack([mean, mean - half, mean + half])
    clear = int(((values[1] > 0) | (values[2] < 0)).sum())
    note = (
        f"0: the first prompt's image, 1: the second's; 95% intervals of all {count} cells together to "
        f"±{float((values[2] - values[1]).nan_to_num().max()) / 2:.2f}, {clear} of them without 0"
    )
    mean, low, high = values
    return HeatMap(title, note, "layer", rows, column_axis, columns, mean, low, high, (-1.0, 1.0))


def patch(
    pipe: TextToImage, prompts: tuple[str, str], layers: Patterns = LAYERS, *, steps: int = 10,
    images: int = 8, seed: int = 0, track: Track = iter, **arguments: Any,
) -> tuple[str, list[HeatMap], list[tuple[str, "Image"]]]:  # fmt: skip
    """Patch each head and each token of two prompts: a summary, the tables, and images of the last seed.

    Of tokens those images are drawn whose effect in all layers is clearly not 0.
    layers: patterns of attentions' names, as in `record_attention`. images: seeds, at least twice `FEWEST`.
    arguments: the pipeline call's others. ValueError for fewer seeds, prompts whose tokens do not stand at
    the same places, and a pipeline without a tokenizer.
    """
    check_int("images", images, least=2 * FEWEST)
    if pipe.tokenizer is None:
        raise ValueError("this pipeline has no tokenizer, which names the tokens")
    heads = head_parts(pipe.unet, layers)
    tokens = token_parts(pipe.tokenizer, prompts, list(heads))
    patcher = Patcher(pipe, prompts, range(seed, seed + images), steps, **arguments)
    rows = {
        name: {ALL: parts} | {str(i): [part] for i, part in enumerate(parts)} for name, parts in heads.items()
    }
    effects = measure(patcher, rows, track)
    of_tokens = measure(patcher, {EVERY: tokens[EVERY]}, track)
    differ = [label for label in tokens[EVERY] if has_effect(of_tokens[EVERY, label])]
    parts_of = {
        row: {label: parts[label] for label in differ} for row, parts in tokens.items() if row != EVERY
    }
    of_tokens |= measure(patcher, parts_of, track)
    half = images // 2
    ranked = sorted((key for key in effects if key[1] != ALL), key=lambda key: -effects[key][:half].mean())
    order = torch.randperm(len(ranked), generator=torch.Generator().manual_seed(seed)).tolist()
    others = [ranked[i] for i in order if i >= STRONGEST][:STRONGEST]
    chosen = {
        f"{STRONGEST} strongest heads": [
            part for row, column in ranked[:STRONGEST] for part in rows[row][column]
        ],
        f"{len(others)} other heads": [part for row, column in others for part in rows[row][column]],
        "all heads": [part for parts in heads.values() for part in parts],
        "pooled text": [POOLED],
    }
    texts = []
    for name, parts in chosen.items():
        mean, error = mean_interval(patcher(parts)[half:])
        texts.append(f"{name} {float(mean):.2f} ± {float(error):.2f}")
    maps = [table("Heads", "head", effects), table("Tokens: their keys and values", "token", of_tokens)]
    columns, low, high = maps[1].columns, maps[1].low[0], maps[1].high[0]
    clear = [
        label for label, a, b in zip(columns, low, high, strict=True) if label != ALL and (a > 0 or b < 0)
    ]
    one = Patcher(pipe, prompts, [seed + images - 1], steps, **arguments)
    chosen = {prompts[0]: [], prompts[1]: [*tokens[EVERY][ALL], POOLED]} | chosen
    chosen |= {f"token {label}": tokens[EVERY][label] for label in clear}
    drawn = [(name, one.draw(parts, output_type="pil")[0]) for name, parts in chosen.items()]
    names = ", ".join(f"{row} {column}" for row, column in ranked[:STRONGEST])
    summary = (
        f"Heads are ranked on {half} seeds; patched together on the other {images - half}: "
        f"{', '.join(texts)}. The strongest: {names}."
    )
    return summary, maps, drawn
