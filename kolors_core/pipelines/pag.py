"""Perturbed-attention guidance: away from the UNet's prediction where some self-attentions are the identity.

In a copy of the conditional rows the attention map of the named layers is the identity: each pixel gets its
own value. `KolorsPAGPipeline` has the reference's names; other tasks take the rule itself,
`pipe.guided = functools.partial(perturbed, pag_scale=3.0)`.
Source: https://arxiv.org/abs/2403.17377; diffusers' pipelines/pag/pag_utils.py and pipeline_pag_kolors.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self, Unpack

from torch import Tensor

from kolors_core import guidance
from kolors_core.checkpoint import EMBEDDED_NAME
from kolors_core.conditioning import Conditioning
from kolors_core.denoiser import require_unet
from kolors_core.devices import unwrap_compiled
from kolors_core.guidance import GuidanceRule, Interval, guided, use_inside_interval
from kolors_core.image import Size
from kolors_core.module import WrapStep
from kolors_core.pipelines.base import Components
from kolors_core.pipelines.denoising_loop import StepCallback
from kolors_core.pipelines.request import Extras, KolorsPipelineOutput, documented_like, warn_unused
from kolors_core.pipelines.text_prompts import MAX_TOKENS, Prompt
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.sampling import Denoiser, Generators
from kolors_core.schedule import Schedule
from kolors_core.unet import TransformerBlock, UNet
from kolors_core.validation import check_float
from weights_convert import TABLES

Layers = str | Sequence[str]


def perturbed(
    unet: UNet, schedule: Schedule, positive: Conditioning, negative: Conditioning | None = None,
    scale: float = 1.0, *, pag_scale: float = 3.0, pag_adaptive_scale: float = 0.0,
    pag_applied_layers: Layers = "mid", rescale: float = 0.0, interval: Interval | None = None,
    precompute: bool = True, wrap_step: WrapStep | None = None,
) -> Denoiser:  # fmt: skip
    """Make a denoiser: `guidance.guided` plus pag_scale * (cond - perturbed), for any guidance scale.

    pag_adaptive_scale: takes this much off pag_scale, down to 0, for each training timestep denoised already:
    of the schedule's own number (1,100), where the reference counts from 1,000. pag_applied_layers: see
    `perturbed_layers`. rescale, interval: see guidance.py; outside of the interval the positive alone is run.
    Raises ValueError for a scale that is not above 0, and for an adaptive one below 0.
    """
    pag_scale, pag_adaptive_scale = check_scales(pag_scale, pag_adaptive_scale)
    rescaled = guidance.cfg_rescale(rescale)
    parts = (positive, positive) if negative is None or scale <= 1 else (negative, positive, positive)

    def combine(timestep: float, noise: Tensor) -> Tensor:
        *unconditional, conditional, other = noise.chunk(len(parts))
        pag = max(pag_scale - pag_adaptive_scale * (len(schedule.training_sigmas) - timestep), 0.0)
        away = pag * (conditional - other)
        if unconditional:
            away = away + (scale - 1) * (conditional - unconditional[0])
        return rescaled(conditional + away, conditional)

    rows = [len(positive.text_tokens) * is_one for is_one in perturbed_layers(unet, pag_applied_layers)]
    perturbed_parts = replace(Conditioning.cat(*parts), perturbed=tuple(rows))
    x0_of = partial(guidance.make_denoiser, unet, schedule, precompute=precompute, wrap_step=wrap_step)
    inside = x0_of(perturbed_parts, len(parts), combine)
    return inside if interval is None else use_inside_interval(interval, schedule, inside, x0_of(positive))


def check_scales(pag_scale: float, pag_adaptive_scale: float) -> tuple[float, float]:
    """Convert scales to float; ValueError for those that `perturbed` cannot take."""
    if (scale := check_float("pag_scale", pag_scale)) <= 0:
        raise ValueError(f"pag_scale must be above 0, got {scale}: without it, use `guided`")
    return scale, check_float("pag_adaptive_scale", pag_adaptive_scale, 0)


def perturbed_layers(unet: UNet, names: Layers) -> list[bool]:
    """Match layer names: whether each TransformerBlock, in order of execution, is perturbed.

    names: one or several, each found anywhere in the reference's name of the layer, as a regular expression:
    "mid", "down_blocks.1", "up_blocks.(0|1).attentions.1"; or as its documentation has them, "down.block_2"
    or "up.block_0.attentions_1". Raises ValueError or TypeError for what matches no layer, or is no name.
    """
    require_unet(unet, "perturbed-attention guidance")
    names = [names] if isinstance(names, str) else names
    paths = [path for path, own in unwrap_compiled(unet).named_modules() if isinstance(own, TransformerBlock)]
    weights = (TABLES["unet"].to_public(f"{path}.self_attention.to_q.weight") for path in paths)
    layers = [name.removesuffix(".to_q.weight") for name in weights]
    if not isinstance(names, Sequence) or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"the layers to perturb must be a name or several, got {names!r}")
    if not names:
        raise ValueError("no layers to perturb: expected names such as 'mid'")
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
    """Convert the documentation's "up.block_0.attentions_1" to the expression up_blocks.0.attentions.1."""
    name = re.sub(r"\b(down|up)\.block_(\d+)", r"\1_blocks\\.\2\\b", name)
    return re.sub(r"\battentions_(\d+)", r"attentions\\.\1\\b", name)


class KolorsPAGPipeline(KolorsPipeline):
    """Text to image with perturbed-attention guidance (PAG)."""

    def __init__(self, *parts: Any, pag_applied_layers: Layers = "mid", **named: Any) -> None:
        super().__init__(*parts, **named)
        self.set_pag_applied_layers(pag_applied_layers)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path = EMBEDDED_NAME, *, pag_applied_layers: Layers = "mid",
        **options: Any,
    ) -> Self:  # fmt: skip
        """Load as `KolorsPipeline.from_pretrained` does; layers as for `set_pag_applied_layers`."""
        pipe = super().from_pretrained(pretrained_model_name_or_path, **options)
        pipe.set_pag_applied_layers(pag_applied_layers)
        return pipe

    @classmethod
    def from_pipe(
        cls, pipeline: Components, *, pag_applied_layers: Layers | None = None, **changes: Any
    ) -> Self:
        """Share models as `KolorsPipeline.from_pipe` does; layers None: those of the other pipeline."""
        pipe = super().from_pipe(pipeline, **changes)
        own = pipeline.pag_applied_layers
        pipe.set_pag_applied_layers(own if pag_applied_layers is None else pag_applied_layers)
        return pipe

    def set_pag_applied_layers(self, pag_applied_layers: Layers) -> None:
        """Choose the layers whose self-attention is perturbed; names and errors: see `perturbed_layers`."""
        perturbed_layers(self.unet, pag_applied_layers)
        one = isinstance(pag_applied_layers, str)
        self.pag_applied_layers = [pag_applied_layers] if one else list(pag_applied_layers)

    @documented_like(KolorsPipeline.__call__)
    def __call__(
        self, prompt: Prompt | None = None, height: int | None = None, width: int | None = None,
        num_inference_steps: int = 50, timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None, denoising_end: float | None = None,
        guidance_scale: float = 5.0, negative_prompt: Prompt | None = None, num_images_per_prompt: int = 1,
        eta: float = 0.0, generator: Generators = None, latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None, pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None, negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None, ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str = "pil", return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None, original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0), target_size: Size | None = None,
        negative_original_size: Size | None = None, negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None, callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",), pag_scale: float = 3.0,
        pag_adaptive_scale: float = 0.0, max_sequence_length: int = MAX_TOKENS, **extras: Unpack[Extras],
    ) -> KolorsPipelineOutput:  # fmt: skip
        """Make images from prompts.

        pag_scale: how strongly; 0 is `KolorsPipeline`. pag_adaptive_scale: see `perturbed`.
        All others are as for `KolorsPipeline`. A callback sees the rows that it sees there.
        Raises ValueError or TypeError as there; also for another rule at `pipe.guided`: only one can be.
        """
        if (rule := self.pag_rule(pag_scale, pag_adaptive_scale)) is not None:
            extras["guidance_rule"] = rule
        return super().__call__(
            height=height, width=width, denoising_end=denoising_end, latents=latents,
            prompt=prompt, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds,
            negative_prompt=negative_prompt, negative_prompt_embeds=negative_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            num_inference_steps=num_inference_steps, timesteps=timesteps, sigmas=sigmas, eta=eta,
            guidance_scale=guidance_scale, num_images_per_prompt=num_images_per_prompt, generator=generator,
            ip_adapter_image=ip_adapter_image, ip_adapter_image_embeds=ip_adapter_image_embeds,
            original_size=original_size, target_size=target_size, crops_coords_top_left=crops_coords_top_left,
            negative_original_size=negative_original_size, negative_target_size=negative_target_size,
            negative_crops_coords_top_left=negative_crops_coords_top_left, output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs, return_dict=return_dict,
            callback_on_step_end=callback_on_step_end, max_sequence_length=max_sequence_length,
            cross_attention_kwargs=cross_attention_kwargs, **extras,
        )  # fmt: skip

    def pag_rule(self, pag_scale: float, pag_adaptive_scale: float = 0.0) -> GuidanceRule | None:
        """Return the rule with these scales; None if pag_scale is 0. ValueError for another at `guided`."""
        pag_scale = check_float("pag_scale", pag_scale)
        pag_adaptive_scale = check_float("pag_adaptive_scale", pag_adaptive_scale)
        is_off = pag_scale == 0
        if is_off and pag_adaptive_scale != 0:
            warn_unused("pag_adaptive_scale", "with pag_scale 0")
        if is_off:
            return None
        if self.guided is not guided:
            wanted = "a KolorsPipeline with functools.partial(perturbed, ...) at its `guided`"
            raise ValueError(f"pipe.guided is another rule already: for both, take {wanted}")
        scales = {"pag_scale": pag_scale, "pag_adaptive_scale": pag_adaptive_scale}
        return partial(perturbed, **scales, pag_applied_layers=self.pag_applied_layers)
