"""Requests of the page as options of the command line, which checks them and words the errors.

A request is JSON: a prompt and fields by the names below. Files are named as the page knows them, never by a
path: an image that was drawn or brought here, in the folder of the page.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kolors_core.cli.generate import with_metadata
from kolors_core.cli.parsers import Parser, draw_parser
from kolors_core.validation import did_you_mean

# Fields with a flag of the same name; those of files are names in the page's folder.
VALUES = (
    "negative", "height", "width", "seed", "images", "steps", "sampler", "schedule", "guidance", "strength",
    "padding_mask_crop", "ip_adapter", "ip_scale", "control", "control_end", "guidance_rescale", "pag", "eta",
)  # fmt: skip
SEVERAL = ("lora", "textual_inversion")  # lists
FILES = ("image", "mask", "strength_map", "ip_image", "control_image", "canny")
SWITCHES = ("lora_partial",)
MOST_IMAGES = 16  # of one request
# What must be as it was when the page was started; an image of another model is not drawn again here.
MODEL = ("weights", "unet", "text_encoder", "vae", "unet_bits", "text_encoder_bits")

Request = Mapping[str, Any]


def options_of(
    request: Request, model: argparse.Namespace, find: Callable[[str], Path]
) -> argparse.Namespace:
    """Parse a request beside the model's options, with which the page was started.

    find: maps the name of an image to its file. ValueError, as the command line words it, for a wrong one.
    """
    if not isinstance(request, Mapping):
        raise ValueError(f"expected a request, got {str(request)[:100]!r}")
    known = {"prompt", "from", *VALUES, *SEVERAL, *FILES, *SWITCHES}
    if strangers := sorted(request.keys() - known):
        raise ValueError(f"unknown field {strangers[0][:100]!r}{did_you_mean(strangers[0], known)}")
    flags = list(_flags(request, find))
    parser = _parser()
    options = parser.parse_args(flags, argparse.Namespace(**vars(model)))
    if options.from_png is not None:
        again = with_metadata(flags, parser.parse_args(flags))
        for name in MODEL:
            if (own := getattr(model, name)) != (got := getattr(again, name)):
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"this image is of {flag} {got}, and the page was started with {flag} {own}")
        vars(again).update({name: value for name, value in vars(model).items() if name != "revision"})
        options = again
    if options.images > MOST_IMAGES:
        raise ValueError(f"a request may have {MOST_IMAGES} images, got {options.images}")
    options.quiet, options.force = True, False
    return options


def _flags(request: Request, find: Callable[[str], Path]) -> Iterator[str]:
    for name, value in request.items():
        flag = f"--{name.replace('_', '-')}"
        if value in (None, "", []) or name == "prompt":
            continue
        if name == "from" or name in FILES:
            yield f"{flag}={find(str(value))}"
        elif name in SEVERAL:
            for one in value if isinstance(value, list) else [value]:
                yield f"{flag}={one}"
        elif name in VALUES:
            yield f"{flag}={value}"
        elif value is True:
            yield flag
    if prompt := str(request.get("prompt") or ""):
        yield from ("--", prompt)


def _parser() -> Parser:
    parser = draw_parser()

    def fail(message: str) -> None:
        raise ValueError(" ".join(message.removeprefix("argument ").split()))

    parser.error = fail  # pyright: ignore[reportAttributeAccessIssue]
    return parser
