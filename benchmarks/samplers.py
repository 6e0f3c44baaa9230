"""All samplers side by side: `python -m benchmarks.samplers OUT [--smallest]`.

Writes samplers.md and samplers.png, the error of each deterministic sampler against a solution of 1,000 steps
of Heun's method, by evaluations of the UNet; and images.png, the same image by every sampler of the command
line at 4, 8, 16 and 25 steps. All errors are from the same noise, at Karras' sigmas from the largest to the
smallest training sigma, with timesteps that are not rounded: schedulers differ in these too, and a curve is
of the method alone. Of samplers that draw noise there is no solution to compare with; they are in the images.

With the environment variable KOLORS_WEIGHTS of the checkpoint that it names, else of the embedded model.
--smallest: few steps and one prompt, to see that it runs. Needs the `bench` extra.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from kolors_core.checkpoint import EMBEDDED_NAME
from kolors_core.cli.samplers import OWN, SAMPLERS, choose_scheduler
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.sampling import Denoiser, OnStep, Sigmas
from kolors_core.sampling_deterministic import heun
from kolors_core.schedule import Schedule, Scheduler
from kolors_core.schedulers import SCHEDULERS
from kolors_core.sigmas import karras

VARIABLE = "KOLORS_WEIGHTS"
PROMPTS = ("a red apple", "一张瓢虫的照片")
BUDGETS = (6, 8, 12, 16, 24, 32, 48, 64)  # evaluations of the UNet
STEPS = (4, 8, 16, 25)
SOLUTION = 1000
GUIDANCE, SEED, GAP, LABEL = 5.0, 7, 4, 150
# Schedulers of the curves; those of flows and of EDM are of other models.
CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler, DDIM": ("EulerDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "PNDM": ("PNDMScheduler", {}),
}
Errors = dict[str, list[tuple[int, float]]]  # of each curve: evaluations and error


def open_model() -> tuple[KolorsPipeline, str]:
    """Load the checkpoint that KOLORS_WEIGHTS names, or the embedded model; also what to call it."""
    name = os.environ.get(VARIABLE)
    pipe = KolorsPipeline.from_pretrained(EMBEDDED_NAME if name is None else name)
    if torch.cuda.is_available():
        pipe.to("cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe, "embedded model" if name is None else f"what {VARIABLE} names"


def distance(x: Tensor, solution: Tensor) -> float:
    """Compute |x - x*| / |x*|."""
    return ((x - solution).norm() / solution.norm()).item()


def denoiser_of(pipe: KolorsPipeline, prompts: Sequence[str]) -> tuple[Denoiser, Tensor]:
    """Return the guided denoiser of the prompts, at any sigma, and standard normal noise."""
    held: list[tuple[Denoiser, Tensor]] = []

    def keep(denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None) -> Tensor:
        held.append((denoise, torch.randn(x.shape, generator=torch.Generator().manual_seed(SEED)).to(x)))
        return x

    own, pipe.scheduler = pipe.scheduler, choose_scheduler(pipe.scheduler, "euler", "leading")
    pipe.sampler = keep
    pipe(list(prompts), num_inference_steps=2, guidance_scale=GUIDANCE, output_type="latent")
    pipe.sampler, pipe.scheduler = None, own
    return held[0]


def steps_within(scheduler: Scheduler, evaluations: int, sigmas_of: Any) -> Schedule:
    """Return the schedule of the most steps that take no more evaluations."""
    steps = evaluations
    while scheduler.evaluations(schedule := sigmas_of(scheduler, steps)) > evaluations:
        steps -= 1
    return schedule


def measure(pipe: KolorsPipeline, prompts: Sequence[str], budgets: Sequence[int], solution: int) -> Errors:
    """Measure |x - x*| / |x*| of each curve at each number of evaluations; x: the latents of all prompts."""
    denoise, noise = denoiser_of(pipe, prompts)
    table = pipe.scheduler.training_sigmas()
    low, high = table[0].item(), table[-1].item()
    start = noise * (high**2 + 1) ** 0.5

    def schedule_of(scheduler: Scheduler, steps: int) -> Schedule:
        sigmas = torch.tensor([*karras(low, high, steps), 0.0], dtype=torch.float64)
        return replace(scheduler.schedule(sigmas=sigmas.tolist()), sigmas=sigmas)

    exact = heun(denoise, start, [*karras(low, high, solution).tolist(), 0.0])
    found: Errors = {}
    for label, (name, fields) in CURVES.items():
        scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config, **fields)
        found[label] = []
        for budget in budgets:
            schedule = steps_within(scheduler, budget, schedule_of)
            x = scheduler.sampler(schedule, lambda: noise)(denoise, start, schedule.sigmas)
            found[label].append((scheduler.evaluations(schedule), distance(x, exact)))
    return found


def write_table(errors: Errors, budgets: Sequence[int], model: str, solution: int, file: Path) -> None:
    """Write a row for each curve, a column for each number of evaluations; the least of a column is bold."""
    least = [min(curve[i][1] for curve in errors.values()) for i in range(len(budgets))]
    lines = [
        f"# Error by evaluations of the UNet, {model}",
        "",
        f"Distance to the solution of {solution:,} steps of Heun's method by its norm, from one noise, at",
        "Karras' sigmas. `python -m benchmarks.samplers OUT` writes it.",
        "",
        f"| evaluations, at most | {' | '.join(map(str, budgets))} |",
        f"|---|{'---|' * len(budgets)}",
    ]
    for label, curve in errors.items():
        cells = [
            f"**{error:.2g}**" if error == best else f"{error:.2g}"
            for (_, error), best in zip(curve, least, strict=True)
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot(errors: Errors, model: str, pyplot: Any, file: Path) -> None:
    """Write the curves."""
    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    for i, (label, curve) in enumerate(errors.items()):
        axes.plot(*zip(*curve, strict=True), "os^vDP*Xdp"[i] + "-", label=label, markersize=5, linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="evaluations of the UNet", ylabel="relative error")
    ticks = sorted({evaluations for curve in errors.values() for evaluations, _ in curve})
    axes.set_xticks(ticks[::2], [str(tick) for tick in ticks[::2]])
    axes.minorticks_off()
    axes.set_title(f"Distance to the solution, {model}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


def draw(pipe: KolorsPipeline, prompt: str, steps: Sequence[int], side: int, file: Path) -> None:
    """Draw a row for each sampler of the command line, a column for each number of steps, one seed."""
    names, own = [name for name in SAMPLERS if name != OWN], pipe.scheduler
    page = Image.new("RGB", (LABEL + (side + GAP) * len(steps), (side + GAP) * len(names) + 20), "white")
    pen = ImageDraw.Draw(page)
    for column, count in enumerate(steps):
        pen.text((LABEL + (side + GAP) * column, 4), f"{count} steps", fill="black")
    for row, name in enumerate(names):
        pipe.scheduler = choose_scheduler(own, name, None)
        top = 20 + (side + GAP) * row
        pen.text((4, top + side // 2), name, fill="black")
        for column, count in enumerate(steps):
            generator = torch.Generator().manual_seed(SEED)
            given: dict[str, Any] = {"num_inference_steps": count, "guidance_scale": GUIDANCE}
            image = pipe(prompt, generator=generator, **given).images[0]
            page.paste(image.resize((side, side)), (LABEL + (side + GAP) * column, top))
    pipe.scheduler = own
    page.quantize(256).save(file, optimize=True)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.samplers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--smallest", action="store_true", help="few steps and one prompt")
    options = parser.parse_args(arguments)
    from matplotlib import pyplot  # what the plot needs is found missing before the work, not after

    pipe, model = open_model()
    options.out.mkdir(parents=True, exist_ok=True)
    small = options.smallest
    prompts, budgets, steps = (PROMPTS[:1], (4, 6), (1,)) if small else (PROMPTS, BUDGETS, STEPS)
    solution = 20 if small else SOLUTION
    errors = measure(pipe, prompts, budgets, solution)
    write_table(errors, budgets, model, solution, options.out / "samplers.md")
    plot(errors, model, pyplot, options.out / "samplers.png")
    side = pipe.unet.config.sample_size * pipe.vae.config.vae_scale_factor
    draw(pipe, prompts[0], steps, min(side, 256), options.out / "images.png")


if __name__ == "__main__":
    main()
