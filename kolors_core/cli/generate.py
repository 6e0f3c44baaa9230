"""The command line: `python -m kolors_core "一张瓢虫的照片" --weights DIR -o ladybug.png`."""

import argparse
import logging
import secrets
import sys
from pathlib import Path
from typing import Any

import torch

from kolors_core.adapters.face_id import load_face_embeds
from kolors_core.checkpoint import EMBEDDED_NAME, logger
from kolors_core.cli.explain import explain, explain_parser
from kolors_core.cli.options import (
    add_control,
    add_guidance,
    add_model,
    add_sampler,
    check_control,
    check_output_paths,
    control_arguments,
    default_steps,
    guidance_of,
    guide,
    load_controls,
    load_loras,
    load_pipeline,
    load_textual_inversions,
    quantization_bits,
    quantize,
    with_revision,
)
from kolors_core.config import VERSION
from kolors_core.devices import named_device, planned_device
from kolors_core.image import load_image
from kolors_core.performance.quantize import quantize as quantize_model
from kolors_core.pipelines.controlnet import KolorsControlNetPipeline
from kolors_core.pipelines.image_to_image import KolorsImg2ImgPipeline
from kolors_core.pipelines.inpainting import KolorsInpaintPipeline
from kolors_core.pipelines.memory_plan import plan as plan_memory
from kolors_core.pipelines.png_metadata import attach_metadata, read_metadata, save_png
from kolors_core.pipelines.stages import Task
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.validation import LARGEST_SEED, check_int


def parser() -> argparse.ArgumentParser:
    """Every flag, in groups."""
    top = argparse.ArgumentParser(
        prog="python -m kolors_core",
        description="Make images with Kolors from a Chinese or English prompt.",
        epilog='Example: python -m kolors_core "一张瓢虫的照片" -w Kwai-Kolors/Kolors-diffusers -o out.png. '
        'And python -m kolors_core explain "PROMPT" shows where in an image each token acted.',
    )
    top.add_argument("prompt", nargs="?", help="what to draw, in Chinese or English")
    top.add_argument(
        "-o", "--out", type=Path, default=Path("kolors.png"), metavar="PNG",
        help="the image to write; with --images 3 it is numbered: out-1.png (default: %(default)s)",
    )  # fmt: skip
    top.add_argument("--force", action="store_true", help="write over a file that exists")
    top.add_argument(
        "--info", type=Path, metavar="PNG", help="print how an image was made, and do nothing else"
    )
    top.add_argument(
        "--plan", action="store_true",
        help="print the memory that each stage will need, load no weights and make no image",
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"kolors_core {VERSION}")

    model = top.add_argument_group("model")
    add_model(model)
    model.add_argument(
        "--lora", action="append", default=[], metavar="FROM[:SCALE]",
        help="a LoRA of any spelling: a file, folder or hub repository, whose revision may follow an @; may "
        "be repeated",
    )  # fmt: skip
    model.add_argument(
        "--textual-inversion", action="append", default=[], metavar="FROM[:WORD]",
        help="learned vectors that a word of the prompt stands for, by its name in the file or by WORD; a "
        "file, folder or hub repository; may be repeated",
    )  # fmt: skip
    picture = top.add_argument_group("picture")
    picture.add_argument("-n", "--negative", metavar="TEXT", help="what not to draw")
    picture.add_argument(
        "--height", type=int,
        help="pixels, a multiple of 8 (default: the model's own, or --image's, or the control image's)",
    )  # fmt: skip
    picture.add_argument("--width", type=int, help="pixels, likewise; --image is resized to both")
    picture.add_argument("--images", type=int, default=1, metavar="N", help="how many images (default: 1)")
    picture.add_argument(
        "--seed", type=int, help="of the noise; image i of several takes seed + i (default: random)"
    )

    images = top.add_argument_group("from images")
    images.add_argument("--image", metavar="FILE", help="start from this image; or its http(s) address")
    images.add_argument(
        "--strength", type=float,
        help="how much of it is made anew, above 0, at most 1 (default: 0.3, with --mask 0.9999)",
    )  # fmt: skip
    images.add_argument(
        "--strength-map", metavar="FILE",
        help="a grey image of how much each place of --image may change: white as --strength says",
    )  # fmt: skip
    images.add_argument(
        "--mask", metavar="FILE",
        help="make anew only what is white in this image, and leave all else of --image as it is",
    )  # fmt: skip
    images.add_argument(
        "--padding-mask-crop", type=int, metavar="N",
        help="with --mask: work on its region and N pixels around, at --height and --width",
    )  # fmt: skip
    images.add_argument(
        "--no-paste-back", action="store_true",
        help="with --mask: leave the image as the model decodes it, a little changed outside the mask too",
    )  # fmt: skip
    images.add_argument(
        "--ip-adapter", metavar="FROM",
        help="IP-Adapter-Plus: a file, folder or hub repository, whose revision may follow an @: "
        "Kwai-Kolors/Kolors-IP-Adapter-Plus@refs/pr/4",
    )  # fmt: skip
    images.add_argument(
        "--ip-image", action="append", metavar="FILE", help="be guided by this image (may be repeated)"
    )
    images.add_argument("--ip-scale", type=float, help="how much (default: 1)")
    images.add_argument(
        "--face-adapter", metavar="FROM",
        help="IP-Adapter-FaceID-Plus as safetensors, with CLIP beside it or from --ip-adapter",
    )  # fmt: skip
    images.add_argument("--face-image", metavar="FILE", help="a square image of the face")
    images.add_argument(
        "--face-embeds", metavar="FILE", help="its id vector by insightface, as .npy or .safetensors"
    )
    images.add_argument("--face-scale", type=float, help="how much (default: 1)")
    add_control(images)

    steps = top.add_argument_group("sampling")
    steps.add_argument("--steps", type=int, help="denoising steps (default: 50 for euler, 25 for the others)")
    add_sampler(steps)
    steps.add_argument(
        "-g", "--guidance", type=float, default=5.0, metavar="SCALE",
        help="how strongly to follow the prompt; 1 is off (default: %(default)s)",
    )  # fmt: skip
    add_guidance(steps)
    steps.add_argument(
        "--timesteps", type=numbers, metavar="T,T,...", help="own timesteps, falling, in place of --steps"
    )
    steps.add_argument(
        "--sigmas", type=numbers, metavar="S,S,...", help="own noise levels, the last one ends the run"
    )
    steps.add_argument(
        "--denoising-end", type=float, metavar="PART", help="stop after this part of the noise schedule"
    )

    sizes = top.add_argument_group("size conditions (SDXL's), as HEIGHT,WIDTH or TOP,LEFT in pixels")
    for half in ("", "negative-"):
        for flag in ("original-size", "crop", "target-size"):
            sizes.add_argument(f"--{half}{flag}", type=size, metavar="A,B")
    sizes.add_argument(
        "--max-tokens", type=int, default=256, help="cut the prompt to this many tokens (default: 256)"
    )
    top.add_argument("-q", "--quiet", action="store_true", help="no progress bar and no report")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2, and one line on stderr, for what cannot be done."""
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
                raise ValueError("--info stands alone: it prints how an image was made, and draws none")
            for name, value in read_metadata(options.info).items():
                print(f"{name}: {value}")
        elif options.plan:
            plan(options)
        else:
            draw(options)
    except KeyboardInterrupt:
        print("interrupted, nothing written", file=sys.stderr)
        return 130
    except (OSError, ValueError, TypeError, FloatingPointError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        logger.setLevel(level)
    return 0


def draw(options: argparse.Namespace) -> None:
    """Make and write the images that the options ask for."""
    outs, arguments = checked(options), pipeline_kwargs(options)  # images are read before weights
    device = named_device(options.device)
    outs[0].parent.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(options, device, task=pipeline_class(options))
    quantized = quantize(pipe, options)
    load_adapters(pipe, options)
    guide(pipe, options)
    load_controls(options, pipe, device)
    output = pipe(**arguments)
    names = ("image", "mask", "strength_map", "padding_mask_crop", "lora", "textual_inversion", "ip_adapter",
             "ip_image", "face_adapter", "face_image", "control", "control_image", "canny")  # fmt: skip
    given = {name: value for name in names if (value := getattr(options, name)) not in (None, [])}
    told = {name: ", ".join(value) if isinstance(value, list) else value for name, value in given.items()}
    if quantized is not None:
        told["quantized"] = str(quantized)
    for image, out in zip(output[0], outs, strict=True):
        attach_metadata(image, image.info | told)
        save_png(image, out)
        if not options.quiet:
            print(f"{out}  {image.width}x{image.height}  seed {image.info['seed']}", file=sys.stderr)


def pipeline_kwargs(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the task that the options ask for; its images are read."""
    steps = default_steps(options.sampler) if options.steps is None else options.steps
    if options.timesteps or options.sigmas:
        steps = 50  # the pipeline's own default, which says nothing
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
        **control_arguments(options),
    )  # fmt: skip
    if options.image is not None:
        arguments["image"] = load_image(options.image)
    elif options.control:  # is what that task calls `image`
        arguments["image"] = arguments.pop("control_image")
    for name, file in {"mask_image": options.mask, "strength_map": options.strength_map}.items():
        if file is not None:
            arguments[name] = load_image(file, lambda picture: picture.convert("L"))
    if options.ip_image:
        arguments["ip_adapter_image"] = [[load_image(file) for file in options.ip_image]]
    if options.face_adapter is not None:
        arguments["face_embeds"] = load_face_embeds(options.face_embeds)
        arguments["face_image"] = load_image(options.face_image)
    for name in ("strength", "padding_mask_crop"):
        if getattr(options, name) is not None:
            arguments[name] = getattr(options, name)
    return arguments | ({"paste_back": False} if options.no_paste_back else {})


def plan(options: argparse.Namespace) -> None:
    """Print what the images that the options ask for would need; the device need not be there."""
    checked(options)
    device = planned_device(options.device)
    pipe = load_pipeline(options, device, is_planned=True, task=pipeline_class(options))
    for name, bits in quantization_bits(options).items():
        quantize_model(getattr(pipe, name), bits)
    load_adapters(pipe, options)
    guide(pipe, options)
    load_controls(options, pipe, device, is_planned=True)
    plan_memory(
        pipe, options.height, options.width, num_images_per_prompt=options.images,
        guidance_scale=options.guidance, max_sequence_length=options.max_tokens, device=device,
    )  # fmt: skip


def checked(options: argparse.Namespace) -> list[Path]:
    """The files to write; ValueError or OSError, before anything is loaded, for what cannot be done."""
    if options.prompt is None and not options.plan:
        raise ValueError("no prompt: say what to draw")
    if options.steps is not None and (options.timesteps or options.sigmas):
        raise ValueError("--steps has no effect beside --timesteps or --sigmas")
    if options.timesteps and "karras" in options.sampler:
        raise ValueError(f"--timesteps needs a --sampler without karras, got {options.sampler}")
    if options.out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, got {options.out}")
    outs = [options.out]
    if options.images > 1:
        outs = [options.out.with_stem(f"{options.out.stem}-{i + 1}") for i in range(options.images)]
    check_output_paths(outs, options.force or options.plan)
    if options.seed is not None:
        check_int("--seed", options.seed, least=0, most=LARGEST_SEED)
    for name, multiple in {"images": 1, "steps": 1, "height": 8, "width": 8}.items():
        if (value := getattr(options, name)) is not None:
            check_int(f"--{name}", value, multiple)
    for kind, names in {"ip": ("adapter", "image"), "face": ("adapter", "image", "embeds")}.items():
        *given, is_scaled = (getattr(options, f"{kind}_{name}") is not None for name in (*names, "scale"))
        if (any(given) or is_scaled) and not all(given):
            flags = ", ".join(f"--{kind}-{name}" for name in names)
            raise ValueError(f"{flags} and --{kind}-scale need each other")
    check_control(options)
    needs = {
        "strength": "image", "strength_map": "image", "mask": "image",
        "padding_mask_crop": "mask", "no_paste_back": "mask",
    }  # fmt: skip
    for name, needed in needs.items():
        if getattr(options, name) not in (None, False) and getattr(options, needed) is None:
            raise ValueError(f"--{name.replace('_', '-')} has no effect without --{needed}")
    if options.mask is not None and options.strength_map is not None:
        raise ValueError("--mask and --strength-map exclude each other: a mask is a map of black and white")
    keywords = guidance_of(options)
    if keywords and options.guidance <= 1 and options.pag is None:
        raise ValueError("--guidance-rescale and --guidance-interval need --guidance above 1, or --pag")
    return outs


def pipeline_class(options: argparse.Namespace) -> type[Task]:
    """What the weights are loaded for. Inpainting may have a UNet of its own."""
    if options.image is None:
        return KolorsControlNetPipeline if options.control else KolorsPipeline
    return KolorsImg2ImgPipeline if options.mask is None else KolorsInpaintPipeline


def load_adapters(pipe: Task, options: argparse.Namespace) -> None:
    """Load the LoRAs, the learned words and the IP-Adapters that the options ask for."""
    load_loras(pipe, options.lora, options.local_files_only, options.quiet)
    load_textual_inversions(pipe, options.textual_inversion, options.local_files_only)
    if options.ip_adapter is not None:
        name, revision = with_revision(options.ip_adapter)
        pipe.load_ip_adapter(name, revision=revision, local_files_only=options.local_files_only)
        if options.ip_scale is not None:
            pipe.set_ip_adapter_scale(options.ip_scale)
    if options.face_adapter is not None:
        name, revision = with_revision(options.face_adapter)
        pipe.load_ip_adapter_face_id(name, revision=revision, local_files_only=options.local_files_only)
        if options.face_scale is not None:
            pipe.set_ip_adapter_face_id_scale(options.face_scale)


def numbers(text: str) -> list[float]:
    """Numbers with commas between."""
    return [float(part) for part in text.split(",")]


def size(text: str) -> tuple[int, int]:
    """Two whole numbers with an x or a comma between."""
    first, second = text.replace("x", ",").split(",")
    return int(first), int(second)
