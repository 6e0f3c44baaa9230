"""What a step cache gains and costs: `python -m benchmarks.speed.cache OUT [--data DATA] [--model tiny]`.

The embedded model draws the same prompts from the same noise, whole and with each setting of each mode of
kolors_core/performance/step_cache.py: 25 steps of DPM++ 2M Karras with guidance 5. Fewer whole steps are a
curve too. Saved is the share of rows of the UNet's middle block that were not computed. Errors are against
the whole run: of latents, |x - x*| / |x*|, and of images, PSNR; medians over the prompts. With DATA, a folder
as of `benchmarks.tiny.quality`, the detector counts prompts that are drawn right, those that a setting lost
and gained, and the change with its 95% interval. Modes that decide by themselves are run image by image, as a
batch decides as one. Times as fast are of one prompt to an image, in turns, and of the process' own time,
which other programs disturb less; the JSON files have wall time too. Writes cache.json, cache.md and
cache.png; the plot needs the `bench` extra.

    --recommended  the settings that are recommended alone, of more prompts: cache_recommended.json and .md
    --full-size    times of the full-size UNet's steps instead, random, bfloat16, 512x512: cache_step.json
    --smallest     three settings of two prompts, or small sizes: to see that it runs
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.pairs import randomise
from benchmarks.side_by_side import Contestant, Goal, Row, environment, race, write_json
from benchmarks.speed import arguments
from benchmarks.speed.unet_step import EMPTY, PROMPT, SCALE, SEED, embedding
from benchmarks.tiny.captions import Grammar
from benchmarks.tiny.detector import Detector
from benchmarks.tiny.emoji import read_concepts
from benchmarks.tiny.judge import Prompt, Verdict, judge, write_prompts
from benchmarks.tiny.quality import SHOWN, load_detector, summarize
from kolors_core.conditioning import Conditioning, size_ids
from kolors_core.config import KOLORS, TINY
from kolors_core.guidance import guided
from kolors_core.performance.step_cache import StepCache
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.schedulers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from kolors_core.unet import UNet

STEPS, GUIDANCE, BATCH = 25, 5.0, 25
WHOLE = "whole"
Settings = Mapping[str, Any]  # of `StepCache`, or "steps" of a whole run
CURVES: dict[str, Sequence[Settings]] = {
    "fewer steps": [{"steps": steps} for steps in (18, 12, 8, 6)],
    "interval": [{"interval": n} for n in (2, 3, 4, 5)],
    "interval, branch 0": [{"interval": n, "branch": 0} for n in (2, 3, 5)],
    "interval, branch 4": [{"interval": n, "branch": 4} for n in (2, 3)],
    "interval, center": [{"interval": n, "center": 0.3} for n in (2, 3)],
    "threshold": [{"threshold": change} for change in (0.1, 0.2, 0.4)],
    "gate": [{"gate": part} for part in (0.8, 0.5)],
    "guidance interval": [{"guidance_interval": (0.0, end)} for end in (0.8, 0.6, 0.4)],
    "guidance similarity": [{"guidance_similarity": limit} for limit in (0.999, 0.99)],
    "interval and guidance interval": [
        {"interval": n, "guidance_interval": (0.0, end)}
        for n, end in ((2, 0.6), (3, 0.8), (3, 0.6), (3, 0.4), (4, 0.6))
    ],
}  # fmt: skip
RECOMMENDED: Sequence[Settings] = [{"interval": n, "guidance_interval": (0.0, 0.6)} for n in (2, 3)]
DECIDING = {"threshold", "guidance_similarity"}  # settings whose steps depend on the images


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurements of one setting, see above; shares: of the prompts, what the detector found right."""

    curve: str
    settings: Settings
    prompts: int
    saved: float
    error: float
    psnr: float
    times_as_fast: float
    times_as_fast_by_the_clock: float
    shares: dict[str, float] = field(default_factory=dict)


def draw(
    pipe: KolorsPipeline, prompts: Sequence[str], settings: Settings, first: int = 0, **more: Any
) -> Any:
    """Draw a batch; image i has the seed first + i."""
    cache = {name: value for name, value in settings.items() if name != "steps"}
    pipe.step_cache = StepCache(**cache) if cache else None
    generators = [torch.Generator().manual_seed(first + i) for i in range(len(prompts))]
    steps = settings.get("steps", STEPS)
    return pipe(
        list(prompts), num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generators, **more
    ).images


def latents_of(pipe: KolorsPipeline, prompts: Sequence[str], settings: Settings) -> tuple[Tensor, int]:
    """Return all prompts' latents, and the rows of the middle block that were computed for them."""
    rows, parts = list[int](), list[Tensor]()
    counting = pipe.unet.mid.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    size = 1 if settings.keys() & DECIDING else BATCH
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        parts.append(draw(pipe, batch, settings, first, output_type="latent"))
    counting.remove()
    return torch.cat(parts), sum(rows)


def decode(pipe: KolorsPipeline, latents: Tensor) -> Tensor:
    """Decode latents to images [B, 3, H, W] in [-1, 1]."""
    return torch.cat([pipe.vae.decode_latents(part).clamp(-1, 1) for part in latents.split(BATCH)])


def errors(x: Tensor, exact: Tensor) -> Tensor:
    """Return each row's |x - x*| / |x*|."""
    return (x - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)


def psnr(images: Tensor, exact: Tensor) -> Tensor:
    """Return each image's PSNR in dB; images in [-1, 1]."""
    return 10 * torch.log10(4 / (images - exact).square().flatten(1).mean(1).clamp(min=1e-12))


def judged(detector: Detector, prompts: Sequence[Prompt], images: Tensor) -> list[Verdict]:
    """Judge the images of prompts."""
    found = [one for part in images.split(BATCH) for one in detector.detect(part)]
    return [judge(prompt, each) for prompt, each in zip(prompts, found, strict=True)]


def compare(verdicts: Sequence[Verdict], whole: Sequence[Verdict]) -> dict[str, float]:
    """Count what is right: the shares of `quality.summarize`, and of prompts that were lost and gained."""
    shares = {name: row["share"] for name, row in summarize(verdicts).items()}
    found = {name: share for name, share in shares.items() if isinstance(share, float)}
    changes = [now.is_right - was.is_right for now, was in zip(verdicts, whole, strict=True)]
    lost, gained, count = changes.count(-1), changes.count(1), len(changes)
    change = (gained - lost) / count
    within = 1.96 * (((lost + gained) / count - change**2) / count) ** 0.5  # of pairs, as of McNemar's test
    return found | {"lost": lost / count, "gained": gained / count, "change": change, "within": within}


def clocked(run: Callable[[], object]) -> Contestant:
    """A contestant that measures the seconds of one call, by the clock and of this process' own time."""

    def measure() -> dict[str, float]:
        own, start = time.process_time(), time.perf_counter()
        run()
        return {"seconds": time.perf_counter() - start, "own_seconds": time.process_time() - own}

    return measure


def measure(
    pipe: KolorsPipeline, curves: Mapping[str, Sequence[Settings]], texts: Sequence[str],
    see: Callable[[Tensor], list[Verdict]] | None, rounds: int,
) -> Iterator[Measured]:  # fmt: skip
    """Measure settings one after another, the whole run first. see: judges images of the texts."""
    exact, all_rows = latents_of(pipe, texts, {})
    exact_images = decode(pipe, exact)
    verdicts = [] if see is None else see(exact_images)
    listed = [(WHOLE, dict[str, Any]())] + [(curve, one) for curve in curves for one in curves[curve]]
    for curve, settings in listed:
        x, rows = latents_of(pipe, texts, settings) if settings else (exact, all_rows)
        images = decode(pipe, x)
        shares = {} if see is None else compare(see(images), verdicts)
        runs = {WHOLE: {}, "set": settings}
        result = race(
            {name: clocked(partial(draw, pipe, texts[:1], one)) for name, one in runs.items()}, rounds
        )
        yield Measured(
            curve=curve, settings=settings, prompts=len(texts), saved=1 - rows / all_rows,
            error=errors(x, exact).median().item(), psnr=psnr(images, exact_images).median().item(),
            times_as_fast=result.ratio(WHOLE, "set", "own_seconds"),
            times_as_fast_by_the_clock=result.ratio(WHOLE, "set"), shares=shares,
        )  # fmt: skip


COLUMNS = ("present", "number", "claims", "characters", "right", "lost", "gained", "change")


def name_of(settings: Settings) -> str:
    """Return settings as the arguments of a call."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def row_of(one: Measured) -> str:
    """Return a setting as a row of the table."""
    cells = [
        one.curve, name_of(one.settings), f"{one.saved:.0%}", f"{one.times_as_fast:.2f}", f"{one.error:.3f}",
        "" if one.curve == WHOLE else f"{one.psnr:.1f}",
    ]  # fmt: skip
    if one.shares:
        shares = one.shares | {"right": one.shares["all"]}
        cells += [*(f"{shares[column]:.1%}" for column in COLUMNS), f"± {shares['within']:.1%}"]
    return f"| {' | '.join(cells)} |"


def write_table(found: Sequence[Measured], model: str, file: Path) -> None:
    """Write all settings as a table."""
    shown = [*COLUMNS, "95%"] if found[0].shares else []
    head = ["curve", "settings", "saved", "times as fast", "error of latents", "PSNR, dB", *shown]
    lines = [
        f"# Step caches on {model}", "",
        f"{found[0].prompts} prompts, 25 steps, guidance 5, {torch.get_num_threads()} threads.",
        "`python -m benchmarks.speed.cache OUT` writes this; its `--help` says what the columns are.", "",
        f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *map(row_of, found),
    ]  # fmt: skip
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot(found: Sequence[Measured], pyplot: Any, file: Path) -> None:
    """Draw a curve for each mode: PSNR, prompts that are right, and time, by the share that is saved."""
    panels = {"PSNR of the image, dB": lambda one: one.psnr, "times as fast": lambda one: one.times_as_fast}
    if found[0].shares:
        panels["prompts drawn right"] = lambda one: one.shares["all"]
    figure, all_axes = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.5), layout="constrained")
    for axes, (title, value) in zip(all_axes, panels.items(), strict=True):
        for i, curve in enumerate(dict.fromkeys(one.curve for one in found[1:])):
            points = sorted((one.saved, value(one)) for one in found if one.curve == curve)
            axes.plot(*zip(*points, strict=True), "os^vDP*Xdp"[i % 10] + "-", label=curve, markersize=5)
        if not title.startswith("PSNR"):
            axes.axhline(value(found[0]), color="grey", linewidth=1, linestyle=":")
        axes.set(xlabel="share of the middle block's rows that is saved", title=title)
        axes.grid(alpha=0.3)
    all_axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


def step_contestants(is_small: bool) -> dict[str, Callable[[], Tensor]]:
    """Return steps of a UNet with random weights: whole, and with the deep part of an earlier step."""
    config, pixels = (TINY.unet, 128) if is_small else (KOLORS.unet, 512)
    with torch.device("meta"):
        unet = UNet(config)
    unet = unet.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    randomise(unet, SEED)
    both = [embedding(tokens, config, torch.bfloat16) for tokens in (PROMPT, EMPTY)]
    sizes = size_ids((pixels, pixels), (0, 0), (pixels, pixels))
    positive, negative = (Conditioning(text.tokens, text.pooled, sizes, text.counts) for text in both)
    schedule = EulerDiscreteScheduler().schedule(STEPS)
    sigmas = schedule.sigmas.tolist()
    shape = (1, config.in_channels, pixels // 8, pixels // 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)) * (1 + sigmas[12] ** 2) ** 0.5

    def step(i: int, settings: Settings, is_guided: bool = True) -> Callable[[], Tensor]:
        rule = StepCache(**settings).wrap_rule(guided) if settings else guided
        denoise = rule(unet, schedule, positive, negative if is_guided else None, SCALE)
        if i % 3:
            denoise(x, sigmas[12])
        return lambda: denoise(x, sigmas[i])

    return {
        WHOLE: step(12, {}), "cached, whole": step(12, {"interval": 3}),
        "deep part reused": step(13, {"interval": 3}),
        "deep part reused, branch 0": step(13, {"interval": 3, "branch": 0}),
        "no guidance": step(12, {}, is_guided=False),
        "no guidance, deep part reused": step(13, {"interval": 3}, is_guided=False),
    }  # fmt: skip


def measure_steps(out: Path, rounds: int, is_small: bool) -> None:
    """Measure steps of the full-size UNet, and write cache_step.json."""
    with torch.no_grad():
        result = race({name: clocked(run) for name, run in step_contestants(is_small).items()}, rounds)
    fulls = len(StepCache(interval=3).full_steps(STEPS))

    def times_as_fast(reused: str, quantity: str) -> float:
        median = partial(result.median, quantity=quantity)
        return STEPS * median(WHOLE) / (fulls * median("cached, whole") + (STEPS - fulls) * median(reused))

    value = times_as_fast("deep part reused", "own_seconds")
    Row(
        name="cache_step", work="25 steps with interval 3, full size, bfloat16, 512x512", value=value,
        goal=Goal(limit=2.0, unit="times as fast as whole steps", at_least=True, is_ratio=False),
        is_rehearsal=is_small, race=result, note=f"{fulls} of {STEPS} steps are whole; of the process' time",
        details={
            "by_the_clock": times_as_fast("deep part reused", "seconds"),
            "branch_0": times_as_fast("deep part reused, branch 0", "own_seconds"),
        },
    ).write(out)  # fmt: skip


@torch.no_grad()
def measure_model(options: argparse.Namespace) -> None:
    """Measure a model's settings and write the three files."""
    from matplotlib import pyplot  # what the plot needs is found missing before the work, not after

    pipe = KolorsPipeline.from_pretrained(options.model)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    pipe.set_progress_bar_config(disable=True)
    see, curves, count, name = None, CURVES, options.prompts, "cache"
    if options.recommended:
        curves, name = {"recommended": RECOMMENDED}, "cache_recommended"
    if options.smallest:
        curves, count = {name: CURVES[name][:1] for name in ("interval", "threshold", "gate")}, 1
    if options.data is None:
        texts = SHOWN[: 2 * count]
    else:
        grammar = Grammar(read_concepts(options.data / "package"))
        prompts = [prompt for language in (0, 1) for prompt in write_prompts(grammar, count, language)]
        texts = [prompt.text for prompt in prompts]
        see = partial(judged, load_detector(options.data / "detector", pipe.device), prompts)
    found, about = list[Measured](), environment()
    for one in measure(pipe, curves, texts, see, options.rounds):
        found.append(one)
        print(row_of(one), flush=True)
        write_json(
            {"environment": about, "settings": [asdict(each) for each in found]},
            options.out / f"{name}.json",
        )
        write_table(found, options.model, options.out / f"{name}.md")
    if not options.recommended:
        plot(found, pyplot, options.out / "cache.png")


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--data", type=Path, help="folder of the embedded model's recipe, for the detector")
    parser.add_argument("--model", default="tiny", help="a checkpoint folder (default: the embedded model)")
    parser.add_argument("--prompts", type=int, default=100, help="of each language (default: 100)")
    parser.add_argument("--recommended", action="store_true", help="measure the recommended settings alone")
    parser.add_argument("--full-size", action="store_true", help="measure the full-size UNet's steps instead")
    parser.add_argument("--smallest", action="store_true", help="see that it runs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.full_size:
        measure_steps(options.out, options.rounds, options.smallest)
    else:
        measure_model(options)


if __name__ == "__main__":
    main()
