"""CLIP's pixels against the reference's own processor."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil

from kolors_core.adapters.clip_vision import preprocess_clip
from tests.support.images import MODES, array, noise_image


def reference_clip_pixels(images: object, size: int) -> Tensor:
    processor = CLIPImageProcessorPil(size=size, crop_size=size)
    return processor(images, return_tensors="pt").pixel_values


@pytest.mark.parametrize(
    ("width", "height"), [(3, 100), (501, 337), (1, 1), (700, 335), (336, 336), (337, 336), (336, 1000)]
)
def test_clip_pixels_are_the_references_at_any_size(width: int, height: int) -> None:
    image = noise_image(width=width, height=height)
    ours = preprocess_clip(image)
    assert ours.shape == (1, 3, 336, 336) and ours.dtype == torch.float32
    assert torch.equal(ours, reference_clip_pixels(image, 336))


@pytest.mark.parametrize("mode", MODES)
def test_clip_pixels_are_the_references_in_any_mode(mode: str) -> None:
    image = noise_image(mode)
    assert torch.equal(preprocess_clip(image, 29), reference_clip_pixels(image, 29))


def test_clip_pixels_can_differ() -> None:
    image = noise_image("RGBA")
    expected = reference_clip_pixels(image, 29)
    assert not torch.equal(preprocess_clip(image.convert("RGB"), 29), expected), "transparent is not black"
    assert not torch.equal(preprocess_clip(image.resize((49, 29)), 29), expected), (
        "the size rounds down: 48 x 29"
    )


def test_clip_pixels_of_lists_and_arrays() -> None:
    pictures = [noise_image(width=40, height=31, seed=1), noise_image("L", 20, 90, seed=2)]
    assert torch.equal(preprocess_clip(pictures, 16), reference_clip_pixels(pictures, 16))
    batch = np.stack([array(40, 31, seed=1), array(40, 31, seed=2)])
    expected = reference_clip_pixels(list(batch), 16)
    assert torch.equal(preprocess_clip(batch, 16), expected)
    assert torch.equal(preprocess_clip(list(batch), 16), expected)
    floats = (batch / 255).astype(np.float32)
    assert torch.equal(preprocess_clip(floats, 16), expected)
    between = (floats - 0.3 / 255).clip(0, 1)
    assert torch.equal(preprocess_clip(between, 16), expected), "the nearest byte, not the one below"
    # The reference divides floats in [0, 1] by 255 once more, so that every image is nearly black there.
    darkened = reference_clip_pixels(list(floats), 16)
    assert darkened.max() < -1.4 < expected.max()


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "expected at least one image, got none"),
        ("a.png", TypeError, "expected a PIL image or an array, got str"),
        (torch.zeros(3, 8, 8), TypeError, "got Tensor"),
        (np.zeros((8, 8), np.uint8), ValueError, r"expected an array \[H, W, 3\] .* got one of \[8, 8\]"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"got one of \[3, 8, 8\]"),
        (np.full((8, 8, 3), 255.0), ValueError, r"floats in \[0, 1\], got float64 up to 255"),
        (np.full((8, 8, 3), np.nan), ValueError, "up to nan"),
        (np.zeros((8, 8, 3), np.int64), ValueError, "got int64"),
    ],
)
def test_what_clip_cannot_take_is_named(images: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        preprocess_clip(images)
