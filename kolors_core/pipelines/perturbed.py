"""Perturbed-attention guidance: away from what the UNet predicts when some self-attentions see nothing.

In a copy of the conditional rows the attention map of the named layers is the identity: each pixel gets its
own value. Source: https://arxiv.org/abs/2403.17377; diffusers' pipelines/pag/pag_utils.py.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from kolors_core.conditioning import Conditioning
from kolors_core.devices import plain
from kolors_core.guidance import Interval, cfg_rescale, make_denoiser, use_inside_interval
from kolors_core.module import WrapStep
from kolors_core.sampling import Denoise
from kolors_core.schedule import Schedule
from kolors_core.unet import TransformerBlock, UNet
from kolors_core.validation import finite_number
from weights_convert import TABLES

Layers = str | Sequence[str]


def perturbed(
    unet: UNet,
    schedule: Schedule,
    positive: Conditioning,
    negative: Conditioning | None = None,
    scale: float = 1.0,
    *,
    pag_scale: float = 3.0,
    pag_adaptive_scale: float = 0.0,
    pag_applied_layers: Layers = "mid",
    rescale: float = 0.0,
    interval: Interval | None = None,
    precompute: bool = True,
    wrap_step: WrapStep | None = None,
) -> Denoise:
    """As `guidance.guided`, plus pag_scale * (cond - perturbed), with and without classifier-free guidance.

    pag_adaptive_scale: takes this much off pag_scale, but no more than all, for each training timestep that
    is denoised already: of the schedule's own number (1,100), where the reference counts from 1,000.
    pag_applied_layers: see `perturbed_layers`. rescale, interval: see kolors_core/guidance.py; outside of
    the interval the positive alone is run. Raises ValueError for a scale that is not above 0, and for an
    adaptive one below 0.
    """
    check_scales(pag_scale, pag_adaptive_scale)
    rescaled = cfg_rescale(rescale)
    parts = (positive, positive) if negative is None or scale <= 1 else (negative, positive, positive)

    def combine(timestep: float, noise: Tensor) -> Tensor:
        *unconditional, conditional, other = noise.chunk(len(parts))
        pag = max(pag_scale - pag_adaptive_scale * (len(schedule.table) - timestep), 0.0)
        away = pag * (conditional - other)
        if unconditional:
            away = away + (scale - 1) * (conditional - unconditional[0])
        return rescaled(conditional + away, conditional)

    rows = [len(positive.text_tokens) * is_one for is_one in perturbed_layers(unet, pag_applied_layers)]
    told = replace(Conditioning.cat(*parts), perturbed=tuple(rows))
    x0_of = partial(make_denoiser, unet, schedule, precompute=precompute, wrap_step=wrap_step)
    inside = x0_of(told, len(parts), combine)
    return inside if interval is None else use_inside_interval(interval, schedule, inside, x0_of(positive))


def check_scales(pag_scale: float, pag_adaptive_scale: float) -> None:
    """ValueError for what `perturbed` cannot take."""
    if finite_number("pag_scale", pag_scale) <= 0:
        raise ValueError(f"pag_scale must be above 0, got {pag_scale}: without it, use `guided`")
    finite_number("pag_adaptive_scale", pag_adaptive_scale, 0)


def perturbed_layers(unet: UNet, names: Layers) -> list[bool]:
    """For each TransformerBlock in the order in which they run, whether a name means its self-attention.

    names: one or several, each found anywhere in the reference's name of the layer, as a regular expression:
    "mid", "down_blocks.1", "up_blocks.(0|1).attentions.1"; or as its documentation has them, "down.block_2"
    or "up.block_0.attentions_1". Raises ValueError or TypeError for what matches no layer, or is no name.
    """
    names = [names] if isinstance(names, str) else names
    layers = [
        TABLES["unet"].to_public(f"{path}.self_attention.to_q.weight").removesuffix(".to_q.weight")
        for path, module in plain(unet).named_modules()
        if isinstance(module, TransformerBlock)
    ]
    if not isinstance(names, Sequence) or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"the layers to perturb must be a name or several, got {names!r}")
    if not names:
        raise ValueError("no layers to perturb: wanted names such as 'mid'")
    found = [False] * len(layers)
    for name in names:
        try:
            hits = [re.search(_as_public(name), layer) is not None for layer in layers]
        except re.error as error:
            raise ValueError(f"the layer name {name!r} is no regular expression: {error}") from None
        if not any(hits):
            places = sorted({layer.partition(".transformer_blocks")[0] for layer in layers})
            raise ValueError(f"no self-attention is named {name!r}; they are in {', '.join(places)}")
        found = [one or other for one, other in zip(found, hits, strict=True)]
    return found


def _as_public(name: str) -> str:
    """The documentation's "up.block_0.attentions_1" as the expression up_blocks.0.attentions.1."""
    name = re.sub(r"\b(down|up)\.block_(\d+)", r"\1_blocks\\.\2\\b", name)
    return re.sub(r"\battentions_(\d+)", r"attentions\\.\1\\b", name)
