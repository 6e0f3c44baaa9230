"""Options shared by the command lines: functions that load what they name, checks, and the exit status."""

import argparse
import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kolors_core.checkpoint import EMBEDDED_NAME, logger
from kolors_core.cli import parsers
from kolors_core.cli.samplers import choose_scheduler
from kolors_core.devices import best_dtype, is_out_of_memory
from kolors_core.guidance import cfg_rescale, check_interval, guided
from kolors_core.performance.quantize import Format
from kolors_core.pipelines.pag import check_scales, perturbed, perturbed_layers
from kolors_core.pipelines.quantization_report import quantize
from kolors_core.pipelines.single_file import open_model
from kolors_core.pipelines.stages import Task
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.validation import LARGEST_SEED, check_int
from weights_convert.untrusted_files import one_line, printable

MODELS = parsers.MODELS
# Errors that are told in a line; of RuntimeErrors only a lack of memory is none of the library's own.
FAULTS = (OSError, ValueError, TypeError, FloatingPointError, MemoryError, RuntimeError)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_output_paths(outs: Sequence[Path], is_forced: bool) -> None:
    """Raise FileExistsError or IsADirectoryError for a file that may not be written.

    A device, FIFO or socket is never replaced by an image: --force overwrites files alone.
    """
    if existing := [out for out in outs if os.path.lexists(out) and not is_forced]:
        raise FileExistsError(f"{existing[0]} exists: choose another --out, or --force")
    if folders := [out for out in outs if out.is_dir()]:
        raise IsADirectoryError(f"{folders[0]} is a folder: choose another --out")
    if others := [out for out in outs if out.exists() and not out.is_file()]:
        raise FileExistsError(f"{others[0]} is no regular file: choose another --out")


def make_writable(out: Path) -> None:
    """Create a file's folder, and check that it can be written to before time is spent; OSError naming it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise OSError(f"{out}: cannot be written: {error.strerror}") from None


def run_command(
    run: Callable[[argparse.Namespace], object], options: argparse.Namespace,
    interrupted: str = "interrupted, nothing written",
) -> int:  # fmt: skip
    """Run a command; return the status: 1 if it returns failures, 2, with one line on stderr, on error."""
    level = logger.level
    if options.quiet:
        logger.setLevel(logging.ERROR)
    try:
        return 1 if run(options) else 0
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of standard output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that flushing it does not fail
        return 141  # as a process that SIGPIPE ends
    except FAULTS as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        print(f"error: {one_line(error, None)}", file=sys.stderr)
        return 2
    finally:
        logger.setLevel(level)


def select_seed(options: argparse.Namespace) -> int:
    """Return --seed, checked, or a random seed."""
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    return check_int("--seed", seed, least=0, most=LARGEST_SEED)


def select_dtype(options: argparse.Namespace, device: torch.device) -> torch.dtype:
    """Return --dtype, or the device's default."""
    return DTYPES[options.dtype] if options.dtype else best_dtype(device)


def component_files(options: argparse.Namespace) -> dict[str, str]:
    """Return the files of models that are not taken from --weights."""
    return {name: file for name in MODELS if (file := getattr(options, name)) is not None}


def quantization_formats(options: argparse.Namespace) -> dict[str, Format]:
    """Return the format of each model to quantize; ValueError for --report without any."""
    given = {name: getattr(options, f"{name}_bits") for name in ("text_encoder", "unet")}
    if options.report and not any(given.values()):
        raise ValueError("--report has no effect without --unet-bits or --text-encoder-bits")
    return {name: int(text) if text.isdigit() else text for name, text in given.items() if text is not None}


@contextmanager
def progress_of_layers(is_quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function that draws a bar for each model, called as show(name, layers done, all)."""
    from tqdm.auto import tqdm

    bars = dict[str, Any]()

    def show(name: str, done: int, total: int) -> None:
        if name not in bars:
            what = name if name == "measured" else f"quantizing {name}"
            bars[name] = tqdm(total=total, desc=what, leave=False, disable=is_quiet)
        bars[name].update(done - bars[name].n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()


def guidance_kwargs(options: argparse.Namespace) -> dict[str, object]:
    """Check the guidance flags and return the guidance rule's arguments; ValueError for unused flags too."""
    if options.pag is None and (options.pag_layers or options.pag_adaptive is not None):
        raise ValueError("--pag-layers and --pag-adaptive have no effect without --pag")
    if options.pag is not None:
        check_scales(options.pag, options.pag_adaptive or 0.0)
    if options.guidance_rescale is not None:
        cfg_rescale(options.guidance_rescale)
    interval = None if options.guidance_interval is None else check_interval(options.guidance_interval)
    pag = {"pag_scale": options.pag, "pag_adaptive_scale": options.pag_adaptive,
           "pag_applied_layers": options.pag_layers}  # fmt: skip
    keywords = pag | {"rescale": options.guidance_rescale, "interval": interval}
    return {name: value for name, value in keywords.items() if value is not None}


def load_pipeline(
    options: argparse.Namespace, device: torch.device, task: type[Task] = KolorsPipeline,
    is_planned: bool = False,
) -> Any:  # fmt: skip
    """Load the pipeline, with the sampler of the options; without weights if it is only planned.

    Models are quantized while they are read, unless that is to be measured: see `measure_quantization`.
    """
    files = component_files(options)
    if files and options.weights == EMBEDDED_NAME:
        flag = next(iter(files)).replace("_", "-")
        raise ValueError(f"--{flag} needs --weights, the checkpoint of the other models")
    folder = options.weights if Path(options.weights).is_dir() else None
    keywords: dict[str, Any] = {"config": folder, "has_weights": not is_planned}
    models: dict[str, Any] = {name: open_model(file, name, **keywords) for name, file in files.items()}
    formats = quantization_formats(options)
    is_file = options.weights.endswith(".safetensors")
    with progress_of_layers(options.quiet) as show:
        pipe = (task.from_single_file if is_file else task.from_pretrained)(
            options.weights, variant=options.variant, revision=options.revision,
            local_files_only=options.local_files_only, torch_dtype=select_dtype(options, device),
            device="meta" if is_planned else "cpu" if options.offload else device, progress=show,
            quantization={} if options.report and not is_planned else formats, **models,
        )  # fmt: skip
    if options.offload and not is_planned:
        is_model = options.offload == "model"
        (pipe.enable_model_cpu_offload if is_model else pipe.enable_sequential_cpu_offload)(device=device)
    if options.vae_tiling:
        pipe.enable_vae_tiling()
    pipe.set_progress_bar_config(disable=options.quiet)
    pipe.scheduler = choose_scheduler(pipe.scheduler, options.sampler, options.schedule)
    return pipe


def measure_quantization(pipe: Task, options: argparse.Namespace) -> dict[str, str]:
    """Quantize and measure with --report; return the report as metadata, else nothing."""
    if not options.report:
        return {}
    with progress_of_layers(options.quiet) as show:
        formats = quantization_formats(options)
        report = quantize(
            pipe, text_encoder=formats.get("text_encoder"), unet=formats.get("unet"), progress=show
        )
    if not options.quiet:
        print(f"quantized: {report}", file=sys.stderr)
    return {"quantized": str(report)}


def apply_guidance(pipe: KolorsPipeline, options: argparse.Namespace) -> None:
    """Set the guidance rule and FreeU of the options."""
    if keywords := guidance_kwargs(options):
        if "pag_scale" in keywords:
            perturbed_layers(pipe.unet, options.pag_layers or "mid")
        pipe.guided = partial(perturbed if "pag_scale" in keywords else guided, **keywords)
    if options.freeu is not None:
        pipe.enable_freeu(*options.freeu)


def load_loras(
    pipe: Task, loras: Sequence[str], is_local: bool, is_quiet: bool, is_partial: bool = False
) -> None:
    """Load LoRAs, each FROM[:SCALE], and set their scales; the pipeline must have none."""
    for i, text in enumerate(loras):
        source, _ = parse_source_scale(text)
        name, revision = with_revision(source)
        keywords = {"revision": revision, "local_files_only": is_local, "allow_partial": is_partial}
        try:
            report = pipe.load_lora_weights(name, adapter_name=f"lora{i}", **keywords)
        except ValueError as error:
            raise ValueError(str(error).replace("allow_partial=True", "--lora-partial")) from None
        if not is_quiet:
            print(printable(f"{source}: {report}"), file=sys.stderr)
    set_lora_scales(pipe, loras)


def set_lora_scales(pipe: Task, loras: Sequence[str]) -> None:
    """Set the scales of the loaded LoRAs, each FROM[:SCALE]."""
    if loras:
        scales = [parse_source_scale(text)[1] for text in loras]
        pipe.set_adapters([f"lora{i}" for i in range(len(loras))], scales)


def parse_source_scale(text: str, default: float = 1.0) -> tuple[str, float]:
    """Split FROM[:SCALE]; FROM may contain colons."""
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
