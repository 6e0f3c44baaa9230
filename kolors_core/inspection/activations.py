"""Activation statistics: how large the values of units are, how heavy their tails, and which units are dead.

A unit is a channel that a layer reads: of a convolution the values behind SiLU, of a feed-forward's second
matrix those behind GEGLU. Its RMS is over images, places and rows of both prompts. A unit is dead if its RMS
is below `DEAD` of the median unit's of its layer. What units do is tested by setting them to 0.
Shapes: U units, P parts of the images, T steps, L layers.
"""

from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kolors_core.inspection.features import Patterns, capture, inject
from kolors_core.inspection.heat_map import HeatMap
from kolors_core.inspection.intervals import FEWEST, mean_interval
from kolors_core.inspection.prompt_template import (
    TIMESTEPS,
    PromptTemplate,
    Track,
    check_calls,
    generate,
    in_batches,
)
from kolors_core.inspection.token_attention import TextToImage

READERS = ("*.conv2", "*.feed_forward.proj_out", "conv_out")  # layers that read what a nonlinearity returns
DEAD = 0.01  # of the layer's median RMS
PARTS = 6  # of the images: the repeats of the intervals
SHARE = 0.05  # of a layer's units that are set to 0


def moments(x: Tensor) -> Tensor:
    """Compute each unit's mean square, mean fourth power and peak: [3, U] of [B, U, H, W] or [.., U]."""
    units = x.detach().double().movedim(1 if x.ndim == 4 else -1, -1).flatten(0, -2)  # [.., U]
    return torch.stack([units.square().mean(0), units.pow(4).mean(0), units.abs().amax(0)]).cpu()


def silence(units: Tensor, x: Tensor, _step: int = 0) -> Tensor:
    """Return a copy of features [B, U, H, W] or [.., U] with some units set to 0."""
    return x.index_fill(1 if x.ndim == 4 else -1, units.to(x.device), 0)


def record_moments(
    pipe: TextToImage, template: PromptTemplate, layers: Patterns, *, steps: int, images: int, seed: int,
    track: Track = iter, **arguments: Any,
) -> tuple[dict[str, Tensor], list[int]]:  # fmt: skip
    """Record the `moments` of what layers read: layer -> [P, T, 3, U]; and the timesteps."""
    examples = template.examples(images, seed)
    if len(examples) < FEWEST:
        raise ValueError(f"expected at least {FEWEST} images in all, got {len(examples)}")
    parts, timesteps = defaultdict[str, list[Tensor]](list), list[int]()
    for batch in track([examples[i::PARTS] for i in range(min(PARTS, len(examples)))]):
        with capture(pipe.unet, layers, "in", keep=moments) as kept:
            _, timesteps = generate(pipe, batch, steps, **arguments)
        check_calls(kept, timesteps)
        for name, calls in kept.items():
            parts[name].append(torch.stack(calls))
    return {name: torch.stack(part) for name, part in parts.items()}, timesteps


def dead_units(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Find the units that are dead in all steps: layer -> their indices, of layer -> moments [P, T, 3, U]."""
    powers = {name: part[:, :, 0].mean((0, 1)).sqrt() for name, part in found.items()}  # [U]
    return {name: (rms <= DEAD * rms.median()).nonzero()[:, 0] for name, rms in powers.items()}


def measure_silence(
    pipe: TextToImage, template: PromptTemplate, units: Mapping[str, Tensor], *, steps: int, images: int,
    seed: int, **arguments: Any,
) -> Tensor:  # fmt: skip
    """Set units to 0 in all steps: each image's change of the UNet's output, in parts of its RMS: [N].

    The UNet reads the latents of the unchanged run: the mean over steps is of one step's change each.
    """
    changes = []
    for batch in in_batches(pipe, template.examples(images, seed)):
        with capture(pipe.unet, "", "in") as latents, capture(pipe.unet, "") as before:
            generate(pipe, batch, steps, **arguments)
        with ExitStack() as stack:
            stack.enter_context(inject(pipe.unet, latents, "in"))
            silenced = {name: partial(silence, each) for name, each in units.items()}
            stack.enter_context(inject(pipe.unet, silenced, "in"))
            after = stack.enter_context(capture(pipe.unet, ""))
            generate(pipe, batch, steps, **arguments)
        old, new = (torch.stack(kept[""]).double().flatten(2) for kept in (before, after))  # [T, rows, ..]
        ratios = (new - old).norm(dim=2) / old.norm(dim=2)
        changes.append(ratios.unflatten(1, (-1, len(batch))).mean((0, 1)))
    return torch.cat(changes)


def activations(
    pipe: TextToImage, template: PromptTemplate, layers: Patterns = READERS, *, steps: int = 10,
    images: int = 1, seed: int = 0, track: Track = iter, **arguments: Any,
) -> tuple[str, list[HeatMap]]:  # fmt: skip
    """Measure what layers read, by step; a summary of dead and weak units, and the heat maps.

    layers: patterns of `capture`, of modules called once a step. images: of each prompt. Units are chosen on
    these images, and set to 0 on as many of other noise. arguments: the pipeline call's others. ValueError
    for fewer images in all than `FEWEST`, and as in `check_calls`.
    """
    named: dict[str, Any] = {"steps": steps, "images": images} | arguments
    found, timesteps = record_moments(pipe, template, layers, seed=seed, track=track, **named)
    other_seed, count = seed + len(template.examples(images, seed)), sum(x.shape[-1] for x in found.values())
    again, _ = record_moments(pipe, template, layers, seed=other_seed, track=track, **named)
    dead, still = dead_units(found), dead_units(again)
    both = sum(int(torch.isin(units, still[name]).sum()) for name, units in dead.items())
    generator, weak, others = torch.Generator().manual_seed(seed), {}, {}
    for name, part in found.items():
        order, few = part[:, :, 0].mean((0, 1)).argsort(), -(-part.shape[-1] // round(1 / SHARE))
        weak[name], others[name] = order[:few], torch.randperm(len(order), generator=generator)[:few]
    texts = []
    for units in (weak, others):
        mean, half = mean_interval(measure_silence(pipe, template, units, seed=other_seed, **named))
        texts.append(f"{float(mean):.3f} ± {float(half):.3f}")
    summary = (
        f"{sum(map(len, dead.values()))} of {count} units are dead, on other noise {both} of them. There, "
        f"setting each layer's weakest {SHARE:.0%} of units to 0 changes the UNet's output by {texts[0]} of "
        f"its RMS, as many at random by {texts[1]}."
    )
    return summary, heat_maps(found, timesteps)


def heat_maps(found: Mapping[str, Tensor], timesteps: list[int]) -> list[HeatMap]:
    """Make the heat maps of moments [P, T, 3, U]: RMS, kurtosis, peak, weakest unit."""
    tables = defaultdict[tuple[str, str], list[Tensor]](list)
    for moments_of in found.values():
        power, fourth, peak = moments_of.clamp(min=1e-30).unbind(2)  # [P, T, U]
        rms, middle = power.mean(-1).sqrt(), power.median(-1).values.sqrt()
        tables["RMS of all units", "no unit"].append(rms)
        kurtosis = (fourth / power.square()).median(-1).values
        tables["Kurtosis of the median unit", "E x^4 / (E x^2)^2, 3 of a normal variable"].append(kurtosis)
        tables["Largest size of a value, in RMS", "what one scale for the layer has to hold"].append(
            peak.amax(-1) / rms
        )
        weakest = power.amin(-1).sqrt() / middle
        tables["RMS of the weakest unit, in that of the median", f"dead up to {DEAD}"].append(weakest)
    maps = []
    for (title, note), parts in tables.items():
        mean, half = mean_interval(torch.stack(parts, dim=1))  # [L, T]
        note += f"; 95% intervals to ±{float((half / mean).max()):.0%}"
        columns, bounds = [str(timestep) for timestep in timesteps], (0.0, float(mean.max()))
        maps.append(HeatMap(title, note, "layer", list(found), TIMESTEPS, columns, mean, mean - half,
                            mean + half, bounds))  # fmt: skip
    return maps
