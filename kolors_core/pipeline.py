"""The tasks, as thin compositions of the rooms above, with the reference's argument names.

Source: diffusers' pipelines/kolors/pipeline_kolors.py.
Shapes: B pictures (prompts times images per prompt).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kolors_core.callback import NAMES, Run, StepCallback
from kolors_core.chatglm import TextEmbedding
from kolors_core.components import MAX_TOKENS, Components, Prompt, whole_number
from kolors_core.config import VERSION
from kolors_core.guidance import Conditioning, Size, size_ids_of_both
from kolors_core.image import OUTPUT_TYPES, describe, to_output
from kolors_core.sampling import Generators, draw_noise, sampler_of


class KolorsPipelineOutput(NamedTuple):
    """`images`: PIL images; or, in [0, 1], an array [B, H, W, 3] or tensor [B, 3, H, W]; or latents."""

    images: Any


class KolorsPipeline(Components):
    """Text to image."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: Prompt | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = MAX_TOKENS,
    ) -> KolorsPipelineOutput | tuple[Any]:
        """Make pictures.

        prompt: one or several, Chinese or English; or prompt_embeds and pooled_prompt_embeds from
        `encode_prompt`.
        height, width: pixels, multiples of 8; the UNet's own size (1024) if None.
        num_inference_steps: or else `timesteps`, or `sigmas` with the last one where the run ends.
        denoising_end: stop after this part of the noise schedule, above 0 and at most 1, for a second model
        to go on.
        guidance_scale: 1 or less runs without guidance; whatever is negative is then an error.
        generator: one for all pictures, or one for each; noise is drawn on its device, the CPU's if None.
        latents: [B, 4, height/8, width/8] standard normal noise in place of drawn noise.
        output_type: "pil", "np", "pt", or "latent" for what the VAE would decode.
        original_size, crops_coords_top_left, target_size: SDXL's size conditions, (height, width) in pixels;
        what is not given for the negative prompt is as for the prompt.
        callback_on_step_end: see kolors_core/callback.py; it gets the tensors that
        `callback_on_step_end_tensor_inputs` names.
        eta, cross_attention_kwargs: of the reference's signature, without effect here and so refused if set.
        Raises ValueError or TypeError naming the argument, what came and what was wanted.
        """
        _refuse_idle(
            guidance_scale, eta=eta or None, cross_attention_kwargs=cross_attention_kwargs or None,
            negative_prompt=negative_prompt or None, negative_prompt_embeds=negative_prompt_embeds,
            negative_original_size=negative_original_size, negative_target_size=negative_target_size,
            negative_crops_coords_top_left=tuple(negative_crops_coords_top_left) != (0, 0) or None,
        )  # fmt: skip
        _one_of("output_type", (output_type,), (*OUTPUT_TYPES, "latent"))
        names = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        _one_of("callback_on_step_end_tensor_inputs", names, NAMES)
        if callback_on_step_end is None and tuple(names) != ("latents",):
            raise ValueError("callback_on_step_end_tensor_inputs has no effect without callback_on_step_end")
        num_images_per_prompt = whole_number("num_images_per_prompt", num_images_per_prompt)
        custom = timesteps is not None or sigmas is not None
        if custom and num_inference_steps != 50:
            raise ValueError("num_inference_steps has no effect beside timesteps or sigmas")
        whole = self.scheduler.schedule(
            None if custom else num_inference_steps, timesteps=timesteps, sigmas=sigmas
        )
        schedule = whole if denoising_end is None else whole.until(denoising_end)

        scale = self.vae.config.downscale
        own = self.unet.config.sample_size * scale
        height = whole_number("height", own if height is None else height, scale)
        width = whole_number("width", own if width is None else width, scale)
        ids, negative_ids = size_ids_of_both(
            (height, width), original_size, crops_coords_top_left, target_size, negative_original_size,
            negative_crops_coords_top_left, negative_target_size,
        )  # fmt: skip
        text, negative_text = self.embed(
            prompt, guidance_scale > 1, negative_prompt, prompt_embeds, pooled_prompt_embeds,
            negative_prompt_embeds, negative_pooled_prompt_embeds, max_sequence_length,
        )  # fmt: skip
        positive = self._condition(text, ids, num_images_per_prompt)
        negative = (
            self._condition(negative_text, negative_ids, num_images_per_prompt) if negative_text else None
        )

        shape = (len(positive.size_ids), self.vae.config.latent_channels, height // scale, width // scale)
        precise = torch.promote_types(self.dtype, torch.float32)

        if latents is None:
            latents = draw_noise(shape, generator, self.device, precise)
        elif not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
            got = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"latents must be a tensor {list(shape)}, got {got}")
        start = latents.to(self.device, precise) * schedule.start_scale
        sampler = sampler_of(
            self.scheduler, schedule, lambda: draw_noise(shape, generator, self.device, torch.float32)
        )
        self._num_timesteps = len(schedule.timesteps)
        self._guidance_scale, self._interrupt = guidance_scale, False
        with self._progress_bar(self._num_timesteps) as bar:
            run = Run(self, schedule, positive, negative, callback_on_step_end, names, bar.update)
            result = _finite(run(sampler, start), "the denoised latents", self.dtype)

        images = (
            result.to(self.dtype) if output_type == "latent" else to_output(self._decode(result), output_type)
        )
        if output_type == "pil":
            self._describe(images, prompt, negative_prompt, generator, len(whole.timesteps), guidance_scale)
        return KolorsPipelineOutput(images) if return_dict else (images,)

    def _condition(self, text: TextEmbedding, ids: Tensor, images_per_prompt: int) -> Conditioning:
        """Text [prompts, ...] and size ids [1, 6] as what the UNet is told for each picture."""
        tokens = text.tokens.to(self.device, self.dtype).repeat_interleave(images_per_prompt, dim=0)
        pooled = text.pooled.to(self.device, self.dtype).repeat_interleave(images_per_prompt, dim=0)
        return Conditioning(tokens, pooled, ids.to(self.device).expand(len(tokens), -1))

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, H/8, W/8] to images [B, 3, H, W] in the VAE's own precision."""
        weight = self.vae.post_quant_conv.weight
        if weight.dtype == torch.float16:
            raise ValueError("the VAE overflows in float16: pipe.vae.to(torch.float32)")
        return _finite(self.vae.decode(latents.to(weight)), "the VAE's image", weight.dtype)

    def _describe(
        self,
        images: Any,
        prompt: Prompt | None,
        negative_prompt: Prompt | None,
        generator: Generators,
        steps: int,
        guidance_scale: float,
    ) -> None:
        """Attach to each picture how it was made."""
        for i, image in enumerate(images):
            facts: dict[str, Any] = {}
            for name, texts in (("prompt", prompt), ("negative_prompt", negative_prompt)):
                if texts is not None:
                    texts = [texts] if isinstance(texts, str) else texts
                    facts[name] = texts[i * len(texts) // len(images)]
            if generator is not None:
                one = generator if isinstance(generator, torch.Generator) else generator[i]
                facts["seed"] = one.initial_seed()
                if isinstance(generator, torch.Generator) and len(images) > 1:
                    facts["picture"] = f"{i + 1} of {len(images)} of this seed"
            facts |= {
                "steps": steps, "sampler": self.scheduler.describe(), "guidance_scale": guidance_scale,
                "size": f"{image.width}x{image.height}", "software": f"kolors_core {VERSION}",
            }  # fmt: skip
            describe(image, facts)


def _finite(tensor: Tensor, what: str, dtype: torch.dtype) -> Tensor:
    """The tensor, or FloatingPointError naming the stage and its precision instead of a black picture."""
    if not torch.isfinite(tensor).all():
        raise FloatingPointError(f"{what} are not finite, computed in {dtype}: try bfloat16 or float32")
    return tensor


def _refuse_idle(
    guidance_scale: float, eta: float | None, cross_attention_kwargs: Any, **negatives: Any
) -> None:
    """What is given and would do nothing is an error; None is what is not given."""
    if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, int | float):
        raise TypeError(f"guidance_scale must be a number, got {guidance_scale!r}")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be finite, got {guidance_scale}")
    if eta is not None:
        raise ValueError(f"eta is {eta!r}, but only DDIM has a use for it, and there is no DDIM here")
    if cross_attention_kwargs is not None:
        raise ValueError(f"cross_attention_kwargs has no effect here, got {cross_attention_kwargs!r}")
    if guidance_scale <= 1 and (given := [name for name, value in negatives.items() if value is not None]):
        raise ValueError(f"{given[0]} has no effect without guidance, and guidance_scale is {guidance_scale}")


def _one_of(name: str, got: Sequence[str], allowed: Sequence[str]) -> None:
    if strangers := [value for value in got if value not in allowed]:
        raise ValueError(f"{name} must be of {', '.join(allowed)}, got {strangers[0]!r}")
