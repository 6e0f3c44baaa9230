"""Parser of `inspect`. Nothing here imports torch."""

from pathlib import Path

from kolors_core.cli import parsers

KINDS = ("probe", "activations", "similarity", "patch")


def parser() -> parsers.Parser:
    """Build the parser of the flags."""
    top = parsers.Parser(
        "inspect", usage="kolors inspect KIND PROMPT [PROMPT] [flags]",
        description="Measure what is inside the UNet while it draws prompts.\n\n"
        "  probe        which answer of the prompt's questions a linear classifier reads from each layer\n"
        "  activations  how large, heavy-tailed and weak each layer's values are, and dead units\n"
        "  similarity   CKA between the layers of the model and of --other\n"
        "  patch        which heads and tokens turn the first prompt's image into the second's\n\n"
        "In a PROMPT, {NAME: ANSWER|ANSWER} is a question: it stands for each answer in turn.",
        epilog='Example: kolors inspect probe "a {thing: fox|cat} {place: on the left|on the right}" -o read',
    )  # fmt: skip
    add = top.add_argument
    add("kind", metavar="KIND", choices=KINDS, type=parsers.one_of(KINDS), help=", ".join(KINDS))
    add("prompts", metavar="PROMPT", nargs="+", help="what to draw; two of them for patch")
    add("-o", "--out", type=Path, default=Path("inspected"), metavar="NAME",
        help="write NAME.png, heat maps, and NAME.csv, all values (default: %(default)s)")  # fmt: skip
    add("--force", action="store_true", help="overwrite files that exist")
    add("-q", "--quiet", action="store_true", help="no progress bar and no report")
    add("--layers", nargs="+", metavar="GLOB", help="names of modules (default: the kind's own)")
    add("--images", type=parsers.integer, metavar="N",
        help="of each prompt, each of its own noise (default: the kind's own)")  # fmt: skip
    model = top.add_argument_group("model")
    parsers.add_model(model)
    model.add_argument("--other", metavar="DIR", help="the second model, as --weights (default: the same)")
    model.add_argument("--other-lora", metavar="FROM", help="a LoRA of the second model, such as tiny")
    image = top.add_argument_group("image")
    parsers.add_image(image)
    image.add_argument("--seed", type=parsers.integer, metavar="N", default=0,
        help="of the first image; each other has the next (default: 0)")  # fmt: skip
    parsers.add_steps(top.add_argument_group("sampling"), lists_names=False)
    return top.list_only("--out", "--force", "-q", "-w", "--layers", "--images", "--other", "--other-lora",
                         "--seed", "--steps",
                         note="More flags of the model: kolors draw --help")  # fmt: skip
