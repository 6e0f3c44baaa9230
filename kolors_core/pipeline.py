"""The tasks, as thin compositions of the rooms above, with the reference's argument names.

Source: diffusers' pipelines/kolors/pipeline_kolors.py and pipeline_kolors_img2img.py.
Shapes: B pictures (prompts times images per prompt).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from kolors_core.callback import StepCallback
from kolors_core.conditioning import Size
from kolors_core.fields import fraction_of
from kolors_core.image import vae_pixels
from kolors_core.placement import finite
from kolors_core.plan import Planning
from kolors_core.running import run
from kolors_core.sampling import Generators, draw_noise
from kolors_core.schedule import Schedule
from kolors_core.task import Extras, KolorsPipelineOutput, Request
from kolors_core.text_prompt import MAX_TOKENS, Prompt


class KolorsPipeline(Planning):
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
        All others, and `Extras`, are described at `kolors_core.task.Request`.
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


class KolorsImg2ImgPipeline(Planning):
    """Image to image: noise is added to a picture, and taken off again under the prompt."""

    @run
    def __call__(
        self,
        prompt: Prompt | None = None,
        image: Any = None,
        strength: float = 0.3,
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
        **extras: Unpack[Extras],
    ) -> KolorsPipelineOutput | tuple[Any]:
        """Make pictures from pictures and prompts.

        image: a PIL image, an array [H, W, 3], a tensor [3, H, W] in [0, 1] or [-1, 1], or latents [4, H/8,
        W/8]; or a batch or list of them, one for all, for each prompt or for each of the B pictures.
        strength: above 0 and at most 1; int(steps * strength) steps are done, from that much noise.
        height, width: pixels, multiples of 8, to which the image is resized; its own if None.
        denoising_start: take the image as one on which `denoising_end` has left off, and add no noise.
        latents: [B, 4, H/8, W/8], noisy already, in place of the image's: `callback_on_step_end` sees such.
        All others, and `Extras`, are described at `kolors_core.task.Request`.
        Raises ValueError or TypeError naming the argument, what came and what was wanted.
        """
        request = Request.of(locals())
        whole = self._schedule(request)
        schedule = self._part(whole, strength, denoising_start, denoising_end)
        mean, std = self._encoded(image, height, width, is_only_size=latents is not None)  # [b, 4, H/8, W/8]
        size = mean.shape[-2] * self.vae.config.downscale, mean.shape[-1] * self.vae.config.downscale
        positive, negative = self._conditions(request, size)
        count = len(positive.size_ids)
        if latents is not None:
            shape = self._latent_shape(count, size)
            x = self._given_latents(latents, shape) * self._preserved(schedule)
        else:
            clean = self._sampled(mean, std, count, num_images_per_prompt, generator)
            if denoising_start is not None:
                x = clean * self._preserved(schedule)
            else:
                x = clean + self._draw(clean.shape, generator) * schedule.sigmas[0].item()
        facts = {"steps": len(whole.timesteps), "strength": strength}
        return self._pictures(request, schedule, x, positive, negative, facts)

    def _part(self, whole: Schedule, strength: float, start: float | None, end: float | None) -> Schedule:
        """The steps that are done: those that strength or denoising_start leaves, up to denoising_end."""
        if start is None:
            schedule = whole.noised(strength)
        elif strength != 0.3:
            raise ValueError(f"strength has no effect beside denoising_start, got {strength} and {start}")
        elif end is not None and fraction_of("denoising_start", start) >= fraction_of("denoising_end", end):
            raise ValueError(f"denoising_start must be before denoising_end, got {start} and {end}")
        else:
            schedule = whole.since(start)
        return schedule if end is None else schedule.until(end)

    def _encoded(
        self, image: Any, height: int | None, width: int | None, is_only_size: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Images as the VAE's mean and standard deviation over latents [b, 4, H/8, W/8]; latents have no
        deviation. is_only_size: the shape is all that is asked for, nothing is encoded.
        """
        if image is None:
            raise ValueError("no image: wanted the picture to start from, or its latents")
        channels, scale = self.vae.config.latent_channels, self.vae.config.downscale
        if (latents := _as_latents(image, channels)) is not None:
            for name, side, own in (("height", height, latents.shape[2]), ("width", width, latents.shape[3])):
                if side not in (None, own * scale):
                    raise ValueError(f"{name} of given latents is {own * scale}, and cannot become {side}")
            return latents.to(self.device, self.precision), None
        pixels = vae_pixels(image, height, width, scale)  # [b, 3, H, W]
        if is_only_size:
            height, width = pixels.shape[-2:]
            return torch.empty(self._latent_shape(len(pixels), (height, width)), device="meta"), None
        self._on_device("vae")
        weight = self._vae_weight
        # One after another, so that a batch needs no more memory.
        found = [self.vae.encode(self._input_for(weight, picture[None])) for picture in pixels]
        mean, std = (torch.cat([getattr(one, part) for one in found]) for part in ("mean", "std"))
        return finite(mean, "the given image's latents", weight.dtype), std

    def _sampled(
        self, mean: Tensor, std: Tensor | None, count: int, images_per_prompt: int, generator: Generators
    ) -> Tensor:
        """Clean latents for B pictures. One generator draws for each image, a list for each picture."""
        if std is not None:
            if not isinstance(generator, torch.Generator | None):
                mean, std = (_for_each(part, count, images_per_prompt) for part in (mean, std))
            noise = draw_noise(tuple(mean.shape), generator, mean.device, torch.float32)
            mean = mean + std * noise.to(std)
        return _for_each(mean, count, images_per_prompt).to(self.device, self.precision)

    def _preserved(self, schedule: Schedule) -> float:
        """What turns latents between steps, as the reference has them, into image + sigma * noise."""
        if not self.scheduler.latents_preserve_variance:
            return 1.0
        return (schedule.sigmas[0].item() ** 2 + 1) ** 0.5


def _for_each(clean: Tensor, count: int, images_per_prompt: int) -> Tensor:
    """Images for B pictures: one for all, one for each prompt, or one for each picture."""
    if len(clean) == count // images_per_prompt:
        return clean.repeat_interleave(images_per_prompt, dim=0)
    if count % len(clean):
        wanted = f"one, {count // images_per_prompt} (one a prompt) or {count} (one a picture)"
        raise ValueError(f"wanted {wanted} images, got {len(clean)}")
    return clean.repeat(count // len(clean), 1, 1, 1)


def _as_latents(image: Any, channels: int) -> Tensor | None:
    """Latents [b, 4, h, w] if that is what is given: a tensor of one or several, or a list of them."""
    listed = list(image) if isinstance(image, list | tuple) else [image]
    for one in listed:
        if not isinstance(one, Tensor) or one.ndim not in (3, 4) or one.shape[-3] != channels:
            return None
    if not listed:
        return None
    if len({one.shape[-2:] for one in listed}) > 1:
        raise ValueError(f"latents of different sizes: {', '.join(str(list(one.shape)) for one in listed)}")
    latents = torch.cat([one if one.ndim == 4 else one[None] for one in listed])
    if not latents.numel() or not latents.is_floating_point():
        got = f"{list(latents.shape)} of {latents.dtype}"
        raise ValueError(f"latents as image must be some floats, got {got}")
    return latents
