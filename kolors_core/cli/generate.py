"""Command `draw`: `python -m kolors_core "一张瓢虫的照片" --weights DIR -o ladybug.png`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kolors_core.adapters.canny import canny
from kolors_core.adapters.controlnet_files import KolorsControlNet
from kolors_core.adapters.face_id import load_face_embeds
from kolors_core.checkpoint import EMBEDDED_NAME, logger
from kolors_core.cli import from_png
from kolors_core.cli import options as cli
from kolors_core.cli.memory import check_memory
from kolors_core.cli.output import STANDARD_OUTPUT, read_image_metadata, save_image
from kolors_core.cli.parsers import OUT_SUFFIXES, draw_parser
from kolors_core.cli.samplers import SCHEDULES, default_steps, with_schedule
from kolors_core.cli.split import check_split, join_split, leave_split, split_pipeline
from kolors_core.devices import planned_device
from kolors_core.image import load_image
from kolors_core.pipelines.controlnet import KolorsControlNetPipeline
from kolors_core.pipelines.embedded import concepts, grammar
from kolors_core.pipelines.image_to_image import KolorsImg2ImgPipeline
from kolors_core.pipelines.inpainting import KolorsInpaintPipeline
from kolors_core.pipelines.masks import load_mask
from kolors_core.pipelines.memory_plan import plan
from kolors_core.pipelines.png_metadata import attach_metadata
from kolors_core.pipelines.request import CONTROL_SCALE
from kolors_core.pipelines.stages import Task
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.validation import check_int
from weights_convert.untrusted_files import printable

MOST_IMAGES = 256  # of one call: memory, and the time of its plan, grow with them
CONTROLNETS = {kind: f"Kwai-Kolors/Kolors-ControlNet-{kind.title()}" for kind in ("canny", "depth", "pose")}

# What metadata say beside the flags that `from_png.arguments_of` gives, by the flags that override it.
FACTS_OF = {
    "sampler": ["scheduler"], "lora": ["lora", "lora_scale"], "ip_scale": ["ip_adapter_scale"],
    "face_scale": ["face_scale"], "control": ["control_steps"], "control_end": ["control_steps"],
}  # fmt: skip


class Call(NamedTuple):
    """Call of a pipeline, checked: the files to write, its arguments, and the metadata of `--from`."""

    outs: list[Path]
    arguments: dict[str, Any]
    facts: from_png.Facts
    has_seed: bool  # one that was given


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 2, with one line on stderr, after an error."""
    return cli.run_command(partial(_run, arguments), draw_parser().parse_args(arguments))


def _run(arguments: list[str] | None, options: argparse.Namespace) -> None:
    if options.concepts:
        return print(*concepts(), "", grammar(), sep="\n")
    if options.info is not None:
        return _print_info(options)
    if options.from_png is not None:
        options = with_metadata(arguments, options)
    if options.plan:
        return _print_plan(options)
    with redirect_stdout(sys.stderr):  # standard output is for what was written
        outs, images = _generate(options)
    for image, out in zip(images, outs, strict=True):
        save_image(image, out)
        if not options.quiet:
            seed = f"  seed {image.info['seed']}" if "seed" in image.info else ""
            print(printable(f"{out}  {image.width}x{image.height}{seed}"), file=sys.stderr)


def _print_info(options: argparse.Namespace) -> None:
    if options.prompt is not None or options.weights != EMBEDDED_NAME:
        raise ValueError("--info stands alone: it prints an image's metadata, and draws none")
    for name, value in read_image_metadata(options.info).items():
        print(printable(f"{name}: {value}"))


def with_metadata(arguments: list[str] | None, options: argparse.Namespace) -> argparse.Namespace:
    """Return the options that an image's metadata give, overridden by those of the command."""
    flags, unknown = from_png.arguments_of(options.from_png)
    for sentence in unknown:
        logger.warning("%s", sentence)
    parser = draw_parser()
    # What is not given remains None: defaults do not replace attributes that are there.
    given = parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(vars(options))))
    again = parser.parse_args(flags)
    if given.steps is not None or given.timesteps or given.sigmas:
        again.steps = again.timesteps = again.sigmas = None
    if again.seed is None and any((given.prompt, given.negative, given.images)):  # one of a batch, no longer
        again.seed = int(read_image_metadata(options.from_png).get("seed", 0))
    flags = [flag for flag in FACTS_OF if getattr(given, flag) is not None]
    again.overridden = [name for flag in flags for name in FACTS_OF[flag]]
    vars(again).update({name: value for name, value in vars(given).items() if value is not None})
    return again


def _generate(options: argparse.Namespace) -> tuple[list[Path], Sequence[Any]]:
    """Generate the images; return the files to write and the images with their metadata.

    Of processes that split an image, the first has files to write.
    """
    call, device = prepare(options), join_split(options)
    if call.outs[0] != STANDARD_OUTPUT:
        cli.make_writable(call.outs[0])
    pipe = cli.load_pipeline(options, device, task_of(options))
    quantized = cli.measure_quantization(pipe, options)
    images = draw(pipe, options, call, quantized)
    return (call.outs, images) if leave_split(options.split) else ([], [])


def prepare(options: argparse.Namespace) -> Call:
    """Check the options and read the images that they name, before weights; ValueError or OSError."""
    facts = from_png.read_facts(options)
    facts = {name: text for name, text in facts.items() if name not in options.overridden}
    has_seed = options.seed is not None
    outs = _validate(options)
    arguments = _pipeline_kwargs(options) | from_png.call_arguments(facts, has_seed)
    return Call(outs, arguments, facts, has_seed)


def draw(
    pipe: Any, options: argparse.Namespace, call: Call, metadata: Mapping[str, str] | None = None
) -> list[Any]:
    """Load the options' adapters into a pipeline without any, and draw; metadata: more of the images'."""
    _load_adapters(pipe, options)
    from_png.prepare(pipe, call.facts)
    if "scheduler" in call.facts and options.schedule is not None:
        pipe.scheduler = with_schedule(pipe.scheduler, options.schedule)
    image = call.arguments.get("image")  # to start from, or of ControlNets
    if options.split is None:
        check_memory(pipe, options, image[0] if isinstance(image, list) else image)
    else:
        split_pipeline(pipe, options.split)
    images = from_png.select_image(pipe(**call.arguments)[0], call.facts, call.has_seed)
    files = cli.component_files(options) | {"face_embeds": options.face_embeds}
    found = {f"{name}_file": file for name, file in files.items() if file is not None}
    found |= {} if options.canny is None else {"canny": options.canny}
    for image in images:
        attach_metadata(image, image.info | found | dict(metadata or {}))
    return images


def _pipeline_kwargs(options: argparse.Namespace) -> dict[str, Any]:
    steps = default_steps(options.sampler) if options.steps is None else options.steps
    if options.timesteps or options.sigmas:
        steps = 50  # the pipeline's default, which it takes as unset
    arguments: dict[str, Any] = dict(
        prompt=options.prompt, negative_prompt=options.negative, height=options.height, width=options.width,
        num_inference_steps=steps, timesteps=options.timesteps, sigmas=options.sigmas, eta=options.eta,
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
    pipe = cli.load_pipeline(options, device, task_of(options), is_planned=True)
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
    sets_levels = "karras" in options.sampler if options.schedule is None else (
        "timestep_spacing" not in SCHEDULES[options.schedule])  # fmt: skip
    if options.timesteps and sets_levels:
        got = options.schedule or options.sampler
        raise ValueError(f"--timesteps needs a --sampler without karras and no such --schedule, got {got}")
    check_split(options)
    out, count = options.out, options.images
    if check_int("--images", count) > MOST_IMAGES:
        raise ValueError(f"--images must be at most {MOST_IMAGES}, got {count}: kolors batch draws more")
    if out == STANDARD_OUTPUT and count > 1:
        raise ValueError(f"--out - takes one image, got --images {count}")
    if out != STANDARD_OUTPUT and out.suffix.lower() not in OUT_SUFFIXES:
        raise ValueError(f"--out must end in {', '.join(OUT_SUFFIXES)} or be -, got {out}")
    outs = [out.with_stem(f"{out.stem}-{i + 1}") for i in range(count)] if count > 1 else [out]
    cli.check_output_paths(outs, options.force or options.plan)
    options.seed = cli.select_seed(options)
    for name, multiple in {"steps": 1, "height": 8, "width": 8}.items():
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


def task_of(options: argparse.Namespace) -> type[Task]:
    """Return the pipeline of the task that the options describe."""
    if options.image is None:
        return KolorsControlNetPipeline if options.control else KolorsPipeline
    return KolorsImg2ImgPipeline if options.mask is None else KolorsInpaintPipeline


def _load_adapters(pipe: KolorsPipeline, options: argparse.Namespace) -> None:
    is_local = options.local_files_only
    cli.load_loras(pipe, options.lora or (), is_local, options.quiet, options.lora_partial)
    for text in options.textual_inversion or ():
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
        keywords: dict[str, Any] = {"torch_dtype": pipe.dtype, "device": pipe.unet.conv_in.weight.device}
        if name.endswith(".safetensors"):
            nets.append(KolorsControlNet.from_single_file(name, **keywords))
        else:
            keywords |= {"revision": revision, "local_files_only": is_local}
            nets.append(KolorsControlNet.from_pretrained(name, **keywords))
    if nets:
        pipe.controlnet = type(pipe).from_pipe(pipe, controlnet=nets).controlnet  # checked there
