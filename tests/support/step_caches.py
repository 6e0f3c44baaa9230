"""Step caches written out: a run in plain loops over the UNet's blocks, and a change of an exact pipeline."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_core.conditioning import Conditioning
from kolors_core.sampling import Denoiser, dpmpp_2m
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.unet import TransformerBlock, UNet
from tests.support.small import EXACT, relative_error

STEPS, SCALE, SKIPS = 6, 5.0, 9
SCHEDULE = EulerDiscreteScheduler().schedule(STEPS)
Blocks = dict[TransformerBlock, Tensor]
Parts = Generator[Any, Tensor | None, None]


@contextmanager
def crossing(unet: UNet, given: Blocks | None, taken: Blocks) -> Iterator[None]:
    """Within it cross-attentions return what is given, if anything, and what they return is taken."""
    blocks = [module for module in unet.modules() if isinstance(module, TransformerBlock)]

    def forward(block: TransformerBlock, plain: Callable[..., Tensor], x: Tensor, context: Any) -> Tensor:
        taken[block] = plain(x, context) if given is None else given[block]
        return taken[block]

    for block in blocks:
        vars(block.cross_attention)["forward"] = partial(forward, block, block.cross_attention.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.cross_attention.forward


def parts(unet: UNet, x: Tensor, timestep: float, told: Conditioning, branch: int) -> Parts:
    """The UNet written out: yields the branch's skip connection, is sent the deep part's output or None to
    compute it, yields that output and the noise.
    """
    time = unet.embed_time(torch.tensor([timestep])) + unet.added_embedding(told.pooled_text, told.size_ids)
    context, skips, deep = unet.context(told.text_tokens, None), [unet.conv_in(x)], None

    def run(level: Any, i: int, x: Tensor) -> Tensor:
        x = level.resnets[i](x, time)
        return level.attentions[i](x, iter([context] * 9)) if level.attentions else x

    def down(number: int) -> Tensor:
        """Skip connection `number`, 1 to 8: two of ResBlocks and one of a convolution at each level."""
        level: Any = unet.down[(number - 1) // 3]
        return level.downsample(skips[-1]) if number % 3 == 0 else run(level, (number - 1) % 3, skips[-1])

    for number in range(1, branch + 1):
        skips.append(down(number))
    if (deep := (yield skips[-1])) is None:
        for number in range(branch + 1, SKIPS):
            skips.append(down(number))
        x = unet.mid(skips[-1], iter([time] * 2), iter([context] * 9))
    for number in reversed(range(SKIPS)):
        level: Any = unet.up[2 - number // 3]
        if number == branch:
            deep = x = x if deep is None else deep
        if number <= branch or len(skips) > branch + 1:
            x = run(level, 2 - number % 3, torch.cat([x, skips.pop()], 1))
            if level.upsample is not None and number % 3 == 0:
                x = level.upsample(F.interpolate(x, size=skips[-1].shape[-2:]))
    yield deep, unet.conv_out(F.silu(unet.norm_out(x)))


def assert_same_run(denoise: Denoiser, expected: Denoiser, x: Tensor) -> None:
    """Compare the latents after each step of DPM++ 2M, from noise x."""
    seen: list[list[Tensor]] = []
    for one in (denoise, expected):
        seen.append([])
        dpmpp_2m(one, x * SCHEDULE.init_noise_sigma, SCHEDULE.sigmas, lambda _, x: seen[-1].append(x) or x)
    assert len(seen[0]) == STEPS
    for i, (a, b) in enumerate(zip(*seen, strict=True)):
        assert relative_error(a, b) < EXACT, f"step {i}"


class WrittenOut:
    """A run of some denoiser in plain loops, and what it did.

    is_full: (step, the branch's skip connection, that of the last whole step) -> whether all runs. is_guided:
    (step, the cosines of the last step) -> whether there is guidance. gate: from this step on none, and
    cross-attentions return the mean of the step before.
    """

    def __init__(
        self, unet: UNet, told: tuple[Conditioning, Conditioning, Tensor], branch: int = 2, *,
        is_full: Callable[[int, Tensor, Tensor], bool] = lambda *_: True,
        is_guided: Callable[[int, Tensor], bool] = lambda *_: True, gate: int = 99, scale: float = SCALE,
    ) -> None:  # fmt: skip
        self.unet, (self.positive, self.negative, _), self.branch, self.scale = unet, told, branch, scale
        self.is_full, self.is_guided, self.gate, self.fulls = is_full, is_guided, gate, list[int]()
        self.kept: tuple[Tensor, Tensor] | None = None
        self.crossed, self.cosines, self.guided_steps = Blocks(), torch.zeros(2), list[int]()

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        step = SCHEDULE.sigmas.tolist().index(sigma)
        has_guidance = step < self.gate and self.scale > 1 and self.is_guided(step, self.cosines)
        both = Conditioning.cat(self.negative, self.positive) if has_guidance else self.positive
        latents = torch.cat([x] * (1 + has_guidance)) / (sigma**2 + 1) ** 0.5
        taken = Blocks()
        with crossing(self.unet, self.crossed if step >= self.gate else None, taken):
            noise = self.noise(step, latents, both)
        if step == self.gate - 1:
            halves = {block: out.chunk(1 + has_guidance) for block, out in taken.items()}
            self.crossed = {block: (half[0] + half[-1]) / 2 for block, half in halves.items()}
        if not has_guidance:
            return x - sigma * noise
        self.guided_steps.append(step)
        negative, positive = noise.chunk(2)
        self.cosines = torch.cosine_similarity(negative.flatten(1), positive.flatten(1))
        return x - sigma * (negative + self.scale * (positive - negative))

    def noise(self, step: int, latents: Tensor, told: Conditioning) -> Tensor:
        run = parts(self.unet, latents, SCHEDULE.timesteps[step].item(), told, self.branch)
        skip, deep = next(run), None
        if self.kept is not None and len(self.kept[0]) == len(latents) and step != self.gate - 1:
            deep = None if self.is_full(step, skip, self.kept[0]) else self.kept[1]
        if deep is None:
            self.fulls.append(step)
        after, noise = run.send(deep)
        self.kept = self.kept if deep is not None and self.kept else (skip, after)
        return noise


@contextmanager
def rereading(unet: UNet, is_full: Callable[[int], bool], branch: int = 2) -> Iterator[list[int]]:
    """Within it the up path has, where it reads the branch's skip connection, what it had in a full step.

    Every step computes all; yields the number of steps so far.
    """
    unit = SKIPS - 1 - branch
    level: Any = unet.up[unit // 3]
    calls, steps, kept = [0], [0], list[Tensor]()

    def join(x: Tensor, skip: Tensor) -> Tensor:
        if calls[0] % 3 == unit % 3:
            kept[:] = [x] if is_full(steps[0]) else kept
            x, steps[0] = kept[0], steps[0] + 1
        calls[0] += 1
        return type(level).join(level, x, skip)

    level.join = join
    try:
        yield steps
    finally:
        del level.join
