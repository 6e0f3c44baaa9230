"""Command `python -m kolors_core inspect KIND PROMPT`: heat maps and a table of what is inside the UNet."""

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from kolors_core.cli import options as cli
from kolors_core.cli.inspect_parser import parser
from kolors_core.cli.samplers import default_steps
from kolors_core.devices import named_device
from kolors_core.inspection.activations import activations
from kolors_core.inspection.heat_map import HeatMap, render_csv, render_png
from kolors_core.inspection.patch_effects import patch
from kolors_core.inspection.probes import probe
from kolors_core.inspection.prompt_template import PromptTemplate
from kolors_core.inspection.similarity import similarity
from kolors_core.validation import check_int
from weights_convert.atomic_write import atomic_file

if TYPE_CHECKING:
    from PIL.Image import Image

Measured = tuple[str, list[HeatMap], list[tuple[str, "Image"]]]  # summary, maps, examples with their labels


def measure(
    options: argparse.Namespace, pipe: Any, track: Callable[[list[Any]], Iterable[Any]], named: dict[str, Any]
) -> Measured:
    """Run the analysis of the options. named: its settings and the pipeline call's arguments."""
    if options.kind == "patch":
        return patch(pipe, tuple(options.prompts), track=track, **named)
    template = PromptTemplate.parse(options.prompts[0])
    if options.kind == "probe":
        return "", probe(pipe, template, track=track, **named), []
    if options.kind == "activations":
        summary, maps = activations(pipe, template, track=track, **named)
        return summary, maps, []
    return "", similarity(pipe, second_pipeline(options), template, track=track, **named), []


def second_pipeline(options: argparse.Namespace) -> Any:
    """Load --other with --other-lora."""
    name = options.weights if options.other is None else options.other
    pipe = cli.load_pipeline(
        argparse.Namespace(**vars(options) | {"weights": name}), named_device(options.device)
    )
    pipe.set_progress_bar_config(disable=True)
    cli.load_loras(
        pipe, [options.other_lora] if options.other_lora else [], options.local_files_only, options.quiet
    )
    return pipe


def inspect(options: argparse.Namespace) -> None:
    """Measure and write the image and the table; raises ValueError or OSError."""
    check_options(options)
    steps = default_steps(options.sampler) if options.steps is None else check_int("--steps", options.steps)
    name = options.out.with_suffix("") if options.out.suffix in (".png", ".csv") else options.out
    outs = [name.with_name(f"{name.name}.{kind}") for kind in ("png", "csv")]
    cli.check_output_paths(outs, options.force)
    cli.make_writable(outs[0])
    pipe = cli.load_pipeline(options, named_device(options.device))
    cli.measure_quantization(pipe, options)
    pipe.set_progress_bar_config(disable=True)
    named = {
        "layers": options.layers, "images": options.images, "steps": steps, "seed": options.seed,
        "height": options.height, "width": options.width, "negative_prompt": options.negative,
        "guidance_scale": options.guidance,
    }  # fmt: skip
    named = {key: value for key, value in named.items() if value is not None}

    def track(parts: list[Any]) -> Iterable[Any]:
        from tqdm.auto import tqdm

        return tqdm(parts, desc=options.kind, leave=False, disable=options.quiet)

    with torch.no_grad():
        summary, maps, images = measure(options, pipe, track, named)
    across = 2 if len(maps) > 1 and options.kind != "patch" else 1
    title = f"{options.kind}: {' > '.join(options.prompts)}{'. ' * bool(summary)}{summary}"
    sheet = render_png(title, maps, across, images)
    with atomic_file(outs[0]) as scratch, atomic_file(outs[1]) as table_scratch:
        sheet.save(scratch, "PNG", optimize=True)
        table_scratch.write_bytes(render_csv(maps).encode())
    print(*outs, sep="\n")
    if summary and not options.quiet:
        print(summary, file=sys.stderr)


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for what the kind does not take."""
    wanted, kind = 2 if options.kind == "patch" else 1, options.kind
    if len(options.prompts) != wanted:
        raise ValueError(f"{kind} takes {wanted} prompt{'s' * (wanted > 1)}, got {len(options.prompts)}")
    others = {"--other": options.other, "--other-lora": options.other_lora}
    given = [flag for flag, value in others.items() if value is not None]
    if given and kind != "similarity":
        raise ValueError(f"{given[0]} has no effect on {kind}: similarity alone has two models")
    if not given and kind == "similarity":
        raise ValueError("similarity needs a second model: --other or --other-lora")
    if not options.out.with_suffix("").name:
        raise ValueError(
            f"--out must be the name of files, such as car for car.png and car.csv, got {options.out}"
        )
    check_int("--seed", options.seed, least=0)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 2, with one line on stderr, after an error."""
    return cli.run_command(inspect, parser().parse_args(arguments))
