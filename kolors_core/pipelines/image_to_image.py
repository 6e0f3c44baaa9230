"""What tasks that start from a picture share: its latents, and the steps that a strength leaves.

Source: diffusers' pipelines/kolors/pipeline_kolors_img2img.py.
Shapes: B pictures (prompts times images per prompt), b pictures given.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from kolors_core.devices import finite
from kolors_core.image import vae_pixels
from kolors_core.pipelines.stages import Task
from kolors_core.sampling import Generators, draw_noise
from kolors_core.schedule import Schedule
from kolors_core.validation import fraction_of


class FromPicture(Task):
    """A task that starts from a picture."""

    default_strength: ClassVar[float]  # says nothing, and so may stand beside denoising_start

    def _part(self, whole: Schedule, strength: float, start: float | None, end: float | None) -> Schedule:
        """The steps that are done: those that strength or denoising_start leaves, up to denoising_end."""
        if start is None:
            schedule = whole.noised(strength)
        elif strength != self.default_strength:
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
        if (latents := self._as_latents(image, height, width)) is not None:
            return latents, None
        pixels = vae_pixels(image, height, width, self.vae.config.downscale)  # [b, 3, H, W]
        if is_only_size:
            height, width = pixels.shape[-2:]
            return torch.empty(self._latent_shape(len(pixels), (height, width)), device="meta"), None
        return self._moments(pixels)

    def _as_latents(self, image: Any, height: int | None, width: int | None) -> Tensor | None:
        """Latents [b, 4, H/8, W/8] if that is what is given; ValueError if they are not of this size."""
        scale = self.vae.config.downscale
        if (latents := as_latents(image, self.vae.config.latent_channels)) is None:
            return None
        for name, side, own in (("height", height, latents.shape[2]), ("width", width, latents.shape[3])):
            if side not in (None, own * scale):
                raise ValueError(f"{name} of given latents is {own * scale}, and cannot become {side}")
        return latents.to(self.device, self.precision)

    def _moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Images [b, 3, H, W] as the VAE's mean and standard deviation."""
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
                mean, std = (for_each(part, count, images_per_prompt) for part in (mean, std))
            noise = draw_noise(tuple(mean.shape), generator, mean.device, torch.float32)
            mean = mean + std * noise.to(std)
        return for_each(mean, count, images_per_prompt).to(self.device, self.precision)


def for_each(clean: Tensor, count: int, images_per_prompt: int, name: str = "images") -> Tensor:
    """Images for B pictures: one for all, one for each prompt, or one for each picture."""
    if len(clean) == count // images_per_prompt:
        return clean.repeat_interleave(images_per_prompt, dim=0)
    if count % len(clean):
        wanted = f"one, {count // images_per_prompt} (one a prompt) or {count} (one a picture)"
        raise ValueError(f"wanted {wanted} {name}, got {len(clean)}")
    return clean.repeat(count // len(clean), 1, 1, 1)


def as_latents(image: Any, channels: int) -> Tensor | None:
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
