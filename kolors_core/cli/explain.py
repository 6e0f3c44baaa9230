"""`python -m kolors_core explain "PROMPT"`: where in the image each token of the prompt acted."""

import argparse
import secrets
import sys
from pathlib import Path

import torch

from kolors_core.adapters.textual_inversion import words_of
from kolors_core.cli.options import (
    add_model,
    add_sampler,
    check_output_paths,
    default_steps,
    files_of,
    load_pipeline,
    quantize,
)
from kolors_core.devices import named_device, plain
from kolors_core.inspection.attention_report import Explanation, page, sheet
from kolors_core.inspection.token_attention import explain_prompt
from kolors_core.pipelines.png_metadata import attach_metadata
from kolors_core.validation import LARGEST_SEED, check_int
from weights_convert.atomic_write import atomic_file


def explain_parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(
        prog="python -m kolors_core explain",
        description="Draw an image, and for each token of the prompt where the image looked at it.",
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
    check_output_paths(outs, options.force)
    for side in ("height", "width"):
        if getattr(options, side) is not None:
            check_int(side, getattr(options, side), 8)
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    check_int("--seed", seed, least=0, most=LARGEST_SEED)
    steps = default_steps(options.sampler) if options.steps is None else check_int("steps", options.steps)
    name.parent.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(options, named_device(options.device))
    quantized = quantize(pipe, options)
    made = explain_prompt(
        pipe, options.prompt, steps, words_of(plain(pipe.text_encoder)), negative_prompt=options.negative,
        height=options.height, width=options.width, guidance_scale=options.guidance,
        generator=torch.Generator().manual_seed(seed),
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
    with atomic_file(png) as scratch, atomic_file(html) as page_scratch:
        drawn.save(scratch, "PNG", compress_level=3)  # a third of the time, a tenth more bytes
        page_scratch.write_bytes(text)
