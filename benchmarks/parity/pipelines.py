"""Whole pipelines: the latents of every step and the image, by both libraries from the same noise."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

from benchmarks.pairs import OneNoise
from benchmarks.parity.checkpoint import Checkpoint
from benchmarks.parity.components import PROMPTS, SEED, SLOW, picture
from benchmarks.parity.layers import Layer
from benchmarks.parity.measure import DTYPES, FLOAT32, TOLERANCES, Measured, Result, error_of, let_go, name_of
from benchmarks.parity.samplers import SOLVERS
from kolors_core import KolorsImg2ImgPipeline, KolorsInpaintPipeline, KolorsPipeline
from kolors_core.checkpoint import open_component
from kolors_core.pipelines.base import Components

# The solver of each, and how much of the image is made anew. Image to image is the last, since the
# reference leaves its VAE in another dtype.
TASKS = {
    "text to image": ("Euler", 1.0),
    "inpainting": ("DPM++ 2M Karras", 0.8),
    "image to image": ("SDE-DPM++ 2M Karras", 0.6),
}
EMBEDDINGS = (
    "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
)  # fmt: skip
STEPS, FEW_STEPS = 25, 8  # fewer would be so coarse that float32 schedules show in float64
# In float64 the reference's schedulers compute in float32. In float32 guidance multiplies the difference of
# two predictions' rounding, and float64 may not fit in memory to say how large that is.
PIPELINES = TOLERANCES | {"float64": FLOAT32, "float32": 10 * FLOAT32}


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What one run made: latents after each step, and the image, [H, W, 3] from 0 to 1."""

    latents: list[Tensor]
    pixels: Tensor

    @property
    def bytes(self) -> Tensor:
        """The image in 8 bits a channel, as a file has it."""
        return (self.pixels.double() * 255).round()


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """One image by both libraries. psnr: of ours from the reference's, in dB, and of each from the
    reference's in float64; infinite where images are equal. levels: the largest difference, of 255. ours,
    reference: [H, W, 3]."""

    task: str
    dtype: str
    psnr: float
    levels: int
    ours_from_float64: float
    reference_from_float64: float
    ours: Tensor
    reference: Tensor


def our_pipelines(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    """By task."""
    pipe = KolorsPipeline.from_pretrained(checkpoint.folder, torch_dtype=dtype, device=checkpoint.device)
    kinds = {"image to image": KolorsImg2ImgPipeline, "inpainting": KolorsInpaintPipeline}
    return {"text to image": pipe} | {task: kind.from_pipe(pipe) for task, kind in kinds.items()}


def their_pipelines(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    """By task. Kolors has no inpainting there: SDXL's is given Kolors' models, and its embeddings."""
    pipe = diffusers.KolorsPipeline.from_pretrained(
        checkpoint.folder, dtype=dtype, variant=checkpoint.variant("unet")
    ).to(checkpoint.device)
    parts = dict(pipe.components)
    img2img = diffusers.KolorsImg2ImgPipeline(
        **parts, force_zeros_for_empty_prompt=pipe.config["force_zeros_for_empty_prompt"]
    )
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    shared = {name: parts[name] for name in ("vae", "unet", "scheduler")}
    inpaint = diffusers.StableDiffusionXLInpaintPipeline(**nothing, **shared, add_watermarker=False)
    return {"text to image": pipe, "image to image": img2img, "inpainting": inpaint}


def arguments(task: str, side: int, steps: int) -> dict[str, Any]:
    """What both are called with."""
    given: dict[str, Any] = {
        "prompt": PROMPTS[0], "negative_prompt": "", "height": side, "width": side, "guidance_scale": 5.0,
        "num_inference_steps": steps, "output_type": "pt",
        "generator": torch.Generator().manual_seed(SEED),
    }  # fmt: skip
    if task != "text to image":
        given |= {"image": picture(side), "strength": TASKS[task][1]}
    if task == "inpainting":
        mask = Image.new("L", (side, side))
        mask.paste(255, (side // 4, side // 4, side * 3 // 4, side))
        given["mask_image"] = mask
    return given


def draw(pipelines: dict[str, Any], task: str, side: int, steps: int) -> Drawn:
    """One image."""
    pipe, latents, given = pipelines[task], [], arguments(task, side, steps)
    is_ours = isinstance(pipe, Components)
    kind, changes = SOLVERS[TASKS[task][0]]
    kind = kind if is_ours else getattr(diffusers, kind.__name__)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **changes)
    pipe.set_progress_bar_config(disable=True)
    if task == "inpainting" and is_ours:
        given["paste_back"] = False
    elif task == "inpainting":
        with torch.no_grad():
            found = pipelines["text to image"].encode_prompt(
                given.pop("prompt"), negative_prompt=given.pop("negative_prompt")
            )
        given |= dict(zip(EMBEDDINGS, found, strict=True))

    def keep(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(tensors["latents"].to("cpu", copy=True))
        return {}

    with OneNoise():
        image = pipe(**given, callback_on_step_end=keep).images[0]
    return Drawn(latents=latents, pixels=image.permute(1, 2, 0).cpu())


def measure_pipelines(
    checkpoint: Checkpoint, steps: int, dtypes: Sequence[torch.dtype] = DTYPES
) -> tuple[list[Result], list[Pictures]]:
    """All tasks in every dtype whose weights fit in memory; ours are let go before the reference's come.

    What is said to be from float64 is from the widest dtype that fits.
    """
    config = open_component(checkpoint.folder, "unet").model.config
    side = 8 * (min(config.sample_size, 32) if checkpoint.is_slow else config.sample_size)
    left_out = why_not(checkpoint)
    dtypes = [dtype for dtype in dtypes if name_of(dtype) not in left_out]
    drawn: dict[tuple[str, torch.dtype], list[Drawn]] = {}
    for dtype in dtypes:
        for make in (our_pipelines, their_pipelines):
            pipelines = make(checkpoint, dtype)
            for task in TASKS:
                drawn.setdefault((task, dtype), []).append(draw(pipelines, task, side, steps))
            del pipelines
            let_go()
    results, pictures = [], []
    for task, (solver, strength) in TASKS.items():
        measured = []
        for dtype in dtypes:
            (ours, theirs), exact = drawn[task, dtype], drawn[task, dtypes[0]][1]
            measured.append(_measured(task, name_of(dtype), ours, theirs, exact))
            pictures.append(_pictures(task, name_of(dtype), ours, theirs, exact))
        note = f"{solver}, {side} x {side}, {steps} steps, strength {strength}, guidance 5."
        shared = {"weights": "checkpoint", "left_out": left_out, "note": note, "unit": "step"}
        results.append(Result(name=task, measured=measured, **shared))
    return results, pictures


def why_not(checkpoint: Checkpoint) -> dict[str, str]:
    """The dtypes that a whole pipeline is not run in, each with the reason."""
    found = {"float16": SLOW} if checkpoint.is_slow else {}
    count = sum(checkpoint.parameters(name) for name in ("text_encoder", "unet", "vae"))
    if checkpoint.device.type == "cuda":
        memory = torch.cuda.mem_get_info()[0]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for dtype in DTYPES:
        if (needed := 1.3 * count * dtype.itemsize) > memory:  # 0.3: what the models work in
            gib = f"{needed / 2**30:.0f} GiB and there are {memory / 2**30:.0f}"
            found[name_of(dtype)] = f"a pipeline would take {gib}"
    return found


def _measured(task: str, dtype: str, ours: Drawn, theirs: Drawn, exact: Drawn) -> Measured:
    """One task in one dtype, its steps in place of modules."""
    steps = zip(ours.latents, theirs.latents, exact.latents, strict=True)
    layers = [Layer.of(f"step {i}", f"step {i}", *latents) for i, latents in enumerate(steps, 1)]
    last = ours.latents[-1], theirs.latents[-1], exact.latents[-1]
    pixels = (one.pixels for one in (ours, theirs, exact))
    errors = [error_of("latents", *last), error_of("picture", *pixels)]
    return Measured.of(task, dtype, PIPELINES[dtype], errors, layers)


def _pictures(task: str, dtype: str, ours: Drawn, theirs: Drawn, exact: Drawn) -> Pictures:
    return Pictures(
        task=task, dtype=dtype, psnr=psnr(ours.bytes, theirs.bytes),
        levels=int((ours.bytes - theirs.bytes).abs().max()),
        ours_from_float64=psnr(ours.bytes, exact.bytes),
        reference_from_float64=psnr(theirs.bytes, exact.bytes), ours=ours.bytes, reference=theirs.bytes,
    )  # fmt: skip


def psnr(one: Tensor, other: Tensor) -> float:
    """Peak signal to noise in dB, of 8 bits a channel; infinite for equal images."""
    error = (one - other).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf
