"""Token attention: maps of a generated image's attention to each token of its prompt.

Shapes: S tokens that the UNet reads, T displayed tokens, h and w of a map.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from itertools import pairwise, starmap, takewhile
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_core.inspection.attention_maps import record_attention
from kolors_core.inspection.attention_report import PARTS, Explanation, Token
from kolors_core.module import reads_counts
from kolors_core.precompute import Savings
from kolors_core.tokenizer import TokenBatch, Tokenizer
from kolors_core.unet import UNet


class TextToImage(Protocol):
    """Pipeline that generates an image from a prompt, such as `KolorsPipeline`."""

    unet: UNet
    tokenizer: Tokenizer | None
    savings: Savings

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate images: (prompt, num_inference_steps=...) -> (images, ...)."""


def explain_prompt(
    pipe: TextToImage, prompt: str, steps: int, words: Mapping[str, list[int]] | None = None, **arguments: Any
) -> Explanation:
    """Generate one image and average its attention to each token, by layers and by thirds of the steps.

    words: as of `textual_inversion.words_of`. arguments: the call's others. ValueError without a tokenizer.
    """
    if pipe.tokenizer is None:
        raise ValueError("this pipeline has no tokenizer, which names the tokens")
    batch = pipe.tokenizer([prompt], words=words)
    is_merged = pipe.savings.merge_padding and reads_counts(getattr(pipe, "text_encoder", None))
    batch = batch.merge_padding() if is_merged else batch
    tokens = display_tokens(pipe.tokenizer, batch, words)
    edges = [round(third * steps / 3) for third in range(4)] if steps >= 3 else [0, steps]
    spans = list(starmap(range, pairwise(edges)))
    with ExitStack() as stack:
        maps = [stack.enter_context(record_attention(pipe.unet, "*cross_attention", span)) for span in spans]
        image = pipe(prompt, num_inference_steps=steps, **arguments)[0][0]
    means = [(s, average_by_block(each, batch.ids.shape[1])) for s, each in zip(spans, maps, strict=True)]
    views = {}
    for part in means[0][1]:
        shares = {"all": torch.stack([mean[part] * len(span) for span, mean in means]).sum(0) / steps}
        if len(spans) > 1:
            shares |= {f"{span.start + 1} to {span.stop}": mean[part] for span, mean in means}
        for name, share in shares.items():
            views[part, name] = torch.stack([share[token.columns].sum(0) for token in tokens])  # [T, h, w]
    counts = {place: sum(name.startswith(part) for name in maps[0]) for part, place in PARTS.items()}
    layers = ", ".join(f"{n} in the {place}" for place, n in counts.items() if n)
    facts = {name: value for name, value in image.info.items() if name != "prompt"} | {
        "maps": "each token's share of the cross-attention to the prompt: the mean over all heads, all steps "
        f"({steps}) and all layers ({layers}), whose maps are enlarged to the largest; each in colors from "
        "its own minimum to its own maximum",
        "tokens": "a character of several tokens has the sum of their maps; so have all pads, which fill the "
        "prompt up, are alike and have attended to the whole of it; [gMASK] and sop begin every prompt",
    }
    return Explanation(prompt, image, tokens, views, facts)


def display_tokens(
    tokenizer: Tokenizer, batch: TokenBatch, words: Mapping[str, list[int]] | None = None
) -> list[Token]:
    """List the tokens of a batch's one prompt, all pads and a character's bytes as one; words: with ids."""
    ids, pieces = batch.ids[0].tolist(), tokenizer.pieces
    special = {i: name for name, i in tokenizer.special.items()}
    special |= {i: word for word, word_ids in (words or {}).items() for i in word_ids}
    names = [special[i] if i in special else pieces.id_to_piece(i) for i in ids]
    start = int((~batch.mask[0]).sum())
    pads = start if batch.counts is None else int(batch.counts[0, :start].sum())
    tokens = [Token(f"{pads} pads", f"{names[0]}, {pads} times", slice(0, start))] if start else []
    while start < len(ids):
        run = takewhile(lambda i: i not in special and pieces.is_byte(i), ids[start : start + 4])
        raw = bytes(int(pieces.id_to_piece(i)[3:5], 16) for i in run)  # of pieces such as <0xE7>
        char = raw.decode("utf-8", "replace")[:1]
        is_char = char != "" and raw.startswith(char.encode())
        columns = slice(start, start + (len(char.encode()) if is_char else 1))
        text = char if is_char else names[start].replace("▁", " ")
        tokens.append(Token(text.strip(" ") or "␣" * len(text), " ".join(names[columns]), columns))
        start = columns.stop
    return tokens


def average_by_block(maps: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Average the maps of the prompt's row, the last, over the layers of each of `PARTS`: [S, h, w].

    maps: [B, h, w, S or more] by the layer's name; length: S. Smaller ones are enlarged to a part's largest.
    """
    means = {}
    for part in PARTS:
        layers = [rows for name, rows in maps.items() if part in ("all", name.split(".")[0])]
        if layers:
            rows = [each[-1, :, :, -length:].movedim(-1, 0).float().cpu() for each in layers]  # [S, h, w]
            size = max(each.shape[-2:] for each in rows)
            resized = [F.interpolate(each[None], size, mode="bilinear")[0] for each in rows]
            means[part] = torch.stack(resized).mean(0)
    return means
