"""How a UNet and ControlNets are run: whole in every step, or with what is the same in all computed once.

Shapes: B pictures, T width of the time embedding, C channels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kolors_core.adapters.controlnet import ControlNet, acting, summed
from kolors_core.adapters.ip_adapter import attached
from kolors_core.adapters.lora import state_of
from kolors_core.attention import forced_kernel
from kolors_core.conditioning import Conditioning
from kolors_core.context import ImagePrompt
from kolors_core.performance.cuda_graphs import Graphs
from kolors_core.schedule import Schedule
from kolors_core.unet import Encoder, ResBlock, Shift, UNet
from kolors_core.validation import path_of, whole_number


@dataclass(frozen=True, kw_only=True)
class Savings:
    """What a pipeline saves without changing its result; each can be switched off, to compare.

    collapse_pads: equal pads of a prompt are encoded and read as one that counts as many.
    read_once: see `guidance.guided`.
    cached_prompts: how many prompts, or lists of them, keep their embeddings in memory; 0 is none.
    prompt_folder: where they are kept as safetensors files too, for other processes and days; see
    kolors_core/performance/prompt_cache.py.
    """

    collapse_pads: bool = True
    read_once: bool = True
    cached_prompts: int = 32
    prompt_folder: str | Path | None = None

    def __post_init__(self) -> None:
        whole_number("cached_prompts", self.cached_prompts, least=0)
        if self.prompt_folder is not None:
            path_of("prompt_folder", self.prompt_folder)


class Prepared:
    """What a UNet or ControlNet makes, before the first step, of all that is known by then.

    reads: keys and values of each cross-attention, in the order in which they run.
    """

    def __init__(
        self,
        net: Encoder,
        schedule: Schedule,
        told: Conditioning,
        images: Sequence[ImagePrompt] = (),
        perturbed: Sequence[int] = (),
        added: Tensor | None = None,
    ) -> None:
        rows, where = net.context(told.text_tokens, told.text_counts, images).distinct()
        self.net, self.reads = net, [read.rows(where) for read in net.read(rows)]
        if perturbed:
            pairs = zip(self.reads, perturbed, strict=True)
            self.reads = [read._replace(perturbed=count) for read, count in pairs]
        self.condition = net.embed_condition(told.pooled_text, told.size_ids, added)  # [B, T]
        self.widths = [block.time_proj.out_features for block in net.modules() if isinstance(block, ResBlock)]
        timesteps = schedule.timesteps.tolist()
        self.known = dict(zip(timesteps, self._shifts(timesteps), strict=True))

    def shifts(self, timestep: float) -> Tensor:
        """What all blocks add at a timestep: [B, all blocks' C]."""
        return self.known[timestep] if timestep in self.known else self._shifts([timestep])[0]

    def _shifts(self, timesteps: list[float]) -> list[Tensor]:
        times = torch.tensor(timesteps, dtype=torch.float32, device=self.condition.device)
        every = self.net.shifts(self.net.embed_time(times)[:, None] + self.condition)  # each [n, B, C]
        return list(torch.cat([shift.added for shift in every], dim=-1))  # n of [B, all blocks' C]

    def split(self, shifts: Tensor) -> Iterator[Shift]:
        """One for each block."""
        return map(Shift, shifts.split(self.widths, dim=-1))


def is_as_written(net: Encoder) -> bool:
    """Whether the parts of a UNet's or ControlNet's `forward` may stand for calling the whole."""
    is_another = type(net).forward not in (UNet.forward, ControlNet.forward) or "forward" in vars(net)
    return not (is_another or net._compiled_call_impl or net._forward_hooks or net._forward_pre_hooks)


# (what conv_in reads [b, ...], timestep, indices of the controls that act) -> noise [B, ...]
Predict = Callable[[Tensor, float, tuple[int, ...]], Tensor]


def reading_always(unet: UNet, told: Conditioning, copies: int) -> Predict:
    """The UNet and ControlNets called as a whole; a forward of your own need know only what is set."""
    more: dict[str, Any] = {"perturbed": told.perturbed} if told.perturbed else {}
    more |= {} if told.added is None else {"added": told.added}

    def predict(latents: Tensor, timestep: float, active: tuple[int, ...]) -> Tensor:
        time = torch.tensor(timestep, dtype=torch.float32, device=latents.device)
        given = latents.repeat(copies, 1, 1, 1), time, told.text_tokens, told.pooled_text, told.size_ids
        controls = [told.controls[k] for k in active]
        residuals = summed((c.scale, c.net(*given, c.image, told.text_counts)) for c in controls)
        now = more | {"residuals": residuals} if residuals else more
        return unet(*given, told.text_counts, told.image_prompts, **now)

    return predict


def reading_once(
    unet: UNet, schedule: Schedule, told: Conditioning, copies: int, graphs: Graphs | None
) -> Predict:
    """The UNet and ControlNets without what is the same in every step."""
    main = Prepared(unet, schedule, told, told.image_prompts, told.perturbed, told.added)
    controls = told.controls
    nets = [Prepared(control.net, schedule, told) for control in controls]
    images = [control.net.image_embedding(control.image) for control in controls]
    constant = [main.reads, [net.reads for net in nets], images]

    def step(
        active: tuple[int, ...], constant: Any, latents: Tensor, shifts: Tensor, *shifts_of_nets: Tensor
    ) -> Tensor:
        reads, reads_of_nets, images = constant
        residuals = summed(
            (controls[k].scale,
             controls[k].net.residuals(latents, images[k], nets[k].split(own), reads_of_nets[k], copies))
            for k, own in zip(active, shifts_of_nets, strict=True)
        )  # fmt: skip
        return unet.denoise(latents, main.split(shifts), reads, copies, residuals)

    def runner(active: tuple[int, ...]) -> Callable[..., Tensor]:
        plain = partial(step, active, constant)
        if graphs is None or any(image.masks is not None for image in told.image_prompts):
            return plain
        scales = [branch.scale for handle in attached(unet) for branch in handle.branches.values()]
        states = [(state_of(control.net), control.scale) for control in controls]
        numbers = str((scales, told.perturbed, [level.freeu for level in unet.up], forced_kernel()))
        key = copies, state_of(unet), numbers, active, *states
        recorded = graphs.of_run(partial(step, active), key, constant)
        # A recorded step would call no hook, and hooks may come at any step.
        modules = [module for part in (main, *nets) for module in part.net.modules()]
        hooks = [own for module in modules for own in (module._forward_hooks, module._forward_pre_hooks)]
        return lambda *changing: (plain if any(hooks) else recorded)(*changing)

    runs = {active: runner(active) for active in acting(controls, len(schedule.timesteps))}

    def predict(latents: Tensor, timestep: float, active: tuple[int, ...]) -> Tensor:
        return runs[active](latents, main.shifts(timestep), *(nets[k].shifts(timestep) for k in active))

    return predict
