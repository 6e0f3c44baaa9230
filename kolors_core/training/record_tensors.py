"""Tensors that a cache keeps of each record, for `write_cache(tensors=...)`: control images, masks, pixels.

Each is a function of a record and of its pixels [3, H, W] in [-1, 1], resized and cropped to its bucket.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_core.training.cache import digest_function
from kolors_core.training.data import Example, control_image, load_pixels
from kolors_core.training.run_record import digest_model
from kolors_core.training.sources import Record, Stored
from kolors_core.vae import VAE
from kolors_core.validation import short_repr

if TYPE_CHECKING:
    from PIL.Image import Image


class ControlImages:
    """Control images as of `LatentDataset(control=...)`: "control" uint8 [3, H, W], `Batch.control`."""

    def __init__(self, control: "Callable[[Image], Image]") -> None:
        self.control = control

    def state_key(self) -> tuple[str, ...]:
        """Return the digest of the function that makes control images."""
        return (digest_function(self.control),)

    def __call__(self, record: Record, pixels: Tensor) -> Mapping[str, Tensor]:
        """Compute the control image."""
        return {"control": control_image(pixels, self.control)}


class GivenMasks:
    """Masks of a source, for inpainting: "extra" [5, H/8, W/8], the mask and the masked image's latents.

    What is white in the mask is to be generated. The latents are the mean of the VAE's distribution for the
    image with gray there. name: of the mask in `Record.more`, an image of the image's size, else ValueError.
    """

    def __init__(self, vae: VAE, name: str = "mask") -> None:
        self.vae, self.name = vae, name

    def state_key(self) -> tuple[str, ...]:
        """Return the name of the masks, and the digest of the VAE."""
        return self.name, digest_model(self.vae)

    @torch.no_grad()
    def __call__(self, record: Record, pixels: Tensor) -> Mapping[str, Tensor]:
        """Encode what the mask leaves of the image."""
        mask = fitted(record, self.name, pixels)[:1] > 0  # [1, H, W]
        encoded = self.vae.encode_images((pixels * ~mask)[None].to(self.vae.post_quant_conv.weight))
        latents = encoded.mean.float().cpu()  # [1, 4, H/8, W/8]
        small = F.interpolate(mask[None].float(), size=latents.shape[-2:])
        return {"extra": torch.cat([small, latents], dim=1)[0]}


def store_pixels(record: Record, pixels: Tensor) -> Mapping[str, Tensor]:
    """Keep the pixels, uint8 [3, H, W], for `RandomMasks` or a loss that reads them: 3 MiB at 1024x1024."""
    return {"pixels": ((pixels + 1) * 127.5).round().byte()}


def fitted(record: Record, name: str, pixels: Tensor) -> Tensor:
    """Load an image of `Record.more`, resized and cropped as the record's own: [3, H, W] in [-1, 1].

    ValueError if there is none, or it has another shape than the record's image has.
    """
    if not isinstance(stored := record.more.get(name), Stored):
        has = ", ".join(map(short_repr, record.more)) or "nothing"
        raise ValueError(f"{record.image.name}: expected an image {name!r} beside it, got {has}")
    own, image = record.image.open(), stored.open()
    if image.size != own.size:
        sizes = f"{image.height} x {image.width}, expected {own.height} x {own.width}"
        raise ValueError(f"{stored.name}: {sizes} (height x width), as of {record.image.name}")
    height, width = pixels.shape[-2:]
    return load_pixels(Example(image, record.captions, image.height, image.width), (height, width))[0]
