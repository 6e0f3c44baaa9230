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
    """Record the `moments` of what layers read: layer -> [P, T, 3, U]; and the timesteps.

    ValueError for fewer images in all than `FEWEST` parts.
    """
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
    return {name: (rms < DEAD * rms.median()).nonzero()[:, 0] for name, rms in powers.items()}


def measure_silence(
    pipe: TextToImage, template: PromptTemplate, units: Mapping[str, Tensor], *, steps: int, images: int,
    seed: int, **arguments: Any,
) -> Tensor:  # fmt: skip
    """Set units to 0 in all steps: each image's change of the UNet's output, in parts of its RMS: [N].

    The UNet reads the latents of the unchanged run: the mean over steps is of one step's change each.
    """
    changes = []
    for batch in in_batches(template.examples(images, seed)):
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
    these images, and set to 0 on as many of other noise. arguments: the pipeline call's others.
    """
    named: dict[str, Any] = {"steps": steps, "images": images} | arguments
    found, timesteps = record_moments(pipe, template, layers, seed=seed, track=track, **named)
    names, other_seed = list(found), seed + len(template.examples(images, seed))
    dead, count = dead_units(found), sum(part.shape[-1] for part in found.values())
    again, _ = record_moments(pipe, template, layers, seed=other_seed, track=track, **named)
    still = sum(
        len(set(dead[name].tolist()) & set(each.tolist())) for name, each in dead_units(again).items()
    )
    generator, weak, others = torch.Generator().manual_seed(seed), {}, {}
    for name, part in found.items():
        order, few = part[:, :, 0].mean((0, 1)).argsort(), -(-part.shape[-1] // round(1 / SHARE))
        weak[name], others[name] = order[:few], torch.randperm(len(order), generator=generator)[:few]
    changes = [mean_interval(measure_silence(pipe, template, units, seed=other_seed, **named))
               for units in (weak, others)]  # fmt: skip
    texts = [f"{float(mean):.3f} ± {float(half):.3f}" for mean, half in changes]
    total = sum(len(each) for each in dead.values())
    summary = (
        f"{total} of {count} units are dead, {still} of them on other noise too. On other noise, setting "
        f"each layer's weakest {SHARE:.0%} of units to 0 changes the UNet's output by {texts[0]} of their "
        f"RMS, as many at random by {texts[1]}."
    )
    return summary, heat_maps(found, names, timesteps)


def heat_maps(found: Mapping[str, Tensor], names: list[str], timesteps: list[int]) -> list[HeatMap]:
    """Make the heat maps of moments [P, T, 3, U]: RMS, kurtosis, largest value, weakest unit."""
    rows = defaultdict[str, list[Tensor]](list)
    for name in names:
        power, fourth, peak = found[name].unbind(2)  # [P, T, U]
        rms = power.mean(-1).sqrt()
        rows["RMS"].append(rms)
        rows["kurtosis"].append((fourth / power.square().clamp(min=1e-30)).median(-1).values)
        rows["peak"].append(peak.amax(-1) / rms)
        rows["weakest"].append(power.amin(-1).sqrt() / power.median(-1).values.sqrt())
    titles = {
        "RMS": ("RMS of all units", "in the layer's own unit", 1.0),
        "kurtosis": (
            "kurtosis of the median unit",
            "fourth by squared second moment; 3: a normal variable",
            30.0,
        ),
        "peak": ("largest value, in RMS", "what a layer-wide scale of 8 bits has to hold", 40.0),
        "weakest": ("RMS of the weakest unit, in the median unit's", f"dead below {DEAD}", 1.0),
    }
    maps = []
    for key, (title, note, most) in titles.items():
        mean, half = mean_interval(torch.stack(rows[key], dim=1))  # [L, T]
        note += f"; 95% intervals to ±{float((half / mean).max()):.0%}"
        columns = [str(timestep) for timestep in timesteps]
        low, high = mean - half, mean + half
        maps.append(HeatMap(title, note, "layer", names, TIMESTEPS, columns, mean, low, high, (0.0, most)))
    return maps
