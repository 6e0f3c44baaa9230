"""Flags of the command lines for one image and for many: model, sampler, ControlNets; what they load."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kolors_core.adapters.canny import canny
from kolors_core.adapters.controlnet_files import DEFAULT_SCALE, KolorsControlNet
from kolors_core.checkpoint import EMBEDDED_NAME
from kolors_core.devices import best_dtype
from kolors_core.guidance import cfg_rescale, check_interval, guided
from kolors_core.image import load_image
from kolors_core.performance.quantize import BITS
from kolors_core.pipelines.pag import check_scales, perturbed, perturbed_layers
from kolors_core.pipelines.quantization_report import QuantizationReport
from kolors_core.pipelines.quantization_report import quantize as quantize_pipeline
from kolors_core.pipelines.single_file import open_model
from kolors_core.pipelines.stages import Task
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.schedule import DPMSolverMultistepScheduler, EulerDiscreteScheduler, Scheduler

MODELS = ("unet", "text_encoder", "vae")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CONTROLNETS = {kind: f"Kwai-Kolors/Kolors-ControlNet-{kind.title()}" for kind in ("canny", "depth", "pose")}
# Each says all that it is: the checkpoint's own scheduler may be any of them.
SAMPLERS: dict[str, tuple[type[Scheduler], dict[str, object]]] = {
    name + ending: (kind, {**own, "use_karras_sigmas": bool(ending)})
    for name, kind, own in (
        ("euler", EulerDiscreteScheduler, {}),
        ("dpmpp-2m", DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
        ("dpmpp-2m-sde", DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    )
    for ending in ("", "-karras")
}


def add_model(model: argparse._ArgumentGroup) -> None:
    """Which weights, where and in which precision."""
    model.add_argument(
        "-w", "--weights", metavar="DIR", default=EMBEDDED_NAME,
        help="a checkpoint folder or .safetensors file, or a hub repository such as "
        "Kwai-Kolors/Kolors-diffusers (default: the embedded model, which draws emoji)",
    )  # fmt: skip
    for name in MODELS:
        model.add_argument(
            f"--{name.replace('_', '-')}", metavar="FILE",
            help=f"take the {name} from this .safetensors file, whatever its names, and not from --weights",
        )  # fmt: skip
    model.add_argument(
        "--variant", help='which weight files, such as "fp16" (default: the only ones there are)'
    )
    model.add_argument("--revision", help="branch, tag or commit of the hub repository")
    model.add_argument(
        "--local-files-only", action="store_true", help="never download, use the hub's local cache"
    )
    model.add_argument("--device", help="cuda, mps, cpu, cuda:1, ... (default: the best there is)")
    model.add_argument("--dtype", choices=DTYPES, help="precision (default: float16, on a CPU float32)")
    for name in ("text-encoder", "unet"):
        model.add_argument(
            f"--{name}-bits", type=int, choices=BITS,
            help="hold its linear layers in so many bits; reports the error",
        )  # fmt: skip
    model.add_argument(
        "--offload", choices=("model", "block"),
        help="keep on the device only the model at work, or only its block (least memory, slowest)",
    )  # fmt: skip
    model.add_argument("--vae-tiling", action="store_true", help="decode in bands, with less memory")


def add_sampler(group: argparse._ArgumentGroup) -> None:
    """Which sampler."""
    group.add_argument(
        "--sampler", choices=SAMPLERS, default="dpmpp-2m-karras", help="(default: %(default)s)"
    )


def add_guidance(group: argparse._ArgumentGroup) -> None:
    """What stands beside the guidance scale, and FreeU."""
    group.add_argument(
        "--pag", type=float, metavar="SCALE", help="perturbed-attention guidance, 3 is usual (default: none)"
    )
    group.add_argument(
        "--pag-layers", nargs="+", metavar="LAYER",
        help='whose self-attention it perturbs, such as "down.block_2" (default: mid)',
    )  # fmt: skip
    group.add_argument(
        "--pag-adaptive", type=float, metavar="SCALE", help="takes this off --pag per timestep, of 1,100"
    )
    group.add_argument(
        "--guidance-rescale", type=float, metavar="PART", help="against overexposure, 0.7 is usual"
    )
    group.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("A", "B"),
        help="guide only in these parts of the steps, 0 to 1; the others take half the time",
    )  # fmt: skip
    group.add_argument(
        "--freeu", type=float, nargs=4, metavar=("S1", "S2", "B1", "B2"),
        help="weigh the UNet's skips and what comes from below, 0.6 0.4 1.1 1.2 is usual",
    )  # fmt: skip


def add_control(images: argparse._ArgumentGroup) -> None:
    """What a ControlNet sees; given in the same order, as often as there are ControlNets."""
    images.add_argument(
        "--control", action="append", metavar="FROM[:SCALE]",
        help="a ControlNet: canny, depth or pose for Kwai-Kolors' own, or a folder or hub repository, whose "
        f"revision may follow an @; how much it says (default: {DEFAULT_SCALE}); may be repeated",
    )  # fmt: skip
    images.add_argument(
        "--control-image", action="append", metavar="FILE",
        help="what it sees, as it is: edges, depth or a pose; may be repeated, one for each --control",
    )  # fmt: skip
    images.add_argument(
        "--canny", metavar="FILE", help="in place of one --control-image: the edges of this image"
    )
    images.add_argument(
        "--control-end", type=float, metavar="PART", help="end its say after this part of the steps"
    )


def check_output_paths(outs: Sequence[Path], is_forced: bool) -> None:
    """FileExistsError or IsADirectoryError for what may not be written over."""
    if existing := [out for out in outs if out.exists() and not is_forced]:
        raise FileExistsError(f"{existing[0]} exists: choose another --out, or --force")
    if folders := [out for out in outs if out.is_dir()]:
        raise IsADirectoryError(f"{folders[0]} is a folder: choose another --out")


def default_steps(sampler: str) -> int:
    """How many steps a sampler takes where none are named."""
    return 50 if sampler.startswith("euler") else 25


def precision(options: argparse.Namespace, device: torch.device) -> torch.dtype:
    """The dtype that is asked for, or the device's best."""
    return DTYPES[options.dtype] if options.dtype else best_dtype(device)


def files_of(options: argparse.Namespace) -> dict[str, str]:
    """The models that come from files of their own."""
    return {name: file for name in MODELS if (file := getattr(options, name)) is not None}


def quantization_bits(options: argparse.Namespace) -> dict[str, int]:
    """In how many bits the models are to be held that are to be quantised."""
    bits = {"text_encoder": options.text_encoder_bits, "unet": options.unet_bits}
    return {name: count for name, count in bits.items() if count is not None}


def guidance_of(options: argparse.Namespace) -> dict[str, object]:
    """The guidance rule's keywords that the options ask for; ValueError for what cannot be, or has no use."""
    if options.pag is None and (options.pag_layers or options.pag_adaptive is not None):
        raise ValueError("--pag-layers and --pag-adaptive have no effect without --pag")
    if options.pag is not None:
        check_scales(options.pag, options.pag_adaptive or 0.0)
    if options.guidance_rescale is not None:
        cfg_rescale(options.guidance_rescale)
    if options.guidance_interval is not None:
        check_interval(options.guidance_interval)
    asked = {
        "pag_scale": options.pag, "pag_adaptive_scale": options.pag_adaptive,
        "pag_applied_layers": options.pag_layers, "rescale": options.guidance_rescale,
        "interval": options.guidance_interval and tuple(options.guidance_interval),
    }  # fmt: skip
    return {name: value for name, value in asked.items() if value is not None}


def check_control(options: argparse.Namespace) -> None:
    """ValueError unless there is an image for each ControlNet, and the other way round."""
    nets, images = options.control or [], len(options.control_image or ()) + (options.canny is not None)
    if len(nets) != images:
        got = f"{len(nets)} --control and {images} of --control-image and --canny"
        raise ValueError(f"expected an image for each ControlNet, got {got}")
    if options.control_end is not None and not nets:
        raise ValueError("--control-end has no effect without --control")


def load_pipeline(
    options: argparse.Namespace,
    device: torch.device,
    is_planned: bool = False,
    task: type[Task] = KolorsPipeline,
) -> Any:
    """The pipeline, with the sampler that the options ask for; if only planned, without weights."""
    files = files_of(options)
    if files and options.weights == EMBEDDED_NAME:
        wanted = "needs --weights, the checkpoint of the rest"
        raise ValueError(f"--{next(iter(files)).replace('_', '-')} {wanted}")
    folder = options.weights if Path(options.weights).is_dir() else None
    models: dict[str, Any] = {
        name: open_model(file, name, config=folder, has_weights=not is_planned)
        for name, file in files.items()
    }
    is_file = options.weights.endswith(".safetensors")
    pipe = (task.from_single_file if is_file else task.from_pretrained)(
        options.weights, variant=options.variant, revision=options.revision,
        local_files_only=options.local_files_only, torch_dtype=precision(options, device),
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


def quantize(pipe: Task, options: argparse.Namespace) -> QuantizationReport | None:
    """Quantise what the options ask for; None if nothing."""
    if not (bits := quantization_bits(options)):
        return None
    report = quantize_pipeline(pipe, **bits)
    if not options.quiet:
        print(f"quantized: {report}", file=sys.stderr)
    return report


def guide(pipe: KolorsPipeline, options: argparse.Namespace) -> None:
    """Have the guidance rule and FreeU that the options ask for."""
    if keywords := guidance_of(options):
        if "pag_scale" in keywords:
            perturbed_layers(pipe.unet, options.pag_layers or "mid")
        pipe.guided = partial(perturbed if "pag_scale" in keywords else guided, **keywords)
    if options.freeu is not None:
        pipe.enable_freeu(*options.freeu)


def load_loras(pipe: Task, loras: Sequence[str], is_local: bool, is_quiet: bool) -> None:
    """Load LoRAs, each written FROM[:SCALE], and weigh them; the pipeline has none yet."""
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
    """Give the loaded LoRAs the scales that are written here."""
    if loras:
        pipe.set_adapters(
            [f"lora{i}" for i in range(len(loras))], [parse_source_scale(text)[1] for text in loras]
        )


def load_textual_inversions(pipe: Task, files: Sequence[str], is_local: bool) -> None:
    """Load learned words, each written FROM[:WORD]; its name in the file if there is no WORD."""
    for text in files:
        source, word = with_word(text)
        name, revision = with_revision(source)
        pipe.load_textual_inversion(name, word, revision=revision, local_files_only=is_local)


def load_controls(
    options: argparse.Namespace, pipe: KolorsPipeline, device: torch.device, is_planned: bool = False
) -> None:
    """Give the pipeline the ControlNets that the options name."""
    nets = []
    for text in options.control or ():
        source, _ = parse_source_scale(text, DEFAULT_SCALE)
        name, revision = with_revision(CONTROLNETS.get(source, source))
        nets.append(
            KolorsControlNet.from_pretrained(
                name, revision=revision, local_files_only=options.local_files_only, torch_dtype=pipe.dtype,
                device="meta" if is_planned else "cpu" if options.offload else device,
            )
        )  # fmt: skip
    if nets:
        pipe.controlnet = type(pipe).from_pipe(pipe, controlnet=nets).controlnet  # checked there


def control_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The pipeline's arguments for its ControlNets; the edges of --canny are the last image."""
    if not options.control:
        return {}
    images = [load_image(file) for file in options.control_image or ()]
    if options.canny is not None:
        images.append(canny(load_image(options.canny)))
    scales = [parse_source_scale(text, DEFAULT_SCALE)[1] for text in options.control]
    end = {} if options.control_end is None else {"control_guidance_end": options.control_end}
    return {"control_image": images, "controlnet_conditioning_scale": scales} | end


def parse_source_scale(text: str, default: float = 1.0) -> tuple[str, float]:
    """FROM[:SCALE], where FROM may have colons of its own."""
    source, colon, scale = text.rpartition(":")
    try:
        return (source, float(scale)) if colon and source else (text, default)
    except ValueError:
        return text, default


def with_word(text: str) -> tuple[str, str | None]:
    """FROM[:WORD]; what is on the disk is taken as it is."""
    source, colon, word = text.rpartition(":")
    return (text, None) if not colon or Path(text).exists() else (source, word)


def with_revision(text: str) -> tuple[str, str | None]:
    """REPOSITORY[@REVISION]; what is on the disk is taken as it is."""
    name, _, revision = text.partition("@")
    return (text, None) if not revision or Path(text).exists() else (name, revision)
