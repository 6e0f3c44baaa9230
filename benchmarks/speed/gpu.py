"""The whole pipeline at full size on one CUDA device: `python -m benchmarks.speed.gpu OUT [--only STAGE]`.

Random weights made on the device, 25 steps, 1024x1024, guidance on. Stages, each of which a run can do alone:
eager: both in fp16 as their `from_pretrained` leaves them, the VAE in float32.
compiled: both in bfloat16, the VAE too, since the reference's documented way does not run with a float32 VAE.
memory: ours in fp16, all resident, staged and smallest, the peak that torch has allocated.
batch: ours eager in fp16, 8 images at once and one after another.
attention: ours eager in fp16, with the kernels that torch chooses and with cuDNN's where it can.
Without CUDA all of it runs at the embedded model's size on the CPU, and every row is a rehearsal or empty.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch

from benchmarks.pairs import make_pair, make_reference
from benchmarks.side_by_side import Goal, Row, below, nothing, race, share, timed
from benchmarks.speed import arguments
from kolors_core import DPMSolverMultistepScheduler, KolorsPipeline
from kolors_core.attention import attention_kernel
from kolors_core.checkpoint import EMBEDDED
from kolors_core.config import KOLORS, TINY, KolorsConfig

PROMPT = "a photo of a ladybug, a red apple and a basketball, please"
SEED, BATCH, MODE = 20240710, 8, "max-autotune"
# https://huggingface.co/docs/diffusers/optimization/fp16, "torch.compile"
INDUCTOR = {
    "conv_1x1_as_mm": True, "coordinate_descent_tuning": True, "epilogue_fusion": False,
    "coordinate_descent_check_all_directions": True,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and at what size the stages run."""

    device: str
    config: KolorsConfig
    pixels: int
    steps: int
    wait: Callable[[], None]

    @property
    def is_rehearsal(self) -> bool:
        """On a CPU."""
        return self.device == "cpu"

    @property
    def half(self) -> torch.dtype:
        """fp16, which a CPU is too slow in."""
        return torch.float32 if self.is_rehearsal else torch.float16


def place() -> Place:
    """One CUDA device, or else a rehearsal."""
    if torch.cuda.is_available():
        return Place(device="cuda", config=KOLORS, pixels=1024, steps=25, wait=torch.cuda.synchronize)
    return Place(device="cpu", config=TINY, pixels=128, steps=2, wait=nothing)


def pipelines(where: Place, dtype: torch.dtype, vae_dtype: torch.dtype) -> tuple[Any, KolorsPipeline]:
    """The reference's and ours on the same random weights, without kept prompts: each run encodes its own."""
    dtypes = {"text_encoder": dtype, "unet": dtype, "vae": vae_dtype}
    pairs = {
        name: make_pair(name, getattr(where.config, name), SEED, dtypes[name], where.device)
        for name in dtypes
    }
    theirs, ours = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))
    if vae_dtype != dtype:  # the reference has it in the pipeline's dtype, and casts it in every call
        theirs["vae"] = make_reference(where.config.vae, SEED, dtype, where.device)
    reference = diffusers.KolorsPipeline.from_pretrained(EMBEDDED, **theirs)
    pipe = KolorsPipeline.from_pretrained("tiny", **ours)
    pipe.savings = replace(pipe.savings, cached_prompts=0)
    for one, solver in (
        (reference, diffusers.DPMSolverMultistepScheduler),
        (pipe, DPMSolverMultistepScheduler),
    ):
        one.scheduler = solver.from_config(one.scheduler.config, use_karras_sigmas=True)
        one.set_progress_bar_config(disable=True)
    return reference, pipe


def drawing(pipe: Any, where: Place, count: int = 1) -> Callable[[], None]:
    """Prompt to PIL images."""

    def run() -> None:
        pipe(
            PROMPT, height=where.pixels, width=where.pixels, num_inference_steps=where.steps,
            guidance_scale=5.0, num_images_per_prompt=count, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    return run


def eager(where: Place, rounds: int) -> list[Row]:
    """Both as they are loaded."""
    reference, pipe = pipelines(where, where.half, torch.float32)
    runs = {"reference": drawing(reference, where), "ours": drawing(pipe, where)}
    result = race({name: timed(run, where.wait) for name, run in runs.items()}, rounds, warm_ups=2)
    value = result.ratio("ours", "reference")
    return [
        row(where, "eager", "eager, fp16, prompt to image", share(0.65, "time"), value, race=result)
    ]  # fmt: skip


def compiled(where: Place, rounds: int) -> list[Row]:
    """Both compiled, each the best way that its documentation has."""
    goals = share(0.85, "time"), below(0.8, "s")
    works = "compiled, bfloat16, prompt to image", "compiled, bfloat16, prompt to image, absolute"
    names = "compiled", "seconds"
    reference, pipe = pipelines(where, torch.bfloat16, torch.bfloat16)
    runs = {"reference": drawing(reference, where), "ours": drawing(pipe, where)}
    reference.fuse_qkv_projections()
    reference.unet.to(memory_format=torch.channels_last)
    reference.vae.to(memory_format=torch.channels_last)
    reference.unet = torch.compile(reference.unet, mode=MODE, fullgraph=True)
    reference.vae.decode = torch.compile(reference.vae.decode, mode=MODE, fullgraph=True)
    with torch._inductor.config.patch(INDUCTOR):
        runs["reference"]()
    pipe.compile(mode=MODE)
    result = race({name: timed(run, where.wait) for name, run in runs.items()}, rounds, warm_ups=3)
    values = result.ratio("ours", "reference"), result.median("ours")
    return [
        row(where, *which, race=result) for which in zip(names, works, goals, values, strict=True)
    ]  # fmt: skip


def memory(where: Place, _rounds: int) -> list[Row]:
    """The peak of ours in its three placements."""
    reference, pipe = pipelines(where, where.half, torch.float32)
    for name in ("text_encoder", "unet", "vae"):
        getattr(reference, name).to("meta")  # ours still has the shared weights
    placements = {
        "resident": ("all resident, VAE in tiles", 19, ["enable_vae_tiling"]),
        "staged": ("staged", 13, ["enable_model_cpu_offload"]),
        "smallest": ("smallest", 5, ["enable_sequential_cpu_offload", "enable_vae_tiling"]),
    }
    rows = []
    for name, (work, limit, methods) in placements.items():
        goal = below(limit, "GiB")
        pipe.disable_vae_tiling()
        for method in methods:
            getattr(pipe, method)()
        value, details = peak(drawing(pipe, where), where)
        rows.append(row(where, f"memory_{name}", f"peak GPU memory, {work}", goal, value, details=details))
    return rows


def peak(run: Callable[[], None], where: Place) -> tuple[float | None, dict[str, float]]:
    """GiB allocated at the peak of a second run, and reserved; None where memory is not the device's own."""
    run()
    if where.is_rehearsal:
        return None, {}
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    reserved = torch.cuda.max_memory_reserved() / 2**30
    return torch.cuda.max_memory_allocated() / 2**30, {"reserved_gib": reserved}


def batch(where: Place, rounds: int) -> list[Row]:
    """Several images at once against one after another."""
    _, pipe = pipelines(where, where.half, torch.float32)
    runs = {"one": drawing(pipe, where), "batch": drawing(pipe, where, BATCH)}
    result = race({name: timed(run, where.wait) for name, run in runs.items()}, rounds)
    goal = Goal(limit=1.1, unit="times one at a time", at_least=True, is_ratio=False)
    work = f"batch of {BATCH}, eager, fp16, images a second"
    return [row(where, "batch", work, goal, BATCH * result.ratio("one", "batch"), race=result)]


def attention(where: Place, rounds: int) -> list[Row]:
    """torch's choice of attention kernels against the forced "cudnn_first"."""
    _, pipe = pipelines(where, where.half, torch.float32)
    run = drawing(pipe, where)

    def forced() -> None:
        with attention_kernel("cudnn_first"):
            run()

    runs = {"chosen": run, "cudnn_first": forced}
    result = race({name: timed(one, where.wait) for name, one in runs.items()}, rounds, warm_ups=2)
    goal, work = below(1.0, "times cuDNN first"), "torch's choice of attention kernels, eager, fp16"
    return [row(where, "attention", work, goal, result.ratio("chosen", "cudnn_first"), race=result)]


def row(where: Place, name: str, work: str, goal: Goal, value: float | None, **more: Any) -> Row:
    """A row of this file."""
    size = f"{where.pixels}x{where.pixels}, {where.steps} steps"
    return Row(
        name=f"gpu_{name}", work=f"{work}, one GPU", goal=goal, value=value, is_rehearsal=where.is_rehearsal,
        details={"size": size} | more.pop("details", {}), **more,
    )  # fmt: skip


STAGES = {"eager": eager, "compiled": compiled, "memory": memory, "batch": batch, "attention": attention}


def main() -> None:
    """Measure and write."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--only", choices=STAGES, help="one stage")
    options = parser.parse_args()
    where = place()
    for name in [options.only] if options.only else STAGES:
        for one in STAGES[name](where, options.rounds):
            one.write(options.out)
        torch.compiler.reset()
        gc.collect()


if __name__ == "__main__":
    main()
