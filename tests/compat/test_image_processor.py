"""Image processor for scripts: bit for bit as the reference's, or right where that misreads numbers."""

from typing import Any

import diffusers.image_processor
import numpy as np
import pytest
import torch
from PIL import Image

from kolors_core.compat.image_processor import VaeImageProcessor
from tests.support.pipelines import picture

PLAIN: dict[str, Any] = {"vae_scale_factor": 8}
MASK = PLAIN | {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True}
CONTROL = PLAIN | {"do_convert_rgb": True, "do_normalize": False}
RGB = [picture(seed, height=40, width=48) for seed in (1, 2)]
GRAY = [one.convert("L") for one in RGB]
PIXELS = np.stack([np.asarray(one, np.float32) / 255 for one in RGB])  # [2, 40, 48, 3]
TENSORS = torch.from_numpy(PIXELS).movedim(-1, 1).contiguous()  # [2, 3, 40, 48]


def both(settings: dict[str, Any]) -> tuple[Any, Any]:
    return diffusers.image_processor.VaeImageProcessor(**settings), VaeImageProcessor(**settings)


IMAGES: dict[str, Any] = {
    "PIL": RGB[0], "PILs": RGB, "gray PIL": GRAY[0], "array": PIXELS[0], "arrays": PIXELS,
    "list of arrays": [*PIXELS],
    "list of batches": [PIXELS, PIXELS[:1]], "double": PIXELS.astype(np.float64), "tensor": TENSORS[0],
    "tensors": TENSORS, "list of tensors": [*TENSORS], "list of batched tensors": [TENSORS, TENSORS[:1]],
    "half": TENSORS.half(), "normalized": 2 * TENSORS - 1, "latents": torch.randn(2, 4, 5, 6),
}  # fmt: skip
MASKS: dict[str, Any] = {
    "PIL": GRAY[0], "RGB": RGB[0], "one bit": GRAY[0].convert("1"), "PILs": GRAY, "array": PIXELS[0, ..., 0],
    "arrays": PIXELS[..., 0], "one channel": PIXELS[0, ..., :1], "list of arrays": [*PIXELS[..., 0]],
    "tensor": TENSORS[0, 0], "tensors": TENSORS[:, 0], "channel": TENSORS[0, :1], "batch": TENSORS[:, :1],
    "a half": torch.linspace(0, 1, 9)[:, None].expand(9, 16),
}  # fmt: skip
SIZES = [{}, {"height": 64, "width": 32}, {"height": 30}, {"width": 100}]


def assert_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs) and ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", IMAGES)
def test_images_as_the_references(name: str, size: dict[str, int]) -> None:
    for settings in (
        PLAIN,
        PLAIN | {"do_normalize": False},
        PLAIN | {"do_resize": False},
        {"vae_scale_factor": 16},
    ):
        theirs, ours = both(settings)
        assert_same(ours.preprocess(IMAGES[name], **size), theirs.preprocess(IMAGES[name], **size))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks_as_the_references(name: str, size: dict[str, int]) -> None:
    for settings in (MASK, MASK | {"do_binarize": False}):
        theirs, ours = both(settings)
        given = MASKS[name]
        before = np.array(given) if not isinstance(given, list) else None
        expected = theirs.preprocess(given, **size)
        assert_same(ours.preprocess(given, **size), expected)
        assert before is None or np.array_equal(before, np.array(given)), "the mask given stays as it is"


@pytest.mark.parametrize("mode", ["default", "fill", "crop"])
@pytest.mark.parametrize("box", [None, (3, 5, 40, 33)])
def test_crops_and_resize_modes(mode: str, box: tuple[int, int, int, int] | None) -> None:
    for settings, image in ((PLAIN, RGB[0]), (MASK, GRAY[0]), (CONTROL, GRAY)):
        theirs, ours = both(settings)
        given = {"height": 64, "width": 40, "resize_mode": mode, "crops_coords": box}
        assert_same(ours.preprocess(image, **given), theirs.preprocess(image, **given))


@pytest.mark.parametrize("flags", [None, [True, False]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_back_to_images(flags: list[bool] | None, dtype: torch.dtype) -> None:
    decoded = (torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 0.7).to(dtype)
    for settings in (PLAIN, PLAIN | {"do_normalize": False}):
        theirs, ours = both(settings)
        tame = decoded if settings == PLAIN and flags is None else decoded.abs().clamp(0, 1)
        for kind in ("pt", "np", "latent"):
            assert_same(ours.postprocess(tame, kind, flags), theirs.postprocess(tame, kind, flags))
        assert ours.postprocess(tame, "pil", flags) == theirs.postprocess(tame, "pil", flags)


def test_the_helpers_of_the_references() -> None:
    theirs, ours = both(PLAIN)
    for images in (RGB[0], RGB, GRAY[0], GRAY):
        assert_same(ours.pil_to_numpy(images), theirs.pil_to_numpy(images))
        assert_same(
            ours.numpy_to_pt(ours.pil_to_numpy(images)), theirs.numpy_to_pt(theirs.pil_to_numpy(images))
        )
    for pixels in (PIXELS, PIXELS[0], PIXELS[..., :1]):
        pairs = zip(ours.numpy_to_pil(pixels), theirs.numpy_to_pil(pixels), strict=True)
        assert all(mine == other for mine, other in pairs)
    assert_same(ours.pt_to_numpy(TENSORS.half()), theirs.pt_to_numpy(TENSORS.half()))
    assert_same(ours.normalize(TENSORS), theirs.normalize(TENSORS))
    assert_same(ours.denormalize(3 * TENSORS - 2), theirs.denormalize(3 * TENSORS - 2))
    assert_same(ours.resize(PIXELS, 16, 8), theirs.resize(PIXELS, 16, 8))
    assert ours.resize(RGB[0], 16, 8) == theirs.resize(RGB[0], 16, 8)
    assert ours.blur(GRAY[0], 3) == theirs.blur(GRAY[0], 3)
    assert ours.convert_to_rgb(GRAY[0]) == theirs.convert_to_rgb(GRAY[0])
    assert ours.convert_to_grayscale(RGB[0]) == theirs.convert_to_grayscale(RGB[0])
    for image in (RGB[0], PIXELS, TENSORS):
        assert (
            ours.get_default_height_width(image, 33) == theirs.get_default_height_width(image, 33) == (32, 48)
        )
    mask = Image.new("L", (48, 40))
    mask.paste(255, (5, 7, 20, 12))
    box = theirs.get_crop_region(mask, 64, 32, pad=2)
    assert ours.get_crop_region(mask, 64, 32, pad=2) == box
    for region in (None, box):
        mine, other = (one.apply_overlay(mask, RGB[0], RGB[1], region) for one in (ours, theirs))
        assert mine == other
    assert dict(ours.config) == {name: theirs.config[name] for name in ours.config}
    assert ours.config.vae_scale_factor == ours.vae_scale_factor == 8


def test_numbers_that_the_reference_takes_for_others() -> None:
    """Bytes for [0, 1], a palette's indices for gray, one bit for 1/255, and alpha for a color."""
    processor = VaeImageProcessor()
    expected = processor.preprocess(RGB[0])
    pixels = np.array(RGB[0])
    bytes_of_a_tensor = torch.from_numpy(pixels).movedim(-1, 0)
    for image in (pixels, np.uint16(257) * pixels, bytes_of_a_tensor, RGB[0].convert("RGBA")):
        assert torch.equal(processor.preprocess(image), expected)
    deep = Image.fromarray(np.uint16(257) * np.asarray(GRAY[0]))
    assert deep.mode == "I;16" and torch.equal(processor.preprocess(deep), processor.preprocess(GRAY[0]))
    palette = RGB[0].quantize(16)
    assert torch.equal(processor.preprocess(palette), processor.preprocess(palette.convert("RGB")))
    assert processor.preprocess(Image.new("1", (8, 8), 1)).unique().tolist() == [1.0]
    alpha = GRAY[0].convert("LA")
    assert torch.equal(processor.preprocess(alpha), processor.preprocess(alpha.convert("RGB")))


@pytest.mark.parametrize(("call", "message"), [
    (lambda p: p.preprocess([]), "expected PIL images, arrays or tensors, all of one kind, got none"),
    (lambda p: p.preprocess("file.png"), "got str"),
    (lambda p: p.preprocess([RGB[0], PIXELS]), "got Image, ndarray"),
    (lambda p: p.preprocess(255 * PIXELS), r"must lie in \[0, 1\] or \[-1, 1\], got one of size 2"),
    (lambda p: p.preprocess(PIXELS * np.float32("nan")), "got one of size nan"),
    (lambda p: p.preprocess(PIXELS.astype(np.int64)), "uint8, uint16 or floats, got int64"),
    (lambda p: p.preprocess(np.ones((1, 8, 8, 4))), "1 or 3 channels, got 4"),
    (lambda p: p.preprocess(np.ones(5)), r"2 to 4 axes, got one of \[5\]"),
    (lambda p: p.preprocess([TENSORS, TENSORS[..., :8]]), "images of different shapes"),
    (lambda p: p.preprocess(RGB[0], 4, 8), "image sides must be at least 8, got 4 x 8"),
    (lambda p: p.preprocess(RGB[0], resize_mode="stretch"), "one of default, fill, crop, got 'stretch'"),
    (lambda p: p.preprocess(TENSORS, resize_mode="fill"), "resize_mode 'fill' is for PIL images, got Tensor"),
    (lambda p: p.postprocess(PIXELS), r"expected a tensor \[B, C, H, W\], got ndarray"),
    (lambda p: p.postprocess(TENSORS, "jpg"), "must be one of pil, np, pt, latent, got 'jpg'"),
    (lambda p: p.postprocess(TENSORS, do_denormalize=[True]), "must have 2 values, one an image, got 1"),
    (lambda p: VaeImageProcessor(resample="box"), "resample must be one of lanczos, .*nearest, got 'box'"),
    (lambda p: VaeImageProcessor(do_convert_rgb=True, do_convert_grayscale=True), "got both"),
])  # fmt: skip
def test_wrong_images(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(VaeImageProcessor())
