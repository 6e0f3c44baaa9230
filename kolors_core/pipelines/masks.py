"""Where an image is made anew: masks read, a region around one cut out, what was made put back.

Masks are [m, 1, H, W] from 0 (stays) to 1 (is made anew).
Source: `VaeImageProcessor` in diffusers' image_processor.py, with its binarising, "fill" and "crop".
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_core.image import Size, preprocess_vae, to_grayscale, to_output

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels
SHAPE_TOLERANCE = 0.02  # by which a mask's aspect may differ from its image's
NO_WHITE = "white is repainted, and there is none"


def size_of(image: Any) -> Size:
    """Of an image, or the first of several: PIL images, arrays [..., H, W, 3], tensors [..., H, W]."""
    from PIL import Image

    one: Any = image[0] if isinstance(image, list | tuple) and image else image
    if isinstance(one, Image.Image):
        return one.height, one.width
    if getattr(one, "ndim", 0) < 3:
        raise TypeError(f"expected a PIL image, an array or a tensor, got {type(one).__name__}")
    height, width = one.shape[-2:] if isinstance(one, Tensor) else one.shape[-3:-1]
    return height, width


def grey(masks: Any, size: Size, pictures: Sequence[Size], name: str = "mask_image") -> Tensor:
    """Grey images as float32 [m, 1, H, W] in [0, 1] of this size.

    masks: PIL images of any mode, resized with Lanczos; arrays [H, W], [H, W, 1] or [m, H, W], and tensors
    [H, W], [m, H, W] or [m, 1, H, W], of bool, uint8 or in [0, 1], resized to the nearest pixel; or a list.
    images: the sizes of what they belong to, one of whose aspects each must have.
    Raises ValueError or TypeError naming the argument, what came and what was expected.
    """
    from PIL import Image

    planes = []
    for mask in masks if isinstance(masks, list | tuple) else [masks]:
        for plane in [mask] if isinstance(mask, Image.Image) else _planes(mask, name):
            h, w = (plane.height, plane.width) if isinstance(plane, Image.Image) else plane.shape
            if all(abs(h * p[1] - w * p[0]) > SHAPE_TOLERANCE * h * p[1] for p in pictures):
                shapes = " or ".join(dict.fromkeys(f"{p[0]} x {p[1]}" for p in pictures))
                wanted = f"its image's shape, {shapes}"
                raise ValueError(f"{name} is {h} x {w} (height x width), expected {wanted}")
            planes.append(_resized(plane, size))
    if not planes:
        raise ValueError(f"{name} is an empty list")
    return torch.stack(planes)[:, None]  # [m, 1, H, W]


def _planes(mask: Any, name: str) -> Iterator[Tensor]:
    """An array or tensor as floats [H, W] in [0, 1], one by one."""
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
    if values.dtype == torch.uint8:
        values = values / 255
    if values.dtype != torch.bool and not values.is_floating_point():
        raise ValueError(f"{name} must hold bool, uint8 or floats, got {mask.dtype}")
    values = values.float()
    if not 0 <= values.min() <= values.max() <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {values.min():g} to {values.max():g}")
    yield from values


def _resized(plane: "Image | Tensor", size: Size) -> Tensor:
    """A grey image as [H, W] in [0, 1]."""
    if isinstance(plane, Tensor):
        return F.interpolate(plane[None, None], size=size)[0, 0]
    return to_grayscale(plane, size).float() / 255


def repainted(mask: Tensor, size: Size, name: str = "mask_image") -> tuple[Tensor, Tensor]:
    """A mask as 1 where it is at least a half, else 0: as it is, and of the latents' size (nearest pixel).

    ValueError if one of the masks leaves nothing to repaint.
    """
    binary = (mask >= 0.5).to(mask)
    small = F.interpolate(binary, size=size)  # [m, 1, H/8, W/8]
    for part, trouble in ((binary, NO_WHITE), (small, "what is white is too fine for the latents")):
        if not part.flatten(1).any(1).all():
            raise ValueError(f"{name} leaves nothing to repaint: {trouble}")
    return binary, small


def crop_region(mask: "Image", size: Size, padding: int) -> Box:
    """What is not black in a mask, with `padding` pixels around, grown to the aspect of `size` where the
    image has room. ValueError for a mask that is all black.
    """
    found = mask.convert("L").getbbox()
    if found is None:
        raise ValueError(f"mask_image leaves nothing to repaint: {NO_WHITE}")
    left, top = (max(side - padding, 0) for side in found[:2])
    right, bottom = min(found[2] + padding, mask.width), min(found[3] + padding, mask.height)
    aspect = size[1] / size[0]
    if (right - left) / (bottom - top) > aspect:
        more = int((right - left) / aspect - (bottom - top))
        top, bottom = _grown(top, bottom, more, mask.height)
    else:
        left, right = _grown(left, right, int((bottom - top) * aspect - (right - left)), mask.width)
    return left, top, right, bottom


def _grown(start: int, end: int, more: int, limit: int) -> tuple[int, int]:
    """A stretch, longer by `more` at both ends alike, moved and at last cut to stay from 0 to the limit."""
    start, end = start - more // 2, end + more - more // 2
    beyond = max(end - limit, 0)
    start, end = start - beyond, end - beyond
    return (0, min(end - start, limit)) if start < 0 else (start, end)


def fitted(image: "Image", size: Size, covers: bool = False) -> "Image":
    """An image scaled to fit into a size, its edges drawn out into what is left; or to cover it, cut."""
    from PIL import Image

    height, width = size
    is_wider = image.width * height > width * image.height
    if is_wider != covers:
        scaled = image.resize((width, image.height * width // image.width), Image.Resampling.LANCZOS)
    else:
        scaled = image.resize((image.width * height // image.height, height), Image.Resampling.LANCZOS)
    left, top = width // 2 - scaled.width // 2, height // 2 - scaled.height // 2
    page = Image.new(image.mode, (width, height))
    page.paste(scaled, (left, top))
    if top > 0:
        end = scaled.height
        page.paste(scaled.resize((width, top), box=(0, 0, width, 0)), (0, 0))
        page.paste(scaled.resize((width, top), box=(0, end, width, end)), (0, top + end))
    if left > 0:
        end = scaled.width
        page.paste(scaled.resize((left, height), box=(0, 0, 0, height)), (0, 0))
        page.paste(scaled.resize((left, height), box=(end, 0, end, height)), (left + end, 0))
    return page


def put_back(made: Tensor, given: Tensor, mask: Tensor, box: Box | None = None) -> Tensor:
    """Made images in the given ones' place: only they where the mask is 1, only the given where it is 0.

    made: [B, 3, h, w] in [-1, 1], scaled to the box, which is the whole image if None. given: [B, 3, H, W];
    mask: [B, 1, H, W]. Returns [B, 3, H, W] in float32 or better.
    """
    given = given.to(made.device, torch.promote_types(made.dtype, torch.float32))
    mask = mask.to(given)
    left, top, right, bottom = (0, 0, given.shape[-1], given.shape[-2]) if box is None else box
    size = bottom - top, right - left
    if made.shape[-2:] != size:
        images = to_output(made, "pil")
        made = preprocess_vae([fitted(image, size, covers=True) for image in images], multiple=1)
    page = given.clone()
    page[..., top:bottom, left:right] = made.to(given)
    return given * (1 - mask) + page * mask
