"""Pixels against the reference's own processors: for CLIP, for the VAE, as masks; and loading a picture."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import unquote

import diffusers.utils
import numpy as np
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor as ReferenceMaskProcessor
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

from kolors_core import image as image_module
from kolors_core.image import IPAdapterMaskProcessor, clip_pixels, load_image, read_description, vae_pixels

MODES = ["RGB", "RGBA", "L", "LA", "P", "P transparent", "L transparent", "1", "I;16", "CMYK", "I", "F"]


def array(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def picture(mode: str = "RGB", width: int = 37, height: int = 22, seed: int = 0) -> Image.Image:
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


def reference_clip_pixels(images: object, size: int) -> Tensor:
    processor = CLIPImageProcessorPil(size=size, crop_size=size)
    return processor(images, return_tensors="pt").pixel_values


@pytest.mark.parametrize(
    ("width", "height"), [(3, 100), (501, 337), (1, 1), (700, 335), (336, 336), (337, 336), (336, 1000)]
)
def test_clip_pixels_are_the_references_at_any_size(width: int, height: int) -> None:
    image = picture(width=width, height=height)
    ours = clip_pixels(image)
    assert ours.shape == (1, 3, 336, 336) and ours.dtype == torch.float32
    assert torch.equal(ours, reference_clip_pixels(image, 336))


@pytest.mark.parametrize("mode", MODES)
def test_clip_pixels_are_the_references_in_any_mode(mode: str) -> None:
    image = picture(mode)
    assert torch.equal(clip_pixels(image, 29), reference_clip_pixels(image, 29))


def test_clip_pixels_can_differ() -> None:
    image = picture("RGBA")
    expected = reference_clip_pixels(image, 29)
    assert not torch.equal(clip_pixels(image.convert("RGB"), 29), expected), "transparent is not black"
    assert not torch.equal(clip_pixels(image.resize((49, 29)), 29), expected), "the size rounds down: 48 x 29"


def test_clip_pixels_of_lists_and_arrays() -> None:
    pictures = [picture(width=40, height=31, seed=1), picture("L", 20, 90, seed=2)]
    assert torch.equal(clip_pixels(pictures, 16), reference_clip_pixels(pictures, 16))
    batch = np.stack([array(40, 31, seed=1), array(40, 31, seed=2)])
    expected = reference_clip_pixels(list(batch), 16)
    assert torch.equal(clip_pixels(batch, 16), expected)
    assert torch.equal(clip_pixels(list(batch), 16), expected)
    floats = (batch / 255).astype(np.float32)
    assert torch.equal(clip_pixels(floats, 16), expected)
    between = (floats - 0.3 / 255).clip(0, 1)
    assert torch.equal(clip_pixels(between, 16), expected), "the nearest byte, not the one below"
    # The reference divides floats in [0, 1] by 255 once more, so that every picture is nearly black there.
    darkened = reference_clip_pixels(list(floats), 16)
    assert darkened.max() < -1.4 < expected.max()


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "wanted at least one image, got none"),
        ("a.png", TypeError, "wanted a PIL image or an array, got str"),
        (torch.zeros(3, 8, 8), TypeError, "got Tensor"),
        (np.zeros((8, 8), np.uint8), ValueError, r"wanted an array \[H, W, 3\] .* got one of \[8, 8\]"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"got one of \[3, 8, 8\]"),
        (np.full((8, 8, 3), 255.0), ValueError, r"floats in \[0, 1\], got float64 up to 255"),
        (np.full((8, 8, 3), np.nan), ValueError, "up to nan"),
        (np.zeros((8, 8, 3), np.int64), ValueError, "got int64"),
    ],
)
def test_what_clip_cannot_take_is_named(images: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        clip_pixels(images)


PROCESSOR = VaeImageProcessor(vae_scale_factor=8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sides", [(None, None), (48, 24), (None, 16), (16, None)])
def test_vae_pixels_are_the_references(mode: str, sides: tuple[int | None, int | None]) -> None:
    image = picture(mode)
    ours = vae_pixels(image, *sides)
    assert ours.shape == (1, 3, sides[0] or 16, sides[1] or 32) and ours.dtype == torch.float32
    assert torch.equal(ours, PROCESSOR.preprocess(load_image(image), *sides))


def test_vae_pixels_of_lists() -> None:
    alike = [picture(seed=1), picture(seed=2)]
    assert torch.equal(vae_pixels(alike), PROCESSOR.preprocess(alike))
    mixed = [picture(), picture(width=64, height=40)]
    assert torch.equal(vae_pixels(mixed, 24, 16), PROCESSOR.preprocess(mixed, 24, 16))
    with pytest.raises(ValueError, match="different sizes, 22 x 37, 40 x 64 .height x width.: give height"):
        vae_pixels(mixed)
    with pytest.raises(ValueError, match="different sizes"):
        vae_pixels(mixed, height=24)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("low", [0.0, -1.0])
@pytest.mark.parametrize("sides", [(None, None), (48, 24)])
def test_vae_pixels_of_arrays_and_tensors(
    dtype: str, low: float, sides: tuple[int | None, int | None]
) -> None:
    values = np.random.default_rng(0).random((2, 22, 37, 3)) * (1 - low) + low
    floats = values.astype(dtype)
    tensor = torch.from_numpy(floats).permute(0, 3, 1, 2)
    expected = PROCESSOR.preprocess(tensor, *sides)
    for images in (floats, list(floats), tensor, list(tensor), floats[:, :, ::-1][:, :, ::-1]):
        ours = vae_pixels(images, *sides)
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)
    single = vae_pixels(tensor[0], *sides)
    assert single.shape[0] == 1 and torch.equal(vae_pixels(floats[0], *sides), single)


def test_vae_pixels_of_bytes_are_those_of_the_picture() -> None:
    whole = array(40, 24)
    expected = vae_pixels(Image.fromarray(whole))
    assert torch.equal(vae_pixels(whole), expected)
    assert torch.equal(vae_pixels(torch.from_numpy(whole).permute(2, 0, 1)), expected)
    assert torch.equal(vae_pixels((whole / 255).astype(np.float32)), expected)
    assert expected.min() >= -1 and expected.max() <= 1


@pytest.mark.parametrize(
    ("images", "sides", "error", "message"),
    [
        (picture(), {"height": 20}, ValueError, "height must be a positive multiple of 8, got 20"),
        (picture(), {"width": 0}, ValueError, "width must be a positive multiple of 8, got 0"),
        (picture(width=7), {}, ValueError, "image sides must be at least 8, got 22 x 7"),
        ([], {}, ValueError, "wanted at least one image"),
        ("a.png", {}, TypeError, "wanted a PIL image, an array or a tensor, got str"),
        (torch.zeros(1, 4, 8, 8), {}, ValueError, r"wanted a tensor \[3, H, W\] .* got one of \[4, 8, 8\]"),
        (np.zeros((8, 8)), {}, ValueError, r"wanted an array \[H, W, 3\] .* got one of \[8, 8\]"),
        (
            torch.full((3, 8, 8), 255.0),
            {},
            ValueError,
            r"must lie in \[0, 1\] or \[-1, 1\], got one of size 255",
        ),
        (torch.full((3, 8, 8), float("nan")), {}, ValueError, "got one of size nan"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), {}, ValueError, "uint8 or floats, got torch.int64"),
        ([picture(), torch.zeros(3, 22, 37)], {}, ValueError, "different kinds, PIL, torch.float32"),
    ],
)
def test_what_the_vae_cannot_take_is_named(
    images: object, sides: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        vae_pixels(images, **sides)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sides", [(None, None), (64, 24), (50, None)])
def test_masks_are_the_references(mode: str, sides: tuple[int | None, int | None]) -> None:
    masks = [picture(mode, seed=seed) for seed in (1, 2)]
    ours = IPAdapterMaskProcessor().preprocess(masks, *sides)
    assert ours.shape[:2] == (2, 1) and ours.dtype == torch.float32
    assert set(ours.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(ours, ReferenceMaskProcessor().preprocess(masks, *sides))


def test_masks_take_the_first_ones_size_and_split_at_middle_grey() -> None:
    masks = [Image.new("L", (24, 16), 127), Image.new("L", (50, 40), 128)]
    ours = IPAdapterMaskProcessor().preprocess(masks)
    assert torch.equal(ours, ReferenceMaskProcessor().preprocess(masks))
    assert ours.shape == (2, 1, 16, 24) and ours[0].max() == 0 and ours[1].min() == 1
    with pytest.raises(TypeError, match="wanted masks as PIL images, got ndarray"):
        IPAdapterMaskProcessor().preprocess(np.zeros((8, 8)))
    with pytest.raises(ValueError, match="at least 8, got 16 x 5"):
        IPAdapterMaskProcessor().preprocess(masks, width=5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photograph_is_turned_upright(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "photo.png"
    picture(width=5, height=3).save(file, exif=exif)
    ours = load_image(file)
    assert ours.size == ((5, 3) if orientation < 5 else (3, 5))
    assert np.array_equal(np.array(ours), np.array(diffusers.utils.load_image(str(file))))
    with Image.open(file) as opened:
        assert np.array_equal(np.array(load_image(opened)), np.array(ours))


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_of_any_mode_is_loaded_as_the_reference_does(mode: str) -> None:
    image = picture(mode)
    ours = load_image(image)
    assert ours.mode == "RGB"
    assert np.array_equal(np.array(ours), np.array(diffusers.utils.load_image(image)))
    grey = load_image(image.convert("RGB"), lambda upright: upright.convert("L"))
    assert grey.mode == "L"


def test_what_is_no_picture_is_named_in_one_line(tmp_path: Path) -> None:
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("not a picture")
    picture().save(cut)
    cut.write_bytes(cut.read_bytes()[:1000])
    for source, error, message in (
        (tmp_path / "none.png", FileNotFoundError, "none.png: no such file"),
        (text, ValueError, "text.png: not an image"),
        (str(cut), ValueError, "cut.png: .*truncated"),
        (tmp_path, ValueError, f"{tmp_path}: .*directory"),
        (3, TypeError, "wanted a path, an http.s. address or a PIL image, got int"),
    ):
        with pytest.raises(error, match=message) as raised:
            load_image(source)
        assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(ValueError, match="text.png: not an image"):
        read_description(text)
    picture().save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="a.jpg: wanted a PNG, got JPEG"):
        read_description(tmp_path / "a.jpg")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server on this machine that serves the files of `tmp_path`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            file = tmp_path / unquote(self.path[1:])
            known = file.is_file() and "Python" not in self.headers["User-Agent"]
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(file.read_bytes() if known else b"")

        def log_message(self, *arguments: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_a_picture_is_fetched_from_an_address(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture()
    image.save(tmp_path / "瓢虫 1.png")
    (tmp_path / "page.html").write_text("<html>")
    assert np.array_equal(np.array(load_image(f"{server}/瓢虫 1.png")), np.array(image))
    with pytest.raises(ValueError, match=f"{server}/page.html: not an image"):
        load_image(f"{server}/page.html")
    with pytest.raises(OSError, match=f"{server}/none.png: cannot be fetched: HTTP Error 404"):
        load_image(f"{server}/none.png")
    with pytest.raises(OSError, match="http://: cannot be fetched"):
        load_image("http://")
    monkeypatch.setattr(image_module, "DOWNLOAD_BYTES", 100)
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        load_image(f"{server}/瓢虫 1.png")
