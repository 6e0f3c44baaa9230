"""What must not change a result: offload, graphs while a LoRA comes and goes, image sizes that are compiled;
and the tests of every task and feature, run on the device.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kolors_core as kc
from benchmarks.speed.gpu.checks import EXACT, Checks
from benchmarks.speed.gpu.place import PROMPT, Place, distance, our_pipeline
from benchmarks.speed.gpu.precision import make_net, picture
from benchmarks.speed.whole_folder import write_lora
from kolors_core.performance.compile import compile_blocks
from kolors_core.performance.cuda_graphs import CUDAGraphCache
from kolors_core.schedulers import EulerDiscreteScheduler

ROOT = Path(__file__).parents[3]
STEPS = 3
REPLAYED = 1e-3  # of graphs: the same kernels, whose libraries may choose otherwise while they are recorded
OFFLOADS = {"model": "enable_model_cpu_offload", "block": "enable_sequential_cpu_offload"}
OnStep = Callable[[Any, int], object]


def exact(where: Place) -> None:
    """Write the row of offload and graphs, after each kind."""
    config, pixels = list(where.checked.values())[-1]
    with tempfile.TemporaryDirectory() as folder:
        lora = Path(folder) / "lora.safetensors"
        write_lora(lora, config.unet, 4, torch.float32)
        pipe = our_pipeline(where, config, where.half, torch.float32)
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)  # each step moves as much
        net = make_net(config.unet, where.device).to(where.half)
        checks = Checks(where, "exact", total=5)
        for name, cases in graphs(pipe, pixels, str(lora)):
            checks.add(name, cases)
        for name, cases in offloads(pipe, where, pixels, str(lora), net):
            checks.add(name, cases)


def latents(pipe: Any, pixels: int, on_step: OnStep | None = None, **given: Any) -> Tensor:
    """The latents of a short run. on_step: called after each step."""

    def callback(one: Any, i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(one, i)
        return {}

    return pipe(
        PROMPT, height=pixels, width=pixels, num_inference_steps=STEPS, output_type="latent",
        generator=torch.Generator().manual_seed(0), callback_on_step_end=callback, **given,
    ).images  # fmt: skip


def scale(pipe: Any, weight: float) -> None:
    """Weigh the LoRA, whose random factors move little."""
    pipe.set_adapters(pipe.get_active_adapters(), weight)


def graphs(pipe: Any, pixels: int, lora: str) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """Steps recorded and replayed while a LoRA is loaded, scaled and unloaded, against steps as they are."""

    def after_first(change: Callable[[Any], object]) -> OnStep:
        return lambda one, i: change(one) if i == 0 else None

    runs: dict[str, OnStep | None] = {
        "plain": None, "again": None,
        "loaded": after_first(lambda one: (one.load_lora_weights(lora), scale(one, 200.0))),
        "scaled": after_first(lambda one: scale(one, 100.0)),
        "unloaded": after_first(lambda one: one.unload_lora_weights()),
    }  # fmt: skip
    plain = {name: latents(pipe, pixels, on_step) for name, on_step in runs.items()}
    pipe._wrap_step = CUDAGraphCache()
    recorded = {name: latents(pipe, pixels, on_step) for name, on_step in runs.items()}
    pipe._wrap_step = None
    yield (
        "graphs",
        {name: {"error": distance(recorded[name], plain[name]), "allowed": REPLAYED} for name in runs},
    )
    # And each change is seen at all: what it moves is beyond what is allowed.
    moved = {name: distance(plain[name], plain["plain"]) for name in ("loaded", "scaled", "unloaded")}
    yield (
        "what a LoRA moves",
        {name: {"error": 2 * REPLAYED, "allowed": max(by, 1e-30)} for name, by in moved.items()},
    )


def offloads(
    pipe: Any, where: Place, pixels: int, lora: str, net: Any
) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """Both modes against all resident, bit for bit: plain, with a LoRA, with a ControlNet from an image."""
    control = kc.KolorsControlNetImg2ImgPipeline.from_pipe(pipe, controlnet=net)
    given: dict[str, dict[str, Any]] = {
        "text": {}, "LoRA": {},
        "control": {"image": picture(pixels), "control_image": picture(pixels), "strength": 0.8},
    }  # fmt: skip
    for name, arguments in given.items():
        own = control if name == "control" else pipe
        if name == "LoRA":
            own.load_lora_weights(lora)
            scale(own, 200.0)
        expected, cases = latents(own, pixels, **arguments), dict[str, dict[str, float]]()
        for mode, method in OFFLOADS.items():
            getattr(own, method)(device=where.device)
            error = distance(latents(own, pixels, **arguments), expected)
            cases[mode] = {"error": error, "allowed": EXACT}
        own.to(where.device)
        if name == "LoRA":
            own.unload_lora_weights()
        yield f"offload, {name}", cases


def recompiles(where: Place) -> None:
    """Compile the UNet's blocks, draw at three sizes, and write how often the third one compiled."""
    if where.backend is None:
        return where.write("recompiles", None, "nothing is compiled on a simulated device")
    from torch._dynamo.utils import counters

    config, pixels = list(where.checked.values())[0]
    pipe = our_pipeline(where, config, where.bfloat16, where.bfloat16)
    sizes = [pixels, pixels + 64, pixels + 128]
    plain = [latents(pipe, size) for size in sizes]
    kinds = compile_blocks(pipe.unet, backend=where.backend)
    graphs, errors = [counters["stats"]["unique_graphs"]], []
    for size, expected in zip(sizes, plain, strict=True):
        errors.append(distance(latents(pipe, size), expected))
        graphs.append(counters["stats"]["unique_graphs"])
        details = {"kinds": kinds, "compilations": graphs, "errors_against_eager": errors}
        where.write_case("recompiles", details)
    where.write("recompiles", graphs[3] - graphs[2], f"{graphs[1]}, then {graphs[2] - graphs[1]}", details)


def everywhere(where: Place) -> None:
    """Run the tests that are marked for a device, and write how many failed, as each ends."""
    missing = [
        name
        for name in ("pytest", "hypothesis", "diffusers", "transformers", "peft")
        if find_spec(name) is None
    ]
    if missing:
        return where.write("everywhere", None, f"needs {', '.join(missing)}")
    files = sorted(file for file in ROOT.glob("tests/**/test_*.py") if "mark.device" in file.read_text())
    chosen = ["-k", "everywhere and outputs"] if where.is_rehearsal else []
    files = [file for file in files if file.stem == "test_on_a_device"] if where.is_rehearsal else files
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-m", "device", "-v", "--tb=line"]
    command += ["--import-mode=importlib", *chosen, *map(str, files)]
    passed, failed = 0, list[str]()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.match(r"(\S+::.+?) (PASSED|FAILED|ERROR)", line):
                is_good = found[2] == "PASSED"
                passed, failed = passed + is_good, failed + ([] if is_good else [found[1]])
                where.write_case("everywhere", {"test": found[1], "outcome": found[2]})
                if not (passed + len(failed)) % 20:  # the rest may be cut off
                    where.write("everywhere", len(failed), f"{passed} passed so far", {"failed": failed})
    value = len(failed) if passed + len(failed) else None
    where.write("everywhere", value, f"{passed} passed; {line.strip()}", {"failed": failed})
