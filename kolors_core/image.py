"""Images between files, PIL and tensors: for the VAE, for CLIP, as masks; and what a PNG tells of its making.

Tensors are [B, 3, H, W]; [-1, 1] at the VAE, [0, 1] outside.
Sources: `VaeImageProcessor`, `IPAdapterMaskProcessor` and `load_image` in diffusers, `CLIPImageProcessorPil`
in transformers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_core.config import VERSION
from kolors_core.validation import path_of, whole_number
from weights_convert.atomic_write import new_file

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]  # (height, width) in pixels
OUTPUT_TYPES = ("pil", "np", "pt")
DOWNLOAD_SECONDS = 30  # without an answer
DOWNLOAD_BYTES = 256 * 2**20
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LARGEST_VALUE = 2.0  # a decoder overshoots [-1, 1] a little; [0, 255] in floats is another scale
LARGEST_ASPECT = 100  # the longer side by the shorter, of a picture for CLIP


def to_output(images: Tensor, output_type: str) -> Any:
    """Images [B, 3, H, W] in [-1, 1] as a "pil" list, or in [0, 1] as "np" [B, H, W, 3] float32 or "pt"."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
    images = (images * 0.5 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    pixels = images.float().cpu().movedim(1, -1).numpy()  # [B, H, W, 3]
    if output_type == "np":
        return pixels
    from PIL import Image

    return [Image.fromarray(picture) for picture in (pixels * 255).round().astype("uint8")]


def load_image(
    image: "str | Path | Image", convert_method: "Callable[[Image], Image] | None" = None
) -> "Image":
    """A picture from a file, an http(s) address or PIL, turned upright by its EXIF tag and made RGB.

    convert_method: called on the upright picture in place of the conversion to RGB.
    Raises, in one line, FileNotFoundError, OSError for an address that does not answer, ValueError for what
    is no image.
    """
    from PIL import Image, ImageOps

    if isinstance(image, Image.Image):
        picture = ImageOps.exif_transpose(image)
    elif isinstance(image, str | Path):
        is_address = str(image).lower().startswith(("http://", "https://"))
        content = _download(str(image)) if is_address else image
        with naming(image), Image.open(content) as opened:
            picture = ImageOps.exif_transpose(opened)
    else:
        raise TypeError(f"wanted a path, an http(s) address or a PIL image, got {type(image).__name__}")
    return picture.convert("RGB") if convert_method is None else convert_method(picture)


def _download(address: str) -> BytesIO:
    from http.client import HTTPException
    from urllib.parse import quote
    from urllib.request import Request, urlopen

    try:
        # Some servers refuse the name that Python gives itself; urllib takes no spaces or Chinese characters.
        quoted = quote(address, safe="!#$%&'()*+,/:;=?@[]~")
        request = Request(quoted, headers={"User-Agent": f"kolors_core/{VERSION}"})
        with urlopen(request, timeout=DOWNLOAD_SECONDS) as answer:
            content = answer.read(DOWNLOAD_BYTES + 1)
    except (OSError, HTTPException, ValueError) as error:
        reason = " ".join(str(error).split())
        raise OSError(f"{address}: cannot be fetched: {reason[:200]}") from None
    if len(content) > DOWNLOAD_BYTES:
        raise ValueError(f"{address}: larger than {DOWNLOAD_BYTES:,} bytes")
    return BytesIO(content)


@contextmanager
def naming(file: str | Path) -> Iterator[None]:
    """Turn what PIL raises into FileNotFoundError or ValueError that names the file."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(f"{file}: {reason}") from None


def vae_pixels(
    images: "Image | np.ndarray | Tensor | Sequence[Image | np.ndarray | Tensor]",
    height: int | None = None,
    width: int | None = None,
    multiple: int = 8,
) -> Tensor:
    """Images for the VAE: [B, 3, H, W] in [-1, 1], float32 unless a tensor or array has other floats.

    PIL images of any mode; arrays [H, W, 3] or [B, H, W, 3] and tensors [3, H, W] or [B, 3, H, W], of uint8
    or in [0, 1], or in [-1, 1] if any value is negative; or a list of them. Without `height` or `width` an
    image's own side is rounded down to the multiple. PIL images are resized with Lanczos, arrays and tensors
    to the nearest pixel. Raises ValueError for sizes that differ, sides that are no multiple, values beyond.
    """
    batch = _stacked(images, height, width, multiple)  # [B, 3, H, W]
    if not (largest := batch.abs().max().item()) <= LARGEST_VALUE:
        raise ValueError(f"image values must lie in [0, 1] or [-1, 1], got one of size {largest:g}")
    return batch if batch.min() < 0 else 2.0 * batch - 1.0


def control_pixels(images: Any, height: int | None = None, width: int | None = None) -> Tensor:
    """Images for ControlNets: [B, 3, H, W] in [0, 1].

    Images, sizes and errors as for `vae_pixels`, but that values below 0 are refused.
    """
    batch = _stacked(images, height, width, 8)
    if not bool(((batch >= 0) & (batch <= 1)).all()):
        got = f"{batch.min().item():g} to {batch.max().item():g}"
        raise ValueError(f"a control image's values must lie in [0, 1], got {got}")
    return batch


def _stacked(images: Any, height: int | None, width: int | None, multiple: int) -> Tensor:
    """Images of one size [B, 3, H, W] in the range that they came in, [0, 1] for PIL."""
    for name, side in (("height", height), ("width", width)):
        if side is not None:
            whole_number(name, side, multiple)
    single = _listed(images)
    if len(kinds := {str(getattr(image, "dtype", "PIL")) for image in single}) > 1:
        raise ValueError(f"images of different kinds, {', '.join(sorted(kinds))}: their ranges may differ")
    pictures = [_rgb_or_tensor(image) for image in single]
    sizes = [p.shape[-2:] if isinstance(p, Tensor) else (p.height, p.width) for p in pictures]
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
    return torch.stack([_resized(picture, target) for picture in pictures])  # [B, 3, H, W]


def _listed(images: Any) -> list[Any]:
    """One image, a sequence, or arrays and tensors that stack several: as single images."""
    single = []
    for image in images if isinstance(images, list | tuple) else [images]:
        single += list(image) if getattr(image, "ndim", 0) == 4 else [image]
    if not single:
        raise ValueError("wanted at least one image, got none")
    return single


def _rgb_or_tensor(image: Any) -> "Image | Tensor":
    """A PIL image as RGB; an array or tensor as a floating tensor [3, H, W]."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "fu" or not image.dtype.isnative:
            raise ValueError(f"wanted pixels of uint8 or floats, got {image.dtype}")
        wanted = "an array [H, W, 3] or [B, H, W, 3]"
        pixels = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, 0)  # [3, H, W]
    elif isinstance(image, Tensor):
        wanted, pixels = "a tensor [3, H, W] or [B, 3, H, W]", image
    else:
        raise TypeError(f"wanted a PIL image, an array or a tensor, got {type(image).__name__}")
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"wanted {wanted}, got one of {list(image.shape)}")
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    if not pixels.is_floating_point():
        raise ValueError(f"wanted pixels of uint8 or floats, got {image.dtype}")
    return pixels


def _resized(picture: "Image | Tensor", target: Size) -> Tensor:
    """[3, H, W] of the target's height and width, in the range that it came in, [0, 1] for PIL."""
    if isinstance(picture, Tensor):
        return F.interpolate(picture[None], size=target)[0]
    from PIL.Image import Resampling

    return _to_tensor(picture.resize((target[1], target[0]), Resampling.LANCZOS)).float() / 255


def _to_tensor(picture: "Image") -> Tensor:
    """The bytes of an RGB picture: uint8 [3, H, W]."""
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)  # [3, H, W]


def grey_bytes(picture: "Image", size: Size) -> Tensor:
    """A picture of any mode, resized with Lanczos, in grey: uint8 [H, W].

    Resized first, as in the reference, so that edges of a mask of one bit a pixel stay hard.
    """
    from PIL.Image import Resampling

    return torch.from_numpy(np.array(picture.resize((size[1], size[0]), Resampling.LANCZOS).convert("L")))


class IPAdapterMaskProcessor:
    """Makes masks that say where an IP-Adapter image counts, as diffusers' class of this name does."""

    def preprocess(
        self, image: "Image | Sequence[Image]", height: int | None = None, width: int | None = None
    ) -> Tensor:
        """One mask or several, of any mode: [n, 1, H, W], float32, 1 where brighter than middle grey, else 0.

        Each is resized to height and width, or to the first one's size, both rounded down to multiples of 8.
        """
        from PIL import Image

        masks = _listed(image)
        for mask in masks:
            if not isinstance(mask, Image.Image):
                raise TypeError(f"wanted masks as PIL images, got {type(mask).__name__}")
        h = masks[0].height if height is None else whole_number("height", height)
        w = masks[0].width if width is None else whole_number("width", width)
        if h < 8 or w < 8:
            raise ValueError(f"the sides of a mask must be at least 8, got {h} x {w}")
        size = h - h % 8, w - w % 8
        return torch.stack([grey_bytes(mask, size) >= 128 for mask in masks]).float()[:, None]  # [n, 1, H, W]


def clip_pixels(images: "Image | np.ndarray | Sequence[Image | np.ndarray]", size: int = 336) -> Tensor:
    """Images for CLIP: [B, 3, size, size] float32, the middle square, normalised by CLIP's mean and spread.

    PIL images of any mode, what is transparent on white; arrays [H, W, 3] or [B, H, W, 3] of uint8 or in
    [0, 1]; or a list of them, whose sizes may differ.
    """
    from PIL.Image import Resampling

    squares = []
    for image in _listed(images):
        picture = _on_white(image)
        short, long = sorted(picture.size)
        if not 0 < long <= LARGEST_ASPECT * short:
            wanted = f"a picture with sides of 1 to {LARGEST_ASPECT} times each other"
            raise ValueError(f"wanted {wanted}, got {picture.height} x {picture.width}")
        length = int(size * long / short)
        target = (size, length) if picture.width <= picture.height else (length, size)
        left, top = (target[0] - size) // 2, (target[1] - size) // 2
        picture = picture.resize(target, Resampling.BICUBIC)
        squares.append(_to_tensor(picture.crop((left, top, left + size, top + size))))
    pixels = (torch.stack(squares).double() * (1 / 255)).float()  # [B, 3, size, size]
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))  # [3, 1, 1]
    return (pixels - mean) / std


def _on_white(image: Any) -> "Image":
    """An RGB picture of a PIL image or of an array [H, W, 3] of uint8 or in [0, 1]."""
    from PIL import Image

    if isinstance(image, Image.Image):
        if "A" not in image.getbands() and image.info.get("transparency") is None:
            return image.convert("RGB")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if not isinstance(image, np.ndarray):
        raise TypeError(f"wanted a PIL image or an array, got {type(image).__name__}")
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"wanted an array [H, W, 3] or [B, H, W, 3], got one of {list(image.shape)}")
    if image.dtype != np.uint8:
        if not np.issubdtype(image.dtype, np.floating) or not (image.min() >= 0 and image.max() <= 1):
            got = f"{image.dtype} up to {image.max():g}"
            raise ValueError(f"wanted pixels of uint8, or floats in [0, 1], got {got}")
        image = (image * 255).round().astype(np.uint8)
    return Image.fromarray(image)


def describe(image: "Image", facts: Mapping[str, Any]) -> None:
    """Attach facts: `image.info` holds them, and `image.save("x.png")` writes them as text chunks."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for name, value in facts.items():
        chunks.add_itxt(name, str(value))
    image.info.update({name: str(value) for name, value in facts.items()})
    image.encoderinfo = {"pnginfo": chunks}


def save_png(image: "Image", path: str | Path) -> None:
    """Write a PNG with its description, whole or not at all. OSError naming the file."""
    path = path_of("path", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as scratch:
        image.save(scratch, format="PNG")


def read_description(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG. FileNotFoundError or ValueError naming the file if it is none."""
    from PIL import Image

    with naming(path), Image.open(path_of("path", path)) as image:
        kind = image.format
        if kind == "PNG":
            image.load()
    if kind != "PNG":
        raise ValueError(f"{path}: wanted a PNG, got {kind}")
    return {str(name): value for name, value in image.info.items() if isinstance(value, str)}
