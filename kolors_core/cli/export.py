"""Command `python -m kolors_core export DIR OUT --to FORMAT`: the models as programs of other runtimes."""

import argparse
import sys
from typing import Any

import torch

from kolors_core.cli import options as cli
from kolors_core.cli.parsers import export_parser
from kolors_core.devices import named_device
from kolors_core.performance import export as programs
from kolors_core.pipelines.text_to_image import KolorsPipeline
from weights_convert.atomic_write import atomic_folder, check_absent, write_bytes


def export(options: argparse.Namespace) -> None:
    """Write the folder, whole or not at all; raises ValueError or OSError."""
    check_absent(options.out)
    programs.check_can_export(options.to)
    if options.to == "onnx" and options.device not in (None, "cpu"):
        raise ValueError("--device has no effect on --to onnx, whose runtime chooses it")
    device = torch.device("cpu") if options.to == "onnx" else named_device(options.device)
    dtype = cli.select_dtype(options, device)
    if options.check and options.to == "onnx" and dtype == torch.bfloat16:
        raise ValueError("--check cannot run bfloat16: onnxruntime has no such kernels on a CPU")
    is_file = options.weights.endswith(".safetensors")
    pipe: Any = (KolorsPipeline.from_single_file if is_file else KolorsPipeline.from_pretrained)(
        options.weights, variant=options.variant, revision=options.revision,
        local_files_only=options.local_files_only, torch_dtype=dtype, device=device,
    )  # fmt: skip
    if options.lora:
        cli.load_loras(pipe, options.lora, options.local_files_only, options.quiet, options.lora_partial)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    found = programs.text_program(pipe.text_encoder)
    found |= programs.unet_programs(pipe.unet) | programs.vae_programs(pipe.vae)
    names = {name: f"{name}{programs.SUFFIXES[options.to]}" for name in options.programs}
    with atomic_folder(options.out) as folder:
        write_bytes(pipe.tokenizer.model_bytes, folder / "tokenizer.model")
        for name, file in names.items():
            programs.write_program(found[name], programs.trace(found[name]), folder / file, options.to)
            if options.check:
                difference = programs.check_program(found[name], folder / file, options.to)
                if not options.quiet:
                    print(f"{file}: within {difference:.1e} of the model", file=sys.stderr)
    print(*(options.out / file for file in names.values()), sep="\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    return cli.run_command(export, export_parser().parse_args(arguments))
