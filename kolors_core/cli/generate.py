"""Command line: `python -m kolors_core "一张瓢虫的照片" --weights DIR -o ladybug.png`."""

import argparse
import logging
import secrets
import sys
from pathlib import Path
from typing import Any

import torch

from kolors_core.adapters.face_id import load_face_embeds
from kolors_core.checkpoint import EMBEDDED_NAME, logger
from kolors_core.cli import options as cli
from kolors_core.cli.explain import explain, explain_parser
from kolors_core.config import VERSION
from kolors_core.devices import named_device, planned_device
from kolors_core.image import load_image
from kolors_core.performance.quantize import quantize
from kolors_core.pipelines.controlnet import KolorsControlNetPipeline
from kolors_core.pipelines.image_to_image import KolorsImg2ImgPipeline
from kolors_core.pipelines.inpainting import KolorsInpaintPipeline
from kolors_core.pipelines.memory_plan import plan
from kolors_core.pipelines.png_metadata import attach_metadata, read_metadata, save_png
from kolors_core.pipelines.stages import Task
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.validation import LARGEST_SEED, check_int


def parser() -> argparse.ArgumentParser:
    """Build the parser of all flags, in groups."""
    top = argparse.ArgumentParser(
        prog="python -m kolors_core",
        description="Generate images with Kolors from a Chinese or English prompt.",
        epilog='Example: python -m kolors_core "一张瓢虫的照片" -w Kwai-Kolors/Kolors-diffusers -o out.png. '
        'And python -m kolors_core explain "PROMPT" shows where in an image each token acted.',
    )
    add = top.add_argument
    add("prompt", nargs="?", help="what to draw, in Chinese or English")
    add("-o", "--out", type=Path, default=Path("kolors.png"), metavar="PNG",
        help="the image to write; --images 3 numbers it: out-1.png (default: %(default)s)")  # fmt: skip
    add("--force", action="store_true", help="overwrite a file that exists")
    add("--info", type=Path, metavar="PNG", help="print an image's metadata, and do nothing else")
    add("--plan", action="store_true",
        help="print the memory that each stage will need, load no weights and generate no image")  # fmt: skip
    add("--version", action="version", version=f"kolors_core {VERSION}")
    add("-q", "--quiet", action="store_true", help="no progress bar and no report")
    _add_model(top.add_argument_group("model"))
    image = top.add_argument_group("image")
    cli.add_image(image, "the model's own, or --image's, or the control image's")
    image.add_argument("--images", type=int, default=1, metavar="N",
        help="how many images; image i of several takes the seed --seed + i (default: 1)")  # fmt: skip
    _add_start_image(top.add_argument_group("from an image"))
    conditions = top.add_argument_group("image prompts and ControlNets")
    _add_ip_adapters(conditions)
    cli.add_control(conditions)
    _add_sampling(top.add_argument_group("sampling"))
    _add_sizes(top.add_argument_group("size conditions (SDXL's), as HEIGHT,WIDTH or TOP,LEFT in pixels"))
    return top


def _add_model(model: argparse._ArgumentGroup) -> None:
    cli.add_model(model)
    model.add_argument("--lora", action="append", default=[], metavar="FROM[:SCALE]",
        help="a LoRA in any naming: a file, folder or hub repository, whose revision may follow an @; may "
        "be repeated")  # fmt: skip
    model.add_argument("--textual-inversion", action="append", default=[], metavar="FROM[:WORD]",
        help="learned vectors of a word of the prompt, which is its name in the file or WORD; a file, folder "
        "or hub repository; may be repeated")  # fmt: skip


def _add_start_image(start: argparse._ArgumentGroup) -> None:
    add = start.add_argument
    add("--image", metavar="FILE", help="start from this file or http(s) address, resized to the size")
    add("--strength", type=float,
        help="how much of it to regenerate, above 0 to 1 (default: 0.3, with --mask 0.9999)")  # fmt: skip
    add("--strength-map", metavar="FILE",
        help="a gray image of how much each pixel may change: white as much as --strength")  # fmt: skip
    add("--mask", metavar="FILE", help="regenerate --image only where this image is white")
    add("--padding-mask-crop", type=int, metavar="N",
        help="with --mask: process its region and N pixels around it, at --height and --width")  # fmt: skip
    add("--no-paste-back", action="store_true",
        help="with --mask: keep the decoded image, which differs a little outside the mask too")  # fmt: skip


def _add_ip_adapters(images: argparse._ArgumentGroup) -> None:
    add = images.add_argument
    add("--ip-adapter", metavar="FROM",
        help="IP-Adapter-Plus: a file, folder or hub repository, whose revision may follow an @: "
        "Kwai-Kolors/Kolors-IP-Adapter-Plus@refs/pr/4")  # fmt: skip
    add("--ip-image", action="append", metavar="FILE", help="the image prompt (may be repeated)")
    add("--ip-scale", type=float, help="its scale (default: 1)")
    add("--face-adapter", metavar="FROM",
        help="IP-Adapter-FaceID-Plus, .safetensors, with CLIP in its folder or of --ip-adapter")  # fmt: skip
    add("--face-image", metavar="FILE", help="a square image of the face")
    add("--face-embeds", metavar="FILE", help="its id vector by insightface, as .npy or .safetensors")
    add("--face-scale", type=float, help="its scale (default: 1)")


def _add_sampling(sampling: argparse._ArgumentGroup) -> None:
    cli.add_steps(sampling)
    cli.add_guidance(sampling)
    add = sampling.add_argument
    add("--timesteps", type=numbers, metavar="T,T,...", help="descending timesteps, instead of --steps")
    add("--sigmas", type=numbers, metavar="S,S,...", help="noise levels, of which the last ends the run")
    add("--denoising-end", type=float, metavar="PART", help="stop after this part of the noise schedule")


def _add_sizes(sizes: argparse._ArgumentGroup) -> None:
    for prefix in ("", "negative-"):
        for flag in ("original-size", "crop", "target-size"):
            sizes.add_argument(f"--{prefix}{flag}", type=size, metavar="A,B")
    max_tokens = "truncate the prompt to this many tokens (default: 256)"
    sizes.add_argument("--max-tokens", type=int, default=256, help=max_tokens)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 2, with one line on stderr, after an error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    is_explained = arguments[:1] == ["explain"]
    options = explain_parser().parse_args(arguments[1:]) if is_explained else parser().parse_args(arguments)
    level = logger.level
    if options.quiet:
        logger.setLevel(logging.ERROR)
    try:
        if is_explained:
            explain(options)
        elif options.info is not None:
            if options.prompt is not None or options.weights != EMBEDDED_NAME:
                raise ValueError("--info stands alone: it prints an image's metadata, and draws none")
            for name, value in read_metadata(options.info).items():
                print(f"{name}: {value}")
        elif options.plan:
            print_plan(options)
        else:
            generate(options)
    except KeyboardInterrupt:
        print("interrupted, nothing written", file=sys.stderr)
        return 130
    except (OSError, ValueError, TypeError, FloatingPointError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        logger.setLevel(level)
    return 0


def generate(options: argparse.Namespace) -> None:
    """Generate and write the images."""
    outs, arguments = validate(options), pipeline_kwargs(options)  # images are read before weights
    device = named_device(options.device)
    outs[0].parent.mkdir(parents=True, exist_ok=True)
    pipe = cli.load_pipeline(options, device, task=pipeline_class(options))
    quantized = cli.apply_quantization(pipe, options)
    load_adapters(pipe, options)
    cli.apply_guidance(pipe, options)
    cli.load_controls(options, pipe, device)
    images = pipe(**arguments)[0]
    flags = ("image", "mask", "strength_map", "padding_mask_crop", "lora", "textual_inversion", "ip_adapter",
             "ip_image", "face_adapter", "face_image", "control", "control_image", "canny")  # fmt: skip
    given = {flag: value for flag in flags if (value := getattr(options, flag)) not in (None, [])}
    metadata = {flag: ", ".join(value) if isinstance(value, list) else value for flag, value in given.items()}
    if quantized is not None:
        metadata["quantized"] = str(quantized)
    for image, out in zip(images, outs, strict=True):
        attach_metadata(image, image.info | metadata)
        save_png(image, out)
        if not options.quiet:
            print(f"{out}  {image.width}x{image.height}  seed {image.info['seed']}", file=sys.stderr)


def pipeline_kwargs(options: argparse.Namespace) -> dict[str, Any]:
    """Build the pipeline's arguments; reads the images."""
    steps = cli.default_steps(options.sampler) if options.steps is None else options.steps
    if options.timesteps or options.sigmas:
        steps = 50  # the pipeline's default, which it takes as unset
    seed = options.seed if options.seed is not None else secrets.randbelow(2**32)
    arguments: dict[str, Any] = dict(
        prompt=options.prompt, negative_prompt=options.negative, height=options.height, width=options.width,
        num_inference_steps=steps, timesteps=options.timesteps, sigmas=options.sigmas,
        denoising_end=options.denoising_end, guidance_scale=options.guidance,
        num_images_per_prompt=options.images,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(options.images)],
        original_size=options.original_size, crops_coords_top_left=options.crop or (0, 0),
        target_size=options.target_size, negative_original_size=options.negative_original_size,
        negative_crops_coords_top_left=options.negative_crop or (0, 0),
        negative_target_size=options.negative_target_size, max_sequence_length=options.max_tokens,
        **cli.control_arguments(options),
    )  # fmt: skip
    if options.image is not None:
        arguments["image"] = load_image(options.image)
    elif options.control:  # KolorsControlNetPipeline names it `image`
        arguments["image"] = arguments.pop("control_image")
    for name, file in {"mask_image": options.mask, "strength_map": options.strength_map}.items():
        if file is not None:
            arguments[name] = load_image(file, lambda image: image.convert("L"))
    if options.ip_image:
        arguments["ip_adapter_image"] = [[load_image(file) for file in options.ip_image]]
    if options.face_adapter is not None:
        arguments["face_embeds"] = load_face_embeds(options.face_embeds)
        arguments["face_image"] = load_image(options.face_image)
    for name in ("strength", "padding_mask_crop"):
        if getattr(options, name) is not None:
            arguments[name] = getattr(options, name)
    return arguments | ({"paste_back": False} if options.no_paste_back else {})


def print_plan(options: argparse.Namespace) -> None:
    """Print the memory that the images would need; the device need not exist."""
    validate(options)
    device = planned_device(options.device)
    pipe = cli.load_pipeline(options, device, is_planned=True, task=pipeline_class(options))
    for name, bits in cli.quantization_bits(options).items():
        quantize(getattr(pipe, name), bits)
    load_adapters(pipe, options)
    cli.apply_guidance(pipe, options)
    cli.load_controls(options, pipe, device, is_planned=True)
    plan(
        pipe, options.height, options.width, num_images_per_prompt=options.images,
        guidance_scale=options.guidance, max_sequence_length=options.max_tokens, device=device,
    )  # fmt: skip


def validate(options: argparse.Namespace) -> list[Path]:
    """Check the options before anything is loaded (ValueError, OSError); return the files to write."""
    if options.prompt is None and not options.plan:
        raise ValueError("no prompt: say what to draw")
    if options.steps is not None and (options.timesteps or options.sigmas):
        raise ValueError("--steps has no effect with --timesteps or --sigmas")
    if options.timesteps and "karras" in options.sampler:
        raise ValueError(f"--timesteps needs a --sampler without karras, got {options.sampler}")
    if options.out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, got {options.out}")
    outs = [options.out]
    if options.images > 1:
        outs = [options.out.with_stem(f"{options.out.stem}-{i + 1}") for i in range(options.images)]
    cli.check_output_paths(outs, options.force or options.plan)
    if options.seed is not None:
        check_int("--seed", options.seed, least=0, most=LARGEST_SEED)
    for name, multiple in {"images": 1, "steps": 1, "height": 8, "width": 8}.items():
        if (value := getattr(options, name)) is not None:
            check_int(f"--{name}", value, multiple)
    for kind, names in {"ip": ("adapter", "image"), "face": ("adapter", "image", "embeds")}.items():
        *given, has_scale = (getattr(options, f"{kind}_{name}") is not None for name in (*names, "scale"))
        if (any(given) or has_scale) and not all(given):
            flags = ", ".join(f"--{kind}-{name}" for name in names)
            raise ValueError(f"{flags} and --{kind}-scale need each other")
    cli.check_control(options)
    requirements = {"strength": "image", "strength_map": "image", "mask": "image",
                    "padding_mask_crop": "mask", "no_paste_back": "mask"}  # fmt: skip
    for name, needed in requirements.items():
        if getattr(options, name) not in (None, False) and getattr(options, needed) is None:
            raise ValueError(f"--{name.replace('_', '-')} has no effect without --{needed}")
    if options.mask is not None and options.strength_map is not None:
        raise ValueError("--mask and --strength-map exclude each other: a mask is a map of black and white")
    if cli.guidance_kwargs(options) and options.guidance <= 1 and options.pag is None:
        raise ValueError("--guidance-rescale and --guidance-interval need --guidance above 1, or --pag")
    return outs


def pipeline_class(options: argparse.Namespace) -> type[Task]:
    """Select the pipeline's class; the one for inpainting may have a UNet with mask channels."""
    if options.image is None:
        return KolorsControlNetPipeline if options.control else KolorsPipeline
    return KolorsImg2ImgPipeline if options.mask is None else KolorsInpaintPipeline


def load_adapters(pipe: Task, options: argparse.Namespace) -> None:
    """Load the LoRAs, learned words and IP-Adapters of the options."""
    cli.load_loras(pipe, options.lora, options.local_files_only, options.quiet)
    cli.load_textual_inversions(pipe, options.textual_inversion, options.local_files_only)
    if options.ip_adapter is not None:
        name, revision = cli.with_revision(options.ip_adapter)
        pipe.load_ip_adapter(name, revision=revision, local_files_only=options.local_files_only)
        if options.ip_scale is not None:
            pipe.set_ip_adapter_scale(options.ip_scale)
    if options.face_adapter is not None:
        name, revision = cli.with_revision(options.face_adapter)
        pipe.load_ip_adapter_face_id(name, revision=revision, local_files_only=options.local_files_only)
        if options.face_scale is not None:
            pipe.set_ip_adapter_face_id_scale(options.face_scale)


def numbers(text: str) -> list[float]:
    """Parse numbers separated by commas."""
    return [float(part) for part in text.split(",")]


def size(text: str) -> tuple[int, int]:
    """Parse two integers separated by an x or a comma."""
    first, second = text.replace("x", ",").split(",")
    return int(first), int(second)
