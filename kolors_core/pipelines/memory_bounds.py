"""Limits of memory that are checked in every call: microseconds, before anything is allocated.

memory_plan.py counts all that a call needs, in seconds.
"""

import torch
from torch import Tensor

from kolors_core.pipelines.base import Components
from kolors_core.pipelines.request import PipelineInputs
from kolors_core.validation import check_int

GIB = 2**30
LEAST_NEED = GIB  # below it, the available memory is not asked for


def check_room(pipe: Components, inputs: PipelineInputs, height: int | None, width: int | None) -> None:
    """Raise ValueError for a call whose images alone exceed the memory that is available.

    Counted are noise and the UNet's first feature map, and the decoded images: a call needs several times as
    much. height, width: None where they are an image's own, which is there already.
    """
    config = pipe.vae.config
    scale, channels = config.vae_scale_factor, config.latent_channels
    sides = {"height": height, "width": width}
    h, w = (scale if side is None else check_int(name, side, scale) for name, side in sides.items())
    copies = check_int("num_images_per_prompt", inputs.num_images_per_prompt)
    prompts = inputs.prompt if inputs.prompt_embeds is None else inputs.prompt_embeds
    count = copies * (len(prompts) if isinstance(prompts, list | tuple | Tensor) else 1)
    first = getattr(pipe.unet.config, "channels", (0,))[0]  # of another denoiser it is not known
    features = first * pipe.dtype.itemsize * (2 if inputs.is_guided else 1)
    need = count * (h // scale) * (w // scale) * (features + channels * torch.float32.itemsize)
    if inputs.output_type != "latent":
        need = max(need, 3 * count * h * w * pipe.vae.post_quant_conv.weight.itemsize)
    if need > LEAST_NEED and (have := pipe._available_memory()) is not None and need > have:
        what = f"{count:,} x {w}x{h} pixels at once take over {need / GIB:,.1f} GiB"
        got = f"{pipe.device} has {have / GIB:,.1f} GiB available"
        raise ValueError(f"{what}, and {got}: ask for fewer images in a call, or smaller ones")
