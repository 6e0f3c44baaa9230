"""Images of noise, of every mode that PIL has, and the same image in more bits."""

import numpy as np
from PIL import Image

MODES = ["RGB", "RGBA", "L", "LA", "P", "P transparent", "L transparent", "1", "CMYK", "YCbCr", "LAB", "HSV"]
# An 8-bit gray image in modes of more bits: the numbers that a gray of 1 becomes.
DEEP = {"I;16": 257, "I;16B": 257, "I": 257, "I of 8 bits": 1, "F": 1 / 255, "F of 8 bits": 1}


def array(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def noise_image(mode: str = "RGB", width: int = 37, height: int = 22, seed: int = 0) -> Image.Image:
    """Noise of a mode; "transparent" says that a palette entry or a grey counts as transparent."""
    mode, _, transparent = mode.partition(" ")
    made = Image.fromarray(array(width, height, 4, seed), "RGBA")
    if mode == "LAB":
        return Image.frombytes("LAB", (width, height), array(width, height, seed=seed).tobytes())
    made = made.convert("RGB") if mode in ("P", "YCbCr", "HSV") else made
    made = made.quantize(16) if mode == "P" else made.convert(mode)
    if transparent:
        made.info["transparency"] = 3 if mode == "P" else made.getpixel((1, 1))
    return made


def deepened(image: Image.Image, kind: str) -> Image.Image:
    """The same gray image in one of the `DEEP` modes."""
    values, mode = np.asarray(image.convert("L")) * np.float64(DEEP[kind]), kind.partition(" ")[0]
    if mode == "I;16B":
        return Image.frombytes(mode, image.size, values.astype(">u2").tobytes())
    return Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
