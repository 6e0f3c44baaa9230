"""A Canny ControlNet for the embedded model, from packages to a folder that `from_pretrained` loads.

    apt-get install fonts-noto-color-emoji npm && python -m benchmarks.tiny.controlnet OUT

The embedded model draws each thing in the middle, upright and large. Here each stands in several places,
sizes and tilts, some mirrored, so that the edges say what the caption does not. The UNet stays as it is. A
run that was killed goes on where it was. Writes `OUT/model`, a sheet (edges, without, with control) and
controlnet.json: how much of the edges is in what was drawn, for places that training has not seen.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from benchmarks.tiny.__main__ import fetch_names
from benchmarks.tiny.emoji import SIZE, Concept, draw, on_white, read_concepts
from benchmarks.tiny.quality import sheet
from kolors_core import (
    DPMSolverMultistepScheduler,
    KolorsControlNet,
    KolorsControlNetPipeline,
    KolorsPipeline,
    canny,
)
from kolors_core.adapters.controlnet import controlnets_of
from kolors_core.attention import attention_kernel
from kolors_core.image import preprocess_vae
from kolors_core.training.data import Batches, LatentDataset, read_folder
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer, TrainingConfig

CONFIG = TrainingConfig(
    steps=1600, batch_size=16, learning_rate=1e-3, schedule="cosine", warmup=50, weight_decay=0.0,
    ema_decay=0.99,
    min_snr_gamma=5.0, max_tokens=48, dtype=torch.bfloat16, save_every=100,
)  # fmt: skip
WIDTHS = (8, 16, 32, 64)  # of the maps that the control image becomes
PLACES = 5  # of each thing
CAPTIONS = 4  # of each thing: what it is called is not learnt here
# Things and outlines of the sheet; the seeds of places are beyond those trained on.
SHOWN = ("🐞", "🍎", "🚗", "🐱", "🌻", "🚀", "🐠", "🎸")
GUIDANCE = 2.0  # the stronger it is, the more the model insists on what it knows, in the middle and large
NEAR = 1  # pixels that an edge may be off


def placed(character: str, seed: int) -> Image.Image:
    """The emoji on white: of some size, in some place, tilted, perhaps mirrored."""
    order = random.Random(f"{character} {seed}")
    picture = draw(character)
    if order.random() < 0.5:
        picture = ImageOps.mirror(picture)
    side = round(SIZE * order.uniform(0.55, 0.95))
    picture = picture.rotate(order.uniform(-35, 35), Image.Resampling.BICUBIC)
    picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    page = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0))
    page.alpha_composite(picture, (order.randint(0, SIZE - side), order.randint(0, SIZE - side)))
    return on_white(page)


def write(concepts: list[Concept], folder: Path) -> None:
    """Each thing in several places, with the few first of its captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, concept in enumerate(concepts):
        for place in range(PLACES):
            name = f"{i:04}-{place}.png"
            placed(concept.character, place).save(folder / name)
            english, chinese = concept.english[0], concept.chinese[0]
            captions = [english, f"a photo of a {english}", chinese, f"一张{chinese}的照片"][:CAPTIONS]
            rows.append(json.dumps({"file_name": name, "text": captions}, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def train(pipe: KolorsControlNetPipeline, pictures: Path, folder: Path) -> None:
    """Train the pipeline's ControlNet beside its frozen UNet."""
    (net,) = controlnets_of(pipe.controlnet)
    examples = read_folder(pictures)
    assert pipe.tokenizer is not None
    pipe.unet.requires_grad_(False)
    for model in (pipe.unet, net):
        model.to(memory_format=torch.channels_last)  # faster convolutions in bfloat16
    start = time.monotonic()
    batches = Batches(examples, [(SIZE, SIZE)], CONFIG.batch_size, CONFIG.seed)
    data = LatentDataset(
        examples, batches, pipe.vae, pipe.tokenizer, CONFIG, frozen_text=pipe.text_encoder, control=canny
    )
    objective = DiffusionLoss(pipe.unet, None, pipe.scheduler.training_sigmas(), CONFIG, net)

    def report(step: int, loss: float) -> None:
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.4f}, {time.monotonic() - start:.0f} s", flush=True)

    with attention_kernel("matmul"):
        trainer = Trainer(objective, data, CONFIG, folder / "run", report)
        trainer.fit(progress=False)
    trainer.load_ema_weights()
    net.requires_grad_(False)


def followed(edges: Image.Image, picture: Image.Image) -> float:
    """The share of the edges that the picture has too, within `NEAR` pixels."""
    wanted, found = (np.asarray(image.convert("L")) > 0 for image in (edges, canny(picture)))
    padded, span = np.pad(found, NEAR), range(2 * NEAR + 1)
    height, width = found.shape
    near = np.any([padded[y : y + height, x : x + width] for y in span for x in span], axis=0)
    return float((near & wanted).sum() / max(1, wanted.sum()))


def outlines() -> list[tuple[str, Image.Image]]:
    """Shapes drawn by hand, and what each shall become."""
    found = []
    for prompt, box in (("a basketball", (8, 40, 72, 104)), ("watermelon", (20, 20, 116, 96))):
        page = Image.new("RGB", (SIZE, SIZE))
        ImageDraw.Draw(page).ellipse(box, outline="white")
        found.append((prompt, page))
    return found


def compare(pipe: KolorsControlNetPipeline, concepts: list[Concept], out: Path) -> dict[str, float]:
    """Draw the sheet, and measure how far the edges are followed without and with control."""
    names = {concept.character: concept.english[0] for concept in concepts}
    asked = [(names[one], canny(placed(one, 1000))) for one in SHOWN] + outlines()
    (net,) = controlnets_of(pipe.controlnet)
    plain, rows, shares = KolorsPipeline.from_pipe(pipe, controlnet=None), [], {"without": [], "with": []}
    given = {"num_inference_steps": 25, "guidance_scale": GUIDANCE, "height": SIZE, "width": SIZE}
    for i, (prompt, edges) in enumerate(asked):
        seeds = [torch.Generator().manual_seed(50 + i) for _ in range(2)]
        bare = plain(prompt, generator=seeds[0], **given).images[0]
        steered = pipe(prompt, edges, generator=seeds[1], controlnet_conditioning_scale=1.0, **given)
        rows.append((edges, bare, steered.images[0]))
        shares["without"].append(followed(edges, bare))
        shares["with"].append(followed(edges, steered.images[0]))
    pictures: Tensor = torch.cat([preprocess_vae(list(column)) for column in zip(*rows, strict=True)])
    page = sheet(pictures, [prompt for prompt, _ in asked] * 3, len(asked))
    page.save(out / "controlnet.png", optimize=True)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    means = {f"edges_followed_{name}": round(float(np.mean(of)), 3) for name, of in shares.items()}
    return {"steps": CONFIG.steps, "batch_size": CONFIG.batch_size, "parameters": parameters, **means}


def main(out: Path) -> int:
    """Every stage; returns 1 unless the edges are followed far better than without."""
    out.mkdir(parents=True, exist_ok=True)
    concepts = read_concepts(fetch_names(out))
    pipe = KolorsControlNetPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(CONFIG.seed)  # of the image embedding's first weights
    pipe.controlnet = KolorsControlNet.from_unet(pipe.unet, WIDTHS)
    if not (out / "pictures" / "metadata.jsonl").exists():
        write(concepts, out / "pictures")
    train(pipe, out / "pictures", out)
    if not (out / "model").exists():
        pipe.controlnet.save_pretrained(out / "model")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    result = compare(pipe, concepts, out)
    (out / "controlnet.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0 if result["edges_followed_with"] > 1.5 * result["edges_followed_without"] else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    raise SystemExit(main(parser.parse_args().out))
