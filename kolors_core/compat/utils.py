"""Functions for images and noise, under the names of the reference's utils."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kolors_core.image import load_image as load_image
from kolors_core.sampling import Generators, randn_latents
from kolors_core.validation import check_int

if TYPE_CHECKING:
    from PIL.Image import Image


def make_image_grid(
    images: "Sequence[Image]", rows: int, cols: int, resize: int | None = None
) -> "Image":  # fmt: skip
    """Paste rows times cols images into one, row by row; ValueError for another number of them.

    The cells have the first image's size. resize: scales each image to a square of this side first.
    """
    from PIL import Image

    rows, cols = check_int("rows", rows), check_int("cols", cols)
    if len(images) != rows * cols:
        raise ValueError(f"{rows} rows of {cols} need {rows * cols} images, got {len(images)}")
    if resize is not None:
        side = check_int("resize", resize)
        images = [image.resize((side, side)) for image in images]
    width, height = images[0].size
    grid = Image.new("RGB", (cols * width, rows * height))
    for i, image in enumerate(images):
        grid.paste(image, (i % cols * width, i // cols * height))
    return grid


def randn_tensor(
    shape: Sequence[int], generator: Generators = None, device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Draw standard normal noise on the generator's device, then move it; see `sampling.randn_latents`."""
    place, kind = torch.device("cpu" if device is None else device), dtype or torch.get_default_dtype()
    return randn_latents(tuple(shape), generator, place, kind)
