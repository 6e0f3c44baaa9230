"""Pipelines under ControlNets against a loop over the reference's modules, latents step by step."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from kolors_core import (
    KolorsControlNet,
    KolorsControlNetImg2ImgPipeline,
    KolorsControlNetPipeline,
    KolorsImg2ImgPipeline,
    KolorsPipeline,
    SDXLCFGCutoffCallback,
)
from kolors_core.adapters.controlnet import ControlInput, ControlResiduals
from kolors_core.conditioning import Conditioning
from kolors_core.guidance import guided
from kolors_core.image import preprocess_control
from kolors_core.pipelines.memory_plan import plan
from tests.support.controlnets import NET, write_controlnet
from tests.support.ip_adapters import Both, load_both
from tests.support.loras import ATTENTION, factors, peft_names
from tests.support.offloads import offloaded
from tests.support.pipelines import Pair, picture, steps_of
from tests.support.small import EXACT, FLOAT32, relative_error
from tests.test_unet import inputs

HEIGHT, WIDTH, STEPS, GUIDANCE = 64, 72, 5, 5.0
SCALES, STARTS, ENDS = [0.7, 1.2], [0.0, 0.2], [0.6, 1.0]
NEGATIVE = "small"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two ControlNets as the reference saves them."""
    folder = tmp_path_factory.mktemp("controlnets")
    return [write_controlnet(folder / str(seed), seed) for seed in (20, 21)]


def load_nets(folders: Sequence[Path]) -> tuple[list[KolorsControlNet], list[Any]]:
    mine = [KolorsControlNet.from_pretrained(folder, torch_dtype=torch.float64) for folder in folders]
    theirs = [diffusers.ControlNetModel.from_pretrained(folder).double().eval() for folder in folders]
    return mine, theirs


@torch.no_grad()
def loop(
    pipe: Any, nets: Sequence[Any], images: Sequence[Any], prompts: list[str], start: Image.Image | None,
    strength: float, guide: Any = None,
) -> list[Tensor]:  # fmt: skip
    """Latents after each step, written out over the reference's modules; start: of image to image."""
    draw, count = torch.Generator().manual_seed(0), len(prompts)
    embeds = pipe.encode_prompt(prompts, negative_prompt=[NEGATIVE] * count)
    tokens, pooled = torch.cat([embeds[1], embeds[0]]), torch.cat([embeds[3], embeds[2]])
    ids = torch.tensor([[HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH]], dtype=tokens.dtype).expand(2 * count, -1)
    added = {"text_embeds": pooled, "time_ids": ids}
    if guide is not None:
        added["image_embeds"] = pipe.prepare_ip_adapter_image_embeds(guide, None, "cpu", count, True)
    seen = []
    for image in images:
        processor = VaeImageProcessor(do_convert_rgb=True, do_normalize=False)
        pixels = processor.preprocess(image, height=HEIGHT, width=WIDTH).double()
        seen.append((pixels if len(pixels) == count else pixels.expand(count, -1, -1, -1)).repeat(2, 1, 1, 1))
    scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    timesteps, shape = scheduler.timesteps, (count, 4, HEIGHT // 8, WIDTH // 8)
    if start is None:
        latents = torch.randn(shape, generator=draw, dtype=tokens.dtype) * scheduler.init_noise_sigma
    else:
        first = STEPS - int(STEPS * strength)
        timesteps = timesteps[first:]
        scheduler.set_begin_index(first)
        vae = deepcopy(pipe.vae).float()
        encoded = vae.encode(VaeImageProcessor().preprocess(start)).latent_dist
        clean = (encoded.sample(draw) * vae.config.scaling_factor).to(tokens).expand(shape)
        noise = torch.randn(shape, generator=draw, dtype=tokens.dtype)
        latents = scheduler.add_noise(clean, noise, timesteps[:1])
    kept, n = [], len(timesteps)
    for i, t in enumerate(timesteps):
        x = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        total: list[Tensor] = []
        for net, image, scale, begin, end in zip(nets, seen, SCALES, STARTS, ENDS, strict=True):
            active = 1.0 - float(i / n < begin or (i + 1) / n > end)
            skips, mid = net(
                x, t, encoder_hidden_states=net.encoder_hid_proj(tokens), controlnet_cond=image,
                conditioning_scale=scale * active, added_cond_kwargs=added, return_dict=False,
            )  # fmt: skip
            own = [*skips, mid]
            total = [a + b for a, b in zip(total, own, strict=True)] if total else own
        predicted = pipe.unet(
            x, t, encoder_hidden_states=tokens, added_cond_kwargs=added,
            down_block_additional_residuals=total[:-1], mid_block_additional_residual=total[-1],
        ).sample  # fmt: skip
        unconditional, conditional = predicted.chunk(2)
        predicted = unconditional + GUIDANCE * (conditional - unconditional)
        latents = scheduler.step(predicted, t, latents, return_dict=False)[0]
        kept.append(latents)
    return kept


def assert_same(mine: list[Tensor], other: list[Tensor]) -> None:
    assert len(mine) - 1 == len(other) > 1, "ours has the images too"
    for i, (a, b) in enumerate(zip(mine, other, strict=False)):
        assert relative_error(a, b) < FLOAT32, i


GIVEN = {
    "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": HEIGHT, "width": WIDTH,
    "controlnet_conditioning_scale": SCALES, "control_guidance_start": STARTS, "control_guidance_end": ENDS,
}  # fmt: skip
IMAGES = [picture(11, 100, 90), [picture(12, 40, 200), picture(13, 40, 200)]]  # one for all, one a prompt
PROMPTS = ["cat", "一张照片"]


@pytest.mark.numerical
def test_every_step_of_text_to_image_equals_the_reference(pipes: Pair, folders: list[Path]) -> None:
    mine, theirs = load_nets(folders)
    pipe = KolorsControlNetPipeline.from_pipe(pipes[0], controlnet=mine)
    given = {"prompt": PROMPTS, "negative_prompt": [NEGATIVE] * 2, "image": IMAGES} | GIVEN
    other = loop(pipes[1], theirs, IMAGES, PROMPTS, None, 1.0)
    found = steps_of(pipe, **given)
    assert_same(found, other)
    pipe.savings = replace(pipe.savings, precompute=False, merge_padding=False)
    assert_same(steps_of(pipe, **given), other)
    mine[1].to_skips[3].bias.data += 0.01
    with pytest.raises(AssertionError):
        assert_same(steps_of(pipe, **given), other)


def test_every_step_with_adapters_and_from_a_picture_equals_the_reference(
    both: Both, folders: list[Path], adapters: list[Path]
) -> None:
    """Two ControlNets, an IP-Adapter and a LoRA in one pass, from text and from an image."""
    load_both(both, adapters[0])
    state = peft_names("unet", factors(both[0].unet, "unet", ATTENTION), "unet.")
    for pipe in both:
        pipe.load_lora_weights(dict(state))
        pipe.set_ip_adapter_scale(0.6)
    mine, theirs = load_nets(folders)
    images, guide = [picture(11), picture(12)], picture(3)
    given = {"prompt": "cat", "negative_prompt": NEGATIVE, "ip_adapter_image": guide} | GIVEN
    pipe = KolorsControlNetPipeline.from_pipe(both[0], controlnet=mine)
    other = loop(both[1], theirs, images, ["cat"], None, 1.0, guide)
    assert_same(steps_of(pipe, image=images, **given), other)
    start = picture(7)
    pipe = KolorsControlNetImg2ImgPipeline.from_pipe(pipe)
    other = loop(both[1], theirs, images, ["cat"], start, 0.8, guide)
    assert len(other) == 4, "strength is 0.8"
    assert_same(steps_of(pipe, image=start, control_image=images, **given), other)


@pytest.fixture
def steered(pipes: Pair, folders: list[Path]) -> KolorsControlNetPipeline:
    """Text to image with two ControlNets."""
    return KolorsControlNetPipeline.from_pipe(pipes[0], controlnet=load_nets(folders)[0])


def run(pipe: Any, **arguments: Any) -> list[Tensor]:
    return steps_of(pipe, **{"prompt": "cat", "image": [picture(11), picture(12)]} | GIVEN | arguments)


def same(mine: list[Tensor], other: list[Tensor], tolerance: float = EXACT) -> bool:
    pairs = zip(mine, other, strict=True)
    return all(relative_error(a, b) < tolerance for a, b in pairs)


def test_one_controlnet_takes_plain_arguments_and_every_form_of_image(
    pipes: Pair, folders: list[Path]
) -> None:
    net = KolorsControlNet.from_pretrained(folders[0], torch_dtype=torch.float64)
    pipe = KolorsControlNetPipeline.from_pipe(pipes[0], controlnet=net)
    image, given = picture(11), {"num_inference_steps": 2, "prompt": "cat"}
    plain = steps_of(pipe, image=image, **given)
    array = np.asarray(image).astype(np.float32) / 255
    for other in (array, torch.from_numpy(array).movedim(-1, 0), [image], np.array(image)):
        assert same(steps_of(pipe, image=other, **given), plain, FLOAT32)
    assert not same(steps_of(pipe, image=picture(12), **given), plain, 1e-3)
    assert not same(steps_of(pipe, image=image, controlnet_conditioning_scale=0.2, **given), plain, 1e-3)
    assert same(steps_of(KolorsPipeline.from_pipe(pipe), control_image=image, **given), plain)
    # The image is as large as the control image, if nothing is said.
    made = pipe("cat", picture(11, 61, 45), num_inference_steps=1, output_type="pt").images
    assert made.shape == (1, 3, 56, 40)
    pipe.controlnet = [net]
    listed = pipe("cat", [picture(11, 61, 45)], num_inference_steps=1, output_type="pt").images
    assert listed.shape == made.shape


def test_images_for_each_prompt_and_for_each_picture(pipes: Pair, folders: list[Path]) -> None:
    net = KolorsControlNet.from_pretrained(folders[0], torch_dtype=torch.float64)
    pipe = KolorsControlNetPipeline.from_pipe(pipes[0], controlnet=net)
    a, b = picture(11), picture(12)
    given = {"prompt": ["cat", "cat"], "num_images_per_prompt": 2, "num_inference_steps": 1}
    of_prompts = steps_of(pipe, image=[a, b], **given)
    assert same(steps_of(pipe, image=[a, a, b, b], **given), of_prompts)
    assert not same(steps_of(pipe, image=[a, b, a, b], **given), of_prompts, 1e-6)
    with pytest.raises(ValueError, match=r"2 \(one a prompt\) or 4 \(one an image\) control images, got 3"):
        steps_of(pipe, image=[a, b, a], **given)
    one = {"prompt": "cat", "num_inference_steps": 1, "height": None, "width": None}
    assert same(steps_of(pipe, image=preprocess_control(a), **one), steps_of(pipe, image=a, **one)), (
        "a tensor"
    )


def test_what_is_given_and_not_used_is_an_error(
    pipes: Pair, steered: KolorsControlNetPipeline, folders: list[Path]
) -> None:
    ours, image = pipes[0], picture(11)
    for pipe, arguments, named in (
        (ours, {"control_image": image}, "the pipeline has no ControlNet"),
        (ours, {"controlnet_conditioning_scale": 0.5}, "controlnet_conditioning_scale has no effect without"),
        (ours, {"control_guidance_end": 0.5}, "control_guidance_end has no effect without"),
        (KolorsPipeline.from_pipe(steered), {}, "2 ControlNets and no control image: give one, or set"),
        (steered, {"image": None}, "no image: expected the control image"),
        (steered, {"image": [image]}, "one for each of the 2 ControlNets, got 1"),
        (steered, {"image": image}, "control images: expected a list"),
        (steered, {"controlnet_conditioning_scale": 0.0}, "not 0"),
        (steered, {"controlnet_conditioning_scale": [0.5]}, "scale: expected a list .* got 1"),
        (steered, {"control_guidance_start": 0.9, "control_guidance_end": 0.95}, "none of the 5 steps"),
        (steered, {"control_guidance_start": 0.5, "control_guidance_end": 0.5}, "0.5 and 0.5"),
        (steered, {"image": [image, torch.full((3, 64, 72), 1.5)]}, r"must lie in \[0, 1\], got 1.5"),
    ):
        given = {"height": 64, "width": 72} | arguments
        if pipe is steered:
            given = {"image": [image, image]} | given
        with pytest.raises(ValueError, match=named):
            pipe("cat", num_inference_steps=5, **given)
    img2img = KolorsControlNetImg2ImgPipeline.from_pipe(steered)
    with pytest.raises(ValueError, match="no control_image"):
        img2img("cat", image)
    with pytest.raises(ValueError, match="guess_mode can only be False, got True"):
        steered("cat", [image, image], guess_mode=True)
    steered.controlnet = [steered.controlnet[0].float(), steered.controlnet[1]]
    with pytest.raises(ValueError, match=r"ControlNet is torch.float32 on cpu, the UNet torch.float64"):
        run(steered)
    with pytest.raises(TypeError, match="must be kolors_core's ControlNet"):
        KolorsPipeline.from_pipe(ours, controlnet=ours.unet)


def test_a_picture_tells_what_steered_it(steered: KolorsControlNetPipeline) -> None:
    info = steered("cat", [picture(11), picture(12)], **GIVEN).images[0].info
    assert (info["control_scale"], info["control_steps"]) == ("0.7, 1.2", "0 to 0.6, 0.2 to 1")
    info = steered("cat", [picture(11)] * 2, num_inference_steps=1).images[0].info
    assert info["control_scale"] == "0.8, 0.8" and "control_steps" not in info


def test_a_callback_keeps_the_controls(steered: KolorsControlNetPipeline) -> None:
    plain = run(steered)

    def again(pipe: Any, i: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(tensors["latents"].clone())
        return {"prompt_embeds": tensors["prompt_embeds"].clone()}

    latents: list[Tensor] = []
    given = {"generator": torch.Generator().manual_seed(0), "output_type": "pt"} | GIVEN
    wanted = ["latents", "prompt_embeds"]
    images = steered(
        "cat", [picture(11), picture(12)], callback_on_step_end=again,
        callback_on_step_end_tensor_inputs=wanted, **given,
    ).images  # fmt: skip
    assert same([*latents, images], plain, FLOAT32)
    given["generator"] = torch.Generator().manual_seed(0)
    cut = SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    ended = steered("cat", [picture(11), picture(12)], callback_on_step_end=cut, **given).images
    assert torch.isfinite(ended).all() and relative_error(ended, plain[-1]) > 1e-6


def test_halves_of_guidance_apart_are_what_both_are_together(steered: KolorsControlNetPipeline) -> None:
    """As kolors_core/performance/split_guidance.py computes them, each by its own process."""
    whole = run(steered)

    def apart(unet: Any, schedule: Any, positive: Any, negative: Any, scale: float, **more: Any) -> Any:
        halves = [guided(unet, schedule, told, **more) for told in (negative, positive)]

        def denoise(x: Tensor, sigma: float) -> Tensor:
            unconditional, conditional = (half(x, sigma) for half in halves)
            return unconditional + scale * (conditional - unconditional)

        return denoise

    steered.guided = apart
    assert same(run(steered), whole, FLOAT32)


def test_recorded_and_hooked_it_draws_the_same(steered: KolorsControlNetPipeline) -> None:
    from kolors_core.performance.cuda_graphs import CUDAGraphCache
    from tests.performance.test_compile import Recorder

    plain = run(steered)
    recorder = Recorder()
    steered._wrap_step = CUDAGraphCache(recorder)
    assert same(run(steered), plain)
    assert recorder.count == 3, "the UNet's, and one for each ControlNet"
    assert same(run(steered), plain) and recorder.count == 3
    with torch.no_grad():
        steered.controlnet[1].to_mid.weight.mul_(1.5)
    assert not same(run(steered), plain, 1e-6) and recorder.count == 3, "a replay reads the weights of then"
    with torch.no_grad():
        steered.controlnet[1].to_mid.weight.div_(1.5)
    steered._wrap_step = None
    seen = []
    handle = steered.controlnet[0].register_forward_hook(lambda *_: seen.append(1))
    assert same(run(steered), plain, FLOAT32)
    assert len(seen) == 3, "called as a whole, in each of the steps in which it acts"
    handle.remove()


@torch.no_grad()
def test_a_sampler_may_ask_within_a_step(steered: KolorsControlNetPipeline) -> None:
    """A control acts from its step's noise level down to the next one's."""
    given, image = inputs(1, 8, 8), torch.rand(1, 3, 64, 64, dtype=torch.float64)
    schedule, net = steered.scheduler.schedule(4), steered.controlnet[0]
    text = [given[name] for name in ("text_tokens", "pooled_text", "size_ids")]
    controls = ControlInput(net, image), ControlInput(net, image, end=0.5)
    ways = [None, *(ControlResiduals((control,)) for control in controls)]
    without, always, early = (
        guided(steered.unet, schedule, Conditioning(*text, residuals=residuals)) for residuals in ways
    )
    s = schedule.sigmas.tolist()
    for sigma in (s[0] + 1, s[0], s[1], (s[1] + s[2]) / 2, s[2], (s[2] + s[3]) / 2, s[3], s[3] / 2):
        wanted = always if sigma > s[2] else without
        assert torch.equal(early(given["latents"], sigma), wanted(given["latents"], sigma)), sigma
    assert not torch.equal(always(given["latents"], s[0]), without(given["latents"], s[0]))


@torch.no_grad()
def test_compiling_a_pipeline_compiles_its_controlnets(steered: KolorsControlNetPipeline) -> None:
    torch.compiler.reset()
    net, given = steered.controlnet[0], inputs(1, 8, 8)
    image = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    plain = net(**given, image=image)
    parts = {name: deepcopy(getattr(steered, name)) for name in ("unet", "vae", "text_encoder")}
    KolorsControlNetPipeline.from_pipe(steered, **parts).compile(backend="eager")
    assert net.mid.resnets[0]._compiled_call_impl is not None
    assert all(torch.equal(a, b) for a, b in zip(net(**given, image=image), plain, strict=True))
    torch.compiler.reset()


@pytest.mark.parametrize("by_block", [False, True])
def test_offload_brings_the_controlnets_with_the_unet(
    steered: KolorsControlNetPipeline, by_block: bool
) -> None:
    plain = run(steered)
    with offloaded(steered, by_block) as offload:
        assert same(run(steered), plain)
        nets = sum(p.nbytes for net in steered.controlnet for p in net.parameters())
        assert (offload.peak_bytes < nets) is by_block


def test_a_plan_counts_the_controlnets(pipes: Pair, steered: KolorsControlNetPipeline) -> None:
    without = plan(KolorsPipeline.from_pipe(steered, controlnet=None), 64, 72)
    made = plan(steered, 64, 72)
    nets = sum(p.nbytes for net in steered.controlnet for p in net.parameters()) / 2**30
    assert made.stages["unet"].weights == pytest.approx(without.stages["unet"].weights + nets)
    assert made.stages["unet"].work > without.stages["unet"].work
    assert not next(steered.controlnet[0].parameters()).is_meta


def test_moving_saving_and_sharing(pipes: Pair, folders: list[Path], tmp_path: Path) -> None:
    net = KolorsControlNet.from_pretrained(folders[0])
    parts = {name: deepcopy(getattr(pipes[0], name)) for name in ("unet", "vae", "text_encoder")}
    pipe = KolorsControlNetPipeline.from_pipe(pipes[0], controlnet=net, **parts)
    pipe.to(torch.float32)
    assert net.conv_in.weight.dtype == torch.float32 == pipe.unet.conv_in.weight.dtype
    pipe.to(torch.bfloat16)
    assert net.conv_in.weight.dtype == torch.bfloat16
    assert KolorsImg2ImgPipeline.from_pipe(pipe).controlnet is net
    assert pipe.components["controlnet"] is net
    pipe.to(torch.float32).save_pretrained(tmp_path / "saved")
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")) is diffusers.KolorsPipeline
    assert KolorsPipeline.from_pretrained(tmp_path / "saved").controlnet is None
    with pytest.raises(ValueError, match="text_dim is 96, and the UNet's 64"):
        KolorsPipeline.from_pipe(pipe, controlnet=KolorsControlNet(replace(NET, text_dim=96)))
