"""The embedded model made into one that inpaints with nine channels, and compared with holding what stays.

    apt-get install fonts-noto-color-emoji npm && OMP_NUM_THREADS=1 python -m benchmarks.tiny.inpaint OUT

Its UNet gets five input channels of zeros and is trained on the emoji with random masks. A run that was
killed goes on where it was. Writes inpaint.png (a row each: given, masked, made with nine channels, made with
four) and inpaint.json: how far from the given picture is what both make in the mask. The embedded model knows
each of these pictures by heart, so that four channels with what stays held are hard to beat by name.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.tiny.__main__ import fetch_names
from benchmarks.tiny.emoji import SIZE, Concept, draw, on_white, read_concepts, write
from kolors_core import DPMSolverMultistepScheduler, KolorsInpaintPipeline
from kolors_core.attention import attention_kernel
from kolors_core.checkpoint import EMBEDDED
from kolors_core.loading import load, zero_padded
from kolors_core.training.data import Batches, MaskedLatentDataset, random_masks, read_folder
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer, TrainingConfig
from kolors_core.unet import UNet
from weights_convert.safetensors_files import Source

CONFIG = TrainingConfig(
    steps=1200, batch_size=16, learning_rate=5e-4, schedule="cosine", warmup=20, ema_decay=0.98,
    min_snr_gamma=1.0,
    save_every=50,
)  # fmt: skip
UNNAMED = 0.5  # how many pictures have no caption: then only what the mask leaves tells what is missing
SHOWN = "🍎🐞🐼🚌🌻🍕🦊🏠"  # a row each, asked for by name; every second one in Chinese
COMPARED = 32  # pictures that the figures are of
GAP = 4


def nine_channels(config: Any) -> UNet:
    """The embedded UNet with five more input channels, of zeros."""
    with torch.device("meta"):
        unet = UNet(replace(config, in_channels=9))
    files = sorted((EMBEDDED / "unet").glob("*.safetensors"))
    print(load(unet, Source(files), "unet", partial={"conv_in.weight": zero_padded}))
    return unet


def train(pipe: KolorsInpaintPipeline, pictures: Path, folder: Path) -> None:
    """Train the pipeline's UNet, and leave it with its averaged weights."""
    assert pipe.text_encoder is not None and pipe.tokenizer is not None
    examples = read_folder(pictures)
    batches = Batches(examples, [(SIZE, SIZE)], CONFIG.batch_size, CONFIG.seed, UNNAMED)
    data = MaskedLatentDataset(examples, batches, pipe.vae, pipe.tokenizer, CONFIG, None)
    pipe.unet.requires_grad_(True)
    pipe.text_encoder.requires_grad_(False)
    objective = DiffusionLoss(pipe.unet, pipe.text_encoder, pipe.scheduler.training_sigmas(), CONFIG)
    start = time.monotonic()

    def report(step: int, loss: float) -> None:
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.4f}, {time.monotonic() - start:.0f} s", flush=True)

    trainer = Trainer(objective, data, CONFIG, folder, report)
    with attention_kernel("matmul"):
        trainer.fit(progress=False)
    trainer.load_ema_weights()
    pipe.unet.requires_grad_(False).eval()


def repaint(pipe: KolorsInpaintPipeline, prompt: str, given: Image.Image, mask: Image.Image) -> Image.Image:
    """What a pipeline makes of a masked picture; without a prompt it is not guided."""
    scale, generator = 3.0 if prompt else 1.0, torch.Generator().manual_seed(7)
    made = pipe(prompt, given, mask, num_inference_steps=25, guidance_scale=scale, generator=generator)
    return made.images[0]


def compare(pipes: dict[str, KolorsInpaintPipeline], concepts: list[Concept], out: Path) -> dict[str, float]:
    """Draw the sheet; returns each pipeline's mean squared error in the mask, of pixels from 0 to 1: asked by
    the thing's name, and without a prompt.
    """
    masks = random_masks(4 * COMPARED, SIZE, SIZE, torch.Generator().manual_seed(1))
    partly = [Image.fromarray((255 * m[0]).byte().numpy()) for m in masks if 0.1 < m.mean() < 0.6]
    step = SIZE + GAP
    page = Image.new("RGB", ((2 + len(pipes)) * step - GAP, step * len(SHOWN) - GAP), "white")
    errors: dict[str, list[float]] = {}
    first = [next(c for c in concepts if c.character == character) for character in SHOWN]
    others = [concept for concept in concepts if concept not in first]
    chosen = [*first, *others[:: len(others) // (COMPARED - len(first))]][:COMPARED]
    for row, (concept, mask) in enumerate(zip(chosen, partly, strict=False)):
        name = concept.chinese[0] if row % 2 else concept.english[0]
        given, is_masked = on_white(draw(concept.character)), np.asarray(mask) > 0
        shown = [given, Image.composite(Image.new("RGB", given.size, "gray"), given, mask)]
        for title, pipe in pipes.items():
            for asked, prompt in (("by name", name), ("without a prompt", "")):
                image = repaint(pipe, prompt, given, mask)
                difference = (np.asarray(image).astype(float) - np.asarray(given)) / 255
                errors.setdefault(f"{title}, {asked}", []).append(float((difference[is_masked] ** 2).mean()))
                shown += [image] if prompt else []
        if row < len(SHOWN):
            for column, image in enumerate(shown):
                page.paste(image, (step * column, step * row))
    page.save(out / "inpaint.png", optimize=True)
    return {title: round(float(np.mean(values)), 4) for title, values in errors.items()}


def main(out: Path) -> None:
    """Data, training, sheet and figures, all in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    concepts = read_concepts(fetch_names(out))
    write(concepts, out / "pictures")
    four = KolorsInpaintPipeline.from_pretrained("tiny")
    four.scheduler = DPMSolverMultistepScheduler.from_config(four.scheduler.config, use_karras_sigmas=True)
    four.set_progress_bar_config(disable=True)
    nine = KolorsInpaintPipeline.from_pipe(four, unet=nine_channels(four.unet.config))
    train(nine, out / "pictures", out / "inpainting")
    if not (out / "model").exists():
        nine.save_pretrained(out / "model")
    errors = compare({"nine channels": nine, "four channels": four}, concepts, out)
    result = {"steps": CONFIG.steps, "batch_size": CONFIG.batch_size, "error_in_mask": errors}
    (out / "inpaint.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the embedded model inpaint with nine channels.")
    parser.add_argument("out", type=Path, help="a folder for the data, the state of the run and the results")
    main(parser.parse_args().out)
