"""Sketches made into scenes by the embedded model: `python -m benchmarks.tiny.img2img OUT [--model tiny]`.

Writes img2img.png: a row for each sketch and prompt, the sketch and then what is made of it at each strength.
"""

import argparse
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from benchmarks.tiny.emoji import SIZE
from benchmarks.tiny.scenes import ground
from kolors_core import DPMSolverMultistepScheduler, KolorsImg2ImgPipeline

STRENGTHS = (0.1, 0.2, 0.3, 0.5, 0.8)
RED, ORANGE, GREEN, BROWN, YELLOW = (
    (215, 40, 40),
    (245, 150, 40),
    (40, 140, 70),
    (130, 80, 40),
    (250, 210, 60),
)
Shape = tuple[str, tuple[int, ...], tuple[int, int, int]]  # "disc", "box" or "triangle"; its box; its colour
# (ground, shapes, prompt)
ROWS: tuple[tuple[str, tuple[Shape, ...], str], ...] = (
    ("white", (("disc", (8, 40, 58, 90), RED), ("disc", (70, 36, 120, 86), ORANGE)),
     "an apple to the left of a tangerine"),
    ("grass", (("triangle", (12, 30, 60, 84), GREEN), ("box", (32, 84, 40, 96), BROWN),
               ("disc", (76, 64, 118, 106), RED)), "a pine tree and a ladybug on the grass"),
    ("night", (("disc", (10, 10, 46, 46), YELLOW), ("box", (60, 60, 118, 112), BROWN)),
     "夜空下，月亮和房屋"),
    ("sky", (("disc", (14, 10, 66, 66), RED), ("disc", (72, 56, 118, 106), YELLOW)),
     "two balloons in the sky"),
)  # fmt: skip
GAP = 4


def sketch(name: str, shapes: tuple[Shape, ...]) -> Image.Image:
    """Flat shapes on one of the scenes' grounds."""
    page = ground(name, random.Random(0)).convert("RGB")
    pen = ImageDraw.Draw(page)
    for kind, box, colour in shapes:
        left, top, right, bottom = box
        if kind == "disc":
            pen.ellipse(box, fill=colour)
        elif kind == "box":
            pen.rectangle(box, fill=colour)
        else:
            pen.polygon((((left + right) / 2, top), (right, bottom), (left, bottom)), fill=colour)
    return page


def main(out: Path, model: str) -> None:
    """Draw the sheet."""
    pipe = KolorsImg2ImgPipeline.from_pretrained(model)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    pipe.set_progress_bar_config(disable=True)
    step = SIZE + GAP
    page = Image.new("RGB", (step * (1 + len(STRENGTHS)) - GAP, step * len(ROWS) - GAP), "white")
    for row, (name, shapes, prompt) in enumerate(ROWS):
        start = sketch(name, shapes)
        page.paste(start, (0, step * row))
        for column, strength in enumerate(STRENGTHS, start=1):
            generator = torch.Generator().manual_seed(7)
            made = pipe(prompt, start, strength, num_inference_steps=25, generator=generator).images[0]
            page.paste(made, (step * column, step * row))
    out.mkdir(parents=True, exist_ok=True)
    page.save(out / "img2img.png", optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Sketches made into scenes by the embedded model.")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--model", default="tiny", help="a checkpoint folder (default: the embedded model)")
    options = parser.parse_args()
    main(options.out, options.model)
