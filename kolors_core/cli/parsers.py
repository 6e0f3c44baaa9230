"""Parsers of the command lines. Nothing here imports torch: help and completion answer at once."""

import argparse
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from kolors_core.config import EMBEDDED_NAME, VERSION
from kolors_core.validation import did_you_mean

MODELS = ("unet", "text_encoder", "vae")
DTYPES = ("float32", "float16", "bfloat16")
FORMATS = ("4", "8", "fp8", "w8a8", "w8a8-fp8", "w8a8-fp8-fast")
SAMPLERS = (
    "euler", "euler-karras", "dpmpp-2m", "dpmpp-2m-karras", "dpmpp-2m-sde", "dpmpp-2m-sde-karras", "dpmpp-3m",
    "dpmpp-3m-sde", "dpmpp-2s", "dpmpp-sde", "unipc", "deis", "heun", "dpm2", "dpm2-ancestral",
    "euler-ancestral", "lms", "pndm", "ddim", "ddpm", "lcm", "tcd", "own",
)  # fmt: skip
SCHEDULES = ("leading", "linspace", "trailing", "karras", "exponential", "beta", "lu")
SPLITS = ("rows", "guidance")
OUT_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
EXPORT_FORMATS = ("torch", "onnx", "aot")
PROGRAMS = ("text_encoder", "unet", "unet_context", "unet_step", "vae_encoder", "vae_decoder")
CONTROL_SCALE = 0.8  # of pipelines/request.py


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line and suggest the nearest name; its help has at most 100 columns."""

    def __init__(self, command: str, **keywords: Any) -> None:
        width = min(shutil.get_terminal_size((100, 40)).columns, 100)
        super().__init__(
            prog=f"kolors {command}", **keywords,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 28, width),
        )  # fmt: skip

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parse the arguments; ends the process with status 2 and one line at an unknown one."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            is_flag = unknown[0].startswith("-")
            hint = did_you_mean(unknown[0].partition("=")[0], flags) if is_flag else ""
            self.error(f"unknown {'flag' if is_flag else 'argument'} {unknown[0]!r}{hint}")
        return options

    def error(self, message: str) -> NoReturn:
        """End the process with status 2 and one line."""
        print("error:", *message.removeprefix("argument ").split(), file=sys.stderr)
        raise SystemExit(2)

    def list_only(self, *flags: str, note: str) -> "Parser":
        """Leave the other flags out of the help, which ends with a note on where they are listed."""
        for action in self._actions:
            if action.option_strings and not {*action.option_strings} & {"-h", *flags}:
                action.help = argparse.SUPPRESS
        self.epilog = f"{self.epilog}\n{note}"
        return self


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """Return a parser of one of these names."""

    def name(text: str) -> str:
        if text not in names:
            hint = did_you_mean(text, names) or f", expected one of {', '.join(names)}"
            raise argparse.ArgumentTypeError(f"unknown {text!r}{hint}")
        return text

    return name


def integer(text: str) -> int:
    """Parse a whole number."""
    if not text.isascii() or not text.removeprefix("-").isdigit() or len(text) > 30:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text[:100]!r}")
    return int(text)


def number(text: str) -> float:
    """Parse a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text[:100]!r}")
    return value


def numbers(text: str) -> list[float]:
    """Parse numbers separated by commas."""
    return [number(part) for part in text.split(",")]


def size(text: str) -> tuple[int, int]:
    """Parse two integers separated by an x or a comma."""
    parts = [integer(part) for part in text.replace("x", ",").split(",")]
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"expected two whole numbers, got {text[:100]!r}")
    return parts[0], parts[1]


def add_model(model: argparse._ArgumentGroup) -> None:
    """Add the flags of weights, device, precision and memory."""
    add = model.add_argument
    add("-w", "--weights", metavar="DIR", default=EMBEDDED_NAME,
        help="a checkpoint folder or .safetensors file, or a hub repository such as "
        "Kwai-Kolors/Kolors-diffusers (default: the embedded model, see --concepts)")  # fmt: skip
    for name in MODELS:
        add(f"--{name.replace('_', '-')}", metavar="FILE",
            help="take it from this .safetensors file, in any naming, and not from --weights")  # fmt: skip
    add("--variant", help='which weight files, such as "fp16" (default: the only ones there are)')
    add("--revision", help="branch, tag or commit of the hub repository")
    add("--local-files-only", action="store_true", help="never download, use the hub's local cache")
    add("--device", help="cuda, mps, cpu, cuda:1, ... (default: the best there is)")
    add("--dtype", choices=DTYPES, type=one_of(DTYPES), help="precision (default: float16, on a CPU float32)")
    for flag in ("--text-encoder-bits", "--unet-bits"):
        add(flag, choices=FORMATS, type=one_of(FORMATS),
            help="quantize large layers while they are read; w8a8 rounds inputs too")  # fmt: skip
    add("--report", action="store_true",
        help="quantize after loading, and measure the error, which takes long")  # fmt: skip
    add("--offload", choices=("model", "block"), type=one_of(("model", "block")),
        help="keep only the running model or block (least memory, slowest) on the device")  # fmt: skip
    add("--vae-tiling", action="store_true", help="decode in tiles, with less memory")


def add_image(image: argparse._ArgumentGroup, default_size: str = "the model's own") -> None:
    """Add the flags of the negative prompt and the size."""
    add = image.add_argument
    add("-n", "--negative", metavar="TEXT", help="what not to draw")
    for side in ("height", "width"):
        add(f"--{side}", type=integer, metavar="N",
            help=f"pixels, a multiple of 8 (default: {default_size})")  # fmt: skip


def add_seed(image: argparse._ArgumentGroup) -> None:
    """Add the flag of the seed of one image."""
    image.add_argument("--seed", type=integer, metavar="N", help="of the noise (default: random)")


def add_steps(sampling: argparse._ArgumentGroup, *, lists_names: bool = True) -> None:
    """Add the flags of the steps, the sampler, the schedule and the guidance scale."""
    add = sampling.add_argument
    samplers = f"{', '.join(SAMPLERS)}, which is the checkpoint's" if lists_names else "the method"
    add("--steps", type=integer, metavar="N",
        help="denoising steps (default: 50 for euler, ddim, ddpm, pndm, lms and own, 4 for lcm and tcd, "
        "else 25)")  # fmt: skip
    add("--sampler", "--scheduler", choices=SAMPLERS, type=one_of(SAMPLERS), default="dpmpp-2m-karras",
        metavar="NAME", help=f"{samplers} (default: %(default)s)")  # fmt: skip
    add("--schedule", choices=SCHEDULES, type=one_of(SCHEDULES), metavar="NAME",
        help=f"noise levels, instead of the sampler's: {', '.join(SCHEDULES)}")  # fmt: skip
    add("-g", "--guidance", type=number, default=5.0, metavar="SCALE",
        help="how strongly to follow the prompt; 1 is off (default: %(default)s)")  # fmt: skip


def add_guidance(sampling: argparse._ArgumentGroup) -> None:
    """Add the flags of perturbed-attention guidance, guidance modifiers and FreeU."""
    add = sampling.add_argument
    add("--pag", type=number, metavar="SCALE", help="perturbed-attention guidance, such as 3 (default: none)")
    add("--pag-layers", nargs="+", metavar="LAYER",
        help='perturb the self-attention of these, such as "down.block_2" (default: mid)')  # fmt: skip
    add("--pag-adaptive", type=number, metavar="SCALE", help="reduces --pag by this per timestep, of 1,100")
    add("--guidance-rescale", type=number, metavar="PART", help="against overexposure, 0.7 is usual")
    add("--guidance-interval", type=number, nargs=2, metavar=("A", "B"),
        help="guide only in this part of the steps, 0 to 1; the other steps take half the time")  # fmt: skip
    add("--freeu", type=number, nargs=4, metavar=("S1", "S2", "B1", "B2"),
        help="FreeU scales of skip connections and backbone, 0.6 0.4 1.1 1.2 is usual")  # fmt: skip


def add_lora_partial(model: argparse._ActionsContainer) -> None:
    """Add the flag for LoRAs with tensors of other models."""
    model.add_argument("--lora-partial", action="store_true",
        help="take from LoRAs what fits, and report the rest, such as SDXL's text encoders")  # fmt: skip


def add_lora(model: argparse._ActionsContainer) -> None:
    """Add the flags for LoRAs by name."""
    model.add_argument("--lora", action="append", metavar="FROM[:SCALE]",
        help="a LoRA in any naming: a file, folder or hub repository, whose revision may follow an @; may "
        "be repeated")  # fmt: skip
    add_lora_partial(model)


def draw_parser(command: str = "draw") -> Parser:
    """Build the parser of all flags of an image, in groups."""
    top = Parser(
        command, usage="kolors [draw] PROMPT [flags]",
        description="Generate images with Kolors from a Chinese or English prompt.",
        epilog='Example: kolors "一张瓢虫的照片" -w Kwai-Kolors/Kolors-diffusers --variant fp16 -o bug.png',
    )  # fmt: skip
    add = top.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="what to draw, in Chinese or English")
    add("-o", "--out", type=Path, default=Path("kolors.png"), metavar="FILE",
        help="the image to write, .png, .jpg or .webp, or - for a PNG on standard output; --images 3 "
        "numbers it: out-1.png (default: %(default)s)")  # fmt: skip
    add("--force", action="store_true",
        help="overwrite a file that exists, and go on where the memory plan does not fit")  # fmt: skip
    add("--from", dest="from_png", type=Path, metavar="PNG",
        help="draw this image again from its metadata; other flags given override it")  # fmt: skip
    add("--exactly", type=Path, metavar="PNG", help=argparse.SUPPRESS)  # of from_png.arguments_of
    add("--info", type=Path, metavar="FILE", help="print an image's metadata, and do nothing else")
    add("--plan", action="store_true",
        help="print the memory that each stage will need, load no weights and generate no image")  # fmt: skip
    add("--concepts", action="store_true", help="list what the embedded model can draw, and do nothing else")
    add("--version", action="version", version=f"kolors_core {VERSION}")
    add("-q", "--quiet", action="store_true", help="no progress bar and no report")
    model = top.add_argument_group("model")
    add_model(model)
    model.add_argument("--split", choices=SPLITS, type=one_of(SPLITS),
        help="under torchrun: an image on all processes, each with some rows of every feature map; guidance: "
        "half of them for the prompt, half for the negative prompt, and rows within each half")  # fmt: skip
    add_lora(model)
    model.add_argument("--textual-inversion", action="append", metavar="FROM[:WORD]",
        help="learned vectors of a word of the prompt, which is its name in the file or WORD; a file, folder "
        "or hub repository; may be repeated")  # fmt: skip
    image = top.add_argument_group("image")
    add_image(image, "the model's own, or --image's, or the control image's")
    add_seed(image)
    image.add_argument("--images", type=integer, default=1, metavar="N",
        help="how many images; image i of several takes the seed --seed + i (default: 1)")  # fmt: skip
    _add_start_image(top.add_argument_group("from an image"))
    _add_conditions(top.add_argument_group("image prompts and ControlNets"))
    sampling = top.add_argument_group("sampling")
    add_steps(sampling)
    add_guidance(sampling)
    add = sampling.add_argument
    add("--timesteps", type=numbers, metavar="T,T,...", help="descending timesteps, instead of --steps")
    add("--sigmas", type=numbers, metavar="S,S,...", help="noise levels, of which the last ends the run")
    add("--eta", type=number, default=0.0, metavar="PART",
        help="noise that ddim and tcd add in each step, 0 to 1 (default: 0)")  # fmt: skip
    add("--denoising-end", type=number, metavar="PART", help="stop after this part of the noise schedule")
    _add_sizes(top.add_argument_group("size conditions (SDXL's), as HEIGHT,WIDTH or TOP,LEFT in pixels"))
    top.set_defaults(crop=(0, 0), negative_crop=(0, 0), overridden=())
    return top


def _add_start_image(start: argparse._ArgumentGroup) -> None:
    add = start.add_argument
    add("--image", metavar="FILE", help="start from this file or http(s) address, resized to the size")
    add("--strength", type=number,
        help="how much of it to regenerate, above 0 to 1 (default: 0.3, with --mask 0.9999)")  # fmt: skip
    add("--strength-map", metavar="FILE",
        help="a gray image of how much each pixel may change: white as much as --strength")  # fmt: skip
    add("--mask", metavar="FILE", help="regenerate --image only where this image is white")
    add("--padding-mask-crop", type=integer, metavar="N",
        help="with --mask: process its region and N pixels around it, at --height and --width")  # fmt: skip
    add("--no-paste-back", action="store_true",
        help="with --mask: keep the decoded image, which differs a little outside the mask too")  # fmt: skip


def _add_conditions(images: argparse._ArgumentGroup) -> None:
    add = images.add_argument
    add("--ip-adapter", metavar="FROM",
        help="IP-Adapter-Plus: a file, folder or hub repository, whose revision may follow an @: "
        "Kwai-Kolors/Kolors-IP-Adapter-Plus@refs/pr/4")  # fmt: skip
    add("--ip-image", action="append", metavar="FILE", help="the image prompt (may be repeated)")
    add("--ip-scale", type=number, help="its scale (default: 1)")
    add("--face-adapter", metavar="FROM",
        help="IP-Adapter-FaceID-Plus, .safetensors, with CLIP in its folder or of --ip-adapter")  # fmt: skip
    add("--face-image", metavar="FILE", help="a square image of the face")
    add("--face-embeds", metavar="FILE", help="its id vector by insightface, as .npy or .safetensors")
    add("--face-scale", type=number, help="its scale (default: 1)")
    add("--control", action="append", metavar="FROM[:SCALE]",
        help="a ControlNet: canny, depth or pose for Kwai-Kolors' own, or a file, folder or hub repository, "
        f"whose revision may follow an @; its scale (default: {CONTROL_SCALE}); may be repeated")  # fmt: skip
    add("--control-image", action="append", metavar="FILE",
        help="its input, used as it is: edges, depth or a pose; one for each --control")  # fmt: skip
    add("--canny", metavar="FILE", help="instead of one --control-image: the edges of this image")
    add("--control-end", type=number, metavar="PART", help="turn it off after this part of the steps")


def _add_sizes(sizes: argparse._ArgumentGroup) -> None:
    for flag in ("original-size", "crop", "target-size"):
        for prefix in ("--", "--negative-"):
            sizes.add_argument(prefix + flag, type=size, metavar="A,B")
    sizes.add_argument("--max-tokens", type=integer, default=256, metavar="N",
        help="truncate the prompt to this many tokens (default: 256)")  # fmt: skip


def plan_parser() -> Parser:
    """Build the parser of `plan`: the flags of an image, whose memory is planned."""
    top = draw_parser("plan")
    top.usage = "kolors plan [flags]"
    top.description = "Print the memory that images would need, stage by stage, without loading weights."
    top.epilog = (
        "Example: kolors plan -w Kwai-Kolors/Kolors-diffusers --height 1024 --width 1024 --device cuda"
    )
    top.set_defaults(plan=True)
    return top.list_only("-w", "--device", "--dtype", "--unet-bits", "--text-encoder-bits", "--offload",
                         "--vae-tiling", "--height", "--width", "--images", "--guidance",
                         note="All flags of `kolors draw` work here.")  # fmt: skip


def explain_parser() -> Parser:
    """Build the parser of `explain`."""
    top = Parser(
        "explain", usage="kolors explain PROMPT [flags]",
        description="Generate an image, and a map for each token of the prompt of where it acted.",
        epilog='Example: kolors explain "a red car" -o car, and open car.html',
    )  # fmt: skip
    top.add_argument("prompt", metavar="PROMPT", help="what to draw, in Chinese or English")
    top.add_argument("-o", "--out", type=Path, default=Path("explained"), metavar="NAME",
        help="write NAME.png, a sheet, and NAME.html, a page (default: %(default)s)")  # fmt: skip
    top.add_argument("--force", "--overwrite", action="store_true", help="overwrite files that exist")
    top.add_argument("-q", "--quiet", action="store_true", help="no progress bar and no report")
    add_model(top.add_argument_group("model"))
    image = top.add_argument_group("image")
    add_image(image)
    add_seed(image)
    add_steps(top.add_argument_group("sampling"), lists_names=False)
    return top.list_only("--out", "--force", "-q", "-w", "--variant", "--device", "-n", "--height", "--width",
                         "--seed", "--steps", "--sampler", "--schedule", "--guidance",
                         note="More flags of the model, and all samplers: kolors draw --help")  # fmt: skip


def info_parser() -> Parser:
    """Build the parser of `info`."""
    top = Parser(
        "info", description="Print the metadata of a generated image: prompt, seed, sampler, model, ...",
        epilog='Example: kolors info ladybug.png. And kolors --from ladybug.png draws it again.',
    )  # fmt: skip
    top.add_argument("info", type=Path, metavar="FILE", help="a .png, .jpg or .webp that kolors wrote")
    top.set_defaults(quiet=True)
    return top


def export_parser() -> Parser:
    """Build the parser of `export`."""
    top = Parser(
        "export", usage="kolors export DIR OUT --to FORMAT [flags]",
        description="Write the models as programs that run without this library, at any size.",
        epilog="Example: kolors export tiny OUT --to onnx",
    )  # fmt: skip
    add = top.add_argument
    add("weights", metavar="DIR", help="a checkpoint folder or .safetensors file, a hub repository, or tiny")
    add("out", type=Path, metavar="OUT", help="the folder to write; must not exist")
    add("--to", required=True, choices=EXPORT_FORMATS, type=one_of(EXPORT_FORMATS),
        help="torch: .pt2 of torch.export; onnx; aot: .pt2 compiled by AOTInductor for --device")  # fmt: skip
    add("--programs", nargs="+", choices=PROGRAMS, type=one_of(PROGRAMS), metavar="NAME", default=PROGRAMS,
        help=f"of {', '.join(PROGRAMS)} (default: all); unet_context, once an image, and unet_step, once a "
        "step, compute what unet does")  # fmt: skip
    add("--check", action="store_true",
        help="run what is written, at other sizes, and compare it with the model")  # fmt: skip
    add("--variant", help='which weight files, such as "fp16" (default: the only ones there are)')
    add("--revision", help="branch, tag or commit of the hub repository")
    add("--local-files-only", action="store_true", help="never download, use the hub's local cache")
    add("--device", help="of torch and aot: where the programs run (default: the best there is)")
    add("--dtype", choices=DTYPES, type=one_of(DTYPES), help="precision (default: float16, on a CPU float32)")
    add_lora(top)
    add("-q", "--quiet", action="store_true", help="no report")
    return top


def env_parser() -> Parser:
    """Build the parser of `env`."""
    top = Parser(
        "env", description="Print versions, devices and kernels, for a report of a fault.",
        epilog="Example: kolors env > machine.txt",
    )  # fmt: skip
    top.set_defaults(quiet=False)
    return top
