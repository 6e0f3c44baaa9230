"""Images between PIL files and tensors, and what a PNG tells about how it was made.

Tensors are [B, 3, H, W]; [-1, 1] at the VAE, [0, 1] outside.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

OUTPUT_TYPES = ("pil", "np", "pt")


def to_output(images: Tensor, output_type: str) -> "list[Image] | np.ndarray | Tensor":
    """Images [B, 3, H, W] in [-1, 1] as a "pil" list, or in [0, 1] as "np" [B, H, W, 3] float32 or "pt"."""
    images = (images * 0.5 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    from einops import rearrange

    pixels = rearrange(images.float().cpu(), "b c h w -> b h w c").numpy()
    if output_type == "np":
        return pixels
    from PIL import Image

    return [Image.fromarray(picture) for picture in (pixels * 255).round().astype("uint8")]


def describe(image: "Image", facts: Mapping[str, Any]) -> None:
    """Attach facts: `image.info` holds them, and `image.save("x.png")` writes them as text chunks."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for name, value in facts.items():
        chunks.add_itxt(name, str(value))
    image.info.update({name: str(value) for name, value in facts.items()})
    image.encoderinfo = {"pnginfo": chunks}


def save_png(image: "Image", path: str | Path) -> None:
    """Write a PNG with its description, whole or not at all: first beside it, then under its name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    try:
        image.save(scratch, format="PNG")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def read_description(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG. FileNotFoundError or ValueError naming the file if it is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.format != "PNG":
                raise ValueError(f"{path}: wanted a PNG, got {image.format}")
            image.load()
            return {str(name): value for name, value in image.info.items() if isinstance(value, str)}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(f"{path}: {reason}") from None
