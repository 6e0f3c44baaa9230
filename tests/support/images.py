"""Images of noise, of every mode that PIL has."""

import numpy as np
from PIL import Image

MODES = ["RGB", "RGBA", "L", "LA", "P", "P transparent", "L transparent", "1", "I;16", "CMYK", "I", "F"]


def array(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def noise_image(mode: str = "RGB", width: int = 37, height: int = 22, seed: int = 0) -> Image.Image:
    """Noise of a mode; "transparent" says that a palette entry or a grey counts as transparent."""
    mode, _, transparent = mode.partition(" ")
    if mode in ("I;16", "I", "F"):
        grey = array(width, height, 2, seed).astype(np.uint16) @ np.array([1, 2], np.uint16)
        return Image.fromarray(grey.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    made = Image.fromarray(array(width, height, 4, seed), "RGBA")
    made = made.convert("RGB").quantize(16) if mode == "P" else made.convert(mode)
    if transparent:
        made.info["transparency"] = 3 if mode == "P" else made.getpixel((1, 1))
    return made
