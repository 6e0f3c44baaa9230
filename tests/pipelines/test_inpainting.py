"""Inpainting and image to image with a strength map against loops over the reference's modules, step by step;
what is held, loaded and refused."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from kolors_core import KolorsControlNetInpaintPipeline, KolorsImg2ImgPipeline, KolorsInpaintPipeline
from kolors_core.pipelines.masks import resize_to_fit
from tests.support.controlnets import net_pair
from tests.support.inpainting import Nine, mask_of
from tests.support.pipelines import SOLVERS, Pair, embeddings, picture, steps_of, use_solver
from tests.support.small import EXACT, FLOAT32, relative_error


def four(pipes: Pair) -> KolorsInpaintPipeline:
    return KolorsInpaintPipeline.from_pipe(pipes[0])


class Reference:
    """What the loops below share: the reference's modules, and noise in the order in which ours draws it."""

    def __init__(self, theirs: Any, unet: Any, steps: int, strength: float, scale: float) -> None:
        self.draw, self.vae, self.unet, self.scale = torch.Generator().manual_seed(0), theirs.vae, unet, scale
        self.control: tuple[Any, Tensor] | None = None  # a ControlNet, and what it sees at scale 0.8
        self.scheduler = deepcopy(theirs.scheduler)
        self.scheduler.set_timesteps(steps)
        first = steps - int(steps * strength)
        if first:
            self.scheduler.set_begin_index(first)
        self.times = self.scheduler.timesteps[first:]
        given = embeddings(theirs, "cat")
        self.told = [
            torch.cat([given[f"negative_{name}"], given[name]])
            for name in ("prompt_embeds", "pooled_prompt_embeds")
        ]
        self.ids = torch.tensor([[64, 72, 0, 0, 64, 72]] * 2, dtype=torch.float64)

    def encode(self, pixels: Tensor) -> Tensor:
        """A sample of the VAE's latents."""
        found = self.vae.encode(pixels.double()).latent_dist
        noise = torch.randn(found.mean.shape, generator=self.draw)
        return (found.mean + found.std * noise) * self.vae.config.scaling_factor

    def noised(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return self.scheduler.add_noise(clean, noise, time[None])

    def step(self, latents: Tensor, time: Tensor, more: list[Tensor]) -> Tensor:
        """One guided step; more: what the UNet reads beside the latents."""
        x = self.scheduler.scale_model_input(latents.repeat(2, 1, 1, 1), time)
        added = {"text_embeds": self.told[1], "time_ids": self.ids}
        residuals = {}
        if self.control is not None:
            net, image = self.control
            skips, mid = net(
                x, time, encoder_hidden_states=net.encoder_hid_proj(self.told[0]), controlnet_cond=image,
                conditioning_scale=0.8, added_cond_kwargs=added, return_dict=False,
            )  # fmt: skip
            residuals = {"down_block_additional_residuals": skips, "mid_block_additional_residual": mid}
        x = torch.cat([x, *(part.repeat(2, 1, 1, 1) for part in more)], dim=1)
        noise = self.unet(
            x, time, encoder_hidden_states=self.told[0], added_cond_kwargs=added, **residuals
        ).sample
        negative, positive = noise.chunk(2)
        return self.scheduler.step(negative + self.scale * (positive - negative), time, latents).prev_sample


@torch.no_grad()
def inpaint_loop(
    theirs: Any, unet: Any, steps: int, strength: float, scale: float = 7.5, control: Any = None
) -> list[Tensor]:
    """The reference's inpainting, written out: latents after each step, then the image in [0, 1]."""
    run = Reference(theirs, unet, steps, strength, scale)
    run.control = control
    has_mask_channels = unet.config.in_channels == 9
    pixels = VaeImageProcessor(vae_scale_factor=8).preprocess(picture())
    mask_processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    mask = mask_processor.preprocess(mask_of())
    clean = torch.zeros(1)
    if strength < 1 or not has_mask_channels:
        clean = run.encode(pixels)
    noise = torch.randn(1, 4, 8, 9, generator=run.draw, dtype=torch.float64)
    if strength < 1:
        latents = run.noised(clean, noise, run.times[0])
    else:
        latents = noise * run.scheduler.init_noise_sigma
    small = torch.nn.functional.interpolate(mask, size=(8, 9)).double()
    more = [small, run.encode(pixels * (mask < 0.5))] if has_mask_channels else []
    found = []
    for i, time in enumerate(run.times):
        latents = run.step(latents, time, more)
        if not has_mask_channels:
            kept = clean if i == len(run.times) - 1 else run.noised(clean, noise, run.times[i + 1])
            latents = (1 - small) * kept + small * latents
        found.append(latents)
    decoded = run.vae.decode(latents / run.vae.config.scaling_factor).sample
    return [*found, (decoded / 2 + 0.5).clamp(0, 1)]


def inpaint_steps(pipe: KolorsInpaintPipeline, **arguments: Any) -> list[Tensor]:
    """Ours likewise."""
    given = {
        "prompt": "cat", "image": picture(), "mask_image": mask_of(), "paste_back": False,
        "height": None, "width": None,
    }  # fmt: skip
    return steps_of(pipe, **given | arguments)


@pytest.mark.numerical
@pytest.mark.parametrize("channels", [9, 4])
@pytest.mark.parametrize(("solver", "changes"), SOLVERS[:2], ids=["euler", "dpm"])
@pytest.mark.parametrize(("steps", "strength"), [(5, 0.9999), (4, 1.0), (7, 0.6)])
def test_every_step_equals_the_reference(
    pipes: Pair, nine: Nine, channels: int, solver: str, changes: dict, steps: int, strength: float
) -> None:
    use_solver(pipes, solver, changes)
    ours, unet = (four(pipes), pipes[1].unet) if channels == 4 else nine
    ours.scheduler = pipes[0].scheduler
    mine = inpaint_steps(ours, num_inference_steps=steps, strength=strength)
    other = inpaint_loop(pipes[1], unet, steps, strength)
    assert len(mine) == len(other) == int(steps * strength) + 1
    for i, (a, b) in enumerate(zip(mine, other, strict=True)):
        assert relative_error(a, b) < FLOAT32, i
    if (steps, strength) == (5, 0.9999):
        other_mask = mask_of().rotate(0, translate=(8, 0))
        moved = inpaint_steps(ours, num_inference_steps=steps, mask_image=other_mask)
        assert relative_error(moved[0], other[0]) > 100 * FLOAT32, "and so parity can fail"


@pytest.mark.parametrize("channels", [9, 4])
def test_every_step_under_a_controlnet_equals_the_reference(pipes: Pair, nine: Nine, channels: int) -> None:
    net, other_net = net_pair(20, torch.float64)
    other_pipe, unet = (four(pipes), pipes[1].unet) if channels == 4 else nine
    ours = KolorsControlNetInpaintPipeline.from_pipe(other_pipe, controlnet=net)
    ours.scheduler = pipes[0].scheduler
    seen = picture(11)
    pixels = VaeImageProcessor(do_normalize=False).preprocess(seen).double().repeat(2, 1, 1, 1)
    mine = inpaint_steps(ours, num_inference_steps=5, strength=0.6, control_image=seen)
    other = inpaint_loop(pipes[1], unet, 5, 0.6, control=(other_net, pixels))
    assert len(mine) == len(other) == 4
    for i, (a, b) in enumerate(zip(mine, other, strict=True)):
        assert relative_error(a, b) < FLOAT32, i
    plain = inpaint_loop(pipes[1], unet, 5, 0.6)
    assert relative_error(mine[0], plain[0]) > 100 * FLOAT32, "the ControlNet acts"
    with pytest.raises(ValueError, match="no control_image: expected one"):
        inpaint_steps(ours)


def test_arguments_mean_what_they_mean_elsewhere(pipes: Pair, nine: Nine) -> None:
    ours, _ = nine
    ours.scheduler = pipes[0].scheduler
    noise = {"strength": 0.5, "latents": torch.ones(1, 4, 8, 9)}
    plain = inpaint_steps(ours, **noise)
    mask = (torch.from_numpy(np.array(mask_of())) < 128).float()
    pixels = torch.from_numpy(np.array(picture())).movedim(-1, 0)[None] / 127.5 - 1  # [1, 3, 64, 72]
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        clean, shown = (
            found.mean + found.std * torch.randn(found.mean.shape, generator=draw)
            for found in map(ours.vae.encode_images, (pixels.double(), (pixels * mask).double()))
        )
    given = inpaint_steps(ours, image=clean, masked_image_latents=shown, **noise)
    assert all(relative_error(a, b) < FLOAT32 for a, b in zip(plain, given, strict=True))
    rest = inpaint_steps(ours, denoising_start=0.5, num_inference_steps=6)
    assert len(rest) == 3 + 1
    halves = inpaint_steps(ours, denoising_end=0.5, num_inference_steps=6)
    assert len(halves) < 6
    sized = inpaint_steps(ours, height=32, width=40)
    assert sized[-1].shape[-2:] == (32, 40)


def test_each_prompt_keeps_its_picture_and_its_mask(pipes: Pair, nine: Nine) -> None:
    """Two prompts, images and masks with two images a prompt; then one image with two masks."""
    images, masks = [picture(0), picture(1)], [mask_of(), mask_of().rotate(180)]
    for ours in (four(pipes), nine[0]):
        ours.scheduler = pipes[0].scheduler
        seeds = [torch.Generator().manual_seed(i) for i in range(4)]
        both = inpaint_steps(
            ours, prompt=["cat", "red"], image=images, mask_image=masks, num_images_per_prompt=2,
            generator=seeds, paste_back=None,
        )  # fmt: skip
        for row, which in enumerate((0, 0, 1, 1)):
            alone = inpaint_steps(
                ours, prompt=["cat", "red"][which], image=images[which], mask_image=masks[which],
                generator=[torch.Generator().manual_seed(row)], paste_back=None,
            )  # fmt: skip
            assert relative_error(both[-1][row : row + 1], alone[-1]) < FLOAT32
    found = inpaint_steps(nine[0], prompt=["cat", "red"], mask_image=masks, paste_back=None)
    assert found[-1].shape == (2, 3, 64, 72)
    with pytest.raises(ValueError, match="expected one mask or one for each of 3 images, got 2"):
        inpaint_steps(nine[0], image=[*images, picture(2)], mask_image=masks)


# What stays.


@pytest.mark.parametrize("channels", [9, 4])
@pytest.mark.parametrize("size", [(64, 72), (67, 75)])
@pytest.mark.parametrize("padding", [None, 3])
def test_pixels_outside_the_mask_are_the_given_ones(
    pipes: Pair, nine: Nine, channels: int, size: tuple[int, int], padding: int | None
) -> None:
    """Bit for bit, at any size; and the VAE alone would change nearly all of them."""
    ours = four(pipes) if channels == 4 else nine[0]
    given, mask = picture(0, *size), mask_of(*size)
    fixed = {"num_inference_steps": 2, "padding_mask_crop": padding}
    if padding is not None:
        fixed |= {"height": 64, "width": 72}
    made = ours("cat", given, mask, **fixed).images[0]
    assert made.size == given.size
    is_outside = np.asarray(mask) == 0
    changed = (np.asarray(made) != np.asarray(given)).any(-1)
    assert not changed[is_outside].any() and changed[np.asarray(mask) == 255].mean() > 0.9
    assert made.info["size"] == f"{size[1]}x{size[0]}"
    loose = ours("cat", given, mask, **fixed, paste_back=False).images[0]
    if loose.size == given.size:
        assert (np.asarray(loose) != np.asarray(given)).any(-1)[is_outside].mean() > 0.1


def test_a_control_image_shows_the_masks_region(pipes: Pair) -> None:
    """Cut as the reference cuts it: every step is that of the region, its mask and its edges alone."""
    ours = KolorsControlNetInpaintPipeline.from_pipe(pipes[0], controlnet=net_pair(20, torch.float64)[0])
    mask, edges = mask_of(128, 144), picture(4, 128, 144)
    box = VaeImageProcessor().get_crop_region(mask, 64, 64, pad=8)
    sides = {"height": 64, "width": 64}
    cut = {**sides, "crops_coords": box, "resize_mode": "fill"}
    seen, told = (VaeImageProcessor(do_normalize=n).preprocess(p, **cut)
                  for n, p in ((True, picture(0, 128, 144)), (False, edges)))  # fmt: skip
    alone = inpaint_steps(ours, image=seen, mask_image=resize_to_fit(mask.crop(box), (64, 64)),
                          control_image=told, **sides)  # fmt: skip
    whole = {"image": picture(0, 128, 144), "mask_image": mask, "padding_mask_crop": 8, **sides}
    made = inpaint_steps(ours, control_image=edges, **whole)
    assert all(relative_error(a, b) < EXACT for a, b in zip(made[:-1], alone[:-1], strict=True))
    with pytest.raises(ValueError, match="control_image and image of one size .*, got 64 x 72 and 128 x 144"):
        inpaint_steps(ours, control_image=picture(4), **whole)
    with pytest.raises(TypeError, match="needs control_image as one PIL image, got Tensor"):
        inpaint_steps(ours, control_image=told, **whole)


def test_arrays_and_tensors_are_pasted_too(pipes: Pair) -> None:
    ours, fixed = four(pipes), {"num_inference_steps": 2}
    pixels = torch.rand(3, 64, 72, generator=torch.Generator().manual_seed(0))
    is_outside = torch.from_numpy(np.asarray(mask_of()) == 0)
    mask = torch.from_numpy(np.array(mask_of()))
    tensor = ours("cat", pixels, mask, output_type="pt", **fixed).images[0]
    assert (tensor - pixels)[:, is_outside].abs().max() < 1e-6
    array = ours("cat", pixels, mask, output_type="np", **fixed).images[0]
    assert abs(array - pixels.movedim(0, -1).numpy())[is_outside.numpy()].max() < 1e-6
    latents = ours("cat", pixels, mask, output_type="latent", **fixed).images
    assert latents.shape == (1, 4, 8, 9)


# Image to image with a strength for each place.


@torch.no_grad()
def differential_loop(theirs: Any, keep: Tensor, steps: int) -> list[Tensor]:
    """The community's loop, written out: before each step, what its map keeps is the noised image again."""
    run = Reference(theirs, theirs.unet, steps, 1.0, 5.0)
    clean = run.encode(VaeImageProcessor(vae_scale_factor=8).preprocess(picture()))
    noise = torch.randn(clean.shape, generator=run.draw, dtype=torch.float64)
    noised = [run.noised(clean, noise, time) for time in run.times]
    thresholds = torch.arange(steps, dtype=keep.dtype)[:, None, None] / steps
    masks = (keep > thresholds).double()
    latents, found = noised[0], []
    for i, time in enumerate(run.times):
        if i > 0:
            latents = noised[i] * masks[i] + latents * (1 - masks[i])
        latents = run.step(latents, time, [])
        found.append(latents)
    return found


def image_steps(pipe: KolorsImg2ImgPipeline, **arguments: Any) -> list[Tensor]:
    given = {"prompt": "cat", "image": picture(), "strength": 1.0, "height": None, "width": None}
    return steps_of(pipe, **given | arguments)


@pytest.mark.parametrize(("solver", "changes"), SOLVERS[:2], ids=["euler", "dpm"])
def test_a_strength_map_is_the_communitys_map_turned_round(pipes: Pair, solver: str, changes: dict) -> None:
    """There each place changes for one step more; so what is kept to the end changes in the last step."""
    use_solver(pipes, solver, changes)
    steps, values = 6, torch.rand(8, 9, generator=torch.Generator().manual_seed(3))
    values[0], values[1] = 0, 1
    ours = KolorsImg2ImgPipeline.from_pipe(pipes[0])
    strengths = (1 - values + 1 / steps).clamp(max=1)
    mine = image_steps(ours, strength_map=strengths, num_inference_steps=steps)
    other = differential_loop(pipes[1], values, steps)
    given_back = []  # ours gives places back after a step, the community's before the next
    for i, (a, b) in enumerate(zip(mine, other, strict=False)):
        free = strengths * steps >= steps - i
        assert relative_error(a[..., free], b[..., free]) < FLOAT32, i
        given_back.append(int((~free).sum()))
    assert len(set(given_back)) > 3 and given_back[-1] == 0
    coarse = image_steps(ours, strength_map=(1 - values).round(), num_inference_steps=steps)
    assert relative_error(coarse[-2], other[-1]) > 100 * FLOAT32


def test_a_map_of_one_grey_is_image_to_image_of_that_strength(pipes: Pair) -> None:
    ours = KolorsImg2ImgPipeline.from_pipe(pipes[0])
    for value, steps in ((51, 1), (127, 2), (128, 2), (204, 4), (255, 5)):
        plain = image_steps(ours, strength=value / 255, num_inference_steps=5)
        mine = image_steps(ours, strength_map=Image.new("L", (72, 64), value), num_inference_steps=5)
        assert len(plain) == steps + 1
        assert relative_error(mine[-2], plain[-2]) < EXACT, value
    white = image_steps(ours, strength=0.6, strength_map=np.ones((64, 72)), num_inference_steps=5)
    assert relative_error(white[-2], image_steps(ours, strength=0.6, num_inference_steps=5)[-2]) < EXACT


def test_where_the_map_is_black_latents_stay_bit_for_bit(pipes: Pair) -> None:
    ours, clean = KolorsImg2ImgPipeline.from_pipe(pipes[0]), torch.randn(1, 4, 8, 9).double()
    ramp = torch.linspace(0, 1, 9).expand(8, 9)
    made = image_steps(ours, image=clean, strength_map=ramp, num_inference_steps=6)[-2]
    change = (made - clean).abs().mean((0, 1, 2))
    assert torch.equal(made[..., :2], clean[..., :2]), "int(6 / 8) steps are none"
    assert (change[2:] > 0.01).all() and change[-1] > 2 * change[2]


def test_a_map_for_each_prompt(pipes: Pair) -> None:
    ours = KolorsImg2ImgPipeline.from_pipe(pipes[0])
    maps = [np.zeros((64, 72), dtype=bool), np.ones((64, 72), dtype=bool)]
    image = torch.zeros(1, 4, 8, 9)
    made = image_steps(ours, prompt=["a", "b"], image=image, strength_map=maps, num_images_per_prompt=2)[-2]
    assert not made[:2].any() and (made[2:] != 0).all()


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": None}, "no image: expected an image and a mask"),
        ({"mask_image": None}, "no mask_image: expected an image and a mask"),
        ({"mask_image": Image.new("L", (72, 64))}, "mask_image leaves nothing to repaint: white is"),
        ({"mask_image": Image.new("L", (64, 72))}, r"mask_image is 72 x 64 .* expected its image's shape"),
        ({"mask_image": [mask_of()] * 3}, "expected one, 1 .* masks, got 3"),
        ({"mask_image": torch.full((64, 72), 2.0)}, "mask_image must be from 0 to 1, got 2 to 2"),
        ({"height": 60}, "height must be a positive multiple of 8, got 60"),
        ({"strength": 0}, "strength must be above 0 and at most 1, got 0"),
        ({"strength": 0.1}, "strength times steps must be at least 1"),
        ({"masked_image_latents": torch.zeros(1, 4, 8, 9)}, "masked_image_latents has no effect: this UNet"),
        ({"denoising_start": 0.5}, "denoising_start needs a UNet that reads the mask"),
        ({"padding_mask_crop": -1}, "padding_mask_crop must be a whole number of pixels from 0, got -1"),
        ({"padding_mask_crop": 2, "image": torch.zeros(3, 64, 72)}, "needs image as one PIL image"),
        ({"padding_mask_crop": 2, "mask_image": mask_of(32, 36)}, "mask_image and image of one size"),
        ({"padding_mask_crop": 2, "mask_image": Image.new("L", (72, 64))}, "leaves nothing to repaint"),
        ({"padding_mask_crop": 2, "output_type": "latent"}, "need images, and output_type is 'latent'"),
        ({"paste_back": True, "output_type": "latent"}, "need images, and output_type is 'latent'"),
        ({"paste_back": True, "image": torch.zeros(1, 4, 8, 9)}, "paste_back needs an image to paste into"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_arguments_are_named(pipes: Pair, arguments: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        inpaint_steps(four(pipes), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": torch.zeros(1, 4, 8, 9)}, "image is latents, which no mask can be laid on"),
        ({"masked_image_latents": torch.zeros(1, 3, 8, 9)}, "masked_image_latents must be latents"),
        ({"masked_image_latents": torch.zeros(1, 4, 8, 8)}, "width of given latents is 64"),
        ({"denoising_start": 0.5, "latents": torch.zeros(1, 4, 8, 9)}, "no effect beside denoising_start"),
    ],
)
def test_bad_arguments_of_nine_channels_are_named(nine: Nine, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inpaint_steps(nine[0], **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latents": torch.zeros(1, 4, 8, 9)}, "strength_map needs noise that is drawn here"),
        ({"denoising_start": 0.5, "strength": 0.3}, "strength_map needs noise that is drawn here"),
        ({"strength_map": np.ones((64, 64))}, r"strength_map is 64 x 64 .* expected .* 64 x 72"),
        ({"strength_map": np.full((64, 72), 1.5)}, "strength_map must be from 0 to 1"),
        ({"strength_map": [np.ones((64, 72))] * 2}, "expected one, 1 .* strength maps, got 2"),
    ],
)  # fmt: skip
def test_bad_maps_are_named(pipes: Pair, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_steps(
            KolorsImg2ImgPipeline.from_pipe(pipes[0]), **{"strength_map": np.ones((64, 72))} | arguments
        )
