"""Images as prompts against the reference, latents step by step; adapters that come and leave."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor as ReferenceMaskProcessor
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from kolors_core import (
    IPAdapterMaskProcessor,
    KolorsImg2ImgPipeline,
)
from kolors_core.adapters.ip_adapter_files import load_image_embeds, save_image_embeds
from kolors_core.adapters.lora import attach as attach_lora
from kolors_core.adapters.lora import save_adapters
from kolors_core.context import ImagePrompt
from tests.support.images import MODES, noise_image
from tests.support.ip_adapters import Both, guided_steps, load_both
from tests.support.pipelines import SOLVERS, picture, use_solver
from tests.support.small import EXACT, FLOAT32, relative_error
from tests.test_unet import inputs

pytestmark = pytest.mark.numerical


def assert_same(both: Both, tolerance: float = FLOAT32, **arguments: Any) -> list[Tensor]:
    mine, other = (guided_steps(pipe, **arguments) for pipe in both)
    assert len(mine) == len(other) > 1
    for i, (a, b) in enumerate(zip(mine, other, strict=True)):
        assert relative_error(a, b) < tolerance, i
    return mine


def masks(processor: Any, *boxes: tuple[int, int, int, int]) -> Tensor:
    """White boxes on black, [n, 1, 64, 72]."""
    drawn = []
    for box in boxes:
        mask = Image.new("L", (72, 64))
        mask.paste(255, box)
        drawn.append(mask)
    return processor.preprocess(drawn, height=64, width=72)


@pytest.mark.parametrize(("solver", "changes"), SOLVERS[:2], ids=["euler", "dpm"])
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_every_step_equals_the_reference(
    loaded: Both, solver: str, changes: dict, guidance_scale: float
) -> None:
    use_solver(loaded, solver, changes)
    steps = assert_same(
        loaded, prompt=["一张照片", "cat"], num_images_per_prompt=2, guidance_scale=guidance_scale,
        num_inference_steps=3,
    )  # fmt: skip
    use_solver(loaded, *SOLVERS[0])
    assert len(steps) == 4


@pytest.mark.parametrize(
    "scale",
    [
        0.3,
        [0.7],
        {"up": {"block_0": [0.0, 1.0, 0.5]}},
        {"down": {"block_2": [0.0, 1.0]}, "up": 0.4, "mid": 0.2},
    ],
    ids=str,
)
def test_scales_mean_what_they_mean_in_the_reference(loaded: Both, scale: Any) -> None:
    for pipe in loaded:
        pipe.set_ip_adapter_scale(deepcopy(scale))
    changed = assert_same(loaded)
    for pipe in loaded:
        pipe.set_ip_adapter_scale(1.0)
    assert relative_error(changed[0], assert_same(loaded)[0]) > 1e-4


def test_several_adapters_and_pictures(both: Both, adapters: list[Path]) -> None:
    load_both(both, *adapters)
    for pipe in both:
        pipe.set_ip_adapter_scale([0.6, {"up": 0.5}])
    assert_same(
        both, ip_adapter_image=[picture(1), [picture(2), picture(4, 50, 33)]], num_images_per_prompt=2
    )


def test_masks_keep_pictures_apart(both: Both, adapters: list[Path]) -> None:
    load_both(both, *adapters)
    regions = [
        masks(p(), (0, 0, 36, 64), (36, 0, 72, 40)) for p in (IPAdapterMaskProcessor, ReferenceMaskProcessor)
    ]
    assert torch.equal(*regions)
    two, one = regions[0].reshape(1, 2, 64, 72), regions[0][:1]  # [1, images, H, W]
    images = [[picture(1), picture(2)], picture(3)]
    for pipe in both:
        pipe.set_ip_adapter_scale([[0.7, 0.4], 0.5])
    steps = assert_same(
        both, ip_adapter_image=images, cross_attention_kwargs={"ip_adapter_masks": [two, one]}
    )
    swapped = {"ip_adapter_masks": [two.flip(1), one]}
    other = guided_steps(both[0], ip_adapter_image=images, cross_attention_kwargs=swapped)
    assert relative_error(other[0], steps[0]) > 1e-4
    for pipe in both:
        pipe.set_ip_adapter_scale([1.0, 0.0])
    some = {"ip_adapter_masks": [two, None]}
    assert_same(both, ip_adapter_image=images, cross_attention_kwargs=some)


def test_a_mask_of_another_shape_lies_where_it_should(both: Both, adapters: list[Path]) -> None:
    """The reference guesses height and width from the mask, and pads or cuts what does not fit."""
    load_both(both, adapters[0])
    square = torch.zeros(1, 1, 64, 64)
    square[..., :32] = 1.0
    fitting = square.repeat_interleave(2, dim=-1)  # for an image of 64 x 128

    def drawn(pipe: Any, mask: Tensor) -> Tensor:
        return guided_steps(pipe, width=128, cross_attention_kwargs={"ip_adapter_masks": [mask]})[0]

    right = drawn(both[0], fitting)
    assert relative_error(right, drawn(both[1], fitting)) < FLOAT32
    with pytest.warns(UserWarning, match="aspect ratio"):
        guessed = drawn(both[1], square)
    assert relative_error(drawn(both[0], square), right) < 0.3 * relative_error(guessed, right)


def test_embeddings_equal_the_reference_and_stand_in_for_pictures(loaded: Both, tmp_path: Path) -> None:
    ours, theirs = loaded
    arguments = ([[picture(1), picture(2)]], None, torch.device("cpu"), 2, True)
    mine, other = (pipe.prepare_ip_adapter_image_embeds(*arguments) for pipe in loaded)
    assert mine[0].shape == (4, 2, 17, 64) and relative_error(mine[0], other[0]) < EXACT
    save_image_embeds([mine[0][::2]], tmp_path / "embeds.safetensors")
    again = load_image_embeds(tmp_path / "embeds.safetensors")
    given = {"ip_adapter_image": None, "ip_adapter_image_embeds": again}
    a = assert_same(loaded, **given)
    assert relative_error(a[0], guided_steps(ours, ip_adapter_image=[[picture(1), picture(2)]])[0]) < EXACT
    alone = ours.prepare_ip_adapter_image_embeds(picture(1), do_classifier_free_guidance=False)
    assert_same(loaded, ip_adapter_image=None, ip_adapter_image_embeds=alone, guidance_scale=1.0)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"other.safetensors: no image embeddings, expected tensors ip_adapter.0"
    ):
        load_image_embeds(tmp_path / "other.safetensors")


def test_image_to_image_with_an_adapter(loaded: Both) -> None:
    ours = KolorsImg2ImgPipeline.from_pipe(loaded[0])
    parts = {**loaded[1].components, "vae": deepcopy(loaded[1].vae)}
    theirs = diffusers.KolorsImg2ImgPipeline(**parts, force_zeros_for_empty_prompt=False)
    theirs.set_progress_bar_config(disable=True)
    mine, other = (guided_steps(p, image=picture(0), strength=1.0) for p in (ours, theirs))
    assert all(relative_error(a, b) < 4 * FLOAT32 for a, b in zip(mine, other, strict=True))


def test_image_to_image_with_an_adapter_and_two_loras(
    both: Both, adapters: list[Path], tmp_path: Path
) -> None:
    """All at once. The reference's image to image cannot load a LoRA; its text to image can, on its UNet."""
    ours, theirs = both
    unet = deepcopy(ours.unet)
    for i in range(2):
        adapter = attach_lora(unet, rank=2, alpha=3)
        for j, parameter in enumerate(adapter.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1000 * i + j))
            parameter.data.copy_(0.1 * noise)
        save_adapters({"unet": adapter}, tmp_path / f"{i}.safetensors")
        adapter.detach()
    load_both(both, adapters[0])
    ours.load_lora_weights(tmp_path / "0.safetensors", adapter_name="a")
    ours.load_lora_weights(tmp_path / "1.safetensors", adapter_name="b")
    theirs.load_lora_weights(str(tmp_path / "0.safetensors"), adapter_name="a")
    theirs.load_lora_weights(str(tmp_path / "1.safetensors"), adapter_name="b")
    for pipe in both:
        pipe.set_adapters(["a", "b"], [0.7, {"unet": {"up": 0.5, "down": {"block_2": [0.2, 0.9]}}}])
        pipe.set_ip_adapter_scale(0.6)
    parts = {**theirs.components, "vae": deepcopy(theirs.vae)}
    other = diffusers.KolorsImg2ImgPipeline(**parts, force_zeros_for_empty_prompt=False)
    other.set_progress_bar_config(disable=True)
    given = {"image": picture(0), "strength": 0.75, "num_inference_steps": 4, "num_images_per_prompt": 2}
    pair_ = KolorsImg2ImgPipeline.from_pipe(ours), other
    a, b = (guided_steps(pipe, ip_adapter_image=[[picture(1), picture(2)]], **given) for pipe in pair_)
    assert len(a) == len(b) == 4
    assert all(relative_error(x, y) < 4 * FLOAT32 for x, y in zip(a, b, strict=True))
    halved = guided_steps(pair_[0], **given, cross_attention_kwargs={"scale": 0.5})
    expected = guided_steps(pair_[1], **given, cross_attention_kwargs={"scale": 0.5})
    assert all(relative_error(x, y) < 4 * FLOAT32 for x, y in zip(halved, expected, strict=True))
    assert relative_error(halved[0], guided_steps(pair_[0], **given)[0]) > 1e-4


# Bad input.


def embeds(*shape: int) -> dict[str, Any]:
    return {"ip_adapter_image": None, "ip_adapter_image_embeds": [torch.zeros(shape)]}


def mask_of(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {"cross_attention_kwargs": {"ip_adapter_masks": [torch.zeros(shape, dtype=dtype)]}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ip_adapter_image": None}, "an IP-Adapter is loaded and no ip_adapter_image given"),
        ({"ip_adapter_image": [picture(0), picture(1)]}, "for each of the 1 IP-Adapters, got 2"),
        (
            embeds(2, 1, 17, 64) | {"ip_adapter_image": picture(0)},
            "either ip_adapter_image or ip_adapter_image_",
        ),
        (embeds(1, 1, 17, 64), "twice the batch"),
        (embeds(2, 17, 64), r"got \[2, 17, 64\]"),
        (embeds(2, 1, 17, 60), r"64\], got \[1, 1, 17, 60\]"),
        (embeds(6, 1, 17, 64), "has 3 rows, for 1 images"),
        ({"ip_adapter_image": "cat.png"}, "image .* got .*str"),
        (mask_of(1, 2, 8, 8), "each of the 1 images"),
        (mask_of(8, 8), r"\[1, images, height, width\]"),
        (mask_of(1, 1, 8, 8, dtype=torch.complex64), r"\[1, 1, 8, 8\] of torch.complex64"),
        ({"cross_attention_kwargs": {"ip_adapter_masks": []}}, "one tensor for each of 1 IP-Adapters"),
        ({"cross_attention_kwargs": {"mask": 1}}, "cross_attention_kwargs must be of .* got 'mask'"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
@pytest.mark.exact
def test_bad_arguments_are_named(loaded: Both, arguments: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        guided_steps(loaded[0], **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ([1.0, 2.0], "expected a scale for each of the 1 IP-Adapters"),
        ({"down": {"block_3": 1.0}}, "the UNet has no transformers in down.block_3"),
        ({"up": {"block_0": [1.0, 2.0]}}, "takes one scale or 3"),
        ("strong", "a scale must be a number, got 'strong'"),
    ],
)
@pytest.mark.exact
def test_bad_scales_are_named(loaded: Both, scale: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loaded[0].set_ip_adapter_scale(scale)


@pytest.mark.exact
def test_a_scale_for_each_picture_needs_masks(both: Both, adapters: list[Path]) -> None:
    load_both(both, adapters[0])
    both[0].set_ip_adapter_scale([[0.5, 0.4]])
    with pytest.raises(ValueError, match=r"a scale for each image, \[0.5, 0.4\], needs masks"):
        guided_steps(both[0], ip_adapter_image=[[picture(0), picture(1)]])


@pytest.mark.exact
def test_a_picture_without_an_adapter_is_an_error(both: Both) -> None:
    for arguments in ({}, {"ip_adapter_image": None, "ip_adapter_image_embeds": [torch.zeros(2, 1, 17, 64)]}):
        with pytest.raises(ValueError, match="no IP-Adapter is loaded: load_ip_adapter first"):
            guided_steps(both[0], **arguments)
    with pytest.raises(ValueError, match="image_prompts: expected 0, one for each attached .*, got 1"):
        both[0].unet(**inputs(1, 8, 8, torch.float64), image_prompts=[ImagePrompt(torch.zeros(1, 1, 5, 48))])
    both[0].unload_ip_adapter()  # nothing to do, and nothing happens


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "LAB"])  # PIL makes no gray of it
@pytest.mark.parametrize("sides", [(None, None), (64, 24), (50, None)])
def test_masks_are_the_references(mode: str, sides: tuple[int | None, int | None]) -> None:
    masks = [noise_image(mode, seed=seed) for seed in (1, 2)]
    ours = IPAdapterMaskProcessor().preprocess(masks, *sides)
    assert ours.shape[:2] == (2, 1) and ours.dtype == torch.float32
    assert set(ours.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(ours, ReferenceMaskProcessor().preprocess(masks, *sides))


def test_masks_take_the_first_ones_size_and_split_at_middle_grey() -> None:
    masks = [Image.new("L", (24, 16), 127), Image.new("L", (50, 40), 128)]
    ours = IPAdapterMaskProcessor().preprocess(masks)
    assert torch.equal(ours, ReferenceMaskProcessor().preprocess(masks))
    assert ours.shape == (2, 1, 16, 24) and ours[0].max() == 0 and ours[1].min() == 1
    with pytest.raises(TypeError, match="expected masks as PIL images, got ndarray"):
        IPAdapterMaskProcessor().preprocess(np.zeros((8, 8)))
    with pytest.raises(ValueError, match="at least 8, got 16 x 5"):
        IPAdapterMaskProcessor().preprocess(masks, width=5)
