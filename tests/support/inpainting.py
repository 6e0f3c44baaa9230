"""A mask, and pipelines with a UNet of 9 channels: what the tests of inpainting share."""

from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from kolors_core import KolorsInpaintPipeline
from tests.support.small import SMALL

NINE = replace(SMALL, unet=replace(SMALL.unet, in_channels=9))
Nine = tuple[KolorsInpaintPipeline, Any]


def mask_of(height: int = 64, width: int = 72) -> Image.Image:
    """Black, with a white box and a grey edge."""
    values = np.zeros((height, width), dtype=np.uint8)
    values[height // 4 : height * 3 // 4, width // 3 : width * 3 // 4] = 100
    values[height // 4 + 3 : height * 3 // 4 - 3, width // 3 + 3 : width * 3 // 4 - 3] = 255
    return Image.fromarray(values)
