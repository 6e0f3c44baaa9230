"""Guidance: wraps the UNet and a schedule into `denoise(x, sigma) -> x0`, which is all that a sampler knows.

Shapes: B pictures, S text tokens; latents are [B, 4, H/8, W/8].
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from kolors_core.adapters.controlnet import acting
from kolors_core.conditioning import Conditioning, beside
from kolors_core.performance.cuda_graphs import Graphs
from kolors_core.precompute import is_as_written, reading_always, reading_once
from kolors_core.sampling import Denoise
from kolors_core.schedule import Schedule
from kolors_core.tempering import Interval, rescaling, within
from kolors_core.unet import UNet


def guided(
    unet: UNet,
    schedule: Schedule,
    positive: Conditioning,
    negative: Conditioning | None = None,
    scale: float = 1.0,
    *,
    rescale: float = 0.0,
    interval: Interval | None = None,
    read_once: bool = True,
    graphs: Graphs | None = None,
) -> Denoise:
    """Classifier-free guidance (https://arxiv.org/abs/2207.12598): eps = uncond + scale * (cond - uncond).

    Without a negative, with a scale of at most 1, or outside of the interval, the UNet runs on the positive
    alone. It sees x / sqrt(1 + sigma^2), and `extra` behind it, in its own dtype; x and x0 keep theirs.
    Controls add their residuals in the steps in which they act.

    rescale, interval: see kolors_core/tempering.py. read_once: compute what does not depend on x (text and
    pictures as keys and values, what each block makes of sizes and all steps' times) now and not in every
    step; the result is the same. graphs: record the step there as a CUDA graph, unless there are masks or,
    anywhere in it, hooks. A UNet or ControlNet that is compiled as a whole, hooked itself, or has another
    forward is called as a whole in every step, and nothing is recorded.
    """
    temper = rescaling(rescale)

    def combine(_timestep: float, noise: Tensor) -> Tensor:
        unconditional, conditional = noise.chunk(2)
        return temper(unconditional + scale * (conditional - unconditional), conditional)

    x0_of = partial(combined, unet, schedule, read_once=read_once, graphs=graphs)
    if negative is None or scale <= 1:
        return x0_of(positive)
    inside = x0_of(Conditioning.cat(negative, positive), 2, combine)
    return inside if interval is None else within(interval, schedule, inside, x0_of(positive))


def combined(
    unet: UNet,
    schedule: Schedule,
    told: Conditioning,
    copies: int = 1,
    combine: Callable[[float, Tensor], Tensor] = lambda _timestep, noise: noise,
    *,
    read_once: bool = True,
    graphs: Graphs | None = None,
) -> Denoise:
    """x0 = x - sigma * eps, with eps what `combine(timestep, noise)` makes of all rows' noise.

    told: conditions of B pictures, `copies` times. read_once, graphs: see `guided`.
    """
    dtype = unet.conv_in.weight.dtype
    extra = told.extra  # so that `denoise` keeps this alone, and not all of `told`, alive
    copies = copies if extra is None else 1  # with it, `beside` has made the copies
    if read_once and all(map(is_as_written, (unet, *(control.net for control in told.controls)))):
        predict = reading_once(unet, schedule, told, copies, graphs)
    else:
        predict = reading_always(unet, told, copies)
    sigmas = schedule.sigmas.tolist()
    known = dict(zip(sigmas, schedule.timesteps.tolist(), strict=False))  # numbers, for torch to trace a step
    controls_of_step = acting(told.controls, len(schedule.timesteps))

    def denoise(x: Tensor, sigma: float) -> Tensor:
        latents = beside((x / (sigma**2 + 1) ** 0.5).to(dtype), extra)
        timestep = known[sigma] if sigma in known else schedule.timestep(sigma)
        # The step in whose interval sigma lies; before the first it is the first, at the end the last.
        step = min(max(sum(level >= sigma for level in sigmas), 1), len(controls_of_step)) - 1
        noise = predict(latents, timestep, controls_of_step[step]).to(x.dtype)
        return x - sigma * combine(timestep, noise)

    return denoise
