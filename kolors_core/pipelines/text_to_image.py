"""Text to image, with the reference's argument names, composed of the steps in stages.py.

Source: diffusers' pipelines/kolors/pipeline_kolors.py.
Shapes: B images (prompts times images per prompt).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from torch import Tensor

from kolors_core.image import Size
from kolors_core.pipelines.denoising_loop import StepCallback
from kolors_core.pipelines.memory_bounds import check_room
from kolors_core.pipelines.request import Extras, KolorsPipelineOutput, PipelineInputs, check_extras
from kolors_core.pipelines.runs import inference_call
from kolors_core.pipelines.stages import Task, encode_prompts
from kolors_core.pipelines.text_prompts import MAX_TOKENS, Prompt
from kolors_core.sampling import Generators


class KolorsPipeline(Task):
    """Text to image."""

    @inference_call
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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = MAX_TOKENS, **extras: Unpack[Extras],
    ) -> KolorsPipelineOutput | tuple[Any]:  # fmt: skip
        """Make images from prompts.

        height, width: pixels, multiples of 8; the UNet's own size (1024) if None.
        denoising_end: part of the noise schedule, above 0 and at most 1, after which a second model goes on.
        latents: [B, 4, height/8, width/8] standard normal noise in place of drawn noise.
        All others, and `Extras`: see `kolors_core.pipelines.request.PipelineInputs`. Raises ValueError or
        TypeError naming the argument, what came and what was expected.
        """
        check_extras(extras)
        inputs = PipelineInputs(
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
        whole = self._schedule(inputs)
        schedule = whole if denoising_end is None else whole.before(denoising_end)
        size = self._size("height", height), self._size("width", width)
        check_room(self, inputs, *size)
        text, negative_text = encode_prompts(self, prompt, inputs)
        positive, negative = self._condition(inputs, size, text, negative_text)
        shape = self._latent_shape(len(positive.size_ids), size)
        noise = self._draw(shape, generator) if latents is None else self._given_latents(latents, shape)
        denoised = self._denoise(inputs, schedule, noise * schedule.init_noise_sigma, positive, negative)
        return self._output(inputs, denoised, positive, {"steps": len(whole.timesteps)})
