"""What was measured, as Markdown, JSON and images side by side."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.parity.checkpoint import Checkpoint
from benchmarks.parity.measure import DTYPES, FLOAT32, TOLERANCES, Measured, Result, name_of
from benchmarks.parity.pipelines import Pictures
from benchmarks.side_by_side import environment

NAMES = [name_of(dtype) for dtype in DTYPES]
TILE, LABEL, AMPLIFIED = 132, 16, 16
HEAD = """# Parity with the reference

`python -m benchmarks.parity OUT` writes this page: each component of ours beside diffusers' and
transformers', with the same weights and inputs.
"""
READING = """
A cell is the largest difference from the reference in the same dtype, by the reference's largest value, of
the output that differs most; 0 is equality to the bit. The first divergence is the first module, in order of
execution, that is further from the reference than its dtype's tolerance ({tolerances})
and than twice what the reference itself is from float64 there. Where the reference computes a part in float32
(ChatGLM, schedulers), float64 has a tolerance of {float32}.

![Errors of every module over depth](parity.png)

Solid: ours from the reference; in the grey band, equal to the bit. Dotted: the reference from its own
float64, which is its rounding. Dashed: the tolerance.
"""
MEANT = """## Differences that are meant

| what | reference | ours | here |
|---|---|---|---|
| latents between steps | cast to the model's dtype | float32 or wider | pipelines, bfloat16 and float16 |
| a scheduler's step | float32 | float32 or wider | samplers; pipelines in float64 |
| the VAE in image to image | float32, and it stays so | its own dtype | image to image, bfloat16, float64 |
| the VAE of a float16 pipeline | float32 while it works | float32 | left out of the VAE's own rows |
| equal pads of a prompt | each encoded and read | one that counts as many | rounding in pipelines |
| ChatGLM's last layer | every position | the last position, which alone is read | compared there |
| size ids | in the prompt's dtype: bfloat16 makes 1024 of 1023 | float32 | not seen: sizes are exact |
| a seed's noise in float64 | other noise than in float32 | likewise | drawn in float32 for both |
| inpainting | none of Kolors: SDXL's is given its models | keeps unmasked pixels | `paste_back=False` |
| the resampler's keys and values | two modules | one, as in the file | compared by what follows them |

Where the reference fails, or ignores what it is told, there is nothing to compare. Ours does the right thing,
and a test shows both: `tests/test_reference_defects.py`, `pipelines/test_image_to_image.py`,
`pipelines/test_image_prompts.py`, `adapters/test_lora_defects.py`, `pipelines/test_denoising_loop.py`
and `test_devices.py`.
"""


def write(
    folder: Path, checkpoint: Checkpoint, results: Sequence[Result], pictures: Sequence[Pictures], name: str
) -> None:
    """report.md, numbers.json and an image for each task. name: what to call the checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    where = environment() | {"threads": torch.get_num_threads(), "device": device_name(checkpoint)}
    files = {task: f"{task.replace(' ', '-')}.png" for task in dict.fromkeys(one.task for one in pictures)}
    for task, file in files.items():
        side_by_side([one for one in pictures if one.task == task]).save(folder / file)
    tolerances = ", ".join(f"{dtype} {value:.0e}" for dtype, value in TOLERANCES.items())
    parts = [HEAD, about(checkpoint, name, where), verdict(results), overview(results)]
    parts += [READING.format(tolerances=tolerances, float32=f"{FLOAT32:.0e}")]
    parts += [picture_table(pictures, files), *map(details, results), MEANT]
    (folder / "report.md").write_text("\n".join(parts), encoding="utf-8")
    plain = [{key: x for key, x in vars(one).items() if not isinstance(x, Tensor)} for one in pictures]
    numbers = {"checkpoint": name, "environment": where, "pictures": plain,
               "results": [as_numbers(result) for result in results]}  # fmt: skip
    text = json.dumps(rounded(numbers), ensure_ascii=False)
    (folder / "numbers.json").write_text(f"{text}\n", encoding="utf-8")


def about(checkpoint: Checkpoint, name: str, where: dict[str, Any]) -> str:
    """What ran, and on what."""
    sizes = ", ".join(
        f"{model} {checkpoint.parameters(component) / 1e6:,.1f} M"
        for model, component in (("ChatGLM", "text_encoder"), ("UNet", "unet"), ("VAE", "vae"))
    )
    versions = ", ".join(f"{key} {where[key]}" for key in ("torch", "diffusers", "transformers", "python"))
    lacking = f" It has no {', '.join(sorted(checkpoint.random))}: small ones of random weights stand there."
    return (
        f"Checkpoint: {name} (parameters: {sizes}).{lacking if checkpoint.random else ''}\n"
        f"{where['date']}, {where['device']}, threads: {where['threads']}, {versions}.\n"
    )


def device_name(checkpoint: Checkpoint) -> str:
    """The GPU's name or the CPU's."""
    found = environment()
    cpu = f"{found['cpu']} ({found['cpu_capability']})"
    return found["device"] if checkpoint.device.type == "cuda" else cpu


def parting(result: Result) -> str:
    """Where a component first parts from the reference, in the first dtype in which it does."""
    if not result.measured:
        return "not run"
    found = (f"{one.divergence} ({one.dtype})" for one in result.measured if one.divergence != "none")
    return next(found, "none")


def verdict(results: Sequence[Result]) -> str:
    """In one sentence."""
    places = {result.name: parting(result) for result in results}
    found = [f"{name} at {place}" for name, place in places.items() if place not in ("none", "not run")]
    if not found:
        return "**Nothing diverges, in any component and any dtype.**\n"
    return f"**{len(found)} of {len(results)} components diverge: {'; '.join(found)}.**\n"


def overview(results: Sequence[Result]) -> str:
    """One row a component."""
    lines = [
        f"| component | weights | compared | {' | '.join(NAMES)} | first divergence |",
        f"|---|---|---|{'---|' * len(NAMES)}---|",
    ]
    for result in results:
        by_dtype = {one.dtype: one for one in result.measured}
        cells = [_cell(by_dtype.get(name)) for name in NAMES]
        if "int64" in by_dtype:
            cells[0] = "equal" if parting(result) == "none" else "**differs**"
        count = max((len(one.layers) for one in result.measured), default=0)
        compared = f"{count} {result.unit}s"
        lines.append(f"| {' | '.join([result.name, result.weights, compared, *cells, parting(result)])} |")
    return "\n".join(lines) + "\n"


def _cell(one: Measured | None) -> str:
    if one is None:
        return "–"
    text = number(one.worst.max_relative)
    return text if one.divergence == "none" else f"**{text}**"


def number(value: float) -> str:
    """In two digits; 0 is equality to the bit."""
    return "0" if value == 0 else f"{value:.1e}"


def details(result: Result) -> str:
    """All numbers of one component."""
    lines = [
        f"### {result.name}\n",
        "| dtype | output | max | mean | max, relative | mean, relative | ours from float64 "
        "| reference from float64 | tolerance | first divergence |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in result.measured:
        for error in one.errors:
            values = (
                error.max, error.mean, error.max_relative, error.mean_relative, error.ours_from_float64,
                error.reference_from_float64, one.tolerance,
            )  # fmt: skip
            cells = [one.dtype, error.output, *map(number, values), _first(one)]
            lines.append(f"| {' | '.join(cells)} |")
    reasons: dict[str, list[str]] = {}
    for dtype, reason in result.left_out.items():
        reasons.setdefault(reason, []).append(dtype)
    notes = [result.note] if result.note else []
    notes += [f"Not run in {', '.join(dtypes)}: {reason}." for reason, dtypes in reasons.items()]
    if alone := sorted({name for one in result.measured for name in one.unpaired}):
        notes.append(f"Without a counterpart of their own: {', '.join(f'`{name}`' for name in alone)}.")
    return "\n".join(lines) + "\n" + (f"\n{' '.join(notes)}\n" if notes else "")


def _first(one: Measured) -> str:
    if one.first is None:
        return one.divergence
    return f"`{one.first.ours}` (`{one.first.reference}`), {number(one.first.error)}"


def picture_table(pictures: Sequence[Pictures], files: dict[str, str]) -> str:
    """How near the images are, and the images."""
    lines = [
        "## Images by both\n",
        "PSNR of 8 bits a channel in dB; equal: every pixel.\n",
        "| task | dtype | ours and reference | largest difference, of 255 | ours and float64 "
        "| reference and float64 |",
        "|---|---|---|---|---|---|",
    ]
    for one in pictures:
        nears = [decibels(x) for x in (one.psnr, one.ours_from_float64, one.reference_from_float64)]
        lines.append(f"| {one.task} | {one.dtype} | {nears[0]} | {one.levels} | {nears[1]} | {nears[2]} |")
    lines += [f"\n![{task}, by the reference and by ours]({file})" for task, file in files.items()]
    return "\n".join(lines) + "\n"


def decibels(value: float) -> str:
    """One digit, or "equal"."""
    return "equal" if math.isinf(value) else f"{value:.1f}"


def side_by_side(pictures: Sequence[Pictures]) -> Image.Image:
    """A column a dtype: the reference's, ours, and their difference, amplified."""
    rows = ("reference", "ours", f"difference x {AMPLIFIED}")
    page = Image.new("RGB", (len(pictures) * TILE, len(rows) * (TILE + LABEL)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(10)
    for column, one in enumerate(pictures):
        difference = ((one.ours - one.reference).abs() * AMPLIFIED).clamp(max=255)
        for row, pixels in enumerate((one.reference, one.ours, difference)):
            x, y = column * TILE, row * (TILE + LABEL)
            tile = Image.fromarray(pixels.to(torch.uint8).numpy()).resize((TILE - 4, TILE - 4))
            page.paste(tile, (x + 2, y + 2))
            pen.text((x + TILE / 2, y + TILE - 2), f"{rows[row]}, {one.dtype}", "black", font, anchor="ma")
    return page


def as_numbers(result: Result) -> dict[str, Any]:
    """For programs: the layers as columns."""
    kept = asdict(result)
    for side in ("ours", "reference"):
        kept[side] = [getattr(layer, side) for one in result.measured[:1] for layer in one.layers]
    for one, row in zip(result.measured, kept["measured"], strict=True):
        row["first"] = one.divergence
        keys = ("error", "ours_from_float64", "reference_from_float64")
        row["layers"] = {key: [getattr(layer, key) for layer in one.layers] for key in keys}
    return kept


def rounded(value: Any) -> Any:
    """Floats in three digits, and what JSON has no number for as text."""
    if isinstance(value, float):
        return float(f"{value:.3g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list | tuple) else value
