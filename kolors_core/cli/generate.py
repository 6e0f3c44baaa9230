"""Command line: `python -m kolors_core "一张瓢虫的照片" --weights DIR -o ladybug.png`."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from kolors_core.adapters.canny import canny
from kolors_core.adapters.controlnet_files import KolorsControlNet
from kolors_core.adapters.face_id import load_face_embeds
from kolors_core.checkpoint import EMBEDDED_NAME
from kolors_core.cli import options as cli
from kolors_core.cli.explain import explain, explain_parser
from kolors_core.config import VERSION
from kolors_core.devices import named_device, planned_device
from kolors_core.image import load_image
from kolors_core.performance.quantize import quantize
from kolors_core.pipelines.controlnet import KolorsControlNetPipeline
from kolors_core.pipelines.image_to_image import KolorsImg2ImgPipeline
from kolors_core.pipelines.inpainting import KolorsInpaintPipeline
from kolors_core.pipelines.masks import load_mask
from kolors_core.pipelines.memory_plan import plan
from kolors_core.pipelines.png_metadata import attach_metadata, read_metadata, save_png
from kolors_core.pipelines.request import CONTROL_SCALE
from kolors_core.pipelines.stages import Task
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.validation import check_int

CONTROLNETS = {kind: f"Kwai-Kolors/Kolors-ControlNet-{kind.title()}" for kind in ("canny", "depth", "pose")}


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
    model = top.add_argument_group("model")
    cli.add_model(model)
    model.add_argument("--lora", action="append", default=[], metavar="FROM[:SCALE]",
        help="a LoRA in any naming: a file, folder or hub repository, whose revision may follow an @; may "
        "be repeated")  # fmt: skip
    model.add_argument("--textual-inversion", action="append", default=[], metavar="FROM[:WORD]",
        help="learned vectors of a word of the prompt, which is its name in the file or WORD; a file, folder "
        "or hub repository; may be repeated")  # fmt: skip
    image = top.add_argument_group("image")
    cli.add_image(image, "the model's own, or --image's, or the control image's")
    image.add_argument("--images", type=int, default=1, metavar="N",
        help="how many images; image i of several takes the seed --seed + i (default: 1)")  # fmt: skip
    _add_start_image(top.add_argument_group("from an image"))
    _add_conditions(top.add_argument_group("image prompts and ControlNets"))
    sampling = top.add_argument_group("sampling")
    cli.add_steps(sampling)
    cli.add_guidance(sampling)
    add = sampling.add_argument
    add("--timesteps", type=numbers, metavar="T,T,...", help="descending timesteps, instead of --steps")
    add("--sigmas", type=numbers, metavar="S,S,...", help="noise levels, of which the last ends the run")
    add("--denoising-end", type=float, metavar="PART", help="stop after this part of the noise schedule")
    sizes = top.add_argument_group("size conditions (SDXL's), as HEIGHT,WIDTH or TOP,LEFT in pixels")
    for flag in ("original-size", "crop", "target-size"):
        for prefix in ("--", "--negative-"):
            sizes.add_argument(prefix + flag, type=size, metavar="A,B")
    top.set_defaults(crop=(0, 0), negative_crop=(0, 0))
    sizes.add_argument("--max-tokens", type=int, default=256,
        help="truncate the prompt to this many tokens (default: 256)")  # fmt: skip
    return top


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


def _add_conditions(images: argparse._ArgumentGroup) -> None:
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
    add("--control", action="append", metavar="FROM[:SCALE]",
        help="a ControlNet: canny, depth or pose for Kwai-Kolors' own, or a folder or hub repository, whose "
        f"revision may follow an @; its scale (default: {CONTROL_SCALE}); may be repeated")  # fmt: skip
    add("--control-image", action="append", metavar="FILE",
        help="its input, used as it is: edges, depth or a pose; one for each --control")  # fmt: skip
    add("--canny", metavar="FILE", help="instead of one --control-image: the edges of this image")
    add("--control-end", type=float, metavar="PART", help="turn it off after this part of the steps")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 2, with one line on stderr, after an error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["explain"]:
        return cli.run_command(explain, explain_parser().parse_args(arguments[1:]))
    options = parser().parse_args(arguments)
    if options.info is not None:
        return cli.run_command(_print_info, options)
    return cli.run_command(_print_plan if options.plan else _generate, options)


def _print_info(options: argparse.Namespace) -> None:
    if options.prompt is not None or options.weights != EMBEDDED_NAME:
        raise ValueError("--info stands alone: it prints an image's metadata, and draws none")
    for name, value in read_metadata(options.info).items():
        print(f"{name}: {value}")


def _generate(options: argparse.Namespace) -> None:
    outs, arguments = _validate(options), _pipeline_kwargs(options)  # images are read before weights
    device = named_device(options.device)
    outs[0].parent.mkdir(parents=True, exist_ok=True)
    pipe = cli.load_pipeline(options, device, _pipeline_class(options))
    quantized = cli.apply_quantization(pipe, options)
    _load_adapters(pipe, options)
    images = pipe(**arguments)[0]
    flags = ("image", "mask", "strength_map", "padding_mask_crop", "lora", "textual_inversion", "ip_adapter",
             "ip_image", "face_adapter", "face_image", "control", "control_image", "canny")  # fmt: skip
    given = {flag: value for flag in flags if (value := getattr(options, flag)) not in (None, [])}
    metadata = {flag: ", ".join(value) if isinstance(value, list) else value for flag, value in given.items()}
    for image, out in zip(images, outs, strict=True):
        attach_metadata(image, image.info | metadata | quantized)
        save_png(image, out)
        if not options.quiet:
            print(f"{out}  {image.width}x{image.height}  seed {image.info['seed']}", file=sys.stderr)


def _pipeline_kwargs(options: argparse.Namespace) -> dict[str, Any]:
    steps = cli.default_steps(options.sampler) if options.steps is None else options.steps
    if options.timesteps or options.sigmas:
        steps = 50  # the pipeline's default, which it takes as unset
    arguments: dict[str, Any] = dict(
        prompt=options.prompt, negative_prompt=options.negative, height=options.height, width=options.width,
        num_inference_steps=steps, timesteps=options.timesteps, sigmas=options.sigmas,
        denoising_end=options.denoising_end, guidance_scale=options.guidance,
        num_images_per_prompt=options.images,
        generator=[torch.Generator().manual_seed(options.seed + i) for i in range(options.images)],
        original_size=options.original_size, negative_original_size=options.negative_original_size,
        crops_coords_top_left=options.crop, negative_crops_coords_top_left=options.negative_crop,
        target_size=options.target_size, negative_target_size=options.negative_target_size,
        max_sequence_length=options.max_tokens,
    )  # fmt: skip
    if options.control:
        edges = [] if options.canny is None else [canny(load_image(options.canny))]
        name = "image" if options.image is None else "control_image"  # as the pipelines name it
        arguments[name] = [*map(load_image, options.control_image or ()), *edges]
        scales = [cli.parse_source_scale(text, CONTROL_SCALE)[1] for text in options.control]
        arguments["controlnet_conditioning_scale"] = scales
    if options.image is not None:
        arguments["image"] = load_image(options.image)
    for name, file in {"mask_image": options.mask, "strength_map": options.strength_map}.items():
        if file is not None:
            arguments[name] = load_mask(file, name)
    if options.ip_image:
        arguments["ip_adapter_image"] = [[load_image(file) for file in options.ip_image]]
    if options.face_adapter is not None:
        arguments["face_embeds"] = load_face_embeds(options.face_embeds)
        arguments["face_image"] = load_image(options.face_image)
    optional = {"strength": options.strength, "padding_mask_crop": options.padding_mask_crop,
                "control_guidance_end": options.control_end,
                "paste_back": False if options.no_paste_back else None}  # fmt: skip
    return arguments | {name: value for name, value in optional.items() if value is not None}


def _print_plan(options: argparse.Namespace) -> None:
    """Print the memory that the images would need; the device need not exist."""
    _validate(options)
    device = planned_device(options.device)
    pipe = cli.load_pipeline(options, device, _pipeline_class(options), is_planned=True)
    for name, bits in cli.quantization_bits(options).items():
        quantize(getattr(pipe, name), bits)
    _load_adapters(pipe, options)
    plan(
        pipe, options.height, options.width, num_images_per_prompt=options.images,
        guidance_scale=options.guidance, max_sequence_length=options.max_tokens, device=device,
    )  # fmt: skip


def _validate(options: argparse.Namespace) -> list[Path]:
    """Check the options (ValueError, OSError) and draw a missing seed; return the files to write."""
    if options.prompt is None and not options.plan:
        raise ValueError("no prompt: say what to draw")
    if options.steps is not None and (options.timesteps or options.sigmas):
        raise ValueError("--steps has no effect with --timesteps or --sigmas")
    if options.timesteps and "karras" in options.sampler:
        raise ValueError(f"--timesteps needs a --sampler without karras, got {options.sampler}")
    out, count = options.out, options.images
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, got {out}")
    outs = [out.with_stem(f"{out.stem}-{i + 1}") for i in range(count)] if count > 1 else [out]
    cli.check_output_paths(outs, options.force or options.plan)
    options.seed = cli.select_seed(options)
    for name, multiple in {"images": 1, "steps": 1, "height": 8, "width": 8}.items():
        if (value := getattr(options, name)) is not None:
            check_int(f"--{name}", value, multiple)
    for kind, names in {"ip": ("adapter", "image"), "face": ("adapter", "image", "embeds")}.items():
        *given, has_scale = (getattr(options, f"{kind}_{name}") is not None for name in (*names, "scale"))
        if (any(given) or has_scale) and not all(given):
            flags = ", ".join(f"--{kind}-{name}" for name in names)
            raise ValueError(f"{flags} and --{kind}-scale need each other")
    nets, images = len(options.control or ()), len(options.control_image or ()) + (options.canny is not None)
    if nets != images:
        got = f"{nets} --control and {images} of --control-image and --canny"
        raise ValueError(f"expected an image for each ControlNet, got {got}")
    requirements = {"control_end": "control", "strength": "image", "strength_map": "image", "mask": "image",
                    "padding_mask_crop": "mask", "no_paste_back": "mask"}  # fmt: skip
    for name, needed in requirements.items():
        if getattr(options, name) not in (None, False) and getattr(options, needed) is None:
            raise ValueError(f"--{name.replace('_', '-')} has no effect without --{needed}")
    if options.mask is not None and options.strength_map is not None:
        raise ValueError("--mask and --strength-map exclude each other: a mask is a map of black and white")
    if cli.guidance_kwargs(options) and options.guidance <= 1 and options.pag is None:
        raise ValueError("--guidance-rescale and --guidance-interval need --guidance above 1, or --pag")
    return outs


def _pipeline_class(options: argparse.Namespace) -> type[Task]:
    if options.image is None:
        return KolorsControlNetPipeline if options.control else KolorsPipeline
    return KolorsImg2ImgPipeline if options.mask is None else KolorsInpaintPipeline


def _load_adapters(pipe: KolorsPipeline, options: argparse.Namespace) -> None:
    is_local = options.local_files_only
    cli.load_loras(pipe, options.lora, is_local, options.quiet)
    for text in options.textual_inversion:
        source, word = cli.with_word(text)
        name, revision = cli.with_revision(source)
        pipe.load_textual_inversion(name, word, revision=revision, local_files_only=is_local)
    if options.ip_adapter is not None:
        name, revision = cli.with_revision(options.ip_adapter)
        pipe.load_ip_adapter(name, revision=revision, local_files_only=is_local)
        if options.ip_scale is not None:
            pipe.set_ip_adapter_scale(options.ip_scale)
    if options.face_adapter is not None:
        name, revision = cli.with_revision(options.face_adapter)
        pipe.load_ip_adapter_face_id(name, revision=revision, local_files_only=is_local)
        if options.face_scale is not None:
            pipe.set_ip_adapter_face_id_scale(options.face_scale)
    cli.apply_guidance(pipe, options)
    nets = []
    for text in options.control or ():
        source, _ = cli.parse_source_scale(text, CONTROL_SCALE)
        name, revision = cli.with_revision(CONTROLNETS.get(source, source))
        nets.append(KolorsControlNet.from_pretrained(
            name, revision=revision, local_files_only=is_local, torch_dtype=pipe.dtype,
            device=pipe.unet.conv_in.weight.device,
        ))  # fmt: skip
    if nets:
        pipe.controlnet = type(pipe).from_pipe(pipe, controlnet=nets).controlnet  # checked there


def numbers(text: str) -> list[float]:
    """Parse numbers separated by commas."""
    return [float(part) for part in text.split(",")]


def size(text: str) -> tuple[int, int]:
    """Parse two integers separated by an x or a comma."""
    first, second = text.replace("x", ",").split(",")
    return int(first), int(second)
