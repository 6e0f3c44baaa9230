"""Align the steps: the sigmas that suit a model best: `python -m benchmarks.align_steps OUT [--smallest]`.

"Align your steps" (https://arxiv.org/abs/2404.14507) chooses sigmas by the bound of its theorem 3.1: a step
holds the denoised image D of its first sigma s, and loses the integral of E|D(x_t, t) - D(x_s, s)|^2 / t^3
over the sigmas t that it passes, where x_s and x_t are of one path of noise. The paper descends on it by
sampling; on a grid of sigmas the sum has a term of each step alone, so that dynamic programming finds its
least exactly (as https://arxiv.org/abs/2106.03802 does for the likelihood).

The paths end in the model's own images. Writes align_steps.md: the sigmas of 10 steps, as a table that
`kolors_core.sigmas.align_your_steps` takes, and how far the images of each family of sigmas are from a
solution of many steps, on other prompts and noise.

With the environment variable KOLORS_WEIGHTS of the checkpoint that it names, else of the embedded model.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.samplers import VARIABLE, denoiser_of
from kolors_core.checkpoint import EMBEDDED_NAME
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.sampling import Denoiser, dpmpp_2m, euler
from kolors_core.sampling_deterministic import heun
from kolors_core.sigmas import align_your_steps, exponential, karras

PROMPTS = (
    "a red apple", "two foxes to the left of a fire truck", "三个气球", "一只猫头鹰在城堡的上面",
    "a guitar, a drum and a violin", "草地上，两只绵羊和一个房屋", "a panda", "一个蛋糕",
    "a rocket in the night sky", "一条鱼", "three penguins on a blue background", "一辆公共汽车",
)  # fmt: skip
OTHER_PROMPTS = ("a cat and a red apple", "一张瓢虫的照片", "two sheep on the grass", "一个雪人和一个圣诞树")
COUNT, COUNTS = 10, (6, 8, 10, 15, 20)  # steps of the table, and of the comparison
GRID, STEPS, SOLUTION = 80, 50, 400
Sampler = Callable[[Denoiser, Tensor, Sequence[float]], Tensor]
SAMPLERS: dict[str, Sampler] = {"Euler": euler, "DPM++ 2M": dpmpp_2m}


def losses(
    denoise: Denoiser, images: Tensor, grid: Sequence[float], generator: torch.Generator
) -> np.ndarray:
    """Compute what a step loses from each sigma of a descending grid [n] to each later one: [n, n].

    images [B, ...]: where the paths of noise end, on the CPU or where the model is.
    """
    x, denoised = images, list[Tensor]()
    for i in reversed(range(len(grid))):  # the path from the image upwards
        lower = grid[i + 1] if i + 1 < len(grid) else 0.0
        noise = torch.randn(x.shape, generator=generator).to(x)
        x = x + (grid[i] ** 2 - lower**2) ** 0.5 * noise
        denoised.insert(0, denoise(x, grid[i]).flatten())
    found = torch.stack(denoised).double()
    weights = np.diff(0.5 / np.square(np.array(grid)))  # the integral of 1 / t^3 between neighbors
    result = np.full((len(grid), len(grid)), np.inf)
    for i in range(len(grid) - 1):
        change = (found[i:] - found[i]).square().mean(1).cpu().numpy()
        result[i, i + 1 :] = np.cumsum((change[1:] + change[:-1]) / 2 * weights[i:])
    return result


def shortest(cost: np.ndarray, steps: int) -> list[int]:
    """Find the cheapest path of so many steps from the first to the last place: its steps + 1 places."""
    best, came = cost[0], list[np.ndarray]()
    for _ in range(steps - 1):
        through = best[:, None] + cost
        came.append(through.argmin(0))
        best = through.min(0)
    places = [len(cost) - 1]
    for before in reversed(came):
        places.insert(0, int(before[places[0]]))
    return [0, *places]


def compare(denoise: Denoiser, noise: Tensor, table: tuple[float, ...], solution: int,
            counts: Sequence[int]) -> list[tuple[str, list[float]]]:  # fmt: skip
    """Measure |x - x*| / |x*| of each sampler and family at each number of steps."""
    high, low = table[0], table[-1]
    families: dict[str, Callable[[int], np.ndarray]] = {
        "Karras": lambda n: karras(low, high, n), "exponential": lambda n: exponential(low, high, n),
        "aligned for SDXL": align_your_steps, "aligned for this model": lambda n: align_your_steps(n, table),
    }  # fmt: skip
    exact = heun(denoise, noise * (high**2 + 1) ** 0.5, [*karras(low, high, solution).tolist(), 0.0])
    rows = list[tuple[str, list[float]]]()
    for name, sampler in SAMPLERS.items():
        for family, sigmas_of in families.items():
            errors = list[float]()
            for steps in counts:
                sigmas = [*sigmas_of(steps).tolist(), 0.0]
                x = sampler(denoise, noise * (sigmas[0] ** 2 + 1) ** 0.5, sigmas)
                errors.append(((x - exact).norm() / exact.norm()).item())
            rows.append((f"{name}, {family}", errors))
    return rows


def write(table: tuple[float, ...], rows: Sequence[tuple[str, list[float]]], counts: Sequence[int],
          model: str, file: Path) -> None:  # fmt: skip
    """Write the table and the comparison."""
    lines = [
        f"# Aligned steps, {model}",
        "",
        f"Sigmas of {COUNT} steps and where they end, by `python -m benchmarks.align_steps OUT`:",
        "",
        f"    ({', '.join(f'{sigma:.3f}' for sigma in table)})",
        "",
        "Distance to the solution by its norm, other prompts and noise, by steps:",
        "",
        f"| | {' | '.join(map(str, counts))} |",
        f"|---|{'---|' * len(counts)}",
        *(f"| {name} | {' | '.join(f'{error:.3f}' for error in errors)} |" for name, errors in rows),
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.align_steps", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--smallest", action="store_true", help="few sigmas and steps, to see that it runs")
    options = parser.parse_args(arguments)
    name = os.environ.get(VARIABLE)
    pipe = KolorsPipeline.from_pretrained(EMBEDDED_NAME if name is None else name)
    if torch.cuda.is_available():
        pipe.to("cuda")
    pipe.set_progress_bar_config(disable=True)
    options.out.mkdir(parents=True, exist_ok=True)
    small = options.smallest
    grid_size, steps, solution, counts = (
        (COUNT + 2, 2, 4, COUNTS[:1]) if small else (GRID, STEPS, SOLUTION, COUNTS)
    )
    trained = pipe.scheduler.training_sigmas()
    grid = exponential(trained[0].item(), trained[-1].item(), grid_size).tolist()
    denoise, noise = denoiser_of(pipe, PROMPTS[:1] if small else PROMPTS)
    start = noise * (grid[0] ** 2 + 1) ** 0.5
    images = dpmpp_2m(denoise, start, [*karras(grid[-1], grid[0], steps).tolist(), 0.0])
    cost = losses(denoise, images, grid, torch.Generator().manual_seed(1))
    table = tuple(grid[place] for place in shortest(cost, COUNT))
    rows = compare(*denoiser_of(pipe, OTHER_PROMPTS[:1] if small else OTHER_PROMPTS), table, solution, counts)
    model = "embedded model" if name is None else f"what {VARIABLE} names"
    write(table, rows, counts, model, options.out / "align_steps.md")


if __name__ == "__main__":
    main()
