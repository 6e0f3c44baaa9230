"""Command `python -m kolors_core train-lora IMAGES WORD`: a LoRA of a few images, and what it changed."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from kolors_core.checkpoint import EMBEDDED_NAME
from kolors_core.cli import options as cli
from kolors_core.cli import parsers
from kolors_core.devices import named_device
from kolors_core.pipelines import lora_recipe
from kolors_core.pipelines.lora_recipe import LoRARecipe
from kolors_core.pipelines.png_metadata import save_png
from kolors_core.training.trainer import OTHER_RUN
from kolors_core.validation import check_float

USUAL_LEARNING_RATE = 1e-4  # of SDXL's UNet, which Kolors' is; the embedded model's is the recipe's


def parser() -> parsers.Parser:
    """Build the parser of the flags."""
    top = parsers.Parser(
        "train-lora",
        usage="kolors train-lora IMAGES WORD [flags]",
        description="Train a LoRA of the subject of a few images, and show what it changed.\n"
        "Called again, a killed run goes on.",
        epilog="Example: kolors train-lora photos zorp -o zorp.safetensors",
    )
    add, recipe = top.add_argument, LoRARecipe()
    add("images", type=Path, metavar="IMAGES",
        help="a folder of at least three images of it; captions (cat.txt of cat.png) are optional, and have "
        "the word")  # fmt: skip
    add("word", metavar="WORD", help="what prompts are to call it: best a word that is in none, such as zorp")
    add("-o", "--out", type=Path, metavar="FILE",
        help="the LoRA to write; its run is kept beside it, in zorp.run of zorp.safetensors (default: the "
        "word, .safetensors)")  # fmt: skip
    add("--sheet", type=Path, metavar="PNG", help="images before and after (default: as --out, .png)")
    add("--force", action="store_true", help="start anew, and overwrite files that exist")
    add("-q", "--quiet", action="store_true", help="no progress bars and no report")
    parsers.add_model(top.add_argument_group("model"))
    training = top.add_argument_group("training")
    add, settings = training.add_argument, recipe.training
    add("--steps", type=parsers.integer, metavar="N", default=settings.steps, help="(default: %(default)s)")
    add("--rank", type=parsers.integer, metavar="N", default=recipe.rank,
        help="of the LoRA (default: %(default)s)")  # fmt: skip
    rates = f"{settings.learning_rate:g} for the embedded model, else {USUAL_LEARNING_RATE:g}"
    add("--learning-rate", type=float, metavar="RATE", help=f"(default: {rates})")
    add("--batch-size", type=parsers.integer, metavar="N", default=settings.batch_size,
        help="images a step (default: %(default)s)")  # fmt: skip
    add("--accumulate", type=parsers.integer, metavar="N", default=1,
        help="compute a batch in N parts, with less memory (default: 1)")  # fmt: skip
    add("--checkpointing", action="store_true", help="compute activations twice, with less memory")
    add("--keep", nargs="+", metavar="THING",
        help="things that the model draws before, and trains on so that it keeps them, such as the kind of "
        f"thing that the word names (default: {len(recipe.others)} of all kinds)")  # fmt: skip
    add("--inference-steps", type=parsers.integer, metavar="N", default=recipe.inference_steps,
        help="of images that are drawn (default: %(default)s)")  # fmt: skip
    add("--seed", type=parsers.integer, metavar="N", default=settings.seed,
        help="of all that is drawn by chance (default: 0)")  # fmt: skip
    top.set_defaults(sampler="dpmpp-2m-karras", schedule=None)
    return top.list_only("--out", "--sheet", "--force", "-q", "-w", "--steps", "--rank", "--learning-rate",
                         "--batch-size", "--accumulate", "--checkpointing", "--keep", "--inference-steps",
                         "--seed", note="More flags of the model: kolors draw --help")  # fmt: skip


def train_lora(options: argparse.Namespace) -> None:
    """Train the LoRA and write the file and its sheet; raises ValueError or OSError."""
    out = options.out or Path(f"{options.word}.safetensors")
    if out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {out}")
    if options.offload:
        raise ValueError("--offload only draws: training needs the UNet on one device")
    sheet = options.sheet or out.with_suffix(".png")
    if sheet.suffix.lower() != ".png":
        raise ValueError(f"--sheet must end in .png, got {sheet}")
    has_run = (out.with_suffix(".run") / "state.safetensors").exists()
    cli.check_output_paths([sheet], options.force or has_run)
    cli.make_writable(out)
    cli.make_writable(sheet)
    rate, device = options.learning_rate, named_device(options.device)
    if rate is None:
        is_embedded = options.weights == EMBEDDED_NAME
        rate = LoRARecipe().training.learning_rate if is_embedded else USUAL_LEARNING_RATE
    if options.dtype is None and device.type != "cpu":
        options.dtype = "bfloat16"  # that of the forward, so that it casts no weights
    recipe = LoRARecipe(rank=options.rank, inference_steps=options.inference_steps)
    recipe = replace(recipe, others=tuple(options.keep or recipe.others), training=replace(
        recipe.training, steps=options.steps, learning_rate=check_float("--learning-rate", rate, 0),
        batch_size=options.batch_size, gradient_accumulation_steps=options.accumulate,
        checkpoint_blocks=options.checkpointing, seed=options.seed,
    ))  # fmt: skip
    lora_recipe.subject_examples(options.images, options.word, recipe)  # before weights are read
    pipe = cli.load_pipeline(options, device)
    cli.measure_quantization(pipe, options)
    try:
        result = lora_recipe.train_lora(
            pipe, options.images, options.word, out, recipe, resume="never" if options.force else "same",
            overwrite=options.force, progress=not options.quiet,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(str(error).replace(OTHER_RUN, "--force starts anew")) from None
    save_png(result.sheet, sheet)
    print(out, sheet, sep="\n")
    if not options.quiet:
        print(result, file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    interrupted = "interrupted: the same command goes on from the last state saved"
    return cli.run_command(train_lora, parser().parse_args(arguments), interrupted)
