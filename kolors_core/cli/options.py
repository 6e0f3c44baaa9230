"""Flags shared by the command lines, and functions that load what they name."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kolors_core.adapters.canny import canny
from kolors_core.adapters.controlnet_files import KolorsControlNet
from kolors_core.checkpoint import EMBEDDED_NAME
from kolors_core.devices import best_dtype
from kolors_core.guidance import cfg_rescale, check_interval, guided
from kolors_core.image import load_image
from kolors_core.performance.quantize import BITS
from kolors_core.pipelines.pag import check_scales, perturbed, perturbed_layers
from kolors_core.pipelines.quantization_report import QuantizationReport, quantize
from kolors_core.pipelines.request import CONTROL_SCALE
from kolors_core.pipelines.single_file import open_model
from kolors_core.pipelines.stages import Task
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.schedule import DPMSolverMultistepScheduler, EulerDiscreteScheduler, Scheduler

MODELS = ("unet", "text_encoder", "vae")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CONTROLNETS = {kind: f"Kwai-Kolors/Kolors-ControlNet-{kind.title()}" for kind in ("canny", "depth", "pose")}
# Each sets every field that distinguishes it, since the checkpoint's own scheduler may be any of them.
SAMPLERS: dict[str, tuple[type[Scheduler], dict[str, object]]] = {
    name + suffix: (kind, {**fields, "use_karras_sigmas": bool(suffix)})
    for name, kind, fields in (
        ("euler", EulerDiscreteScheduler, {}),
        ("dpmpp-2m", DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
        ("dpmpp-2m-sde", DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    )
    for suffix in ("", "-karras")
}


def add_model(model: argparse._ArgumentGroup) -> None:
    """Add the flags of weights, device, precision and memory."""
    add = model.add_argument
    add("-w", "--weights", metavar="DIR", default=EMBEDDED_NAME,
        help="a checkpoint folder or .safetensors file, or a hub repository such as "
        "Kwai-Kolors/Kolors-diffusers (default: the embedded model, which draws emoji)")  # fmt: skip
    for name in MODELS:
        source = "this .safetensors file, in any naming, and not from --weights"
        add(f"--{name.replace('_', '-')}", metavar="FILE", help=f"take the {name} from {source}")
    add("--variant", help='which weight files, such as "fp16" (default: the only ones there are)')
    add("--revision", help="branch, tag or commit of the hub repository")
    add("--local-files-only", action="store_true", help="never download, use the hub's local cache")
    add("--device", help="cuda, mps, cpu, cuda:1, ... (default: the best there is)")
    add("--dtype", choices=DTYPES, help="precision (default: float16, on a CPU float32)")
    for name in ("text-encoder", "unet"):
        effect = "quantize its linear layers to so many bits; reports the error"
        add(f"--{name}-bits", type=int, choices=BITS, help=effect)
    add("--offload", choices=("model", "block"),
        help="keep only the running model or block (least memory, slowest) on the device")  # fmt: skip
    add("--vae-tiling", action="store_true", help="decode in tiles, with less memory")


def add_image(image: argparse._ArgumentGroup, default_size: str = "the model's own") -> None:
    """Add the flags of the negative prompt, the size and the seed."""
    add = image.add_argument
    add("-n", "--negative", metavar="TEXT", help="what not to draw")
    for side in ("height", "width"):
        add(f"--{side}", type=int, help=f"pixels, a multiple of 8 (default: {default_size})")
    add("--seed", type=int, help="of the noise (default: random)")


def add_steps(sampling: argparse._ArgumentGroup) -> None:
    """Add the flags of the steps, the sampler and the guidance scale."""
    add = sampling.add_argument
    add("--steps", type=int, help="denoising steps (default: 50 for euler, 25 for the others)")
    add_sampler(sampling)
    add("-g", "--guidance", type=float, default=5.0, metavar="SCALE",
        help="how strongly to follow the prompt; 1 is off (default: %(default)s)")  # fmt: skip


def add_sampler(sampling: argparse._ArgumentGroup) -> None:
    """Add the flag of the sampler."""
    default = "dpmpp-2m-karras"
    sampling.add_argument("--sampler", choices=SAMPLERS, default=default, help="(default: %(default)s)")


def add_guidance(sampling: argparse._ArgumentGroup) -> None:
    """Add the flags of perturbed-attention guidance, guidance modifiers and FreeU."""
    add = sampling.add_argument
    add("--pag", type=float, metavar="SCALE", help="perturbed-attention guidance, such as 3 (default: none)")
    add("--pag-layers", nargs="+", metavar="LAYER",
        help='perturb the self-attention of these, such as "down.block_2" (default: mid)')  # fmt: skip
    add("--pag-adaptive", type=float, metavar="SCALE", help="reduces --pag by this per timestep, of 1,100")
    add("--guidance-rescale", type=float, metavar="PART", help="against overexposure, 0.7 is usual")
    add("--guidance-interval", type=float, nargs=2, metavar=("A", "B"),
        help="guide only in this part of the steps, 0 to 1; the other steps take half the time")  # fmt: skip
    add("--freeu", type=float, nargs=4, metavar=("S1", "S2", "B1", "B2"),
        help="FreeU scales of skip connections and backbone, 0.6 0.4 1.1 1.2 is usual")  # fmt: skip


def add_control(images: argparse._ArgumentGroup) -> None:
    """Add the flags of ControlNets and their images, which are given in the same order."""
    add = images.add_argument
    add("--control", action="append", metavar="FROM[:SCALE]",
        help="a ControlNet: canny, depth or pose for Kwai-Kolors' own, or a folder or hub repository, whose "
        f"revision may follow an @; its scale (default: {CONTROL_SCALE}); may be repeated")  # fmt: skip
    add("--control-image", action="append", metavar="FILE",
        help="its input, used as it is: edges, depth or a pose; one for each --control")  # fmt: skip
    add("--canny", metavar="FILE", help="instead of one --control-image: the edges of this image")
    add("--control-end", type=float, metavar="PART", help="turn it off after this part of the steps")


def check_output_paths(outs: Sequence[Path], is_forced: bool) -> None:
    """Raise FileExistsError or IsADirectoryError for a file that may not be written."""
    if existing := [out for out in outs if out.exists() and not is_forced]:
        raise FileExistsError(f"{existing[0]} exists: choose another --out, or --force")
    if folders := [out for out in outs if out.is_dir()]:
        raise IsADirectoryError(f"{folders[0]} is a folder: choose another --out")


def default_steps(sampler: str) -> int:
    """Return a sampler's default number of steps."""
    return 50 if sampler.startswith("euler") else 25


def select_dtype(options: argparse.Namespace, device: torch.device) -> torch.dtype:
    """Return --dtype, or the device's default."""
    return DTYPES[options.dtype] if options.dtype else best_dtype(device)


def component_files(options: argparse.Namespace) -> dict[str, str]:
    """Return the files of models that are not taken from --weights."""
    return {name: file for name in MODELS if (file := getattr(options, name)) is not None}


def quantization_bits(options: argparse.Namespace) -> dict[str, int]:
    """Return the bits of each model to quantize."""
    bits = {"text_encoder": options.text_encoder_bits, "unet": options.unet_bits}
    return {name: count for name, count in bits.items() if count is not None}


def guidance_kwargs(options: argparse.Namespace) -> dict[str, object]:
    """Check the guidance flags and return the guidance rule's arguments; ValueError for unused flags too."""
    if options.pag is None and (options.pag_layers or options.pag_adaptive is not None):
        raise ValueError("--pag-layers and --pag-adaptive have no effect without --pag")
    if options.pag is not None:
        check_scales(options.pag, options.pag_adaptive or 0.0)
    if options.guidance_rescale is not None:
        cfg_rescale(options.guidance_rescale)
    if options.guidance_interval is not None:
        check_interval(options.guidance_interval)
    keywords = {
        "pag_scale": options.pag, "pag_adaptive_scale": options.pag_adaptive,
        "pag_applied_layers": options.pag_layers, "rescale": options.guidance_rescale,
        "interval": options.guidance_interval and tuple(options.guidance_interval),
    }  # fmt: skip
    return {name: value for name, value in keywords.items() if value is not None}


def check_control(options: argparse.Namespace) -> None:
    """Raise ValueError unless there are as many control images as ControlNets."""
    nets, images = options.control or [], len(options.control_image or ()) + (options.canny is not None)
    if len(nets) != images:
        got = f"{len(nets)} --control and {images} of --control-image and --canny"
        raise ValueError(f"expected an image for each ControlNet, got {got}")
    if options.control_end is not None and not nets:
        raise ValueError("--control-end has no effect without --control")


def load_pipeline(
    options: argparse.Namespace, device: torch.device, is_planned: bool = False,
    task: type[Task] = KolorsPipeline,
) -> Any:  # fmt: skip
    """Load the pipeline, with the sampler of the options; without weights if it is only planned."""
    files = component_files(options)
    if files and options.weights == EMBEDDED_NAME:
        flag = next(iter(files)).replace("_", "-")
        raise ValueError(f"--{flag} needs --weights, the checkpoint of the other models")
    folder = options.weights if Path(options.weights).is_dir() else None
    models: dict[str, Any] = {
        name: open_model(file, name, config=folder, has_weights=not is_planned)
        for name, file in files.items()
    }
    is_file = options.weights.endswith(".safetensors")
    pipe = (task.from_single_file if is_file else task.from_pretrained)(
        options.weights, variant=options.variant, revision=options.revision,
        local_files_only=options.local_files_only, torch_dtype=select_dtype(options, device),
        device="meta" if is_planned else "cpu" if options.offload else device, **models,
    )  # fmt: skip
    if not is_planned and options.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif not is_planned and options.offload == "block":
        pipe.enable_sequential_cpu_offload(device=device)
    if options.vae_tiling:
        pipe.enable_vae_tiling()
    pipe.set_progress_bar_config(disable=options.quiet)
    kind, changes = SAMPLERS[options.sampler]
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **changes)
    return pipe


def apply_quantization(pipe: Task, options: argparse.Namespace) -> QuantizationReport | None:
    """Quantize the models of the options; return the report, None if there are none."""
    if not (bits := quantization_bits(options)):
        return None
    report = quantize(pipe, **bits)
    if not options.quiet:
        print(f"quantized: {report}", file=sys.stderr)
    return report


def apply_guidance(pipe: KolorsPipeline, options: argparse.Namespace) -> None:
    """Set the guidance rule and FreeU of the options."""
    if keywords := guidance_kwargs(options):
        if "pag_scale" in keywords:
            perturbed_layers(pipe.unet, options.pag_layers or "mid")
        pipe.guided = partial(perturbed if "pag_scale" in keywords else guided, **keywords)
    if options.freeu is not None:
        pipe.enable_freeu(*options.freeu)


def load_loras(pipe: Task, loras: Sequence[str], is_local: bool, is_quiet: bool) -> None:
    """Load LoRAs, each FROM[:SCALE], and set their scales; the pipeline must have none."""
    for i, text in enumerate(loras):
        source, _ = parse_source_scale(text)
        name, revision = with_revision(source)
        report = pipe.load_lora_weights(
            name, adapter_name=f"lora{i}", revision=revision, local_files_only=is_local
        )
        if not is_quiet:
            print(f"{source}: {report}", file=sys.stderr)
    set_lora_scales(pipe, loras)


def set_lora_scales(pipe: Task, loras: Sequence[str]) -> None:
    """Set the scales of the loaded LoRAs, each FROM[:SCALE]."""
    if loras:
        scales = [parse_source_scale(text)[1] for text in loras]
        pipe.set_adapters([f"lora{i}" for i in range(len(loras))], scales)


def load_textual_inversions(pipe: Task, files: Sequence[str], is_local: bool) -> None:
    """Load learned words, each FROM[:WORD]; the default is the word's name in the file."""
    for text in files:
        source, word = with_word(text)
        name, revision = with_revision(source)
        pipe.load_textual_inversion(name, word, revision=revision, local_files_only=is_local)


def load_controls(
    options: argparse.Namespace, pipe: KolorsPipeline, device: torch.device, is_planned: bool = False
) -> None:
    """Load the ControlNets of the options into the pipeline."""
    nets = []
    for text in options.control or ():
        source, _ = parse_source_scale(text, CONTROL_SCALE)
        name, revision = with_revision(CONTROLNETS.get(source, source))
        nets.append(KolorsControlNet.from_pretrained(
            name, revision=revision, local_files_only=options.local_files_only, torch_dtype=pipe.dtype,
            device="meta" if is_planned else "cpu" if options.offload else device,
        ))  # fmt: skip
    if nets:
        pipe.controlnet = type(pipe).from_pipe(pipe, controlnet=nets).controlnet  # checked there


def control_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Build the pipeline's ControlNet arguments; the edges of --canny are the last image."""
    if not options.control:
        return {}
    images = [load_image(file) for file in options.control_image or ()]
    if options.canny is not None:
        images.append(canny(load_image(options.canny)))
    scales = [parse_source_scale(text, CONTROL_SCALE)[1] for text in options.control]
    end = {} if options.control_end is None else {"control_guidance_end": options.control_end}
    return {"control_image": images, "controlnet_conditioning_scale": scales} | end


def parse_source_scale(text: str, default: float = 1.0) -> tuple[str, float]:
    """Split FROM[:SCALE], where FROM may contain colons."""
    source, colon, scale = text.rpartition(":")
    try:
        return (source, float(scale)) if colon and source else (text, default)
    except ValueError:
        return text, default


def with_word(text: str) -> tuple[str, str | None]:
    """Split FROM[:WORD]; an existing path is kept as it is."""
    source, colon, word = text.rpartition(":")
    return (text, None) if not colon or Path(text).exists() else (source, word)


def with_revision(text: str) -> tuple[str, str | None]:
    """Split REPOSITORY[@REVISION]; an existing path is kept as it is."""
    name, _, revision = text.partition("@")
    return (text, None) if not revision or Path(text).exists() else (name, revision)
