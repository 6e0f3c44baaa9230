"""Step cache: what hardly changes from one step to the next is not computed again. Approximate, and opt-in.

    interval, center     the UNet's deep part runs in some steps only: DeepCache, arxiv.org/abs/2312.00858
    threshold            or where the first level's output has changed: the first-block test of ParaAttention
    gate                 cross-attentions keep their output, guidance ends: T-GATE, arxiv.org/abs/2404.02747
    guidance_interval    guidance in a part of the run only: arxiv.org/abs/2404.07724
    guidance_similarity  guidance until its two halves agree: adaptive guidance, arxiv.org/abs/2312.12487

A UNet is cut at a skip connection, the `branch`. Its head leads from the latents down to that skip, the deep
part from there through the middle up to where the skip is read, the tail from there to the output. A guidance
rule gets a `wrap_step` that runs the parts; a `CachedRun` has the state of one run, none is in the models.
Shapes: B images, R rows of the UNet, with guidance 2B, C channels, H height, W width (in latents).
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.conditioning import Conditioning
from kolors_core.context import KnownOutput
from kolors_core.denoiser import require_unet
from kolors_core.guidance import GuidanceRule, Interval, check_interval, guided, interval_sigmas
from kolors_core.module import WrapStep
from kolors_core.performance.model_version import ModelVersion
from kolors_core.precompute import has_default_forward
from kolors_core.sampling import Denoiser
from kolors_core.schedule import Schedule
from kolors_core.unet import Contexts, DownBlock, ResBlock, Times, TimeShift, TransformerBlock, UNet, UpBlock
from kolors_core.validation import check_float, check_int

Mode = Literal["compute", "record", "known"]  # of cross-attentions, see `CachedRun.mode`
Result = tuple[Any, list[Tensor]]  # of a part of the UNet, and outputs of its cross-attentions if recorded
Units = list[tuple[Any, int | None]]  # (level, number of a ResBlock in it, None for its downsampling)
SWITCHES = ("interval", "threshold", "gate", "guidance_interval", "guidance_similarity")


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
            "center": (0, 1), "threshold": (0, math.inf), "gate": (0, 1), "guidance_similarity": (-1, 1)
        }  # fmt: skip
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
        if all(getattr(self, name) is None for name in SWITCHES):
            raise ValueError(f"a step cache needs {', '.join(SWITCHES[:-1])} or {SWITCHES[-1]}, got none")

    def describe(self) -> str:
        """Return the arguments of `enable_step_cache`: the interval, and others than the defaults."""
        changed = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        named = (each for each in changed if each[0] == "interval" or each[1] != each[2])
        return ", ".join(f"{name}={value!r}" for name, value, _ in named)

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
        require_unet(unet, "a step cache")
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
            run = CachedRun(self, unet, schedule, images, has_negative, wrap_step)
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
    require_unet(unet, "a step cache")
    own = ("encode", "forward_precomputed")  # besides forward, what `UNetParts` does in their place
    is_plain = isinstance(unet, UNet) and has_default_forward(unet, UNet)
    if not is_plain or any(getattr(type(unet), name) is not getattr(UNet, name) for name in own):
        hint = "pipe.compile() compiles blocks"
        raise ValueError(f"a step cache needs UNet's own forward, no hooks, and not compiled whole: {hint}")
    for path, level in unet.named_modules():
        kind = next((kind for kind in (DownBlock, UpBlock) if isinstance(level, kind)), None)
        if kind is not None and not has_default_forward(level, kind):
            raise ValueError(f"a step cache divides {path}, whose own forward and hooks would not be called")


class UNetParts:
    """UNet cut at a skip connection, the `branch`: its head, deep part and tail, numbered 0, 1, 2.

    Together they are `UNet.forward_precomputed`. Each takes the contexts of its own cross-attentions, in the
    order of execution, and the time shifts of all ResBlocks: [R, sum of their C].
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
        in_head, in_tail = _count(self.down[0]), _count(self.up[1])
        self.first_resnets = 0, in_head[0], len(self.widths) - in_tail[0]
        ends = 0, in_head[1], blocks - in_tail[1], blocks
        self.blocks = [slice(start, end) for start, end in pairwise(ends)]  # TransformerBlocks of each part

    def head(self, contexts: Iterable[Any], latents: Tensor, shifts: Tensor) -> list[Tensor]:
        """Map latents [b, ..., H, W] to the skip connections up to the branch's, of R rows."""
        x, copies = self.unet.conv_in(latents), len(shifts) // len(latents)
        skips = [x.repeat(copies, 1, 1, 1) if copies > 1 else x]  # [R, C, H, W]
        return _descend(self.down[0], skips, self._times(shifts, 0), iter(contexts))

    def deep(self, contexts: Iterable[Any], shifts: Tensor, skip: Tensor, *residuals: Tensor) -> Tensor:
        """Map the branch's skip connection to what the up path has where it reads that one.

        residuals: none, or those of the later skip connections and of the middle.
        """
        times, contexts = self._times(shifts, 1), iter(contexts)
        skips = _descend(self.down[1], [skip], times, contexts)
        x, skips = self.unet.mid(skips[-1], times, contexts), skips[1:]
        if residuals:
            *skips, x = map(torch.add, [*skips, x], residuals)
        return _ascend(self.up[0], x, [skip, *skips], times, contexts)

    def tail(self, contexts: Iterable[Any], shifts: Tensor, x: Tensor, *inputs: Tensor) -> Tensor:
        """Map the deep part's output to the noise. inputs: skip connections, then none or their residuals."""
        skips, residuals = list(inputs[: self.branch + 1]), inputs[self.branch + 1 :]
        if residuals:
            skips = list(map(torch.add, skips, residuals))
        x = _ascend(self.up[1], x, skips, self._times(shifts, 2), iter(contexts))
        return self.unet.conv_out(F.silu(self.unet.norm_out(x)))

    def _times(self, shifts: Tensor, part: int) -> Times:
        """Return the time shifts from a part's first ResBlock on."""
        return map(TimeShift, shifts.split(self.widths, dim=-1)[self.first_resnets[part] :])


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


class Kept(NamedTuple):
    """Tensors of the last full step, the denoiser that took it, and the UNet's version."""

    owner: object
    skip: Tensor  # of the branch: [R, C, H, W]
    deep: Tensor  # [R, C', H, W]
    version: int


class CachedRun:
    """State of a run: of one denoiser, or of two where guidance ends.

    images: B. has_negative: whether the rule's rows begin with B negative and B positive ones. inner: another
    way to run each part of a step, such as CUDA graphs.
    """

    def __init__(
        self, cache: StepCache, unet: UNet, schedule: Schedule, images: int, has_negative: bool,
        inner: WrapStep | None,
    ) -> None:  # fmt: skip
        self.cache, self.images, self.has_negative, self.inner = cache, images, has_negative, inner
        self.parts, self.version = UNetParts(unet, cache.branch_of(unet)), ModelVersion(unet)
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
        self.version_of_outputs = 0

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
        if nets[0] is self.parts.unet:
            return CachedStep(self, constant, key)
        return partial(step, constant) if self.inner is None else self.inner(step, constant, nets, key)

    def mode(self, version: int) -> Mode:
        """Return what cross-attentions do in this step: compute, and have their output kept, or return it."""
        if self.step < self.gate - 1:
            return "compute"
        is_known = self.step >= self.gate and self.outputs is not None and self.version_of_outputs == version
        return "known" if is_known else "record"

    def record(self, outputs: Sequence[Tensor], version: int) -> None:
        """Keep the outputs [R, N, C] of all cross-attentions, as means of negative and positive rows."""
        count = self.images

        def mean(rows: Tensor) -> Tensor:
            has_both = self.has_negative and len(rows) >= 2 * count
            return (rows[:count] + rows[count : 2 * count]) / 2 if has_both else rows[:count]

        self.outputs, self.version_of_outputs = list(map(mean, outputs)), version

    def compare_halves(self, noise: Tensor) -> None:
        """End guidance if the negative and positive rows of the noise [R, C, H, W] are similar enough."""
        limit, count = self.cache.guidance_similarity, self.images
        if limit is not None and self.has_negative and len(noise) >= 2 * count:
            rows = noise.to(torch.promote_types(noise.dtype, torch.float32)).flatten(1)
            cosines = F.cosine_similarity(rows[:count], rows[count : 2 * count])
            self.is_similar = bool((cosines > limit).all())


class CachedStep:
    """Step of one denoiser on the UNet: latents, time shifts and residuals -> noise."""

    def __init__(self, run: CachedRun, keys_values: Any, key: Hashable) -> None:
        self.run, self.keys_values, self.key = run, keys_values, key
        self.functions: dict[str, tuple[Any, list[Callable[..., Result]]]] = {}  # by mode, after the contexts
        run.rows = max(run.rows, len(keys_values[0].k) if keys_values else 2 * run.images)

    def __call__(self, latents: Tensor, shifts: Tensor, *residuals: Tensor) -> Tensor:
        """Predict the noise; arguments as in `precompute.predict_precomputed`."""
        run, first, version = self.run, self.run.parts.branch + 1, self.run.version.read()
        if residuals and len(residuals) != (expected := len(run.parts.unet.skip_channels) + 1):
            raise ValueError(f"expected {expected} residuals, skips and mid, got {len(residuals)}")
        mode = run.mode(version)
        head, deep, tail = self._functions_of(mode)
        skips, outputs = head(latents, shifts)
        x = None if mode == "record" else self._reusable(skips[-1], version)
        if x is None:
            x, more = deep(shifts, skips[-1], *residuals[first:])
            outputs, run.kept = outputs + more, Kept(self, skips[-1], x, version)
        noise, more = tail(shifts, x, *skips, *residuals[:first])
        if mode == "record":
            run.record(outputs + more, version)
        run.compare_halves(noise)
        return noise

    def _reusable(self, skip: Tensor, version: int) -> Tensor | None:
        """Return the last output of the deep part if it is to be used again."""
        kept, limit = self.run.kept, self.run.cache.threshold
        if kept is None or kept.owner is not self or kept.version != version:
            return None
        if limit is None:
            return None if self.run.step in self.run.full_steps else kept.deep
        is_near = (skip - kept.skip).abs().mean() < limit * kept.skip.abs().mean()
        return kept.deep if is_near else None

    def _functions_of(self, mode: Mode) -> list[Callable[..., Result]]:
        """Return head, deep part and tail as functions of what changes from step to step."""
        run, parts = self.run, self.run.parts
        contexts: Any = run.outputs if mode == "known" else self.keys_values
        if mode not in self.functions or self.functions[mode][0] is not contexts:
            functions = list[Callable[..., Result]]()
            for part, blocks in zip((parts.head, parts.deep, parts.tail), parts.blocks, strict=True):
                function, own = partial(_with_outputs, part, mode), contexts[blocks]
                if run.inner is None or mode == "record":  # once a run: recording a graph takes longer
                    functions.append(partial(function, own))
                else:
                    key = (self.key, parts.branch, mode, part.__name__)
                    functions.append(run.inner(function, own, [parts.unet], key))
            self.functions[mode] = contexts, functions
        return self.functions[mode][1]


def _with_outputs(part: Callable[..., Any], mode: Mode, constant: Sequence[Any], *changing: Tensor) -> Result:
    """Run a part; also return the outputs of its cross-attentions if they are recorded.

    constant: the keys and values of its cross-attentions, or their known outputs.
    """
    if mode != "record":
        return part(map(KnownOutput, constant) if mode == "known" else constant, *changing), []
    contexts = [keys_values._replace(outputs=[]) for keys_values in constant]
    return part(contexts, *changing), [output for context in contexts for output in context.outputs]
