"""Masks: read, cropped around and put back, pixel for pixel as the reference's image processor does."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from kolors_core.image import preprocess_vae, to_images
from kolors_core.pipelines.masks import (
    binarize_mask,
    mask_region,
    paste,
    resize_to_fit,
    size_of,
    to_gray,
)
from tests.support.pipelines import picture

PROCESSOR = VaeImageProcessor(vae_scale_factor=8)


def spot(width: int, height: int, box: tuple[int, int, int, int], value: int = 255) -> Image.Image:
    """A black image with one box."""
    mask = Image.new("L", (width, height))
    mask.paste(value, box)
    return mask


def boxes(count: int) -> list[tuple[int, int, int, int]]:
    """Boxes anywhere in 90 x 70 pixels: in corners, at edges, thin, large."""
    draw = np.random.default_rng(0)
    found = [(0, 0, 1, 1), (89, 69, 90, 70), (0, 0, 90, 70), (0, 30, 90, 31), (45, 0, 46, 70)]
    while len(found) < count:
        x, y = np.sort(draw.integers(0, 91, 2)), np.sort(draw.integers(0, 71, 2))
        if x[0] < x[1] and y[0] < y[1]:
            found.append((int(x[0]), int(y[0]), int(x[1]), int(y[1])))
    return found


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (128, 64), (40, 200)])
@pytest.mark.parametrize("padding", [0, 7, 200])
def test_regions_are_the_references(size: tuple[int, int], padding: int) -> None:
    for box in boxes(40):
        mask = spot(90, 70, box, 1)
        theirs = PROCESSOR.get_crop_region(mask, size[1], size[0], pad=padding)
        found = mask_region(mask, size, padding)
        assert found == theirs, box
        assert found[0] <= box[0] and found[1] <= box[1] and found[2] >= box[2] and found[3] >= box[3]


@pytest.mark.parametrize("size", [(64, 64), (64, 72), (24, 128), (96, 32), (71, 53)])
@pytest.mark.parametrize(("covers", "mode"), [(False, "fill"), (True, "crop")])
def test_pictures_are_fitted_as_the_reference_does(size: tuple[int, int], covers: bool, mode: str) -> None:
    for width, height in ((72, 64), (30, 90), (91, 33), (64, 64)):
        mine = resize_to_fit(picture(1, height, width), size, covers)
        theirs = PROCESSOR.resize(picture(1, height, width), size[0], size[1], resize_mode=mode)
        assert np.array_equal(np.asarray(mine), np.asarray(theirs)), (width, height)


@pytest.mark.parametrize("is_cropped", [False, True])
def test_the_overlay_is_the_references(is_cropped: bool) -> None:
    """With black and white every pixel is equal. Where a mask is grey, the reference rounds the premultiplied
    colours to whole numbers first, which costs it up to 3 of 255 where little is left of the image."""
    given, made = picture(1, 70, 90), picture(2, 64, 64)
    for box in boxes(12):
        binary = spot(90, 70, box)
        soft = np.random.default_rng(1).integers(0, 256, (70, 90)).astype(np.uint8)
        soft = Image.fromarray(np.where(np.asarray(binary) > 0, soft, 0).astype(np.uint8))
        for mask, allowed in ((binary, 0), (soft, 3)):
            region = mask_region(mask, (64, 64), 5) if is_cropped else None
            one = made if is_cropped else made.resize((90, 70))
            theirs = np.asarray(PROCESSOR.apply_overlay(mask, given, one, region)).astype(int)
            whole = preprocess_vae(given, multiple=1)
            back = paste(
                preprocess_vae(one, multiple=1),
                whole,
                to_gray(mask, (70, 90), ((70, 90),)),
                region,
            )
            mine = np.asarray(to_images(back, "pil")[0]).astype(int)
            assert abs(mine - theirs).max() <= allowed
            outside = np.asarray(mask) == 0
            assert np.array_equal(mine[outside], np.asarray(given)[outside])


def test_masks_of_every_form_are_the_references() -> None:
    processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    values = np.random.default_rng(0).integers(0, 256, (70, 90)).astype(np.uint8)
    image, floats = Image.fromarray(values), values.astype(np.float32) / 255
    for mask in (image, image.convert("RGB"), floats, floats[..., None], torch.from_numpy(floats)):
        other = mask[None] if isinstance(mask, torch.Tensor | np.ndarray) and mask.ndim == 2 else mask
        theirs = processor.preprocess(other, height=64, width=80)
        binary, small = binarize_mask(to_gray(mask, (64, 80), ((70, 90),)), (8, 10))
        assert torch.equal(binary, theirs.float())
        assert torch.equal(small, torch.nn.functional.interpolate(theirs, size=(8, 10)))
    same = to_gray([image, values, values > 255], (70, 90), ((70, 90),))
    assert same.shape == (3, 1, 70, 90) and torch.equal(same[0], same[1]) and not same[2].any()
    assert to_gray(torch.ones(2, 1, 8, 9), (8, 9), ((8, 9),)).shape == (2, 1, 8, 9)
    assert to_gray(np.ones((2, 8, 9), dtype=bool), (4, 5), ((8, 9),)).sum() == 40


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("mask.png", "mask_image must be PIL images, arrays .* got str"),
        ([], "mask_image is an empty list"),
        (np.zeros(5), r"mask_image must be .*, got one of \[5\]"),
        (np.zeros((64, 72, 3, 1)), "mask_image is 72 x 3 "),
        (np.full((64, 72), 255), "mask_image must hold bool, uint8, uint16 or floats, got int64"),
        (torch.full((64, 72), 255.0), "mask_image must be from 0 to 1, got 255 to 255"),
        (torch.full((64, 72), -1.0), "mask_image must be from 0 to 1, got -1 to -1"),
        (torch.full((64, 72), float("nan")), "mask_image must be from 0 to 1, got nan to nan"),
        (
            Image.new("L", (64, 72)),
            r"mask_image is 72 x 64 \(height x width\), expected .*, 64 x 72",
        ),
    ],
)
def test_bad_masks_are_named(mask: object, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        to_gray(mask, (64, 72), ((64, 72),))


def test_a_mask_that_marks_nothing_is_named() -> None:
    for mask, why in ((torch.full((1, 1, 16, 16), 0.49), "white is repainted, and there is none"),
                      (torch.eye(16)[None, None].roll(5, 2), "too fine for the latents")):  # fmt: skip
        with pytest.raises(ValueError, match=f"mask_image leaves nothing to repaint: .*{why}"):
            binarize_mask(mask, (2, 2))
    with pytest.raises(ValueError, match="mask_image leaves nothing to repaint"):
        mask_region(Image.new("L", (9, 9)), (8, 8), 1)


def test_sizes_of_pictures() -> None:
    assert size_of(picture()) == size_of([picture()]) == size_of(np.zeros((64, 72, 3))) == (64, 72)
    assert size_of(torch.zeros(2, 3, 64, 72)) == size_of(torch.zeros(4, 64, 72)) == (64, 72)
    with pytest.raises(TypeError, match="expected a PIL image, an array or a tensor, got int"):
        size_of(3)
