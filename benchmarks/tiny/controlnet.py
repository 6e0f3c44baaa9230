"""A Canny ControlNet for the embedded model, from packages to a folder that `from_pretrained` loads.

    apt-get install fonts-noto-color-emoji fonts-noto-cjk npm
    torchrun --nproc-per-node 2 -m benchmarks.tiny.controlnet OUT

Scenes are made while it trains, with captions that leave much to the edges (sparse_scenes.py). The UNet stays
as it is. A run that was killed goes on where it was. Writes `OUT/model`, a sheet (edges, without, with it)
and controlnet.json: how much of the edges is in what was drawn, of scenes that are never trained on and of
outlines drawn by hand.
"""

import argparse
import json
import random
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.tiny.__main__ import fetch_names
from benchmarks.tiny.captions import Grammar
from benchmarks.tiny.emoji import SIZE, read_concepts
from benchmarks.tiny.processes import processes, report_every
from benchmarks.tiny.quality import sheet
from benchmarks.tiny.scenes import compose, render
from benchmarks.tiny.sparse_scenes import SparseScenes, brief_caption
from kolors_core import (
    DPMSolverMultistepScheduler,
    KolorsControlNet,
    KolorsControlNetPipeline,
    KolorsPipeline,
    canny,
)
from kolors_core.adapters.controlnet import controlnets_of
from kolors_core.attention import attention_kernel
from kolors_core.image import preprocess_vae, to_images
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer, TrainingConfig

CONFIG = TrainingConfig(
    steps=1600, batch_size=16, learning_rate=1e-3, schedule="cosine", warmup=50, weight_decay=0.0,
    ema_decay=0.99, min_snr_gamma=5.0, max_tokens=64, dtype=torch.bfloat16, save_every=100,
)  # fmt: skip
WIDTHS = (8, 16, 32, 64)  # of the maps that the control image becomes
UNSEEN = range(2 * 10**6, 2 * 10**6 + 24)  # seeds of scenes that the figures are of
SHOWN = 8  # of them on the sheet, before the outlines
GUIDANCE, STEPS = 2.0, 25  # the stronger the guidance, the more the model insists on what it knows
NEAR = 1  # pixels that an edge may be off


def train(
    pipe: KolorsControlNetPipeline, grammar: Grammar, folder: Path, config: TrainingConfig = CONFIG
) -> None:
    """Train the pipeline's ControlNet beside its frozen UNet."""
    (net,) = controlnets_of(pipe.controlnet)
    assert pipe.tokenizer is not None and pipe.text_encoder is not None
    pipe.unet.requires_grad_(False)
    data = SparseScenes(grammar, pipe.tokenizer, pipe.text_encoder, pipe.vae, config, control=canny)
    objective = DiffusionLoss(pipe.unet, None, pipe.scheduler.training_sigmas(), config, net)
    trainer = Trainer(objective, data, config, folder, report_every(50, "ControlNet"))
    with attention_kernel("matmul"):
        trainer.fit(progress=False)
    trainer.load_ema_weights()
    net.requires_grad_(False)


def followed(edges: Image.Image, picture: Image.Image) -> float:
    """The share of the edges that the picture has too, within `NEAR` pixels."""
    wanted, found = (np.asarray(image.convert("L")) > 0 for image in (edges, canny(picture)))
    return float((_near(found) & wanted).sum() / max(1, wanted.sum()))


def contrast(edges: Image.Image, picture: Image.Image) -> float:
    """How many times as steep the picture is within `NEAR` pixels of the edges as elsewhere: no detector's
    thresholds are in this number. 1 where edges and picture have nothing to do with each other.
    """
    gray = np.asarray(picture.convert("L")).astype(float)
    steepness = np.hypot(*np.gradient(gray))
    is_near = _near(np.asarray(edges.convert("L")) > 0)
    return float((steepness[is_near].mean() + 1) / (steepness[~is_near].mean() + 1))


def _near(mask: np.ndarray) -> np.ndarray:
    """Where a pixel of the mask [H, W] is within `NEAR` pixels."""
    padded, span, (height, width) = np.pad(mask, NEAR), range(2 * NEAR + 1), mask.shape
    return np.any([padded[y : y + height, x : x + width] for y in span for x in span], axis=0)


def outlines() -> list[tuple[str, Image.Image]]:
    """Shapes drawn by hand, and what each shall become."""
    found = []
    for prompt, boxes in (
        ("a basketball", [(8, 40, 72, 104)]),
        ("a tangerine and a football", [(10, 14, 56, 60), (66, 62, 118, 114)]),
        ("三个篮球", [(6, 6, 44, 44), (48, 46, 86, 84), (84, 86, 120, 122)]), ("", [(30, 30, 100, 100)]),
    ):  # fmt: skip
        page = Image.new("RGB", (SIZE, SIZE))
        for box in boxes:
            ImageDraw.Draw(page).ellipse(box, outline="white")
        found.append((prompt, page))
    return found


def asked_for(grammar: Grammar) -> list[tuple[str, Image.Image, Image.Image | None]]:
    """Prompts that name what is there, in turns in each language; edges; and the scene, if it is of one."""
    found: list[tuple[str, Image.Image, Image.Image | None]] = []
    for seed in UNSEEN:
        scene = compose(seed, is_trained=False)
        picture, order = render(scene), random.Random(seed)
        found.append((brief_caption(grammar, scene, order, seed % 2), canny(picture), picture))
    return found + [(prompt, edges, None) for prompt, edges in outlines()]


def compare(pipe: KolorsControlNetPipeline, grammar: Grammar, out: Path) -> dict[str, float]:
    """Draw the sheet, and measure how far the edges are followed without and with control, and how far they
    would be if what is drawn were the scene itself, as the autoencoder keeps it.
    """
    asked = asked_for(grammar)
    plain, rows = KolorsPipeline.from_pipe(pipe, controlnet=None), []
    given = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": SIZE, "width": SIZE}
    measured: dict[str, list[tuple[float, float]]] = {}
    for i, (prompt, edges, scene) in enumerate(asked):
        seeds = [torch.Generator().manual_seed(50 + i) for _ in range(2)]
        drawn = {
            "without": plain(prompt, generator=seeds[0], **given).images[0],
            "with": pipe(
                prompt, edges, generator=seeds[1], controlnet_conditioning_scale=1.0, **given
            ).images[0],
        }
        rows.append((edges, *drawn.values()))
        if scene is not None:
            drawn["autoencoder"] = decoded(pipe, scene)
        for name, picture in drawn.items():
            of = name if scene is not None else f"outlines_{name}"
            measured.setdefault(of, []).append((followed(edges, picture), contrast(edges, picture)))
    shown = [*range(SHOWN), *range(len(UNSEEN), len(asked))]
    pictures: Tensor = torch.cat([preprocess_vae([row[k] for row in rows])[shown] for k in range(3)])
    sheet(pictures, [asked[i][0] for i in shown] * 3, len(shown)).save(out / "controlnet.png", optimize=True)
    result: dict[str, float] = {}
    for name, of in measured.items():
        shares, contrasts = (round(float(np.mean(values)), 3) for values in zip(*of, strict=True))
        result |= {f"edges_followed_{name}": shares, f"contrast_{name}": contrasts}
    return result


@torch.no_grad()
def decoded(pipe: KolorsControlNetPipeline, picture: Image.Image) -> Image.Image:
    """A picture as the autoencoder keeps it."""
    latents = pipe.vae.encode_images(preprocess_vae([picture]).to(pipe.vae.post_quant_conv.weight)).mean
    return to_images(pipe.vae.decode_latents(latents).clamp(-1, 1), "pil")[0]


def main(out: Path, model: str, config: TrainingConfig = CONFIG) -> int:
    """Every stage; returns 1 unless the edges are followed far better than without."""
    with processes() as is_the_first:
        grammar = Grammar(read_concepts(fetch_names(out)))
        pipe = KolorsControlNetPipeline.from_pretrained(model)
        pipe.set_progress_bar_config(disable=True)
        torch.manual_seed(config.seed)  # of the image embedding's first weights
        pipe.controlnet = KolorsControlNet.from_unet(pipe.unet, WIDTHS)
        train(pipe, grammar, out / "run", config)
    if not is_the_first:
        return 0
    deepcopy(pipe.controlnet).half().save_pretrained(out / "model")  # as the rest is stored
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    result = {
        "steps": config.steps, "batch_size": config.batch_size, "scenes": len(UNSEEN),
        "parameters": sum(parameter.numel() for parameter in pipe.controlnet.parameters()),
        **compare(pipe, grammar, out),
    }  # fmt: skip
    (out / "controlnet.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0 if result["edges_followed_with"] > 1.5 * result["edges_followed_without"] else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder for the state of the run and the results")
    parser.add_argument("--model", default="tiny", help="a checkpoint folder (default: the embedded model)")
    options = parser.parse_args()
    raise SystemExit(main(options.out, options.model))
