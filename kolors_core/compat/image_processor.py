"""Image processor under the reference's names, for scripts that convert images beside the pipeline.

Equal to the reference's except where that misreads numbers: integers are scaled to [0, 1], images of 16 bits,
palettes, one bit and transparency are converted to RGB or gray, and values out of range are refused.
Source: `VaeImageProcessor` in diffusers' image_processor.py.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_core.config import ConfigDict
from kolors_core.image import LARGEST_VALUE, OUTPUT_TYPES, scale_integers, to_8_bits, to_images
from kolors_core.pipelines.masks import Box, mask_region, resize_to_fit
from kolors_core.validation import check_int

if TYPE_CHECKING:
    from PIL.Image import Image

RESAMPLINGS = {
    "lanczos": "LANCZOS", "bicubic": "BICUBIC", "bilinear": "BILINEAR", "linear": "BILINEAR",
    "nearest": "NEAREST",
}  # fmt: skip
RESIZE_MODES = ("default", "fill", "crop")


@dataclass(frozen=True, kw_only=True)
class VaeImageProcessor:
    """Converter of images to the VAE's tensors and back.

    do_resize: to `height` and `width`, or to multiples of vae_scale_factor. do_normalize: to [-1, 1].
    do_binarize: to 0 and 1 at a half. Tensors of vae_latent_channels are latents, and stay as they are.
    """

    do_resize: bool = True
    vae_scale_factor: int = 8
    vae_latent_channels: int = 4
    resample: str = "lanczos"
    reducing_gap: None = None
    do_normalize: bool = True
    do_binarize: bool = False
    do_convert_rgb: bool = False
    do_convert_grayscale: bool = False

    def __post_init__(self) -> None:
        check_int("vae_scale_factor", self.vae_scale_factor)
        if self.resample not in RESAMPLINGS:
            raise ValueError(f"resample must be one of {', '.join(RESAMPLINGS)}, got {self.resample!r}")
        if self.reducing_gap is not None:
            raise ValueError(f"reducing_gap must be None, got {self.reducing_gap!r}")
        if self.do_convert_rgb and self.do_convert_grayscale:
            raise ValueError("give one of do_convert_rgb and do_convert_grayscale, got both")

    @property
    def config(self) -> ConfigDict:
        """The processor's settings."""
        return ConfigDict(asdict(self))

    def preprocess(
        self, image: Any, height: int | None = None, width: int | None = None, resize_mode: str = "default",
        crops_coords: Box | None = None
    ) -> Tensor:  # fmt: skip
        """Convert images to [B, C, H, W] in [-1, 1], or in [0, 1] without do_normalize.

        image: PIL images; arrays [H, W], [H, W, C] or [B, H, W, C] and tensors [H, W], [C, H, W] or [B, C, H,
        W], of uint8, uint16, in [0, 1] or in [-1, 1]; or a list of them.
        crops_coords: the box cut out of PIL images first. resize_mode: of PIL images, see `resize`.
        ValueError naming what came for anything else.
        """
        from PIL.Image import Image

        images = list(image) if isinstance(image, list | tuple) else [image]
        kinds = {kind for kind in (Image, np.ndarray, Tensor) for one in images if isinstance(one, kind)}
        if len(kinds) != 1 or not all(isinstance(one, tuple(kinds)) for one in images):
            got = ", ".join(sorted({type(one).__name__ for one in images})) or "none"
            raise ValueError(f"expected PIL images, arrays or tensors, all of one kind, got {got}")
        if isinstance(images[0], Image):
            pixels = self._from_pil(images, height, width, resize_mode, crops_coords)
        else:
            batches = [self._to_batch(one) for one in images]
            if len(shapes := {batch.shape[1:] for batch in batches}) > 1:
                raise ValueError(f"images of different shapes: {', '.join(str(list(one)) for one in shapes)}")
            pixels = torch.cat(batches)  # [B, C, H, W]
            if isinstance(images[0], Tensor) and pixels.shape[1] == self.vae_latent_channels:
                return pixels
            if pixels.shape[1] not in (1, 3):
                raise ValueError(f"expected images of 1 or 3 channels, got {pixels.shape[1]}")
            if self.do_resize:
                size = self.get_default_height_width(pixels, height, width)
                pixels = self.resize(pixels, *size, resize_mode)
        if not (largest := pixels.abs().max().item()) <= LARGEST_VALUE:
            raise ValueError(f"image values must lie in [0, 1] or [-1, 1], got one of size {largest:g}")
        pixels = self.normalize(pixels) if self.do_normalize and pixels.min() >= 0 else pixels
        return self.binarize(pixels) if self.do_binarize else pixels

    def _from_pil(
        self, images: "list[Image]", height: int | None, width: int | None, resize_mode: str, box: Box | None
    ) -> Tensor:
        images = [one if box is None else one.crop(box) for one in images]
        images = [one if one.mode == "1" else _known_mode(one) for one in images]  # one bit keeps hard edges
        if self.do_resize:
            size = self.get_default_height_width(images[0], height, width)
            images = [self.resize(one, *size, resize_mode) for one in images]
        if self.do_convert_rgb or self.do_convert_grayscale:
            images = [one.convert("RGB" if self.do_convert_rgb else "L") for one in images]
        return self.numpy_to_pt(self.pil_to_numpy(images))

    def _to_batch(self, image: np.ndarray | Tensor) -> Tensor:
        """Convert an array or a tensor, of one image or of several, to floats [B, C, H, W]."""
        if image.ndim not in (2, 3, 4):
            raise ValueError(f"expected images of 2 to 4 axes, got one of {list(image.shape)}")
        if isinstance(image, Tensor):
            pixels = image
        elif image.dtype.kind not in "fu" or not image.dtype.isnative:
            raise ValueError(f"expected pixels of uint8, uint16 or floats, got {image.dtype}")
        else:
            pixels = torch.from_numpy(np.array(image))
            is_masks = self.do_convert_grayscale and pixels.ndim == 3 and pixels.shape[-1] != 1
            if pixels.ndim > 2 and not is_masks:
                pixels = pixels.movedim(-1, -3)  # [C, H, W] or [B, C, H, W]
        if pixels.ndim == 3:  # gray ones are several masks [B, H, W]
            pixels = pixels[:, None] if self.do_convert_grayscale else pixels[None]
        pixels = pixels[None, None] if pixels.ndim == 2 else pixels
        pixels = scale_integers(pixels)
        if not pixels.is_floating_point():
            raise ValueError(f"expected pixels of uint8, uint16 or floats, got {image.dtype}")
        return pixels

    def postprocess(
        self, image: Tensor, output_type: str = "pil", do_denormalize: Sequence[bool] | None = None
    ) -> Any:  # fmt: skip
        """Convert [B, C, H, W] to "pil", "np" or "pt" in [0, 1], or return "latent" unchanged.

        do_denormalize: for each image whether it is in [-1, 1]; do_normalize for all if None.
        """
        if not isinstance(image, Tensor) or image.ndim != 4:
            got = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"expected a tensor [B, C, H, W], got {got}")
        if output_type not in (*OUTPUT_TYPES, "latent"):
            expected = ", ".join((*OUTPUT_TYPES, "latent"))
            raise ValueError(f"output_type must be one of {expected}, got {output_type!r}")
        if output_type == "latent":
            return image
        flags = [self.do_normalize] * len(image) if do_denormalize is None else list(do_denormalize)
        if len(flags) != len(image):
            raise ValueError(f"do_denormalize must have {len(image)} values, one an image, got {len(flags)}")
        pairs = zip(image, flags, strict=True)
        image = torch.stack([self.denormalize(one) if flag else one for one, flag in pairs])
        if output_type == "pt":
            return image
        pixels = self.pt_to_numpy(image)
        return pixels if output_type == "np" else self.numpy_to_pil(pixels)

    def resize(self, image: Any, height: int, width: int, resize_mode: str = "default") -> Any:
        """Resize a PIL image by `resample`, an array [B, H, W, C] or tensor [B, C, H, W] by nearest pixels.

        resize_mode: "default" changes the aspect; for PIL images "fill" keeps it and extends the edges, and
        "crop" keeps it and cuts them.
        """
        from PIL.Image import Image, Resampling

        if resize_mode not in RESIZE_MODES:
            raise ValueError(f"resize_mode must be one of {', '.join(RESIZE_MODES)}, got {resize_mode!r}")
        if isinstance(image, Image):
            if resize_mode == "default":
                return image.resize((width, height), Resampling[RESAMPLINGS[self.resample]])
            return resize_to_fit(image, (height, width), covers=resize_mode == "crop")
        if resize_mode != "default":
            raise ValueError(f"resize_mode {resize_mode!r} is for PIL images, got {type(image).__name__}")
        if isinstance(image, np.ndarray):
            return self.pt_to_numpy(F.interpolate(self.numpy_to_pt(image), size=(height, width)))
        return F.interpolate(image, size=(height, width))

    def get_default_height_width(
        self, image: Any, height: int | None = None, width: int | None = None
    ) -> tuple[int, int]:  # fmt: skip
        """Return height and width, the image's own if None, rounded down to multiples of vae_scale_factor."""
        from PIL.Image import Image

        if isinstance(image, Image):
            own = image.height, image.width
        else:
            own = image.shape[2:4] if isinstance(image, Tensor) else image.shape[1:3]
        sides = own[0] if height is None else height, own[1] if width is None else width
        rounded = [side - side % self.vae_scale_factor for side in sides]
        if min(rounded) < 1:
            got = f"{sides[0]} x {sides[1]}"
            raise ValueError(f"image sides must be at least {self.vae_scale_factor}, got {got}")
        return rounded[0], rounded[1]

    @staticmethod
    def binarize(image: Tensor) -> Tensor:
        """Set values from a half on to 1, all others to 0."""
        return (image >= 0.5).to(image.dtype)

    @staticmethod
    def pil_to_numpy(images: "Image | list[Image]") -> np.ndarray:
        """Convert PIL images of one size and mode to float32 [B, H, W] or [B, H, W, C] in [0, 1]."""
        listed = images if isinstance(images, list) else [images]
        return np.stack([np.asarray(_known_mode(one), dtype=np.float32) / 255 for one in listed])

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> "list[Image]":
        """Convert an array [H, W, C] or [B, H, W, C] in [0, 1] to PIL images."""
        from PIL import Image

        batch = images[None] if images.ndim == 3 else images
        pixels = (batch * 255).round().astype("uint8")
        return [Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one) for one in pixels]

    @staticmethod
    def numpy_to_pt(images: np.ndarray) -> Tensor:
        """Convert an array [B, H, W] or [B, H, W, C] to a tensor [B, C, H, W]."""
        batch = images[..., None] if images.ndim == 3 else images
        return torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2)))  # [B, C, H, W]

    @staticmethod
    def pt_to_numpy(images: Tensor) -> np.ndarray:
        """Convert a tensor [B, C, H, W] to a float32 array [B, H, W, C]."""
        return images.cpu().movedim(1, -1).float().numpy()

    @staticmethod
    def normalize(images: Any) -> Any:
        """Map [0, 1] to [-1, 1]."""
        return 2.0 * images - 1.0

    @staticmethod
    def denormalize(images: Tensor) -> Tensor:
        """Map [-1, 1] to [0, 1], and clamp."""
        return to_images(images, "pt")

    @staticmethod
    def convert_to_rgb(image: "Image") -> "Image":
        """Convert a PIL image of any mode to RGB."""
        return image.convert("RGB")

    @staticmethod
    def convert_to_grayscale(image: "Image") -> "Image":
        """Convert a PIL image of any mode to gray."""
        return image.convert("L")

    @staticmethod
    def blur(image: "Image", blur_factor: int = 4) -> "Image":
        """Blur a PIL image, such as a mask, by a Gaussian of this radius in pixels."""
        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(blur_factor))

    @staticmethod
    def get_crop_region(mask_image: "Image", width: int, height: int, pad: int = 0) -> Box:
        """Return the box (left, top, right, bottom) of a mask's white part, in the aspect of the sides."""
        return mask_region(mask_image, (height, width), pad)

    def apply_overlay(
        self, mask: "Image", init_image: "Image", image: "Image", crop_coords: Box | None = None
    ) -> "Image":  # fmt: skip
        """Paste an image into the initial one where the mask is white; crop_coords: the box that it fills."""
        from PIL import Image as images

        page = image.convert("RGB")
        if crop_coords is not None:
            left, top, right, bottom = crop_coords
            page = images.new("RGB", init_image.size)
            page.paste(self.resize(image, bottom - top, right - left, "crop"), (left, top))
        return images.composite(page, init_image.convert("RGB"), mask.convert("L"))


def _known_mode(image: "Image") -> "Image":
    """Convert modes whose numbers are not 8-bit gray or RGB levels."""
    image = to_8_bits(image)
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")
