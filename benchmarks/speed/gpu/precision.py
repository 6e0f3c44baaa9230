"""Every pipeline in fp16 and in bfloat16 against float64, on the same weights and from the same noise."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import kolors_core as kc
from benchmarks.pairs import OneNoise, randomise
from benchmarks.speed.gpu.checks import Checks
from benchmarks.speed.gpu.place import PROMPT, SEED, Place, distance, our_pipeline
from kolors_core.adapters.controlnet import ControlNet, ControlNetConfig
from kolors_core.config import UNetConfig
from kolors_core.schedulers import EulerDiscreteScheduler

STEPS = 3
# Of the latents after the last step: what guidance of 5 makes of a half's rounding. The VAE is in float32
# beside fp16, so an image is off by what its latents are.
ALLOWED = {torch.float16: 2e-2, torch.bfloat16: 1e-1}


def precision(where: Place) -> None:
    """Write the row, after each pipeline."""
    checks = Checks(where, "precision", total=7 * len(where.checked))
    for size, (config, pixels) in where.checked.items():
        # Weights that all dtypes have, so that what differs is arithmetic alone.
        pipe = our_pipeline(where, config, torch.bfloat16, torch.bfloat16)
        net = make_net(config.unet, where.device)
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        for task, exact, given in tasks(pipe.to(torch.float64), net.double(), pixels):
            expected, cases = draw(exact, pixels, given), {}
            for dtype in ALLOWED:
                got = draw(deepcopy(exact).to(dtype), pixels, given)
                for what, one, other in zip(("latents", "image"), got, expected, strict=True):
                    case = {"error": distance(one, other), "allowed": ALLOWED[dtype]}
                    cases[f"{what}, {str(dtype).removeprefix('torch.')}"] = case
            checks.add(f"{task}, {size}", cases)


def make_net(config: UNetConfig, device: str) -> Any:
    """A ControlNet with random weights."""
    with torch.device("meta"):
        net = ControlNet(ControlNetConfig(**vars(config)))
    net = net.to(torch.bfloat16).to_empty(device=device).eval()
    randomise(net, SEED + 1)
    return net


def picture(pixels: int) -> Image.Image:
    """Colors that change slowly."""
    colors = torch.randint(0, 256, (5, 6, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Image.fromarray(colors.numpy()).resize((pixels, pixels), Image.Resampling.BICUBIC)


def tasks(pipe: Any, net: Any, pixels: int) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each pipeline's name, itself, and its arguments."""
    image = {"image": picture(pixels), "strength": 0.7}
    mask = Image.new("L", (pixels, pixels))
    mask.paste(255, (pixels // 4, pixels // 4, pixels * 3 // 4, pixels))
    hint = {"control_image": picture(pixels).transpose(Image.Transpose.ROTATE_180)}
    kinds: dict[type[Any], dict[str, Any]] = {
        kc.KolorsPipeline: {},
        kc.KolorsImg2ImgPipeline: image,
        kc.KolorsInpaintPipeline: image | {"mask_image": mask},
        kc.KolorsControlNetPipeline: {"image": hint["control_image"]},
        kc.KolorsControlNetImg2ImgPipeline: image | hint,
        kc.KolorsControlNetInpaintPipeline: image | hint | {"mask_image": mask},
        kc.KolorsPAGPipeline: {"pag_scale": 3.0},
    }
    for kind, given in kinds.items():
        changes = {"controlnet": net} if "ControlNet" in kind.__name__ else {}
        yield kind.__name__, kind.from_pipe(pipe, **changes), given


def draw(pipe: Any, pixels: int, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The latents after the last step, and the image."""
    latents = list[Tensor]()

    def keep(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(tensors["latents"].clone())
        return {}

    with OneNoise():
        image = pipe(
            PROMPT, height=pixels, width=pixels, num_inference_steps=STEPS, output_type="pt",
            generator=torch.Generator().manual_seed(0), callback_on_step_end=keep, **given,
        ).images  # fmt: skip
    return latents[-1], image
