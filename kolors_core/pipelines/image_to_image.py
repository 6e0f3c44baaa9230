"""Image to image, and what every task shares that starts from an image.

Source: diffusers' pipelines/kolors/pipeline_kolors_img2img.py.
Shapes: B images (prompts times images per prompt), b images given.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from kolors_core.devices import check_finite
from kolors_core.image import Size, preprocess_vae
from kolors_core.pipelines.denoising_loop import StepCallback
from kolors_core.pipelines.masks import size_of, to_gray
from kolors_core.pipelines.memory_bounds import check_room
from kolors_core.pipelines.request import Extras, KolorsPipelineOutput, PipelineInputs, check_extras
from kolors_core.pipelines.runs import inference_call
from kolors_core.pipelines.stages import Task, encode_prompts
from kolors_core.pipelines.text_prompts import MAX_TOKENS, Prompt
from kolors_core.sampling import Denoiser, Generators, OnStep, Sampler, Sigmas, randn_latents
from kolors_core.schedule import Schedule
from kolors_core.validation import check_fraction


class FromImage(Task):
    """Base of tasks that start from an image."""

    default_strength: ClassVar[float]  # without effect, and so allowed with denoising_start

    def _select_steps(
        self, whole: Schedule, strength: float, start: float | None, end: float | None
    ) -> Schedule:
        """Select the steps after the start that strength or denoising_start sets, up to denoising_end."""
        if start is None:
            schedule = whole.last_steps(strength)
        elif strength != self.default_strength:
            raise ValueError(f"strength has no effect beside denoising_start, got {strength} and {start}")
        else:
            schedule = whole.after(start)
            if end is not None and start >= check_fraction("denoising_end", end):
                raise ValueError(f"denoising_start must be before denoising_end, got {start} and {end}")
        return schedule if end is None else schedule.before(end)

    def _read_image(self, image: Any, height: int | None, width: int | None) -> Tensor:
        """Read images, resized, as [b, 3, H, W] in [-1, 1], or return given latents [b, 4, H/8, W/8]."""
        latents = self._as_latents(image, height, width)
        scale = self.vae.config.vae_scale_factor
        return preprocess_vae(image, height, width, scale) if latents is None else latents

    def _is_latents(self, image: Tensor) -> bool:
        return image.shape[1] == self.vae.config.latent_channels

    def _pixel_size(self, image: Tensor) -> Size:
        """Return (height, width) in pixels of images or latents."""
        scale = self.vae.config.vae_scale_factor if self._is_latents(image) else 1
        return image.shape[-2] * scale, image.shape[-1] * scale

    def _mean_and_std(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode images to the VAE's mean and standard deviation [b, 4, H/8, W/8]; None for latents."""
        return (image, None) if self._is_latents(image) else self.encode_mean_std(image)

    def _as_latents(self, image: Any, height: int | None, width: int | None) -> Tensor | None:
        """Return given latents [b, 4, H/8, W/8], or None for images; ValueError for another size."""
        channels, scale = self.vae.config.latent_channels, self.vae.config.vae_scale_factor
        listed = list(image) if isinstance(image, list | tuple) else [image]
        fits = (isinstance(t, Tensor) and t.ndim in (3, 4) and t.shape[-3] == channels for t in listed)
        if not listed or not all(fits):
            return None
        if len({t.shape[-2:] for t in listed}) > 1:
            raise ValueError(f"latents of different sizes: {', '.join(str(list(t.shape)) for t in listed)}")
        x = torch.cat([t if t.ndim == 4 else t[None] for t in listed])
        if not x.numel() or not x.is_floating_point():
            raise ValueError(f"latents as image must be some floats, got {list(x.shape)} of {x.dtype}")
        for name, side, own in (("height", height, x.shape[2]), ("width", width, x.shape[3])):
            if side not in (None, own * scale):
                raise ValueError(f"{name} of given latents is {own * scale}, and cannot become {side}")
        return x.to(self.device, self.precision)

    def _first_latents(self, schedule: Schedule, clean: Tensor, noise: Tensor | None) -> Tensor:
        """Add noise of the first sigma to clean latents; None for latents that have it already."""
        sigma = schedule.sigmas[0].item()
        return clean * self.scheduler.latent_scale(sigma) if noise is None else clean + noise * sigma

    def encode_mean_std(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images [b, 3, H, W] to the VAE's mean and standard deviation, one by one to save memory."""
        self._enter_stage("vae")
        weight = self._vae_weight
        found = [self.vae.encode_images(self._to_model(weight, image[None])) for image in pixels]
        mean, std = (torch.cat([getattr(one, part) for one in found]) for part in ("mean", "std"))
        return check_finite(mean, "the given image's latents", weight.dtype), std

    def sample_latents(
        self, mean: Tensor, std: Tensor | None, count: int, images_per_prompt: int, generator: Generators
    ) -> Tensor:
        """Sample clean latents for B images, from one generator or a list with one for each."""
        if std is not None:
            if not isinstance(generator, torch.Generator | None):
                mean, std = (repeat_per_image(part, count, images_per_prompt) for part in (mean, std))
            noise = randn_latents(tuple(mean.shape), generator, mean.device, torch.float32)
            mean = mean + std * noise.to(std)
        return repeat_per_image(mean, count, images_per_prompt).to(self.device, self.precision)


class KolorsImg2ImgPipeline(FromImage):
    """Image to image: noise is added to an image and removed again under the prompt."""

    default_strength = 0.3

    @inference_call
    def __call__(
        self, prompt: Prompt | None = None, image: Any = None, strength: float = default_strength,
        height: int | None = None, width: int | None = None, num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None,
        denoising_start: float | None = None, denoising_end: float | None = None, guidance_scale: float = 5.0,
        negative_prompt: Prompt | None = None, num_images_per_prompt: int = 1, eta: float = 0.0,
        generator: Generators = None, latents: Tensor | None = None, prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None, negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None, ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None, output_type: str = "pil",
        return_dict: bool = True, cross_attention_kwargs: Mapping[str, Any] | None = None,
        original_size: Size | None = None, crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None, negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0), negative_target_size: Size | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = MAX_TOKENS, strength_map: Any = None, **extras: Unpack[Extras],
    ) -> KolorsPipelineOutput | tuple[Any]:  # fmt: skip
        """Make images from images and prompts.

        image: a PIL image, an array [H, W, 3], a tensor [3, H, W] in [0, 1] or [-1, 1], or latents [4, H/8,
        W/8]; or a batch or list of them, one for all, for each prompt or for each of the B images.
        strength: above 0 and at most 1; int(steps * strength) steps are done, from that much noise.
        height, width: pixels, multiples of 8, to which the image is resized; its own if None.
        strength_map: a gray image of how much each place may change (https://arxiv.org/abs/2306.00950): as at
        `strength` where it is white, less where it is darker, not at all where it is black; in the forms of
        `masks.to_gray`, one for all, for each prompt or for each image. (The community's differential
        pipeline has it inverted, as `map`.)
        denoising_start: take the image as one on which `denoising_end` has left off, and add no noise.
        latents: [B, 4, H/8, W/8], noisy already, in place of the image's: `callback_on_step_end` sees such.
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
        schedule = self._select_steps(whole, strength, denoising_start, denoising_end)
        if image is None:
            raise ValueError("no image: expected the image to start from, or its latents")
        check_room(self, inputs, height, width)
        read = self._read_image(image, height, width)  # [b, 3, H, W] or [b, 4, H/8, W/8]
        size, start = self._pixel_size(read), self._mean_and_std(read) if latents is None else None
        check_room(self, inputs, *size)
        text, negative_text = encode_prompts(self, prompt, inputs)
        positive, negative = self._condition(inputs, size, text, negative_text)
        count, wrap_sampler = len(positive.size_ids), None
        if strength_map is not None and (latents is not None or denoising_start is not None):
            raise ValueError("strength_map needs noise that is drawn here: no latents, no denoising_start")
        if start is None:
            given = self._given_latents(latents, self._latent_shape(count, size))
            x = self._first_latents(schedule, given, None)
        else:
            clean = self.sample_latents(*start, count, num_images_per_prompt, generator)
            noise = self._draw(clean.shape, generator) if denoising_start is None else None
            x = self._first_latents(schedule, clean, noise)
            if strength_map is not None and noise is not None:
                mask = to_gray(strength_map, size_of(clean), (size_of(image), size), "strength_map").to(x)
                mask = repeat_per_image(mask, count, num_images_per_prompt, "strength maps")
                wrap_sampler = partial(preserve_masked_latents, clean=clean, noise=noise, strength=mask)
        denoised = self._denoise(inputs, schedule, x, positive, negative, wrap_sampler)
        return self._output(inputs, denoised, positive, {"steps": len(whole.timesteps), "strength": strength})


def preserve_masked_latents(sampler: Sampler, *, clean: Tensor, noise: Tensor, strength: Tensor) -> Sampler:
    """Wrap a sampler so that latents are reset, after each step, where their first step has not come yet.

    clean: the image's latents, reset to clean + sigma * noise of the sigma reached. strength: from 0 to 1,
    the part of the steps that change a latent: the last int(strength * n) of n. 0 preserves it to the end and
    1 never, which is inpainting. All are [B, 4, H/8, W/8], or have 1 in place of B or 4. Source: Levin and
    Fried, https://arxiv.org/abs/2306.00950, and the blending of diffusers'
    pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl_inpaint.py.
    """

    def run(denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None) -> Tensor:
        steps = len(sigmas) - 1

        def hold(i: int, x: Tensor) -> Tensor:
            x = torch.where(strength * steps < steps - i, clean + noise * float(sigmas[i + 1]), x)
            return x if on_step is None else on_step(i, x)

        return sampler(denoise, x, sigmas, hold)

    return run


def repeat_per_image(clean: Tensor, count: int, images_per_prompt: int, name: str = "images") -> Tensor:
    """Repeat tensors for B images: given one for all, one for each prompt, or one for each image."""
    if len(clean) == count // images_per_prompt:
        return clean.repeat_interleave(images_per_prompt, dim=0)
    if count % len(clean):
        wanted = f"one, {count // images_per_prompt} (one a prompt) or {count} (one an image)"
        raise ValueError(f"expected {wanted} {name}, got {len(clean)}")
    return clean.repeat(count // len(clean), 1, 1, 1)
