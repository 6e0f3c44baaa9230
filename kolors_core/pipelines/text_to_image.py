"""Text to image and image to image, with the reference's argument names, composed of the steps in task.py.

Source: diffusers' pipelines/kolors/pipeline_kolors.py and pipeline_kolors_img2img.py.
Shapes: B pictures (prompts times images per prompt).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Unpack

from torch import Tensor

from kolors_core.image import Size
from kolors_core.pipelines.denoising_loop import StepCallback
from kolors_core.pipelines.holding import holding
from kolors_core.pipelines.image_to_image import FromPicture, for_each
from kolors_core.pipelines.masks import grey, size_of
from kolors_core.pipelines.running import run
from kolors_core.pipelines.stages import Extras, KolorsPipelineOutput, Request, Task
from kolors_core.pipelines.text_prompts import MAX_TOKENS, Prompt
from kolors_core.sampling import Generators


class KolorsPipeline(Task):
    """Text to image."""

    @run
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
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = MAX_TOKENS,
        **extras: Unpack[Extras],
    ) -> KolorsPipelineOutput | tuple[Any]:
        """Make pictures from prompts.

        height, width: pixels, multiples of 8; the UNet's own size (1024) if None.
        denoising_end: stop after this part of the noise schedule, above 0 and at most 1, for a second model
        to go on.
        latents: [B, 4, height/8, width/8] standard normal noise in place of drawn noise.
        All others, and `Extras`, are described at `kolors_core.pipelines.stages.Request`.
        Raises ValueError or TypeError naming the argument, what came and what was wanted.
        """
        request = Request.of(locals())
        whole = self._schedule(request)
        schedule = whole if denoising_end is None else whole.until(denoising_end)
        size = self._size("height", height), self._size("width", width)
        positive, negative = self._conditions(request, size)
        shape = self._latent_shape(len(positive.size_ids), size)
        noise = self._draw(shape, generator) if latents is None else self._given_latents(latents, shape)
        x = noise * schedule.start_scale
        facts = {"steps": len(whole.timesteps)}
        return self._pictures(request, schedule, x, positive, negative, facts)


class KolorsImg2ImgPipeline(FromPicture):
    """Image to image: noise is added to a picture, and taken off again under the prompt."""

    default_strength = 0.3

    @run
    def __call__(
        self,
        prompt: Prompt | None = None,
        image: Any = None,
        strength: float = default_strength,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        denoising_start: float | None = None,
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
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = MAX_TOKENS,
        strength_map: Any = None,
        **extras: Unpack[Extras],
    ) -> KolorsPipelineOutput | tuple[Any]:
        """Make pictures from pictures and prompts.

        image: a PIL image, an array [H, W, 3], a tensor [3, H, W] in [0, 1] or [-1, 1], or latents [4, H/8,
        W/8]; or a batch or list of them, one for all, for each prompt or for each of the B pictures.
        strength: above 0 and at most 1; int(steps * strength) steps are done, from that much noise.
        height, width: pixels, multiples of 8, to which the image is resized; its own if None.
        strength_map: a grey picture of how much each place may change (https://arxiv.org/abs/2306.00950): as
        at `strength` where it is white, less where it is darker, not at all where it is black. See
        `masks.grey` for its forms; one for all, for each prompt or for each picture. (The community's
        differential pipeline has it the other way round, as `map`.)
        denoising_start: take the image as one on which `denoising_end` has left off, and add no noise.
        latents: [B, 4, H/8, W/8], noisy already, in place of the image's: `callback_on_step_end` sees such.
        All others, and `Extras`, are described at `kolors_core.pipelines.stages.Request`.
        Raises ValueError or TypeError naming the argument, what came and what was wanted.
        """
        request = Request.of(locals())
        whole = self._schedule(request)
        schedule = self._part(whole, strength, denoising_start, denoising_end)
        mean, std = self._encoded(image, height, width, is_only_size=latents is not None)  # [b, 4, H/8, W/8]
        size = mean.shape[-2] * self.vae.config.downscale, mean.shape[-1] * self.vae.config.downscale
        positive, negative = self._conditions(request, size)
        count, around, sigma = len(positive.size_ids), None, schedule.sigmas[0].item()
        if strength_map is not None and (latents is not None or denoising_start is not None):
            raise ValueError("strength_map needs noise that is drawn here: no latents, no denoising_start")
        if latents is not None:
            x = self._given_latents(latents, self._latent_shape(count, size))
            x = x * self.scheduler.latent_scale(sigma)
        else:
            clean = self._sampled(mean, std, count, num_images_per_prompt, generator)
            if denoising_start is not None:
                x = clean * self.scheduler.latent_scale(sigma)
            else:
                noise = self._draw(clean.shape, generator)
                x = clean + noise * sigma
                if strength_map is not None:
                    shapes = (size_of(image), size)
                    places = grey(strength_map, size_of(clean), shapes, "strength_map").to(x)
                    places = for_each(places, count, num_images_per_prompt, "strength maps")
                    around = partial(holding, clean=clean, noise=noise, strength=places)
        facts = {"steps": len(whole.timesteps), "strength": strength}
        return self._pictures(request, schedule, x, positive, negative, facts, around)
