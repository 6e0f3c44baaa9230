"""Image conversion between files, PIL and tensors.

Tensors are [B, 3, H, W]; [-1, 1] at the VAE, [0, 1] outside. An image of more pixels than
`PIL.Image.MAX_IMAGE_PIXELS` is refused before it is read; a caller who trusts larger ones sets that higher.
Sources: `VaeImageProcessor` in diffusers' image_processor.py, `load_image` in its utils/loading_utils.py.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_core.config import VERSION
from kolors_core.validation import check_int
from weights_convert.untrusted_files import check_file, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]  # (height, width) in pixels
OUTPUT_TYPES = ("pil", "np", "pt")
DOWNLOAD_SECONDS, DOWNLOAD_BYTES = 30, 256 * 2**20  # seconds without an answer
LARGEST_VALUE = 2.0  # a decoder overshoots [-1, 1] a little; [0, 255] in floats is another scale
LEVELS = {torch.uint8: 255, torch.uint16: 65535}  # the values of white
MAX_SIDE = 2**20  # pixels; Lanczos takes 48 bytes for each pixel of a side
_OPENING = Lock()  # the filters of warnings belong to the whole process


def to_images(images: Tensor, output_type: str) -> Any:
    """Convert images [B, 3, H, W] in [-1, 1] to "pil", or to [0, 1] as "np" [B, H, W, 3] float32 or "pt"."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
    images = (images * 0.5 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    pixels = images.float().cpu().movedim(1, -1).numpy()  # [B, H, W, 3]
    if output_type == "np":
        return pixels
    from PIL import Image

    return [Image.fromarray(array) for array in (pixels * 255).round().astype("uint8")]


def load_image(
    image: "str | Path | Image", convert_method: "Callable[[Image], Image] | None" = None
) -> "Image":
    """Load an image from a file, an http(s) URL or PIL, rotated upright by its EXIF tag, as RGB.

    convert_method: called on the upright image, of any mode, instead of the conversion to RGB. Raises
    FileNotFoundError, OSError for a URL that does not answer, ValueError for a file that is not a whole image
    of at most PIL.Image.MAX_IMAGE_PIXELS.
    """
    from PIL import Image, ImageOps

    if isinstance(image, Image.Image):
        name = getattr(image, "filename", "") or "the image"
        with image_errors(name):
            check_pixels(*image.size)
            upright = ImageOps.exif_transpose(image)
    elif isinstance(image, str | Path):
        name, is_address = image, str(image).lower().startswith(("http://", "https://"))
        with open_image(image, _download(str(image)) if is_address else None) as opened:
            upright = ImageOps.exif_transpose(opened)
    else:
        raise TypeError(f"expected a path, an http(s) address or a PIL image, got {type(image).__name__}")
    converted = to_8_bits(upright, name).convert("RGB") if convert_method is None else convert_method(upright)
    if isinstance(image, str | Path):
        vars(converted)["filename"] = str(image)  # as of `Image.open`: an image's metadata name it
    return converted


def png_bytes(image: "Image") -> bytes:
    """Encode an image as a PNG."""
    content = BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


@contextmanager
def open_image(file: str | Path, content: BytesIO | None = None) -> Iterator["Image"]:
    """Open an image in a `with` block: a file, or its content. Errors, also in the block, name the file."""
    from PIL import Image

    if content is None:
        check_file(Path(file))
    with image_errors(file):
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(file if content is None else content)
        with opened:
            check_pixels(*opened.size)
            yield opened


def check_pixels(width: int, height: int) -> None:
    """Raise ValueError for an image of more pixels than PIL.Image.MAX_IMAGE_PIXELS, or a side of 2**20."""
    from PIL import Image

    size = f"{height} x {width} (height x width)"
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(_too_large(f"{size} is {width * height:,} pixels"))
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"{size}, expected sides of at most {MAX_SIDE:,}")


def _too_large(got: str) -> str:
    from PIL import Image

    return f"{got}, expected at most {Image.MAX_IMAGE_PIXELS:,}: PIL.Image.MAX_IMAGE_PIXELS sets this limit"


def to_8_bits(image: "Image", name: str | Path = "") -> "Image":
    """Convert an image of 16 bits, integers or floats to 8 bits of gray ("L"), scaled by its range.

    All other modes are returned as they are, with their pixels loaded. "I;16" is from 0 to 65,535, "I" too
    unless all its values are at most 255, and "F" from 0 to 1 or from 0 to 255. ValueError naming the image's
    file, or `name`, for other values, too many pixels, and a damaged file.
    """
    from PIL import Image

    with image_errors(name or getattr(image, "filename", "") or "the image"):
        check_pixels(*image.size)
        image.load()
        is_16_bit = image.mode.startswith("I;16")
        if 0 in image.size or not (is_16_bit or image.mode in ("I", "F")):
            return image
        values = np.asarray(image, dtype=np.float32)
        low, high = values.min(), values.max()
        small, large = (1, 255) if image.mode == "F" else (255, 65535)
        white = small if high <= small and not is_16_bit else large
        if not 0 <= low <= high <= white:  # of NaN too
            expected = f"values from 0 to {small} or from 0 to {large}"
            raise ValueError(f"mode {image.mode!r}: expected {expected}, got {low:g} to {high:g}")
        return Image.fromarray(np.rint(values * np.float32(255 / white)).astype(np.uint8))


def _download(address: str) -> BytesIO:
    from http.client import HTTPException
    from urllib.parse import quote
    from urllib.request import Request, urlopen

    try:
        # Some servers refuse Python's own user agent; urllib takes no spaces or Chinese characters.
        quoted = quote(address, safe="!#$%&'()*+,/:;=?@[]~")
        request = Request(quoted, headers={"User-Agent": f"kolors_core/{VERSION}"})
        with urlopen(request, timeout=DOWNLOAD_SECONDS) as response:
            content = response.read(DOWNLOAD_BYTES + 1)
    except (OSError, HTTPException, ValueError) as error:
        raise OSError(f"{address}: cannot be fetched: {one_line(error, 200)}") from None
    if len(content) > DOWNLOAD_BYTES:
        raise ValueError(f"{address}: larger than {DOWNLOAD_BYTES:,} bytes")
    return BytesIO(content)


@contextmanager
def image_errors(file: str | Path) -> Iterator[None]:
    """Convert PIL's errors to FileNotFoundError or ValueError that names the file."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        pixels = re.findall(r"\d+", str(error))
        raise ValueError(f"{file}: {_too_large(f'{int(pixels[0]):,} pixels')}") from None
    except (OSError, SyntaxError, ValueError, RuntimeError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(f"{file}: {reason}") from None


def preprocess_vae(
    images: "Image | np.ndarray | Tensor | Sequence[Image | np.ndarray | Tensor]", height: int | None = None,
    width: int | None = None, multiple: int = 8
) -> Tensor:  # fmt: skip
    """Convert images for the VAE: [B, 3, H, W] in [-1, 1], float32 unless given as other floats.

    PIL images of any mode; arrays [H, W, 3] or [B, H, W, 3] and tensors [3, H, W] or [B, 3, H, W], of uint8,
    uint16, in [0, 1], or in [-1, 1] if any value is negative; or a list of them. Without `height` or `width`
    an image's own side is rounded down to the multiple. PIL images are resized with Lanczos, arrays and
    tensors to the nearest pixel. Raises ValueError for different sizes, sides not a multiple, values out of
    range.
    """
    batch = _to_batch(images, height, width, multiple)  # [B, 3, H, W]
    if not (largest := batch.abs().max().item()) <= LARGEST_VALUE:
        raise ValueError(f"image values must lie in [0, 1] or [-1, 1], got one of size {largest:g}")
    return batch if batch.min() < 0 else 2.0 * batch - 1.0


def preprocess_control(images: Any, height: int | None = None, width: int | None = None) -> Tensor:
    """Convert images for ControlNets as `preprocess_vae`, but to [B, 3, H, W] in [0, 1]; others fail."""
    batch = _to_batch(images, height, width, 8)
    if not bool(((batch >= 0) & (batch <= 1)).all()):  # a plan has no values, and takes True
        got = f"{batch.min().item():g} to {batch.max().item():g}"
        raise ValueError(f"a control image's values must lie in [0, 1], got {got}")
    return batch


def _to_batch(images: Any, height: int | None, width: int | None, multiple: int) -> Tensor:
    """Resize and stack images: [B, 3, H, W] in the range that they came in, [0, 1] for PIL."""
    for name, side in (("height", height), ("width", width)):
        if side is not None:
            check_int(name, side, multiple)
    single = as_list(images)
    if len(kinds := {str(getattr(image, "dtype", "PIL")) for image in single}) > 1:
        raise ValueError(f"images of different kinds, {', '.join(sorted(kinds))}: their ranges may differ")
    converted = [_rgb_or_tensor(image) for image in single]
    sizes = [c.shape[-2:] if isinstance(c, Tensor) else (c.height, c.width) for c in converted]
    targets = {
        (h - h % multiple if height is None else height, w - w % multiple if width is None else width)
        for h, w in sizes
    }
    if len(targets) > 1:
        named = ", ".join(f"{h} x {w}" for h, w in sizes)
        raise ValueError(f"images of different sizes, {named} (height x width): give height and width")
    target = targets.pop()
    if 0 in target or any(0 in size for size in sizes):
        raise ValueError(f"image sides must be at least {multiple}, got {sizes[0][0]} x {sizes[0][1]}")
    return torch.stack([_resize(image, target) for image in converted])  # [B, 3, H, W]


def as_list(images: Any) -> list[Any]:
    """List the single images of an image, a sequence, or arrays and tensors that stack several."""
    given = images if isinstance(images, list | tuple) else [images]
    single = [one for image in given for one in (image if getattr(image, "ndim", 0) == 4 else [image])]
    if not single:
        raise ValueError("expected at least one image, got none")
    return single


def _rgb_or_tensor(image: Any) -> "Image | Tensor":
    """Convert a PIL image to RGB; an array or tensor to a floating-point tensor [3, H, W]."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return to_8_bits(image).convert("RGB")
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "fu" or not image.dtype.isnative:
            raise ValueError(f"expected pixels of uint8, uint16 or floats, got {image.dtype}")
        expected = "an array [H, W, 3] or [B, H, W, 3]"
        pixels = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, 0)  # [3, H, W]
    elif isinstance(image, Tensor):
        expected, pixels = "a tensor [3, H, W] or [B, 3, H, W]", image
    else:
        raise TypeError(f"expected a PIL image, an array or a tensor, got {type(image).__name__}")
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"expected {expected}, got one of {list(image.shape)}")
    pixels = scale_integers(pixels)
    if not pixels.is_floating_point():
        raise ValueError(f"expected pixels of uint8, uint16 or floats, got {image.dtype}")
    return pixels


def scale_integers(pixels: Tensor) -> Tensor:
    """Scale uint8 and uint16 to floats in [0, 1]; return other pixels as they are."""
    return pixels.float() / LEVELS[pixels.dtype] if pixels.dtype in LEVELS else pixels


def _resize(image: "Image | Tensor", target: Size) -> Tensor:
    """Resize an image to (height, width): [3, H, W] in the range that it came in, [0, 1] for PIL."""
    if isinstance(image, Tensor):
        return F.interpolate(image[None], size=target)[0]
    from PIL.Image import Resampling

    return pil_to_tensor(image.resize((target[1], target[0]), Resampling.LANCZOS)).float() / 255


def pil_to_tensor(image: "Image") -> Tensor:
    """Convert an RGB image to its bytes: uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).movedim(-1, 0)  # [3, H, W]


def to_grayscale(image: "Image", size: Size) -> Tensor:
    """Resize with Lanczos, then convert to gray: uint8 [H, W]; a mask of one bit a pixel keeps hard edges."""
    from PIL.Image import Resampling

    image = to_8_bits(image).resize((size[1], size[0]), Resampling.LANCZOS)
    return torch.from_numpy(np.array(image.convert("L")))


def flatten_alpha(image: "Image", name: str | Path = "") -> "Image":
    """Convert an image of any mode to RGB, composited on white; errors as of `to_8_bits`."""
    from PIL import Image

    image = to_8_bits(image, name)
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def center_crop(image: "Image", size: Size) -> tuple["Image", tuple[int, int]]:
    """Crop the center (height, width) of an image; returns it and its offset, (top, left)."""
    top, left = (image.height - size[0]) // 2, (image.width - size[1]) // 2
    return image.crop((left, top, left + size[1], top + size[0])), (top, left)
