"""Align the steps: the sigmas that suit a model best: `python -m benchmarks.align_steps OUT [--smallest]`.

A step of Euler's method holds the denoised image D of its first sigma. Along an exact trajectory its error
is known: e * |integral from e to s of (D(t) - D(s)) / t^2 dt| for a step from s to e. Of normal data of
variance 1, which latents nearly are, the rest of the run divides it by sqrt(1 + e^2), and the sum of these
bounds the run's error. On a grid of sigmas it has a term of each step alone, so that dynamic programming
finds its least exactly (as https://arxiv.org/abs/2106.03802 does for the likelihood). "Align your steps"
(https://arxiv.org/abs/2404.14507) descends on a bound for the SDE, whose exact least made images worse here
(NOTES.md).

Writes align_steps.md: the sigmas of 10 steps, as a table that `kolors_core.sigmas.align_your_steps` takes,
and how far the images of each family of sigmas are from a solution of many steps, on other prompts and noise.

With the environment variable KOLORS_WEIGHTS of the checkpoint that it names, else of the embedded model.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.samplers import denoiser_of, distance, open_model
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
GRID, SOLUTION = 100, 400
Sampler = Callable[[Denoiser, Tensor, Sequence[float]], Tensor]
SAMPLERS: dict[str, Sampler] = {"Euler": euler, "DPM++ 2M": dpmpp_2m}


def losses(denoised: Tensor, grid: Sequence[float]) -> np.ndarray:
    """Compute what a step of Euler's method from each sigma of a descending grid to each later one changes.

    denoised [n, N]: at each of n sigmas, along exact trajectories. Returns [n, n], infinite for no step.
    """
    inverse = 1 / torch.tensor(grid, dtype=torch.float64, device=denoised.device)
    held = (denoised[1:] + denoised[:-1]) / 2 * inverse.diff()[:, None]
    integral = torch.cat([torch.zeros_like(held[:1]), held.cumsum(0)])  # of D / t^2, from the first sigma on
    result = np.full((len(grid), len(grid)), np.inf)
    for i in range(len(grid) - 1):
        off = integral[i + 1 :] - integral[i] - denoised[i] * (inverse[i + 1 :] - inverse[i])[:, None]
        result[i, i + 1 :] = (off.square().mean(1).sqrt() / (1 + inverse[i + 1 :] ** 2).sqrt()).cpu().numpy()
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
                errors.append(distance(x, exact))
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
    pipe, model = open_model()
    options.out.mkdir(parents=True, exist_ok=True)
    small = options.smallest
    grid_size, solution, counts = (COUNT + 2, 4, COUNTS[:1]) if small else (GRID, SOLUTION, COUNTS)
    trained = pipe.scheduler.training_sigmas()
    grid = exponential(trained[0].item(), trained[-1].item(), grid_size).tolist()
    denoise, noise = denoiser_of(pipe, PROMPTS[:1] if small else PROMPTS)
    denoised = list[Tensor]()

    def recorded(x: Tensor, sigma: float) -> Tensor:
        denoised.append(denoise(x, sigma))
        return denoised[-1]

    dpmpp_2m(recorded, noise * (grid[0] ** 2 + 1) ** 0.5, grid)
    denoised.append(denoised[-1])  # at the last sigma, where the run ends
    cost = losses(torch.stack(denoised).flatten(1).double(), grid)
    table = tuple(grid[place] for place in shortest(cost, COUNT))
    rows = compare(*denoiser_of(pipe, OTHER_PROMPTS[:1] if small else OTHER_PROMPTS), table, solution, counts)
    write(table, rows, counts, model, options.out / "align_steps.md")


if __name__ == "__main__":
    main()
