"""Step cache: what hardly changes from one step to the next is not computed again. Approximate, and opt-in.

    interval, center     the UNet's deep part runs in some steps only: DeepCache, arxiv.org/abs/2312.00858
    threshold            or where the first level's output has changed: the first-block test of ParaAttention
    gate                 cross-attentions keep their output, guidance ends: T-GATE, arxiv.org/abs/2404.02747
    guidance_interval    guidance in a part of the run only: arxiv.org/abs/2404.07724
    guidance_similarity  guidance until its two halves agree: adaptive guidance, arxiv.org/abs/2312.12487

A UNet is cut at a skip connection, the `branch`. Its head leads from the latents down to that skip, the deep
part from there through the middle up to where the skip is read, the tail from there to the output. The models
know nothing of it: a guidance rule gets a `wrap_step` that runs the parts, and a `CachedRun` has the state.
Shapes: B images, R rows of the UNet, with guidance 2B, C channels, H height, W width (in latents).
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.conditioning import Conditioning
from kolors_core.context import KnownOutput
from kolors_core.guidance import GuidanceRule, Interval, check_interval, guided, interval_sigmas
from kolors_core.module import WrapStep, settings
from kolors_core.precompute import has_default_forward
from kolors_core.sampling import Denoiser
from kolors_core.schedule import Schedule
from kolors_core.unet import Contexts, DownBlock, ResBlock, Times, TimeShift, TransformerBlock, UNet, UpBlock
from kolors_core.validation import check_float, check_int

Result = tuple[Any, list[Tensor]]  # of a part of the UNet, and outputs of its cross-attentions if recorded
Units = list[tuple[Any, int | None]]  # (level, number of a ResBlock in it, None for its downsampling)


@dataclass(frozen=True, kw_only=True)
class StepCache:
    """Settings of a step cache; a run's steps are its evaluations of the model, numbered by noise level.

    interval: the UNet's deep part runs in every so many steps, and its last output is used in the others;
    None for all steps. branch: the skip connection that the UNet is cut at, 0 for conv_in's output; None for
    the last one of the first level. center: None, or the part of the run, 0 to 1, around which the same
    number of steps is dense, by `power`, 1 for evenly. threshold: in place of an interval, the mean absolute
    change of the branch's skip connection, relative to that of the last full step, from which the deep part
    runs again. gate: the part of the run, above 0, after which cross-attentions keep their output, averaged
    over the positive and negative rows, and guidance ends. guidance_interval: see
    `guidance.use_inside_interval`. guidance_similarity: guidance ends after the first step in which the
    cosine of both halves' noise is above this in every image. Raises ValueError naming the field.
    """

    interval: int | None = None
    branch: int | None = None
    center: float | None = None
    power: float = 1.4
    threshold: float | None = None
    gate: float | None = None
    guidance_interval: Interval | None = None
    guidance_similarity: float | None = None

    def __post_init__(self) -> None:
        bounds = {
            "center": (0, 1),
            "threshold": (0, math.inf),
            "gate": (0, 1),
            "guidance_similarity": (-1, 1),
        }
        for name, (least, most) in bounds.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_float(name, value, least, most))
        check_float("power", self.power, 1)
        for name, least in (("interval", 1), ("branch", 0)):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), least=least)
        if self.gate == 0:
            raise ValueError("gate must be above 0: the first step computes what is kept")
        if self.guidance_interval is not None:
            check_interval(self.guidance_interval)
        if self.interval is not None and self.threshold is not None:
            raise ValueError("interval and threshold are two ways to choose steps: one of them must be None")
        if self.center is not None and self.interval is None:
            raise ValueError("center needs an interval")
        if self.center is None and self.power != StepCache.power:
            raise ValueError("power needs a center")
        if self.branch is not None and self.interval is None and self.threshold is None:
            raise ValueError("branch needs an interval or a threshold")

    def describe(self) -> str:
        """Return the fields that differ from their defaults."""
        changed = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        return ", ".join(f"{name}={value!r}" for name, value, default in changed if value != default)

    def full_steps(self, steps: int) -> frozenset[int]:
        """Return the steps of a run in which the deep part runs in any case; all without an interval.

        With a center c, ceil(steps / interval) values are evenly spaced on the scale sign(i) |i|^(1/power)
        of i = step - c (section 3.3 of the paper), and those of one step are one.
        """
        if self.threshold is not None:
            return frozenset()
        if self.interval is None or self.center is None:
            return frozenset(range(0, steps, self.interval or 1))
        middle, count = self.center * steps, math.ceil(steps / self.interval)
        low, high = (_signed_power(end - middle, 1 / self.power) for end in (0, steps))
        spaced = (low + (high - low) * i / count for i in range(count))
        return frozenset(int(round(_signed_power(value, self.power) + middle, 9)) for value in spaced)

    def branch_of(self, unet: UNet) -> int:
        """Return the number of the skip connection to cut at; ValueError if the UNet has no such one."""
        if self.branch is None:
            return unet.config.resnets_per_level
        return check_int("branch", self.branch, least=0, most=len(unet.skip_channels) - 1)

    def wrap_rule(self, rule: GuidanceRule) -> GuidanceRule:
        """Return a guidance rule that computes another with this cache; its calls raise ValueError for what
        cannot be cached: a UNet that is not `check_unet`'s, or a rule that needs both halves and has one.
        """

        def cached(
            unet: UNet, schedule: Schedule, positive: Conditioning, negative: Conditioning | None = None,
            scale: float = 1.0, *, precompute: bool = True, wrap_step: WrapStep | None = None, **options: Any
        ) -> Denoiser:  # fmt: skip
            check_unet(unet, precompute)
            images, has_negative = len(positive.text_tokens), negative is not None and scale > 1
            run = CachedRun(self, schedule, images, has_negative, wrap_step)
            saved: dict[str, Any] = {"precompute": precompute, "wrap_step": run.wrap_step}
            inside = outside = rule(unet, schedule, positive, negative, scale, **saved, **options)
            run.check_rule(rule)
            if run.can_end_guidance:
                outside = guided(unet, schedule, positive, **saved)

            def denoise(x: Tensor, sigma: float) -> Tensor:
                return (inside if run.begin_step(sigma) else outside)(x, sigma)

            return denoise

        return cached


def _signed_power(value: float, power: float) -> float:
    return math.copysign(abs(value) ** power, value)


def check_unet(unet: Any, precompute: bool = True) -> None:
    """Raise ValueError for a UNet whose parts cannot be run one by one, naming the part."""
    if not precompute:
        raise ValueError("a step cache needs Savings.precompute")
    if not isinstance(unet, UNet) or not has_default_forward(unet, UNet):
        hint = "pipe.compile() compiles blocks"
        raise ValueError(f"a step cache needs UNet's own forward, no hooks, and not compiled whole: {hint}")
    for path, level in unet.named_modules():
        kind = next((kind for kind in (DownBlock, UpBlock) if isinstance(level, kind)), None)
        if kind is not None and not has_default_forward(cast(Any, level), cast(Any, kind)):
            raise ValueError(f"a step cache divides {path}, whose own forward and hooks would not be called")


class Path:
    """Path through a UNet in three parts, each with the arguments of a `module.WrapStep`'s step.

    constant: keys and values, or outputs, of all cross-attentions. shifts: [R, sum of all ResBlocks' C].
    """

    def __init__(self, unet: UNet, branch: int) -> None:
        self.unet, self.branch = unet, branch
        down, up = Units(), Units()
        for level in cast("Sequence[DownBlock]", unet.down):
            down += [(level, i) for i in range(len(level.resnets))]
            down += [] if level.downsample is None else [(level, None)]
        for level in cast("Sequence[UpBlock]", unet.up):
            up += [(level, i) for i in range(len(level.resnets))]
        self.down, self.up = (down[:branch], down[branch:]), (up[: -branch - 1], up[-branch - 1 :])
        modules = [*unet.modules()]
        self.widths = [block.time_proj.out_features for block in modules if isinstance(block, ResBlock)]
        blocks = sum(isinstance(module, TransformerBlock) for module in modules)
        before, after = _count(self.down[0]), _count(self.up[1])
        # ResBlocks and transformer blocks that run before each part.
        self.starts = (0, 0), before, (len(self.widths) - after[0], blocks - after[1])

    def head(self, constant: Sequence[Any], latents: Tensor, shifts: Tensor) -> list[Tensor]:
        """Map latents [b, ..., H, W] to the skip connections up to the branch's, of R rows."""
        x, copies = self.unet.conv_in(latents), len(shifts) // len(latents)
        skips = [x.repeat(copies, 1, 1, 1) if copies > 1 else x]  # [R, C, H, W]
        return _descend(self.down[0], skips, *self._inputs(constant, shifts, 0))

    def deep(self, constant: Sequence[Any], shifts: Tensor, skip: Tensor, *residuals: Tensor) -> Tensor:
        """Map the branch's skip connection to what the up path has where it reads that one.

        residuals: none, or those of the later skip connections and of the middle.
        """
        times, contexts = self._inputs(constant, shifts, 1)
        skips = _descend(self.down[1], [skip], times, contexts)
        x, skips = self.unet.mid(skips[-1], times, contexts), skips[1:]
        if residuals:
            *skips, x = map(torch.add, [*skips, x], residuals)
        return _ascend(self.up[0], x, [skip, *skips], times, contexts)

    def tail(self, constant: Sequence[Any], shifts: Tensor, x: Tensor, *inputs: Tensor) -> Tensor:
        """Map the deep part's output to the noise. inputs: skip connections, then none or their residuals."""
        skips, residuals = list(inputs[: self.branch + 1]), inputs[self.branch + 1 :]
        if residuals:
            skips = list(map(torch.add, skips, residuals))
        x = _ascend(self.up[1], x, skips, *self._inputs(constant, shifts, 2))
        return self.unet.conv_out(F.silu(self.unet.norm_out(x)))

    def _inputs(self, constant: Sequence[Any], shifts: Tensor, part: int) -> tuple[Times, Contexts]:
        """Return the time shifts and contexts from a part's first block on, in the order of execution."""
        times = map(TimeShift, shifts.split(self.widths, dim=-1))
        contexts = (KnownOutput(one) if isinstance(one, Tensor) else one for one in constant)
        resnets, blocks = self.starts[part]
        return islice(times, resnets, None), islice(contexts, blocks, None)


def _count(units: Units) -> tuple[int, int]:
    """Count ResBlocks and transformer blocks."""
    resnets = [(level, i) for level, i in units if i is not None]
    return len(resnets), sum(len(level.attentions[i].blocks) for level, i in resnets if level.attentions)


def _run(level: Any, i: int, x: Tensor, times: Times, contexts: Contexts) -> Tensor:
    """Run a ResBlock of a level, and its Transformer if it has one."""
    x = level.resnets[i](x, next(times))
    return level.attentions[i](x, contexts) if level.attentions else x


def _descend(units: Units, skips: list[Tensor], times: Times, contexts: Contexts) -> list[Tensor]:
    """Append a skip connection for each unit of the down path, as `DownBlock.forward`."""
    for level, i in units:
        x = skips[-1]
        skips = [*skips, level.downsample(x) if i is None else _run(level, i, x, times, contexts)]
    return skips


def _ascend(units: Units, x: Tensor, skips: list[Tensor], times: Times, contexts: Contexts) -> Tensor:
    """Run units of the up path, each on the last skip connection that is left, as `UpBlock.forward`."""
    for level, i in units:
        x = _run(level, cast(int, i), level.join(x, skips.pop()), times, contexts)
        if level.upsample is not None and i == len(level.resnets) - 1:
            x = level.upsample(F.interpolate(x, size=skips[-1].shape[-2:], mode="nearest"))
    return x


class UNetState:
    """Parameters of a UNet and its settings; equal where nothing was replaced, written to or set.

    Unlike `module.state_of` it stays the same while weights are offloaded and copied back.
    """

    def __init__(self, unet: UNet) -> None:
        self.parameters = list(unet.parameters())  # kept alive, so that no other has the identity of one
        self.key = [(id(parameter), parameter._version) for parameter in self.parameters], settings(unet)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UNetState) and self.key == other.key


class Kept(NamedTuple):
    """Tensors of the last full step, the denoiser that took it, and the state of the UNet."""

    owner: object
    skip: Tensor  # of the branch: [R, C, H, W]
    deep: Tensor  # [R, C', H, W]
    state: UNetState


class CachedRun:
    """State of a run: of one denoiser, or of two where guidance ends.

    images: B. has_negative: whether the rule's rows begin with B negative and B positive ones. inner: another
    way to run each part of a step, such as CUDA graphs.
    """

    def __init__(
        self, cache: StepCache, schedule: Schedule, images: int, has_negative: bool, inner: WrapStep | None
    ) -> None:
        self.cache, self.images, self.has_negative, self.inner = cache, images, has_negative, inner
        self.sigmas, self.guidance = schedule.sigmas.tolist()[:-1], (-math.inf, math.inf)
        self.full_steps = cache.full_steps(len(self.sigmas))
        self.gate = math.inf if cache.gate is None else max(1, round(cache.gate * len(self.sigmas)))
        if cache.guidance_interval is not None:
            self.guidance = interval_sigmas(cache.guidance_interval, schedule)
        options = (cache.gate, cache.guidance_interval, cache.guidance_similarity)
        self.can_end_guidance = any(option is not None for option in options)
        self.step, self.is_similar, self.rows = 0, False, 0  # rows: the most that a denoiser has
        self.kept: Kept | None = None
        self.outputs: list[Tensor] | None = None  # of all cross-attentions, [B, N, C] each
        self.recorded_state: UNetState | None = None

    def begin_step(self, sigma: float) -> bool:
        """Begin the step at a noise level; returns whether it has guidance."""
        self.step = max(sum(level >= sigma for level in self.sigmas), 1) - 1
        low, high = self.guidance
        is_gated = self.step >= self.gate and self.outputs is not None
        return low < sigma <= high and not self.is_similar and not is_gated

    def check_rule(self, rule: GuidanceRule) -> None:
        """Raise ValueError for a rule that uses no `wrap_step`, or has not the rows that the cache needs."""
        name = getattr(rule, "__qualname__", repr(rule))
        if not self.rows:
            raise ValueError(f"a step cache cannot reach the UNet: the rule {name} uses no wrap_step")
        needs_both = self.cache.gate is not None or self.cache.guidance_similarity is not None
        if needs_both and self.has_negative and self.rows < 2 * self.images:
            hint = "set neither gate nor guidance_similarity where guidance is split over processes"
            raise ValueError(f"the rule {name} has one half of the rows in this process: {hint}")

    def wrap_step(
        self, step: Callable[..., Any], constant: Any, nets: Sequence[nn.Module], key: Hashable = ()
    ) -> Callable[..., Any]:
        """Return a denoiser's step on the UNet in three parts; those of other networks stay whole."""
        if isinstance(nets[0], UNet):
            return CachedStep(self, nets[0], constant, key)
        return partial(step, constant) if self.inner is None else self.inner(step, constant, nets, key)

    def mode(self, state: UNetState) -> str:
        """Return how cross-attentions run in this step: "plain", "recorded", or "known"."""
        if self.step < self.gate - 1:
            return "plain"
        is_known = self.step >= self.gate and self.outputs is not None and self.recorded_state == state
        return "known" if is_known else "recorded"

    def record(self, outputs: Sequence[Tensor], state: UNetState) -> None:
        """Keep the outputs [R, N, C] of all cross-attentions, as means of negative and positive rows."""
        count = self.images

        def mean(rows: Tensor) -> Tensor:
            has_both = self.has_negative and len(rows) >= 2 * count
            return (rows[:count] + rows[count : 2 * count]) / 2 if has_both else rows[:count]

        self.outputs, self.recorded_state = list(map(mean, outputs)), state

    def compare_halves(self, noise: Tensor) -> None:
        """End guidance if the negative and positive rows of the noise [R, C, H, W] are similar enough."""
        limit, count = self.cache.guidance_similarity, self.images
        if limit is not None and self.has_negative and len(noise) >= 2 * count:
            rows = noise.to(torch.promote_types(noise.dtype, torch.float32)).flatten(1)
            cosines = F.cosine_similarity(rows[:count], rows[count : 2 * count])
            self.is_similar = bool((cosines > limit).all())


class CachedStep:
    """Step of one denoiser on the UNet: latents, time shifts and residuals -> noise."""

    def __init__(self, run: CachedRun, unet: UNet, keys_values: Any, key: Hashable) -> None:
        self.run, self.unet, self.keys_values, self.key = run, unet, keys_values, key
        self.path = Path(unet, run.cache.branch_of(unet))
        self.parts: dict[str, tuple[Any, list[Callable[..., Result]]]] = {}  # by mode, after their constant
        run.rows = max(run.rows, len(keys_values[0].k) if keys_values else 2 * run.images)

    def __call__(self, latents: Tensor, shifts: Tensor, *residuals: Tensor) -> Tensor:
        """Predict the noise; arguments as in `precompute.predict_precomputed`."""
        run, first, state = self.run, self.path.branch + 1, UNetState(self.unet)
        if residuals and len(residuals) != (expected := len(self.unet.skip_channels) + 1):
            raise ValueError(f"expected {expected} residuals, skips and mid, got {len(residuals)}")
        head, deep, tail = self._parts_of(mode := run.mode(state))
        skips, recorded = head(latents, shifts)
        if mode == "recorded" or (x := self._reusable(skips[-1], state)) is None:
            x, outputs = deep(shifts, skips[-1], *residuals[first:])
            recorded, run.kept = recorded + outputs, Kept(self, skips[-1], x, state)
        noise, outputs = tail(shifts, x, *skips, *residuals[:first])
        if mode == "recorded":
            run.record(recorded + outputs, state)
        run.compare_halves(noise)
        return noise

    def _reusable(self, skip: Tensor, state: UNetState) -> Tensor | None:
        """Return the last output of the deep part if it is to be used again."""
        kept, limit = self.run.kept, self.run.cache.threshold
        if kept is None or kept.owner is not self or self.run.step in self.run.full_steps:
            return None
        if limit is not None and not (skip - kept.skip).abs().mean() < limit * kept.skip.abs().mean():
            return None
        return kept.deep if kept.state == state else None

    def _parts_of(self, mode: str) -> list[Callable[..., Result]]:
        """Return head, deep part and tail as functions of what changes."""
        constant = self.run.outputs if mode == "known" else self.keys_values
        if mode not in self.parts or self.parts[mode][0] is not constant:
            parts, inner = [], self.run.inner
            for i, run in enumerate((self.path.head, self.path.deep, self.path.tail)):
                part, key = (
                    partial(_with_outputs, run, mode == "recorded"),
                    (self.key, self.path.branch, mode, i),
                )
                wrapped = (
                    partial(part, constant) if inner is None else inner(part, constant, [self.unet], key)
                )
                parts.append(wrapped)
            self.parts[mode] = constant, parts
        return self.parts[mode][1]


def _with_outputs(part: Callable[..., Any], is_recorded: bool, constant: Any, *changing: Tensor) -> Result:
    """Run a part; also return the outputs of its cross-attentions if they are recorded."""
    if not is_recorded:
        return part(constant, *changing), []
    constant = [keys_values._replace(outputs=[]) for keys_values in constant]
    return part(constant, *changing), [output for one in constant for output in one.outputs]
