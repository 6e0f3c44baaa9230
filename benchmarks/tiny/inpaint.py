"""The embedded model made into one that inpaints with nine channels, and compared with holding what stays.

    apt-get install fonts-noto-color-emoji fonts-noto-cjk npm
    torchrun --nproc-per-node 2 -m benchmarks.tiny.inpaint OUT

Its UNet gets five input channels of zeros and is trained on scenes with random masks. A run that was killed
goes on where it was. Writes inpaint.png (a row each: given, masked, made with nine channels, with four) and
inpaint.json: how far from the given scene is what both make in the mask, of scenes that are never trained on.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.tiny.__main__ import fetch_names
from benchmarks.tiny.captions import Grammar
from benchmarks.tiny.emoji import SIZE, read_concepts
from benchmarks.tiny.processes import processes, report_every
from benchmarks.tiny.scene_data import APART
from benchmarks.tiny.scenes import compose, pixels, render
from benchmarks.tiny.sparse_scenes import SparseScenes
from kolors_core import DPMSolverMultistepScheduler, KolorsInpaintPipeline
from kolors_core.attention import attention_kernel
from kolors_core.checkpoint import local_name
from kolors_core.loading import load, zero_padded
from kolors_core.training.data import Batch, derive_seed, random_masks
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer, TrainingConfig
from kolors_core.unet import UNet
from weights_convert.safetensors_files import Source

CONFIG = TrainingConfig(
    steps=1200, batch_size=16, learning_rate=5e-4, schedule="cosine", warmup=20, ema_decay=0.98,
    min_snr_gamma=1.0, max_tokens=64, dtype=torch.bfloat16, save_every=50,
)  # fmt: skip
COMPARED = range(3 * 10**6, 3 * 10**6 + 32)  # seeds of the scenes that the figures are of
SHOWN = 8  # a row each, asked for by a whole caption; every second one in Chinese
GAP = 4


class MaskedScenes(SparseScenes):
    """`SparseScenes` for inpainting: batches have `extra` [b, 5, H/8, W/8], the mask and masked latents.

    Half of the captions are empty: then only what the mask leaves tells what is missing. Masks are drawn as
    in `kolors_core.training.data.MaskedLatentDataset`.
    """

    empty = 0.5

    @torch.no_grad()
    def batch(self, step: int, rows: slice, device: torch.device) -> Batch:
        """The `rows` of a step's batch, with `extra`."""
        batch = super().batch(step, rows, device)
        draw = torch.Generator().manual_seed(derive_seed(self.config.seed, step, 2))
        count = self.config.batch_size
        masks = random_masks(count, SIZE, SIZE, draw)[rows]  # [b, 1, H, W]
        noise = torch.randn(count, *batch.latents.shape[1:], generator=draw)[rows]
        own = range(*rows.indices(count))
        images = torch.stack([pixels(self._made[step % APART, row][1]) for row in own])  # [b, 3, H, W]
        with self._autocast(device):
            encoded = self.vae.encode_images((images * (1 - masks)).to(self.vae.post_quant_conv.weight))
        masked = encoded.mean.float() + encoded.std.float() * noise.to(encoded.std.device)  # [b, 4, H/8, W/8]
        masks = F.interpolate(masks, size=masked.shape[-2:])  # [b, 1, H/8, W/8]
        return replace(batch, extra=torch.cat([masks.to(device), masked.to(device)], dim=1))


def nine_channels(config: Any, model: str = "tiny") -> UNet:
    """The UNet of a checkpoint with five more input channels, of zeros."""
    with torch.device("meta"):
        unet = UNet(replace(config, in_channels=9))
    files = sorted((Path(local_name(model)) / "unet").glob("*.safetensors"))
    print(load(unet, Source(files), "unet", partial={"conv_in.weight": zero_padded}))
    return unet


def train(
    pipe: KolorsInpaintPipeline, grammar: Grammar, folder: Path, config: TrainingConfig = CONFIG
) -> None:
    """Train the pipeline's UNet, and leave it with its averaged weights."""
    assert pipe.text_encoder is not None and pipe.tokenizer is not None
    data = MaskedScenes(grammar, pipe.tokenizer, pipe.text_encoder, pipe.vae, config)
    pipe.unet.requires_grad_(True)
    objective = DiffusionLoss(pipe.unet, None, pipe.scheduler.training_sigmas(), config)
    trainer = Trainer(objective, data, config, folder, report_every(20, "UNet"))
    with attention_kernel("matmul"):
        trainer.fit(progress=False)
    trainer.load_ema_weights()
    pipe.unet.requires_grad_(False).eval()


def repaint(pipe: KolorsInpaintPipeline, prompt: str, given: Image.Image, mask: Image.Image) -> Image.Image:
    """What a pipeline makes of a masked scene; without a prompt it is not guided."""
    scale, generator = 3.0 if prompt else 1.0, torch.Generator().manual_seed(7)
    made = pipe(prompt, given, mask, num_inference_steps=25, guidance_scale=scale, generator=generator)
    return made.images[0]


def compare(pipes: dict[str, KolorsInpaintPipeline], grammar: Grammar, out: Path) -> dict[str, float]:
    """Draw the sheet; returns each pipeline's mean squared error in the mask, of pixels from 0 to 1: asked by
    the scene's caption, and without a prompt.
    """
    masks = random_masks(4 * len(COMPARED), SIZE, SIZE, torch.Generator().manual_seed(1))
    partly = [Image.fromarray((255 * m[0]).byte().numpy()) for m in masks if 0.1 < m.mean() < 0.6]
    step = SIZE + GAP
    page = Image.new("RGB", ((2 + len(pipes)) * step - GAP, step * SHOWN - GAP), "white")
    errors: dict[str, list[float]] = {}
    for row, (seed, mask) in enumerate(zip(COMPARED, partly, strict=False)):
        scene = compose(seed, is_trained=False)
        caption = grammar.say(scene, random.Random(seed), row % 2, is_wrapped=False).text
        given, is_masked = render(scene), np.asarray(mask) > 0
        shown = [given, Image.composite(Image.new("RGB", given.size, "gray"), given, mask)]
        for title, pipe in pipes.items():
            for asked, prompt in (("by caption", caption), ("without a prompt", "")):
                image = repaint(pipe, prompt, given, mask)
                difference = (np.asarray(image).astype(float) - np.asarray(given)) / 255
                errors.setdefault(f"{title}, {asked}", []).append(float((difference[is_masked] ** 2).mean()))
                shown += [image] if prompt else []
        if row < SHOWN:
            for column, image in enumerate(shown):
                page.paste(image, (step * column, step * row))
    page.save(out / "inpaint.png", optimize=True)
    return {title: round(float(np.mean(values)), 4) for title, values in errors.items()}


def main(out: Path, model: str, config: TrainingConfig = CONFIG) -> None:
    """Training, sheet and figures, all in `out`."""
    with processes() as is_the_first:
        grammar = Grammar(read_concepts(fetch_names(out)))
        four = KolorsInpaintPipeline.from_pretrained(model)
        four.set_progress_bar_config(disable=True)
        nine = KolorsInpaintPipeline.from_pipe(four, unet=nine_channels(four.unet.config, model))
        train(nine, grammar, out / "inpainting", config)
    if not is_the_first:
        return
    if not (out / "model").exists():
        nine.save_pretrained(out / "model")
    karras = DPMSolverMultistepScheduler.from_config(four.scheduler.config, use_karras_sigmas=True)
    nine.scheduler = four.scheduler = karras
    errors = compare({"nine channels": nine, "four channels": four}, grammar, out)
    result = {"steps": config.steps, "batch_size": config.batch_size, "error_in_mask": errors}
    (out / "inpaint.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the embedded model inpaint with nine channels.")
    parser.add_argument("out", type=Path, help="a folder for the state of the run and the results")
    parser.add_argument("--model", default="tiny", help="a checkpoint folder (default: the embedded model)")
    options = parser.parse_args()
    main(options.out, options.model)
