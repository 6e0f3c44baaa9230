"""Pixels for the VAE against the reference's own processor; and loading an image."""

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import unquote

import diffusers.utils
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from kolors_core import image as image_module
from kolors_core.image import flatten_alpha, load_image, preprocess_control, preprocess_vae, to_8_bits
from tests.support.bombs import png
from tests.support.images import DEEP, MODES, array, deepened, noise_image

PROCESSOR = VaeImageProcessor(vae_scale_factor=8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sides", [(None, None), (48, 24), (None, 16), (16, None)])
def test_vae_pixels_are_the_references(mode: str, sides: tuple[int | None, int | None]) -> None:
    image = noise_image(mode)
    ours = preprocess_vae(image, *sides)
    assert ours.shape == (1, 3, sides[0] or 16, sides[1] or 32) and ours.dtype == torch.float32
    assert torch.equal(ours, PROCESSOR.preprocess(load_image(image), *sides))


def test_vae_pixels_of_lists() -> None:
    alike = [noise_image(seed=1), noise_image(seed=2)]
    assert torch.equal(preprocess_vae(alike), PROCESSOR.preprocess(alike))
    mixed = [noise_image(), noise_image(width=64, height=40)]
    assert torch.equal(preprocess_vae(mixed, 24, 16), PROCESSOR.preprocess(mixed, 24, 16))
    with pytest.raises(ValueError, match="different sizes, 22 x 37, 40 x 64 .height x width.: give height"):
        preprocess_vae(mixed)
    with pytest.raises(ValueError, match="different sizes"):
        preprocess_vae(mixed, height=24)


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
        ours = preprocess_vae(images, *sides)
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)
    single = preprocess_vae(tensor[0], *sides)
    assert single.shape[0] == 1 and torch.equal(preprocess_vae(floats[0], *sides), single)


def test_vae_pixels_of_bytes_are_those_of_the_picture() -> None:
    whole = array(40, 24)
    expected = preprocess_vae(Image.fromarray(whole))
    assert torch.equal(preprocess_vae(whole), expected)
    assert torch.equal(preprocess_vae(torch.from_numpy(whole).permute(2, 0, 1)), expected)
    assert torch.equal(preprocess_vae((whole / 255).astype(np.float32)), expected)
    deep = whole.astype(np.uint16) * 257
    assert torch.equal(preprocess_vae(deep), expected)
    assert torch.equal(preprocess_vae(torch.from_numpy(deep).permute(2, 0, 1)), expected)
    assert expected.min() >= -1 and expected.max() <= 1


@pytest.mark.parametrize(
    ("images", "sides", "error", "message"),
    [
        (noise_image(), {"height": 20}, ValueError, "height must be a positive multiple of 8, got 20"),
        (noise_image(), {"width": 0}, ValueError, "width must be a positive multiple of 8, got 0"),
        (noise_image(width=7), {}, ValueError, "image sides must be at least 8, got 22 x 7"),
        ([], {}, ValueError, "expected at least one image"),
        ("a.png", {}, TypeError, "expected a PIL image, an array or a tensor, got str"),
        (torch.zeros(1, 4, 8, 8), {}, ValueError, r"expected a tensor \[3, H, W\] .* got one of \[4, 8, 8\]"),
        (np.zeros((8, 8)), {}, ValueError, r"expected an array \[H, W, 3\] .* got one of \[8, 8\]"),
        (
            torch.full((3, 8, 8), 255.0),
            {},
            ValueError,
            r"must lie in \[0, 1\] or \[-1, 1\], got one of size 255",
        ),
        (torch.full((3, 8, 8), float("nan")), {}, ValueError, "got one of size nan"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), {}, ValueError, "uint16 or floats, got torch.int64"),
        (np.zeros((8, 8, 3), np.uint32), {}, ValueError, "uint8, uint16 or floats, got uint32"),
        ([noise_image(), torch.zeros(3, 22, 37)], {}, ValueError, "different kinds, PIL, torch.float32"),
    ],
)
def test_what_the_vae_cannot_take_is_named(
    images: object, sides: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        preprocess_vae(images, **sides)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photograph_is_turned_upright(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "photo.png"
    noise_image(width=5, height=3).save(file, exif=exif)
    ours = load_image(file)
    assert ours.size == ((5, 3) if orientation < 5 else (3, 5))
    assert np.array_equal(np.array(ours), np.array(diffusers.utils.load_image(str(file))))
    with Image.open(file) as opened:
        assert np.array_equal(np.array(load_image(opened)), np.array(ours))


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_of_any_mode_is_loaded_as_the_reference_does(mode: str) -> None:
    image = noise_image(mode)
    ours = load_image(image)
    assert ours.mode == "RGB"
    assert np.array_equal(np.array(ours), np.array(diffusers.utils.load_image(image)))
    grey = load_image(image.convert("RGB"), lambda upright: upright.convert("L"))
    assert grey.mode == "L"


def test_what_is_no_picture_is_named_in_one_line(tmp_path: Path) -> None:
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("not an image")
    noise_image().save(cut)
    cut.write_bytes(cut.read_bytes()[:1000])
    for source, error, message in (
        (tmp_path / "none.png", FileNotFoundError, "none.png: no such file"),
        (text, ValueError, "text.png: not an image"),
        (str(cut), ValueError, "cut.png: .*truncated"),
        (tmp_path, ValueError, f"{tmp_path}: not a file"),
        (3, TypeError, "expected a path, an http.s. address or a PIL image, got int"),
    ):
        with pytest.raises(error, match=message) as raised:
            load_image(source)
        assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("kind", DEEP)
def test_an_image_of_more_bits_is_the_same_image(kind: str, tmp_path: Path) -> None:
    """Of every 8-bit gray, without rounding; PIL's own conversion clips them to white."""
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    deep = deepened(ramp, kind)
    assert to_8_bits(deep).mode == "L" and np.array_equal(np.asarray(to_8_bits(deep)), np.asarray(ramp))
    for read in (load_image, flatten_alpha, preprocess_vae, preprocess_control):
        assert np.array_equal(np.asarray(read(deep)), np.asarray(read(ramp)))
    deep.save(tmp_path / "deep.tif")
    assert np.array_equal(np.asarray(load_image(tmp_path / "deep.tif")), np.asarray(ramp.convert("RGB")))
    assert load_image(deep, lambda upright: upright).mode == deep.mode, (
        "a conversion of one's own sees all bits"
    )
    if DEEP[kind] != 1:
        assert not np.array_equal(np.asarray(deep.convert("RGB")), np.asarray(ramp.convert("RGB")))


def test_sixteen_bits_are_rounded_to_the_nearest_gray_and_turned_upright(tmp_path: Path) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(to_8_bits(Image.fromarray(values)), np.rint(values / 65535 * 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values[:2]).save(tmp_path / "photo.png", exif=exif)
    assert load_image(tmp_path / "photo.png").size == (2, 256)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 65536]], np.int32), "mode 'I': .* from 0 to 255 or from 0 to 65535, got 0 to 65536"),
        (np.array([[-1, 7]], np.int32), "mode 'I': .*, got -1 to 7"),
        (
            np.array([[0, 256]], np.float32),
            "mode 'F': expected .* from 0 to 1 or from 0 to 255, got 0 to 256",
        ),
        (np.array([[-0.5, 0.5]], np.float32), "mode 'F': .*, got -0.5 to 0.5"),
        (np.array([[0, np.nan]], np.float32), "mode 'F': .*, got nan to nan"),
        (np.array([[0, np.inf]], np.float32), "mode 'F': .*, got 0 to inf"),
    ],
)
def test_values_of_no_known_range_are_refused(values: np.ndarray, message: str, tmp_path: Path) -> None:
    image = Image.fromarray(values)
    with pytest.raises(ValueError, match=f"^the image: {message}"):
        preprocess_vae(image, 8, 8)
    image.save(tmp_path / "a.tif")
    for read in (load_image, lambda file: preprocess_vae(Image.open(file), 8, 8)):
        with pytest.raises(ValueError, match=f"^{tmp_path}/a.tif: {message}"):
            read(tmp_path / "a.tif")


BOMBS = {  # width, height, and what is said of them
    "a bomb": (13300, 13300, "176,890,000 pixels, expected at most 89,478,485: PIL.Image.MAX_IMAGE_PIXELS"),
    "a larger bomb": (20000, 20000, "400,000,000 pixels, expected at most 89,478,485"),
    "a wide bomb": (1_000_000, 170, "170,000,000 pixels, expected at most 89,478,485"),
    "a line": (80_000_000, 1, "1 x 80000000 .height x width., expected sides of at most 1,048,576"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_too_many_pixels_are_refused_by_number_before_they_are_read(case: str, tmp_path: Path) -> None:
    width, height, message = BOMBS[case]
    file = tmp_path / "bomb.png"
    file.write_bytes(png(width, height))
    with pytest.raises(ValueError, match=f"^{file}: .*{message}"):
        load_image(file)
    opened = Image.new("L", (1, 1))
    opened._size = width, height  # as of a file that is opened and not yet read
    for read in (load_image, flatten_alpha, lambda image: preprocess_vae(image, 64, 64)):
        with pytest.raises(ValueError, match=f"^the image: .*{message}"):
            read(opened)


def test_a_caller_sets_the_limit_of_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    noise_image().save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 37 * 22 - 1)
    with pytest.raises(
        ValueError, match="a.png: 814 pixels, expected at most 813: PIL.Image.MAX_IMAGE_PIXELS"
    ):
        load_image(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 37 * 22)
    assert load_image(file).size == (37, 22)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(file).size == (37, 22)


def test_a_file_that_is_opened_and_cut_short_is_named(tmp_path: Path) -> None:
    file = tmp_path / "cut.png"
    noise_image().save(file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"^{file}: .*truncated"):
        preprocess_vae(Image.open(file), 8, 8)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_a_pipe_and_a_device_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    for file in (tmp_path / "a.png", Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"^{file}: not a file$"):
            load_image(file)


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
    image = noise_image()
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
