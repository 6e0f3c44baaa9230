"""Command `python -m kolors_core env`: what a report of a fault says of the machine, and nothing private."""

import argparse
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from kolors_core.attention import forced_kernel, select_kernel
from kolors_core.cli.options import run_command
from kolors_core.cli.parsers import env_parser
from kolors_core.config import VERSION
from kolors_core.devices import best_device, best_dtype
from kolors_core.performance.available_memory import available_memory

NEEDED = ("torch", "safetensors", "sentencepiece", "einops", "numpy", "pillow", "huggingface-hub")
OPTIONAL = ("triton", "onnx", "onnxruntime", "diffusers", "transformers", "peft")
# Of the environment, without values that name a person, a place or a secret.
VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ENABLE_MPS_FALLBACK", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "HF_HUB_OFFLINE",
)  # fmt: skip


def facts() -> Iterator[tuple[str, str]]:
    """Yield what results and speed depend on beside the prompt, as names and texts of one line."""
    yield "kolors_core", VERSION
    yield "Python", f"{platform.python_version()}, {platform.platform()}"
    yield "needs", ", ".join(f"{name} {_version(name) or 'missing'}" for name in NEEDED)
    present = [f"{name} {found}" for name in OPTIONAL if (found := _version(name))]
    yield "beside it", ", ".join(present) or "none of its optional packages"
    free, kernels = _gib(available_memory(torch.device("cpu"))), torch.backends.cpu.get_cpu_capability()
    counts = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield "CPU", f"{cpu_name()}, {kernels}, {counts}, {free} GiB available"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        free = _gib(available_memory(torch.device("cuda", index)))
        kind = f"compute capability {gpu.major}.{gpu.minor}"
        yield f"cuda:{index}", f"{gpu.name}, {kind}, {free} of {_gib(gpu.total_memory)} GiB available"
    cuda, cudnn = torch.version.cuda or torch.version.hip or "not built in", torch.backends.cudnn.version()
    mps = "MPS available" if torch.backends.mps.is_available() else "no MPS"
    yield "accelerators", f"CUDA {cuda}, cuDNN {cudnn or 'none'}, {mps}"
    device = best_device()
    yield "drawn on", f"{device} in {best_dtype(device)}, where nothing else is said"
    query = torch.empty(2, 20, 1024, 64, dtype=best_dtype(device), device="meta")
    chosen = forced_kernel() or select_kernel(query, query, device.type)
    yield "attention", f"{chosen!r}, in the UNet's inner level at 1024x1024"
    found = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    yield "environment", ", ".join(found) or "none of the variables that matter is set"


def env(_: argparse.Namespace) -> None:
    """Print the facts, a line each."""
    print(*(f"{name:12}  {' '.join(text.split())}" for name, text in facts()), sep="\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    return run_command(env, env_parser().parse_args(arguments))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the CPU's name, of the system if Linux has none."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f}"
