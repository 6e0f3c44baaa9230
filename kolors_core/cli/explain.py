"""`python -m kolors_core explain "PROMPT"`: where in the picture each token of the prompt acted.

Shapes: S tokens that the UNet reads, T tokens as shown, h and w of a map.
"""

import argparse
import secrets
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_core.adapters.textual_inversion import words_of
from kolors_core.cli.options import (
    add_model,
    add_sampler,
    check_outs,
    default_steps,
    files_of,
    load_pipeline,
    quantize,
)
from kolors_core.devices import named_device, plain
from kolors_core.inspection.attention_maps import record_attention
from kolors_core.inspection.attention_report import PARTS, Explanation, Token, page, sheet
from kolors_core.pipelines.png_metadata import attach_metadata
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.tokenizer import TokenBatch, Tokenizer
from kolors_core.validation import LARGEST_SEED, whole_number
from weights_convert.atomic_write import new_file


def explained(pipe: KolorsPipeline, prompt: str, steps: int, **arguments: Any) -> Explanation:
    """Draw one picture and keep where it looked at each token, by layers and by thirds of the steps.

    arguments: others of the pipeline's call. ValueError for a pipeline without a tokenizer.
    """
    if pipe.tokenizer is None or pipe.text_encoder is None:
        raise ValueError("this pipeline has no tokenizer or no text encoder, and its tokens no names")
    words = words_of(plain(pipe.text_encoder))
    batch = pipe.tokenizer([prompt], words=words)
    batch = batch.collapse() if pipe.savings.collapse_pads else batch
    tokens = tokens_of(pipe.tokenizer, batch, words)
    edges = [round(third * steps / 3) for third in range(4)] if steps >= 3 else [0, steps]
    spans = [range(first, stop) for first, stop in zip(edges, edges[1:], strict=False)]
    with ExitStack() as stack:
        maps = [stack.enter_context(record_attention(pipe.unet, "*cross_attention", span)) for span in spans]
        picture = pipe(prompt, num_inference_steps=steps, **arguments)[0][0]
    means = [by_part(each, batch.ids.shape[1]) for each in maps]
    views = {}
    for part in means[0]:
        thirds = {
            f"{span.start + 1} to {span.stop}": mean[part] for span, mean in zip(spans, means, strict=True)
        }
        weighed = [mean[part] * len(span) for span, mean in zip(spans, means, strict=True)]
        shares = {"all": torch.stack(weighed).sum(0) / steps} | (thirds if len(spans) > 1 else {})
        for name, share in shares.items():
            views[part, name] = torch.stack([share[token.columns].sum(0) for token in tokens])  # [T, h, w]
    counts = {part: sum(name.startswith(part) for name in maps[0]) for part in means[0]}
    layers = ", ".join(f"{n} {PARTS[part]}" for part, n in counts.items() if n)
    facts = {name: value for name, value in picture.info.items() if name != "prompt"} | {
        "maps": "each token's share of the cross-attention to the prompt: the mean over all heads, all steps "
        f"({steps}) and all layers ({layers}), whose maps are enlarged to the largest; each in colours from "
        "its own least to its own most",
        "tokens": "a character of several tokens has the sum of their maps; so have all pads, which fill the "
        "prompt up, are alike and have read the whole of it; [gMASK] and sop begin every prompt",
    }
    return Explanation(prompt, picture, tokens, views, facts)


def tokens_of(
    tokenizer: Tokenizer, batch: TokenBatch, words: Mapping[str, list[int]] | None = None
) -> list[Token]:
    """What to show of a batch's one prompt: all pads as one, bytes that are a character as that.

    words: of textual inversion, each with its ids.
    """
    ids, pieces = batch.ids[0].tolist(), tokenizer.pieces
    special = {i: name for name, i in tokenizer.special.items()}
    special |= {i: word for word, its in (words or {}).items() for i in its}
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


def by_part(maps: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Maps of the prompt's row, the last, averaged over the layers of each of `PARTS`: [S, h, w].

    maps: [B, h, w, S or more] by the layer's name; length: S. Smaller ones are enlarged to a part's largest.
    """
    layers: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    for name, rows in maps.items():
        for part in ("all", name.split(".")[0]):
            layers[part].append(rows[-1, :, :, -length:].movedim(-1, 0).float().cpu())  # [S, h, w]
    means = {}
    for part, those in layers.items():
        if those:
            size = max(one.shape[-2:] for one in those)
            sized = [F.interpolate(one[None], size, mode="bilinear")[0] for one in those]
            means[part] = torch.stack(sized).mean(0)
    return means


def explain_parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(
        prog="python -m kolors_core explain",
        description="Draw a picture, and for each token of the prompt where the picture looked at it.",
    )
    top.add_argument("prompt", help="what to draw, in Chinese or English")
    top.add_argument(
        "-o", "--out", type=Path, default=Path("explained"), metavar="NAME",
        help="what to write: NAME.png, a sheet, and NAME.html, a page (default: %(default)s)",
    )  # fmt: skip
    top.add_argument("--force", "--overwrite", action="store_true", help="write over files that exist")
    add_model(top.add_argument_group("model"))
    picture = top.add_argument_group("picture")
    picture.add_argument("-n", "--negative", metavar="TEXT", help="what not to draw")
    for side in ("height", "width"):
        picture.add_argument(f"--{side}", type=int, help="pixels, a multiple of 8 (default: the model's own)")
    picture.add_argument("--seed", type=int, help="of the noise (default: random)")
    picture.add_argument("--steps", type=int, help="denoising steps (default: 50 for euler, 25 for others)")
    add_sampler(picture)
    picture.add_argument(
        "-g", "--guidance", type=float, default=5.0, metavar="SCALE", help="1 is off (default: %(default)s)"
    )
    top.add_argument("-q", "--quiet", action="store_true", help="no progress bar and no report")
    return top


def explain(options: argparse.Namespace) -> None:
    """Do what the flags ask for; ValueError or OSError for what cannot be done."""
    name = options.out.with_suffix("") if options.out.suffix in (".png", ".html") else options.out
    outs = [name.with_name(f"{name.name}.{kind}") for kind in ("png", "html")]
    check_outs(outs, options.force)
    for side in ("height", "width"):
        if getattr(options, side) is not None:
            whole_number(side, getattr(options, side), 8)
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    whole_number("--seed", seed, least=0, most=LARGEST_SEED)
    steps = default_steps(options.sampler) if options.steps is None else whole_number("steps", options.steps)
    name.parent.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(options, named_device(options.device))
    quantized = quantize(pipe, options)
    made = explained(
        pipe, options.prompt, steps, negative_prompt=options.negative, height=options.height,
        width=options.width, guidance_scale=options.guidance, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    model = [options.weights, *(f"{part} from {file}" for part, file in files_of(options).items())]
    model += [] if quantized is None else [f"quantized: {quantized}"]
    made.facts["model"] = ", ".join(model)
    write(made, *outs)
    if not options.quiet:
        size = f"{made.picture.width}x{made.picture.height}"
        print(f"{outs[0]}, {outs[1]}  {size}  seed {seed}", file=sys.stderr)


def write(made: Explanation, png: Path, html: Path) -> None:
    """Write the sheet and the page, both or none. OSError naming the file."""
    drawn, text = sheet(made), page(made).encode()
    attach_metadata(drawn, {"prompt": made.prompt} | made.facts)
    with new_file(png) as scratch, new_file(html) as page_scratch:
        drawn.save(scratch, "PNG", compress_level=3)  # a third of the time, a tenth more bytes
        page_scratch.write_bytes(text)
