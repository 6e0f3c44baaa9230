"""Runs of every task and feature, to be compared between devices: each returns tensors, latents and images.

A run is given a `Place` (device_places.py), which has models of its own for it.
"""

import tempfile
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import kolors_core as kc
from kolors_core.adapters.lora import supported_layers
from kolors_core.attention import attention_kernel
from kolors_core.batch.__main__ import main as run_batch
from kolors_core.guidance import guided
from kolors_core.inspection.attention_maps import record_attention
from kolors_core.inspection.features import capture, inject
from kolors_core.inspection.token_attention import explain_prompt
from kolors_core.performance.quantize import cpu_adds_int8
from kolors_core.performance.quantize import quantize as quantize_model
from kolors_core.performance.vae_tiling import enable_tiling
from kolors_core.pipelines.quantization_report import quantize
from kolors_core.precompute import Savings
from tests.support.device_places import SIZE, Models, Place, seeded
from tests.support.inpainting import mask_of
from tests.support.pipelines import NO_SAVINGS, picture, steps_of
from weights_convert import TABLES

# Runs that need nothing of offload that others do not: the same models, in the same stages.
RESIDENT = {
    "text, unguided", "text, latents there", "text, timesteps", "text, generators", "text, generator there",
    "text_without_savings", "image", "image, tensor", "image, latents there", "image, map", "inpaint",
    "control", "control and image", "control and inpaint", "PAG", "PAG, adaptive", "kernels", "outputs",
    "rescaled_in_an_interval", "guidance_ends", "freeu", "bfloat16", "callback_tensors", "prompts_on_disk",
    "quantization_report", "batch",
}  # fmt: skip
START = picture(1, 32, 40)
HINT = picture(2, 32, 40)
MASK = mask_of(32, 40)
Run = Callable[[Place], list[Tensor]]
RUNS: dict[str, Run] = {}


def draw(pipe: Any, **given: Any) -> list[Tensor]:
    """Latents after each step of two, and the image."""
    return steps_of(pipe, **{"prompt": "a cat", "num_inference_steps": 2} | SIZE | given)


def draw_one_step(pipe: Any, **given: Any) -> list[Tensor]:
    """The same of one step, for all drawings of a run but the first."""
    return draw(pipe, num_inference_steps=1, **given)


def as_tensor(image: Image.Image) -> Tensor:
    """Its values, 0 to 255."""
    return torch.from_numpy(np.array(image)).float()


def run(function: Run) -> None:
    RUNS[function.__name__] = function


def plain(
    kind: Any = None, changes: Callable[[Models], dict[str, Any]] = lambda models: {}, **given: Any
) -> Run:
    """A run of one task with these arguments; functions among them are given the place."""

    def function(at: Place) -> list[Tensor]:
        pipe = at.put(at.pipe(kind, **changes(at.models)))
        return draw(pipe, **{k: v(at) if callable(v) else v for k, v in given.items()})

    return function


def noise(*shape: int, seed: int = 4) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


two = {"prompt": ["a cat", "一张照片 of the red ladybug"], "num_images_per_prompt": 2}
again = {"num_inference_steps": 4, "strength": 0.6}
one_net = {"changes": lambda models: {"controlnet": models.nets[0]}}
RUNS |= {
    "text of two lengths": plain(**two, negative_prompt="bad"),
    "text, unguided": plain(guidance_scale=1.0),
    "text, generators": plain(num_images_per_prompt=2, generator=lambda _at: [seeded(i) for i in range(2)]),
    "text, generator there": plain(generator=lambda at: seeded(0, at.own)),
    "text, timesteps": plain(num_inference_steps=50, timesteps=[900.0, 500.5, 20.0]),
    "text, latents there": plain(latents=lambda at: noise(1, 4, 4, 5).to(at.own)),
    "image": plain(kc.KolorsImg2ImgPipeline, image=START, **again),
    "image, tensor": plain(kc.KolorsImg2ImgPipeline, image=noise(1, 3, 32, 40).sigmoid(), **again),
    "image, latents there": plain(
        kc.KolorsImg2ImgPipeline, image=lambda at: noise(1, 4, 4, 5).to(at.own), **again
    ),
    "image, map": plain(kc.KolorsImg2ImgPipeline, image=START, strength_map=MASK, **again),
    "inpaint": plain(kc.KolorsInpaintPipeline, image=START, mask_image=MASK, **again),
    "inpaint of nine channels": plain(
        kc.KolorsInpaintPipeline, lambda models: {"unet": models.nine}, image=START, mask_image=MASK, **again
    ),
    "control": plain(kc.KolorsControlNetPipeline, **one_net, image=HINT),
    "two controls": plain(
        kc.KolorsControlNetPipeline, lambda models: {"controlnet": models.nets},
        image=[HINT, picture(3, 32, 40)], controlnet_conditioning_scale=[0.7, 1.2],
        control_guidance_start=[0.0, 0.2], control_guidance_end=[0.5, 1.0],
    ),
    "control and image": plain(
        kc.KolorsControlNetImg2ImgPipeline, **one_net, image=START, control_image=HINT, **again
    ),
    "control and inpaint": plain(
        kc.KolorsControlNetInpaintPipeline, **one_net, image=START, mask_image=MASK, control_image=HINT,
        **again,
    ),
    "PAG": plain(kc.KolorsPAGPipeline, pag_scale=3.0),
    "PAG, adaptive": plain(kc.KolorsPAGPipeline, pag_scale=3.0, pag_adaptive_scale=0.002, guidance_scale=1.0),
}  # fmt: skip


@run
def text_without_savings(at: Place) -> list[Tensor]:
    pipe = at.pipe()
    pipe.savings = NO_SAVINGS
    return draw(at.put(pipe))


@run
def embeddings(at: Place) -> list[Tensor]:
    """Encoded there, and on the CPU."""
    found, names = list[Tensor](), ("prompt", "negative_prompt", "pooled_prompt", "negative_pooled_prompt")
    for encode_first in (False, True):
        pipe = at.pipe()
        pipe = pipe if encode_first else at.put(pipe)
        given = {f"{name}_embeds": e for name, e in zip(names, pipe.encode_prompt("cat"), strict=True)}
        found += draw_one_step(at.put(pipe) if encode_first else pipe, prompt=None, **given)
    return found


@run
def outputs(at: Place) -> list[Tensor]:
    pipe = at.put(at.pipe())
    calls = {"prompt": "cat", "num_inference_steps": 1} | SIZE
    images = [pipe(**calls, output_type=kind, generator=seeded()).images for kind in ("latent", "np", "pil")]
    return [images[0], torch.from_numpy(images[1]), as_tensor(images[2][0])]


@run
def moved_to_and_fro(at: Place) -> list[Tensor]:
    """A prompt that was encoded elsewhere is found again."""
    pipe = at.pipe()
    return [*draw_one_step(pipe), *draw(at.put(pipe)), *draw_one_step(pipe.to("cpu"))]


@run
def prompts_on_disk(at: Place) -> list[Tensor]:
    pipe = at.pipe()
    pipe.savings = Savings(prompt_folder=tempfile.mkdtemp(dir=at.models.folder))
    first = draw(at.put(pipe))
    pipe.prompt_cache.clear()
    return [*first, *draw_one_step(pipe)]


@run
def callback_tensors(at: Place) -> list[Tensor]:
    pipe, seen = at.put(at.pipe()), list[Tensor]()
    names = ("latents", "prompt_embeds", "negative_prompt_embeds", "add_text_embeds", "add_time_ids",
             "negative_add_time_ids", "negative_pooled_prompt_embeds")  # fmt: skip

    def callback(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.extend(tensor.clone() for tensor in tensors.values())
        return {"prompt_embeds": tensors["prompt_embeds"] * 0.9}

    given = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    pipe(prompt="cat", num_inference_steps=2, output_type="pt", generator=seeded(), **SIZE, **given)
    return seen


@run
def guidance_ends(at: Place) -> list[Tensor]:
    given = {
        "callback_on_step_end": kc.SDXLCFGCutoffCallback(cutoff_step_ratio=0.4),
        "num_inference_steps": 3,
    }
    call = {"prompt": "cat", "output_type": "pt", "generator": seeded()} | SIZE
    return [at.put(at.pipe())(**call | given).images]


@run
def rescaled_in_an_interval(at: Place) -> list[Tensor]:
    pipe = at.put(at.pipe())
    pipe.guided = partial(guided, rescale=0.7, interval=(0.2, 0.8))
    return draw(pipe, num_inference_steps=3)


@run
def image_prompts(at: Place) -> list[Tensor]:
    """Loaded before and there; with masks; embedded; unloaded there."""
    file, pipe = at.models.ip_adapter, at.pipe()
    pipe.image_encoder = deepcopy(at.models.clip)
    load = partial(
        pipe.load_ip_adapter, str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None
    )
    load()
    at.put(pipe)
    found = draw(pipe, ip_adapter_image=picture(3))
    masks = kc.IPAdapterMaskProcessor().preprocess([MASK], height=32, width=40)
    given = {"cross_attention_kwargs": {"ip_adapter_masks": masks}}
    found += draw_one_step(pipe, ip_adapter_image=picture(3), **given)
    embeds = pipe.prepare_ip_adapter_image_embeds(picture(3), None, None, 1, True)
    found += draw_one_step(pipe, ip_adapter_image_embeds=embeds)
    pipe.unload_ip_adapter()
    found += draw_one_step(pipe)
    load()
    return [*found, *draw_one_step(pipe, ip_adapter_image=picture(3))]


@run
def faces(at: Place) -> list[Tensor]:
    file, pipe = at.models.face, at.pipe()
    pipe.image_encoder = deepcopy(at.models.clip)
    pipe.load_ip_adapter_face_id(file)
    face = noise(1, 12).double()
    return draw(at.put(pipe), face_embeds=face, face_image=picture(7, 64, 64))


def lora_state(pipe: Any) -> dict[str, Tensor]:
    """Random factors of rank 2 for some layers of each kind."""
    state, draws = {}, seeded(3)
    for component, most in (("unet", 5), ("text_encoder", 9)):
        for path, layer in list(supported_layers(getattr(pipe, component)).items())[::most]:
            public = TABLES[component].to_public(f"{path}.weight").removesuffix(".weight")
            out, *rest = layer.weight.shape
            down = torch.randn(2, *rest, generator=draws) / 8
            up = torch.randn(out, 2, *(1 for _ in rest[1:]), generator=draws) / 8
            name = f"{component}.{public}"
            state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return state


@run
def lora(at: Place) -> list[Tensor]:
    """Loaded before; scaled; fused and unfused there; unloaded and loaded there."""
    pipe = at.pipe()
    state = lora_state(pipe)
    pipe.load_lora_weights(state)
    found = draw(at.put(pipe), cross_attention_kwargs={"scale": 0.7})
    pipe.fuse_lora()
    found += draw_one_step(pipe)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    found += draw_one_step(pipe)
    pipe.load_lora_weights(state)
    return [*found, *draw_one_step(pipe)]


@run
def freeu(at: Place) -> list[Tensor]:
    pipe = at.pipe()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return draw(at.put(pipe))


@run
def learned_words(at: Place) -> list[Tensor]:
    """Learned before and there, and forgotten there."""
    pipe, vectors = at.pipe(), noise(2, 64)
    pipe.load_textual_inversion({"<one>": vectors})
    found = draw(at.put(pipe), prompt="a <one>")
    pipe.load_textual_inversion({"<two>": vectors + 1})
    found += draw_one_step(pipe, prompt="a <two>")
    pipe.unload_textual_inversion()
    return [*found, *draw_one_step(pipe)]


@run
def quantized(at: Place) -> list[Tensor]:
    """In 8 bits there, in 4 bits before."""
    pipe = at.pipe()
    quantize_model(pipe.unet, 4)
    at.put(pipe)
    quantize_model(pipe.text_encoder, 8)
    return draw(pipe)


@run
def quantized_products(at: Place) -> list[Tensor]:
    """In float8, and with quantized activations."""
    pipe = at.put(at.pipe())
    quantize_model(pipe.text_encoder, "fp8")
    if cpu_adds_int8():  # the simulated device's kernels are the CPU's
        quantize_model(pipe.unet, "w8a8")
    return draw_one_step(pipe)


@run
def cached_steps(at: Place) -> list[Tensor]:
    pipe = at.put(at.pipe())
    pipe.enable_step_cache(2, gate=0.5, guidance_interval=(0.0, 0.7))
    fixed = draw(pipe, num_inference_steps=4)
    pipe.enable_step_cache(None, threshold=0.2, guidance_similarity=0.9)
    return fixed + draw(pipe, num_inference_steps=3)


@run
def quantization_report(at: Place) -> list[Tensor]:
    pipe = at.put(at.pipe())
    report = quantize(pipe, unet=8)
    errors = [number for error in (report.noise, report.latents) for number in vars(error).values()]
    return [torch.tensor(errors), *draw_one_step(pipe)]


@run
def batch(at: Place) -> list[Tensor]:
    """A file of two prompts by the command, with a saved checkpoint."""
    folder = Path(tempfile.mkdtemp(dir=at.models.folder))
    (folder / "prompts.txt").write_text("a cat\na small red cat\n")
    at.models.pipe.save_pretrained(folder / "model")
    options = {"weights": folder / "model", "device": at.own, "dtype": "float32", "steps": 2} | SIZE
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert run_batch([str(folder / "prompts.txt"), str(folder / "images"), "--quiet", *flags]) == 0
    return [as_tensor(Image.open(file)) for file in sorted((folder / "images").glob("*.png"))]


@run
def tiled(at: Place) -> list[Tensor]:
    pipe = at.put(at.pipe(kc.KolorsImg2ImgPipeline))
    enable_tiling(pipe.vae, tile_sample_min_size=32)
    pipe.enable_vae_slicing()
    size = {"height": 48, "width": 40}
    return draw(pipe, image=picture(1, **size), num_images_per_prompt=2, **again, **size)


@run
def inspected(at: Place) -> list[Tensor]:
    """Maps, features and the report."""
    pipe = at.put(at.pipe())
    with record_attention(pipe.unet, "*") as maps, capture(pipe.unet, "mid*") as features:
        found = draw(pipe)
    with inject(pipe.unet, {"mid.resnets.0": features["mid.resnets.0"]}):
        found += draw(pipe)
    told = explain_prompt(pipe, "a cat", 1, generator=seeded(), **SIZE)
    return [*found, *maps.values(), *(view for shares in told.views.values() for view in shares)]


@run
def kernels(at: Place) -> list[Tensor]:
    """Those that a CPU has too."""
    found, pipe = [], at.put(at.pipe())
    for name in ("sdpa", "chunked", "matmul"):
        with attention_kernel(name):
            found += draw_one_step(pipe)
    return found


@run
def bfloat16(at: Place) -> list[Tensor]:
    """Latents by one kernel: choices for a CPU in bfloat16, of which the VAE makes more, are its alone."""
    with attention_kernel("sdpa"):
        return draw(at.put(at.pipe().to(torch.bfloat16)), output_type="latent")
