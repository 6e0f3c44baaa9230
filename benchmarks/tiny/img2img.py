"""Sketches made into pictures by the embedded model: `python -m benchmarks.tiny.img2img OUT`.

Writes img2img.png: a row for each sketch and prompt, the sketch and then what is made of it at each strength.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from benchmarks.tiny.emoji import SIZE
from kolors_core import DPMSolverMultistepScheduler, KolorsImg2ImgPipeline

STRENGTHS = (0.1, 0.2, 0.3, 0.5, 0.8)
RED, ORANGE, YELLOW = (215, 40, 40), (245, 150, 40), (250, 210, 60)
ROWS = ((RED, "a red apple"), (RED, "一张瓢虫的照片"), (ORANGE, "a basketball"), (YELLOW, "柠檬"))
GAP = 4


def sketch(colour: tuple[int, int, int]) -> Image.Image:
    """A disc on white."""
    page = Image.new("RGB", (SIZE, SIZE), "white")
    ImageDraw.Draw(page).ellipse((20, 26, 108, 112), fill=colour)
    return page


def main(out: Path) -> None:
    """Draw the sheet."""
    pipe = KolorsImg2ImgPipeline.from_pretrained("tiny")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    pipe.set_progress_bar_config(disable=True)
    step = SIZE + GAP
    page = Image.new("RGB", (step * (1 + len(STRENGTHS)) - GAP, step * len(ROWS) - GAP), "white")
    for row, (colour, prompt) in enumerate(ROWS):
        start = sketch(colour)
        page.paste(start, (0, step * row))
        for column, strength in enumerate(STRENGTHS, start=1):
            generator = torch.Generator().manual_seed(7)
            made = pipe(prompt, start, strength, num_inference_steps=25, generator=generator).images[0]
            page.paste(made, (step * column, step * row))
    out.mkdir(parents=True, exist_ok=True)
    page.save(out / "img2img.png", optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Sketches made into pictures by the embedded model.")
    parser.add_argument("out", type=Path, help="folder to write to")
    main(parser.parse_args().out)
