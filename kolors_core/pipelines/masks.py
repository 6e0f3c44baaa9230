"""Masks for inpainting: read, binarized, cropped around, and used to paste generated images back.

Masks are [m, 1, H, W] from 0 (preserved) to 1 (generated).
Source: `VaeImageProcessor` in diffusers' image_processor.py, with its binarization, "fill" and "crop".
"""

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_core.image import (
    Size,
    check_pixels,
    load_image,
    preprocess_vae,
    scale_integers,
    to_8_bits,
    to_grayscale,
    to_images,
)

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels
SHAPE_TOLERANCE = 0.02  # by which a mask's aspect may differ from its image's
NO_WHITE = "white is repainted, and there is none"
logger = logging.getLogger("kolors_core")


def size_of(image: Any) -> Size:
    """Return (height, width) of a PIL image, array [..., H, W, 3], tensor [..., H, W], or a list's first."""
    from PIL import Image

    one: Any = image[0] if isinstance(image, list | tuple) and image else image
    if isinstance(one, Image.Image):
        return one.height, one.width
    if getattr(one, "ndim", 0) < 3:
        raise TypeError(f"expected a PIL image, an array or a tensor, got {type(one).__name__}")
    height, width = one.shape[-2:] if isinstance(one, Tensor) else one.shape[-3:-1]
    return height, width


def load_mask(file: str, name: str) -> "Image":
    """Load a mask from a file or http(s) URL as gray ("L"); `name` is that of its argument, for warnings."""

    def convert(image: "Image") -> "Image":
        warn_alpha_only(image, name)
        return to_8_bits(image, file).convert("L")

    return load_image(file, convert)


def warn_alpha_only(masks: Any, name: str) -> None:
    """Log a mask whose gray is the same everywhere while its alpha, which is not read, has a shape."""
    from PIL import Image

    for mask in masks if isinstance(masks, list | tuple) else [masks]:
        if isinstance(mask, Image.Image) and mask.has_transparency_data:
            bands = to_8_bits(mask).convert("L"), mask.convert("RGBA").getchannel("A")
            is_constant, is_opaque = (
                lowest == highest for lowest, highest in (b.getextrema() for b in bands)
            )
            if is_constant and not is_opaque:
                hint = "give image.getchannel('A'), or ImageOps.invert of it to repaint what is transparent"
                fault = "its gray is the same everywhere and its shape is in its alpha, which is not read"
                logger.warning("%s: %s: %s", name, fault, hint)


def to_gray(masks: Any, size: Size, image_sizes: Sequence[Size], name: str = "mask_image") -> Tensor:
    """Convert masks to gray float32 [m, 1, H, W] in [0, 1] of this size.

    masks: PIL images of any mode, resized with Lanczos; arrays [H, W], [H, W, 1] or [m, H, W], and tensors
    [H, W], [m, H, W] or [m, 1, H, W], of bool, uint8, uint16 or in [0, 1], resized to the nearest pixel; or a
    list.
    image_sizes: of the images that they belong to; each mask must have the aspect of one of them.
    Raises ValueError or TypeError naming the argument, what came and what was expected.
    """
    from PIL import Image

    planes = []
    for mask in masks if isinstance(masks, list | tuple) else [masks]:
        for plane in [mask] if isinstance(mask, Image.Image) else _planes(mask, name):
            h, w = (plane.height, plane.width) if isinstance(plane, Image.Image) else plane.shape
            if all(abs(h * p[1] - w * p[0]) > SHAPE_TOLERANCE * h * p[1] for p in image_sizes):
                own = " or ".join(dict.fromkeys(f"{p[0]} x {p[1]}" for p in image_sizes))
                raise ValueError(f"{name} is {h} x {w} (height x width), expected its image's shape, {own}")
            if isinstance(plane, Image.Image):
                planes.append(to_grayscale(plane, size).float() / 255)
            else:
                planes.append(F.interpolate(plane[None, None], size=size)[0, 0])
    if not planes:
        raise ValueError(f"{name} is an empty list")
    return torch.stack(planes)[:, None]  # [m, 1, H, W]


def _planes(mask: Any, name: str) -> Iterator[Tensor]:
    """Yield the masks of an array or tensor as floats [H, W] in [0, 1]."""
    wanted = "PIL images, arrays [H, W], [H, W, 1] or [m, H, W], or tensors [H, W], [m, H, W] or [m, 1, H, W]"
    if isinstance(mask, np.ndarray):
        values = torch.from_numpy(np.ascontiguousarray(mask))
        values = values[..., 0] if values.ndim > 2 and values.shape[-1] == 1 else values
    elif isinstance(mask, Tensor):
        values = mask[:, 0] if mask.ndim == 4 and mask.shape[1] == 1 else mask
    else:
        raise TypeError(f"{name} must be {wanted}, got {type(mask).__name__}")
    values = values[None] if values.ndim == 2 else values  # [m, H, W]
    if values.ndim != 3 or not values.numel():
        raise ValueError(f"{name} must be {wanted}, got one of {list(mask.shape)}")
    values = scale_integers(values)
    if values.dtype != torch.bool and not values.is_floating_point():
        raise ValueError(f"{name} must hold bool, uint8, uint16 or floats, got {mask.dtype}")
    values = values.float()
    if not 0 <= values.min() <= values.max() <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {values.min():g} to {values.max():g}")
    yield from values


def binarize_mask(mask: Tensor, size: Size, name: str = "mask_image") -> tuple[Tensor, Tensor]:
    """Binarize masks at a half: at their own and at the latents' size. ValueError if one marks nothing."""
    binary = (mask >= 0.5).to(mask)
    small = F.interpolate(binary, size=size)  # [m, 1, H/8, W/8]
    for part, trouble in ((binary, NO_WHITE), (small, "what is white is too fine for the latents")):
        if not part.flatten(1).any(1).all():
            raise ValueError(f"{name} leaves nothing to repaint: {trouble}")
    return binary, small


def mask_region(mask: "Image", size: Size, padding: int) -> Box:
    """Return the padded box of a mask's non-black part, in the aspect of `size` if it fits."""
    if (found := to_8_bits(mask).convert("L").getbbox()) is None:
        raise ValueError(f"mask_image leaves nothing to repaint: {NO_WHITE}")
    left, top = (max(side - padding, 0) for side in found[:2])
    right, bottom = min(found[2] + padding, mask.width), min(found[3] + padding, mask.height)
    aspect = size[1] / size[0]
    if (right - left) / (bottom - top) > aspect:
        top, bottom = _expand(top, bottom, int((right - left) / aspect - (bottom - top)), mask.height)
    else:
        left, right = _expand(left, right, int((bottom - top) * aspect - (right - left)), mask.width)
    return left, top, right, bottom


def _expand(start: int, end: int, more: int, limit: int) -> tuple[int, int]:
    """Lengthen an interval by `more`, half at each end; shift and, if too long, cut it to [0, limit]."""
    start, end = start - more // 2, end + more - more // 2
    beyond = max(end - limit, 0)
    start, end = start - beyond, end - beyond
    return (0, min(end - start, limit)) if start < 0 else (start, end)


def resize_to_fit(image: "Image", size: Size, covers: bool = False) -> "Image":
    """Scale an image to fit into a size and extend its edges to fill it; or, if covers, to cover and crop."""
    from PIL import Image

    height, width = size
    is_wider = image.width * height > width * image.height
    fits_width = width, image.height * width // image.width
    fits_height = image.width * height // image.height, height
    scaled_size = fits_width if is_wider != covers else fits_height
    check_pixels(*scaled_size)
    scaled = image.resize(scaled_size, Image.Resampling.LANCZOS)
    left, top = width // 2 - scaled.width // 2, height // 2 - scaled.height // 2
    page = Image.new(image.mode, (width, height))
    page.paste(scaled, (left, top))
    if top > 0:
        for edge, start in ((0, 0), (scaled.height, top + scaled.height)):
            page.paste(scaled.resize((width, top), box=(0, edge, width, edge)), (0, start))
    if left > 0:
        for edge, start in ((0, 0), (scaled.width, left + scaled.width)):
            page.paste(scaled.resize((left, height), box=(edge, 0, edge, height)), (start, 0))
    return page


def paste(generated: Tensor, given: Tensor, mask: Tensor, box: Box | None = None) -> Tensor:
    """Paste generated images into given ones where the mask is 1; where it is 0 the given pixels stay.

    generated: [B, 3, h, w] in [-1, 1], scaled to the box, which is the whole image if None. given: [B, 3, H,
    W]; mask: [B, 1, H, W]. Returns [B, 3, H, W] in float32 or better.
    """
    given = given.to(generated.device, torch.promote_types(generated.dtype, torch.float32))
    mask = mask.to(given)
    left, top, right, bottom = (0, 0, given.shape[-1], given.shape[-2]) if box is None else box
    if generated.shape[-2:] != (size := (bottom - top, right - left)):
        images = to_images(generated, "pil")
        generated = preprocess_vae([resize_to_fit(image, size, covers=True) for image in images], multiple=1)
    page = given.clone()
    page[..., top:bottom, left:right] = generated.to(given)
    return given * (1 - mask) + page * mask
