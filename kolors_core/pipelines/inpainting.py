"""Inpainting: the masked region is generated, by a UNet with mask channels or by preserving the rest.

Source: diffusers' pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl_inpaint.py, and for Kolors
examples/community/pipeline_kolors_inpainting.py.
Shapes: B images (prompts times images per prompt), b images and m masks given.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import torch
from torch import Tensor

from kolors_core.image import Size, preprocess_vae
from kolors_core.pipelines import masks
from kolors_core.pipelines.denoising_loop import StepCallback
from kolors_core.pipelines.image_to_image import FromImage, preserve_masked_latents, repeat_per_image
from kolors_core.pipelines.masks import Box, size_of, to_gray
from kolors_core.pipelines.memory_bounds import check_room
from kolors_core.pipelines.request import Extras, KolorsPipelineOutput, PipelineInputs, check_extras
from kolors_core.pipelines.runs import inference_call
from kolors_core.pipelines.stages import encode_prompts
from kolors_core.pipelines.text_prompts import MAX_TOKENS, Prompt
from kolors_core.sampling import Generators

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class InpaintInputs:
    """Inputs of the model; postprocess maps generated to final images, None leaves them as they are."""

    image: Tensor  # [b, 3, H, W] in [-1, 1], or latents [b, 4, H/8, W/8]
    mask: Tensor  # [m, 1, H, W] in [0, 1]
    postprocess: Callable[[Tensor], Tensor] | None
    box: Box | None = None  # the region, if the image is one of a larger image


class KolorsInpaintPipeline(FromImage):
    """Inpainting, with Kolors-Inpainting's UNet of 9 channels or any of 4."""

    accepts_mask_channels: ClassVar[bool] = True
    default_strength = 0.9999  # the reference's, which leaves out the first of 50 steps

    @inference_call
    def __call__(
        self, prompt: Prompt | None = None, image: Any = None, mask_image: Any = None,
        masked_image_latents: Tensor | None = None, height: int | None = None, width: int | None = None,
        padding_mask_crop: int | None = None, strength: float = default_strength,
        num_inference_steps: int = 50, timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None, denoising_start: float | None = None,
        denoising_end: float | None = None, guidance_scale: float = 7.5,
        negative_prompt: Prompt | None = None, num_images_per_prompt: int = 1, eta: float = 0.0,
        generator: Generators = None, latents: Tensor | None = None, prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None, pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None, ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None, output_type: str = "pil",
        return_dict: bool = True, cross_attention_kwargs: Mapping[str, Any] | None = None,
        original_size: Size | None = None, crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None, negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0), negative_target_size: Size | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = MAX_TOKENS, paste_back: bool | None = None, **extras: Unpack[Extras],
    ) -> KolorsPipelineOutput | tuple[Any]:  # fmt: skip
        """Inpaint the white part of a mask.

        image: as in `KolorsImg2ImgPipeline`. mask_image: in the forms of `masks.to_gray`; what is at least
        half white is generated; one for all, for each prompt or for each of the B images.
        masked_image_latents: [b, 4, H/8, W/8], for a UNet of 9 channels, in place of those of the image with
        the masked region gray.
        height, width: pixels, multiples of 8, to which the image is resized; its own if None.
        padding_mask_crop: cut out the mask's region with so many pixels around it, and work on it at `height`
        and `width` (the UNet's own if None); needs one PIL image, mask and control images of one size.
        strength: above 0 and at most 1, as in `KolorsImg2ImgPipeline`; 1 starts from noise alone. Kolors'
        makers use 0.999, and a guidance_scale of 6.
        denoising_start: take the image as one on which `denoising_end` has left off; for 9 channels only.
        latents: [B, 4, H/8, W/8] standard normal noise in place of drawn noise.
        paste_back: put only what the mask marks into the given image, of its own size unless height or width
        is given: where the mask is black the pixels stay, bit for bit; where it is gray both are mixed. The
        default, wherever there is an image; False gives what the VAE decodes, for the image or the region.
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
        has_mask_channels = self.unet.config.in_channels > self.vae.config.latent_channels
        if masked_image_latents is not None and not has_mask_channels:
            raise ValueError("masked_image_latents has no effect: this UNet reads no mask, it has 4 channels")
        if denoising_start is not None and not has_mask_channels:
            raise ValueError("denoising_start needs a UNet that reads the mask: what stays could not be held")
        if denoising_start is not None and latents is not None:
            raise ValueError("latents, the noise to start with, has no effect beside denoising_start")
        if output_type == "latent" and (paste_back or padding_mask_crop is not None):
            raise ValueError("paste_back and padding_mask_crop need images, and output_type is 'latent'")
        whole = self._schedule(inputs)
        schedule = self._select_steps(whole, strength, denoising_start, denoising_end)
        copies = num_images_per_prompt
        check_room(self, inputs, height, width)
        prepared = self._prepare(image, mask_image, height, width, padding_mask_crop, paste_back, copies)
        size = self._pixel_size(prepared.image)
        check_room(self, inputs, *size)
        if prepared.box is not None and inputs.control_image is not None:
            control = _control_region(inputs.control_image, image, size, prepared.box)
            inputs = replace(inputs, control_image=control)
        mask, small = masks.binarize_mask(prepared.mask, self._latent_shape(1, size)[2:])
        is_pure_noise = strength == 1 and denoising_start is None  # where masks are read, no image is
        start = None if has_mask_channels and is_pure_noise else self._mean_and_std(prepared.image)
        masked = self._masked(prepared.image, mask, masked_image_latents) if has_mask_channels else None
        text, negative_text = encode_prompts(self, prompt, inputs)
        positive, negative = self._condition(inputs, size, text, negative_text)
        shape, wrap_sampler = self._latent_shape(len(positive.size_ids), size), None
        clean = None if start is None else self.sample_latents(*start, shape[0], copies, generator)
        noise = self._draw(shape, generator) if latents is None else self._given_latents(latents, shape)
        if clean is None or is_pure_noise:
            x = noise * schedule.init_noise_sigma
        else:
            x = self._first_latents(schedule, clean, noise if denoising_start is None else None)
        small = repeat_per_image(small, shape[0], copies, "masks").to(x)  # [B, 1, H/8, W/8]
        if masked is not None:
            extra = torch.cat([small, self.sample_latents(*masked, shape[0], copies, generator)], dim=1)
            positive = replace(positive, extra=extra)
            negative = None if negative is None else replace(negative, extra=extra)
        elif clean is not None:
            wrap_sampler = partial(preserve_masked_latents, clean=clean, noise=noise, strength=small)
        denoised = self._denoise(inputs, schedule, x, positive, negative, wrap_sampler)
        metadata = {"steps": len(whole.timesteps), "strength": strength}
        return self._output(inputs, denoised, positive, metadata, prepared.postprocess)

    def _prepare(
        self, image: Any, mask_image: Any, height: int | None, width: int | None, padding: int | None,
        paste_back: bool | None, images_per_prompt: int,
    ) -> InpaintInputs:  # fmt: skip
        """Prepare image, mask and postprocessing; arguments as in the call."""
        for name, value in (("image", image), ("mask_image", mask_image)):
            if value is None:
                raise ValueError(f"no {name}: expected an image and a mask of the part to inpaint")
        if padding is not None:
            size = self._size("height", height), self._size("width", width)
            read, mask, box = _region(image, mask_image, size, padding)
        else:
            read, box = self._read_image(image, height, width), None
            size, is_latents = self._pixel_size(read), self._is_latents(read)
            if is_latents and paste_back:
                raise ValueError("paste_back needs an image to paste into, and image is latents")
            mask = to_gray(mask_image, size, (size,) if is_latents else (size_of(image), size))
            if is_latents or paste_back is False:
                return InpaintInputs(read, mask, None)
        given, marked = read, mask
        if box is not None or (height is None and width is None):
            given = preprocess_vae(image, multiple=1)
            marked = to_gray(mask_image, size_of(given), (size_of(image), size))
        if box is not None and paste_back is False:
            marked = torch.zeros_like(marked)
            marked[..., box[1] : box[3], box[0] : box[2]] = 1

        def postprocess(generated: Tensor) -> Tensor:
            whole, mask = (repeat_per_image(x, len(generated), images_per_prompt) for x in (given, marked))
            return masks.paste(generated, whole, mask, box)

        return InpaintInputs(read, mask, postprocess, box)

    def _masked(self, image: Tensor, mask: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Encode the image with its masked region gray, or check given latents: mean and deviation."""
        if given is not None:
            if (latents := self._as_latents(given, *self._pixel_size(image))) is None:
                raise ValueError("masked_image_latents must be latents, a tensor [b, 4, H/8, W/8]")
            return latents, None
        if self._is_latents(image):
            raise ValueError("image is latents, which no mask can be laid on: give masked_image_latents too")
        if 1 not in (len(image), len(mask)) and len(image) != len(mask):
            raise ValueError(f"expected one mask or one for each of {len(image)} images, got {len(mask)}")
        return self.encode_mean_std(image * (mask < 0.5))


def _region(image: Any, mask: Any, size: Size, padding: int) -> tuple[Tensor, Tensor, Box]:
    """Crop the masked region of an image and its mask, resize both, and return them with the box."""
    for name, value in (("image", image), ("mask_image", mask)):
        _need_pil(name, value, image)
    if isinstance(padding, bool) or not isinstance(padding, int) or padding < 0:
        raise ValueError(f"padding_mask_crop must be a whole number of pixels from 0, got {padding!r}")
    box = masks.mask_region(mask, size, padding)
    image = masks.resize_to_fit(image.convert("RGB").crop(box), size)
    mask = masks.resize_to_fit(mask.convert("L").crop(box), size)
    return preprocess_vae(image, multiple=1), to_gray(mask, size, (size,)), box


def _control_region(given: Any, image: "Image", size: Size, box: Box) -> Any:
    """Crop the box out of a control image, or of each in a list, and resize it."""
    if isinstance(given, list | tuple):
        return [_control_region(one, image, size, box) for one in given]
    _need_pil("control_image", given, image)
    return masks.resize_to_fit(given.convert("RGB").crop(box), size)


def _need_pil(name: str, value: Any, image: "Image") -> None:
    """Raise TypeError unless a PIL image is given, ValueError unless it has the inpainted image's size."""
    from PIL import Image

    if not isinstance(value, Image.Image):
        raise TypeError(f"padding_mask_crop needs {name} as one PIL image, got {type(value).__name__}")
    if value.size != image.size:
        got = f"{value.height} x {value.width} and {image.height} x {image.width}"
        raise ValueError(f"padding_mask_crop needs {name} and image of one size (height x width), got {got}")
