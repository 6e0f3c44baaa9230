"""Command `python -m kolors_core explain "PROMPT"`: where in the image each token of the prompt acted."""

import argparse
import sys
from pathlib import Path

import torch

from kolors_core.adapters.textual_inversion import words_of
from kolors_core.cli import options as cli
from kolors_core.cli.parsers import explain_parser
from kolors_core.cli.samplers import default_steps
from kolors_core.devices import named_device, unwrap_compiled
from kolors_core.inspection.attention_report import Explanation, render_html, render_png
from kolors_core.inspection.token_attention import explain_prompt
from kolors_core.performance.quantize import format_name
from kolors_core.pipelines.png_metadata import attach_metadata
from kolors_core.validation import check_int
from weights_convert.atomic_write import atomic_file


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 2, with one line on stderr, after an error."""
    return cli.run_command(explain, explain_parser().parse_args(arguments))


def explain(options: argparse.Namespace) -> None:
    """Generate the image and write its report; raises ValueError or OSError."""
    name = options.out.with_suffix("") if options.out.suffix in (".png", ".html") else options.out
    if not name.name:
        raise ValueError(f"--out must be the name of files, such as car for car.png and car.html, got {name}")
    outs = [name.with_name(f"{name.name}.{kind}") for kind in ("png", "html")]
    cli.check_output_paths(outs, options.force)
    for side in ("height", "width"):
        if (pixels := getattr(options, side)) is not None:
            check_int(side, pixels, 8)
    seed = cli.select_seed(options)
    steps = default_steps(options.sampler) if options.steps is None else check_int("steps", options.steps)
    cli.make_writable(outs[0])
    pipe = cli.load_pipeline(options, named_device(options.device))
    formats = {name: format_name(one) for name, one in cli.quantization_formats(options).items()}
    quantized = cli.measure_quantization(pipe, options) or formats
    explanation = explain_prompt(
        pipe, options.prompt, steps, words_of(unwrap_compiled(pipe.text_encoder)),
        negative_prompt=options.negative, height=options.height, width=options.width,
        guidance_scale=options.guidance, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    model = [options.weights, *(f"{part} from {file}" for part, file in cli.component_files(options).items())]
    explanation.facts["model"] = ", ".join([*model, *(f"{name}: {text}" for name, text in quantized.items())])
    write(explanation, *outs)
    print(*outs, sep="\n")
    if not options.quiet:
        size = f"{explanation.image.width}x{explanation.image.height}"
        print(f"{size}  seed {seed}", file=sys.stderr)


def write(explanation: Explanation, png: Path, html: Path) -> None:
    """Write the sheet and the page, both or none; OSError names the file."""
    image, text = render_png(explanation), render_html(explanation).encode()
    attach_metadata(image, {"prompt": explanation.prompt} | explanation.facts)
    with atomic_file(png) as scratch, atomic_file(html) as page_scratch:
        image.save(scratch, "PNG", compress_level=3)  # a third of the time, a tenth more bytes
        page_scratch.write_bytes(text)
