"""Where a stage runs and at what size, and the pipelines with random weights that it measures."""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.pairs import make_ours, make_pair, make_reference
from benchmarks.side_by_side import Race, nothing
from benchmarks.speed.gpu.book import append_line
from benchmarks.speed.gpu.rows import make_row
from kolors_core import DPMSolverMultistepScheduler, KolorsPipeline
from kolors_core.checkpoint import EMBEDDED
from kolors_core.config import KOLORS, TINY, KolorsConfig

PROMPT = "a photo of a ladybug, a red apple and a basketball, please"
SEED = 20240710
# All widths of the large one, in which the sums that rounding moves are as long, and few layers.
MIDDLE = replace(
    KOLORS, text_encoder=replace(KOLORS.text_encoder, layers=3), unet=replace(KOLORS.unet, depths=(0, 1, 2))
)  # fmt: skip
REHEARSED = replace(TINY, unet=replace(TINY.unet, channels=(64, 96), heads=(2, 3), depths=(0, 1)))


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the stages run, and what they write to. pixels, few_pixels: of images, where the GPU and where
    launches are the bound. rounds: of races. checked: the models of the checks, and their images' pixels.
    backend: the compiler's, None where nothing can be compiled.
    """

    out: Path
    device: str = "cuda"
    config: KolorsConfig = KOLORS
    pixels: int = 1024
    few_pixels: int = 512
    steps: int = 25
    rounds: int = 2
    checked: Mapping[str, tuple[KolorsConfig, int]]
    backend: str | None = "inductor"
    is_rehearsal: bool = False
    wait: Callable[[], None] = nothing

    @property
    def half(self) -> torch.dtype:
        """fp16, which a CPU is too slow in."""
        return torch.float32 if self.is_rehearsal else torch.float16

    @property
    def bfloat16(self) -> torch.dtype:
        """bfloat16, which a CPU is too slow in for small models."""
        return torch.float32 if self.is_rehearsal else torch.bfloat16

    def write(
        self, name: str, value: float | None, note: str = "", details: Mapping[str, Any] | None = None,
        race: Race | None = None,
    ) -> None:  # fmt: skip
        """Write a row, whose name is one of rows.GOALS, and print it."""
        size = {"size": f"{self.pixels}x{self.pixels}, {self.steps} steps"}
        row = make_row(
            name, value, note=note, details=size | dict(details or {}), race=race,
            is_rehearsal=self.is_rehearsal,
        )  # fmt: skip
        append_line(asdict(row), self.out)
        print(row.line(), flush=True)

    def write_case(self, name: str, case: Mapping[str, Any]) -> None:
        """Write what was measured for a row before the row itself."""
        append_line({"case_of": f"gpu_{name}", **case}, self.out)


def cuda_place(out: Path) -> Place:
    """One CUDA device, at full size."""
    checked = {"small": (TINY, 256), "middle": (MIDDLE, 512)}
    return Place(out=out, checked=checked, wait=torch.cuda.synchronize)


def rehearsal(out: Path, device: str = "cpu") -> Place:
    """Two levels of the embedded model on the CPU, or on a device that is simulated and cannot compile."""
    return Place(
        out=out, device=device, config=REHEARSED, pixels=64, few_pixels=32, steps=4, rounds=1,
        checked={"small": (REHEARSED, 32)}, backend="eager" if device == "cpu" else None, is_rehearsal=True,
    )  # fmt: skip


def our_pipeline(where: Place, config: KolorsConfig, dtype: torch.dtype, vae_dtype: torch.dtype) -> Any:
    """Ours alone, on the device."""
    dtypes = {"text_encoder": dtype, "unet": dtype, "vae": vae_dtype}
    return _ready(
        {name: make_ours(getattr(config, name), SEED, dtypes[name], where.device) for name in dtypes}
    )


def pipelines(where: Place, dtype: torch.dtype, vae_dtype: torch.dtype) -> tuple[Any, Any, str]:
    """The reference's and ours on the same random weights; or None, ours alone, and why.

    Without kept prompts: each run encodes its own.
    """
    try:
        import diffusers

        dtypes = {"text_encoder": dtype, "unet": dtype, "vae": vae_dtype}
        pairs = {
            name: make_pair(name, getattr(where.config, name), SEED, dtypes[name], where.device)
            for name in dtypes
        }
        theirs, ours = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))
        if vae_dtype != dtype:  # the reference has it in the pipeline's dtype, and casts it in every call
            theirs["vae"] = make_reference(where.config.vae, SEED, dtype, where.device)
        reference = diffusers.KolorsPipeline.from_pretrained(EMBEDDED, **theirs)
        solver = diffusers.DPMSolverMultistepScheduler
        reference.scheduler = solver.from_config(reference.scheduler.config, use_karras_sigmas=True)
        reference.set_progress_bar_config(disable=True)
        return reference, _ready(ours), ""
    except (ImportError, RuntimeError, TypeError, ValueError, AttributeError, OSError) as error:
        traceback.print_exc()
        why = f"the reference is not measured: {type(error).__name__}: {error}"[:200]
        return None, our_pipeline(where, where.config, dtype, vae_dtype), why


def _ready(models: Mapping[str, Any]) -> Any:
    pipe = KolorsPipeline.from_pretrained("tiny", **models)
    pipe.savings = replace(pipe.savings, cached_prompts=0)
    scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawing(pipe: Any, where: Place, pixels: int, count: int = 1, **given: Any) -> Callable[[], Any]:
    """Prompt to PIL images, from the same noise each time."""
    arguments: dict[str, Any] = {
        "height": pixels, "width": pixels, "num_inference_steps": where.steps, "guidance_scale": 5.0,
        "num_images_per_prompt": count,
    }  # fmt: skip
    return lambda: pipe(PROMPT, generator=torch.Generator().manual_seed(0), **arguments | given)


def distance(got: Tensor, expected: Tensor) -> float:
    """|x - y| / |y|, Euclidean, in float64; NaN where either has one."""
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    return ((got - expected).norm() / expected.norm()).item()
