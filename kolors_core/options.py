"""What the command lines for one picture and for many share: flags of model and sampler, and their use."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kolors_core.checkpoint import EMBEDDED_NAME
from kolors_core.pipeline import KolorsPipeline
from kolors_core.placement import best_dtype
from kolors_core.plan import Planning
from kolors_core.quantize import BITS
from kolors_core.quantize_report import QuantizationReport
from kolors_core.schedule import DPMSolverMultistepScheduler, EulerDiscreteScheduler, Scheduler

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SAMPLERS: dict[str, tuple[type[Scheduler], dict[str, object]]] = {
    "euler": (EulerDiscreteScheduler, {"use_karras_sigmas": False}),
    "euler-karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "dpmpp-2m": (DPMSolverMultistepScheduler, {"use_karras_sigmas": False}),
    "dpmpp-2m-karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpmpp-2m-sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp-2m-sde-karras": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
}


def add_model(model: argparse._ArgumentGroup) -> None:
    """Which weights, where and in which precision."""
    model.add_argument(
        "-w",
        "--weights",
        metavar="DIR",
        default=EMBEDDED_NAME,
        help="a checkpoint folder, or a hub repository such as Kwai-Kolors/Kolors-diffusers (default: the "
        "embedded model, which draws emoji)",
    )
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
            f"--{name}-bits",
            type=int,
            choices=BITS,
            help="hold its linear layers in so many bits; reports the error",
        )
    model.add_argument(
        "--offload",
        choices=("model", "block"),
        help="keep on the device only the model at work, or only its block (least memory, slowest)",
    )
    model.add_argument("--vae-tiling", action="store_true", help="decode in bands, with less memory")


def add_sampler(group: argparse._ArgumentGroup) -> None:
    """Which sampler."""
    group.add_argument(
        "--sampler", choices=SAMPLERS, default="dpmpp-2m-karras", help="(default: %(default)s)"
    )


def default_steps(sampler: str) -> int:
    """How many steps a sampler takes where none are named."""
    return 50 if sampler.startswith("euler") else 25


def precision(options: argparse.Namespace, device: torch.device) -> torch.dtype:
    """The dtype that is asked for, or the device's best."""
    return DTYPES[options.dtype] if options.dtype else best_dtype(device)


def load_pipeline(
    options: argparse.Namespace,
    device: torch.device,
    is_planned: bool = False,
    task: type[Planning] = KolorsPipeline,
) -> Any:
    """The pipeline, with the sampler that the options ask for; if only planned, without weights."""
    pipe = task.from_pretrained(
        options.weights, variant=options.variant, revision=options.revision,
        local_files_only=options.local_files_only, torch_dtype=precision(options, device),
        device="meta" if is_planned else "cpu" if options.offload else device,
    )  # fmt: skip
    if options.offload == "model" and not is_planned:
        pipe.enable_model_cpu_offload(device=device)
    if options.offload == "block" and not is_planned:
        pipe.enable_sequential_cpu_offload(device=device)
    if options.vae_tiling:
        pipe.enable_vae_tiling()
    pipe.set_progress_bar_config(disable=options.quiet)
    kind, changes = SAMPLERS[options.sampler]
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **changes)
    return pipe


def bits_of(options: argparse.Namespace) -> dict[str, int]:
    """In how many bits the models are to be held that are to be quantised."""
    bits = {"text_encoder": options.text_encoder_bits, "unet": options.unet_bits}
    return {name: count for name, count in bits.items() if count is not None}


def quantize(pipe: Planning, options: argparse.Namespace) -> QuantizationReport | None:
    """Quantise what the options ask for; None if nothing."""
    if not (bits := bits_of(options)):
        return None
    report = pipe.quantize(**bits)
    if not options.quiet:
        print(f"quantized: {report}", file=sys.stderr)
    return report


def load_loras(pipe: Planning, loras: Sequence[str], is_local: bool, is_quiet: bool) -> None:
    """Load LoRAs, each written FROM[:SCALE], and weigh them; the pipeline has none yet."""
    for i, text in enumerate(loras):
        source, _ = with_scale(text)
        name, revision = with_revision(source)
        report = pipe.load_lora_weights(
            name, adapter_name=f"lora{i}", revision=revision, local_files_only=is_local
        )
        if not is_quiet:
            print(f"{source}: {report}", file=sys.stderr)
    weigh_loras(pipe, loras)


def weigh_loras(pipe: Planning, loras: Sequence[str]) -> None:
    """Give loaded LoRAs the scales that stand here."""
    if loras:
        pipe.set_adapters([f"lora{i}" for i in range(len(loras))], [with_scale(text)[1] for text in loras])


def with_scale(text: str) -> tuple[str, float]:
    """FROM[:SCALE], where FROM may have colons of its own."""
    source, colon, scale = text.rpartition(":")
    try:
        return (source, float(scale)) if colon and source else (text, 1.0)
    except ValueError:
        return text, 1.0


def with_revision(text: str) -> tuple[str, str | None]:
    """REPOSITORY[@REVISION]; what is on the disk is taken as it is."""
    name, _, revision = text.partition("@")
    return (text, None) if not revision or Path(text).exists() else (name, revision)


def check_seed(name: str, seed: int) -> int:
    """The seed; ValueError naming it unless a generator takes it on every device."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"{name} must be from 0 to {2**63 - 1}, got {seed}")
    return seed


def check_number(name: str, value: object) -> float:
    """A finite number; ValueError naming what came otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)
