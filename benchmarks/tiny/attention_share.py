"""Share of attention: does a thing's name attend to where the thing is drawn?

For prompts of two things, the cross-attention to the tokens of each thing's own name is averaged over layers,
heads and steps; its mean inside the thing's detected box, grown to whole cells of the map, is compared with
its mean outside. 1 is a map that knows nothing of places.
Shapes: B prompts, S tokens, h and w of a map.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from benchmarks.tiny.detector import Detector
from benchmarks.tiny.emoji import SIZE, Concept
from benchmarks.tiny.judge import Prompt
from benchmarks.tiny.scenes import SIGN, Item
from kolors_core.inspection.attention_maps import record_attention
from kolors_core.inspection.token_attention import average_by_block
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.tokenizer import Tokenizer

BATCH = 20


def find_columns(tokenizer: Tokenizer, text: str, concept: Concept) -> list[int]:
    """Find the tokens of a concept's name in a text, counted from the end: -1 is the last; [] if none is."""
    pieces = tokenizer.pieces.encode(text, out_type=str)
    joined = "".join(pieces).replace("▁", " ")
    names = sorted(concept.english + concept.chinese, key=len, reverse=True)
    pattern = "|".join(rf"(?<![a-z]){re.escape(n)}(?![a-z])" if n.isascii() else re.escape(n) for n in names)
    match, columns, start = re.search(pattern, joined, re.IGNORECASE), [], 0
    for i, piece in enumerate(pieces):
        if match and start < match.end() and start + len(piece) > match.start():
            columns.append(i - len(pieces))
        start += len(piece)
    return columns


def densities(shares: Tensor, item: Item) -> tuple[float, float]:
    """Average a map [h, w] inside an item's box, of which a cell may have only a part, and outside it."""
    height, width = shares.shape
    left, top, right, bottom = (max(0.0, side) / SIZE for side in item.box)
    rows = slice(int(top * height), math.ceil(bottom * height))
    inside = torch.zeros(shares.shape, dtype=torch.bool, device=shares.device)
    inside[rows, int(left * width) : math.ceil(right * width)] = True
    if inside.all() or not inside.any():
        return float(shares.mean()), float(shares.mean())
    return float(shares[inside].mean()), float(shares[~inside].mean())


def measure_attention(
    pipe: KolorsPipeline, detector: Detector, concepts: Mapping[str, Concept], prompts: Sequence[Prompt],
    generate: Callable[..., Tensor],
) -> dict[str, float | int | None]:  # fmt: skip
    """Measure the ratio of attention inside to outside, for each thing that was drawn once.

    generate: (prompts, seed=...) -> images [B, 3, H, W], with guidance. Keys: "things", the number measured;
    "ratio" of the mean inside to the mean outside; "median" of each thing's ratio. None if there is none.
    """
    assert pipe.tokenizer is not None
    inside, outside = list[float](), list[float]()
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        with record_attention(pipe.unet, "*cross_attention") as maps:
            images = generate([prompt.text for prompt in part], seed=start)
        for i, (prompt, found) in enumerate(zip(part, detector.detect(images), strict=True)):
            rows = {name: each[len(each) // 2 + i][None] for name, each in maps.items()}  # of the prompt
            mean = average_by_block(rows, next(iter(rows.values())).shape[-1])["all"]  # [S, h, w]
            for kind in prompt.scene.kinds:
                items = [item for item in found.items if item.kind == kind]
                columns = find_columns(pipe.tokenizer, prompt.text, concepts[kind])
                if len(items) == 1 and columns:
                    within, without = densities(mean[columns].sum(0), items[0])
                    inside.append(within)
                    outside.append(without)
    if not inside:
        return {"things": 0, "ratio": None, "median": None}
    ratios = [a / max(b, 1e-12) for a, b in zip(inside, outside, strict=True)]
    return {"things": len(ratios), "ratio": sum(inside) / sum(outside), "median": median(ratios)}


def of_two_things(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Choose the prompts of two things, one of each."""
    return [
        prompt for prompt in prompts
        if SIGN not in prompt.scene.kinds and [len(group) for group in prompt.scene.groups] == [1, 1]
    ]  # fmt: skip
