"""Does the embedded model draw what it is asked for? Measured on phrasings that it was not trained on.

    python -m benchmarks.tiny.quality DATA [--model tiny] [--out FOLDER]

DATA: the folder of the recipe (`python -m benchmarks.tiny DATA`), for the pictures and the names. For every
concept, language and unseen phrasing a picture is drawn, and counts as right if the training picture nearest
to it (by the mean squared difference of all pixels) is the concept's. Once with guidance 5, once without.
Writes quality.json and sheets of samples; exits with 1 below 80% or where guidance does not help.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.tiny.emoji import CHINESE_UNSEEN, ENGLISH_UNSEEN, Concept, read_concepts
from kolors_core.conditioning import Conditioning, size_ids
from kolors_core.config import VERSION
from kolors_core.devices import best_device
from kolors_core.guidance import guided
from kolors_core.image import to_images
from kolors_core.pipelines.lora_recipe import nearest
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.sampling import dpmpp_2m
from kolors_core.schedule import DPMSolverMultistepScheduler
from kolors_core.training.data import load_pixels, read_folder

STEPS, BATCH, WANTED = 25, 97, 0.8
SHOWN = (
    "一张瓢虫的照片", "draw me a fox, please", "我想看熊猫", "one red apple, please", "请给我画火箭",
    "your fire truck", "有没有向日葵？", "I would see a frog", "一幅企鹅的图", "a ladybug for me", "请画彩虹",
    "my guitar, please", "想看一个汉堡", "see this butterfly", "你的雪人", "a photo of one whale",
)  # fmt: skip
LABELS = Path("/usr/share/fonts/truetype/wqy/wqy-zenhei.ttc")  # Debian's fonts-wqy-zenhei


@torch.no_grad()
def generate(pipe: KolorsPipeline, prompts: Sequence[str], scale: float, seed: int) -> Tensor:
    """One picture a prompt, at the model's own size: [B, 3, H, W] in [-1, 1]. Picture i has seed + i."""
    assert pipe.tokenizer is not None and pipe.text_encoder is not None
    side, count = pipe.unet.config.sample_size, len(prompts)
    pixels = (side * pipe.vae.config.vae_scale_factor,) * 2
    text = pipe.text_encoder(pipe.tokenizer([*prompts, ""]).merge_padding().to(pipe.device))
    assert text.counts is not None
    ids = size_ids(pixels, (0, 0), pixels).to(pipe.device).expand(count, -1)
    positive = Conditioning(text.tokens[:-1], text.pooled[:-1], ids, text.counts[:-1])
    negative = Conditioning(
        text.tokens[-1:].expand(count, -1, -1), text.pooled[-1:].expand(count, -1), ids,
        text.counts[-1:].expand(count, -1),
    )  # fmt: skip
    schedule = DPMSolverMultistepScheduler(use_karras_sigmas=True).schedule(STEPS)
    noise = [
        torch.randn(4, side, side, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)
    ]
    start = torch.stack(noise).to(pipe.device) * schedule.init_noise_sigma
    latents = dpmpp_2m(guided(pipe.unet, schedule, positive, negative, scale), start, schedule.sigmas)
    return pipe.vae.decode_latents(latents).clamp(-1, 1)


def score(
    pipe: KolorsPipeline, concepts: Sequence[Concept], known: Tensor, phrases: Sequence[str], language: str,
    scale: float,
) -> tuple[float, list[str], Tensor]:  # fmt: skip
    """Share of right pictures over all concepts and phrasings; what went wrong; the pictures of the first."""
    right, wrong, shown = 0, [], torch.empty(0)
    for number, phrase in enumerate(phrases):
        prompts = [phrase.format(x=getattr(concept, language)[0]) for concept in concepts]
        parts = [
            generate(pipe, prompts[i : i + BATCH], scale, 1000 * number + i).cpu()
            for i in range(0, len(prompts), BATCH)
        ]
        images = torch.cat(parts)
        shown = images if number == 0 else shown
        for i, found in enumerate(nearest(images, known)):
            right += found == i
            if found != i:
                wrong.append(f"{prompts[i]} -> {concepts[found].english[0]}")
    return right / (len(concepts) * len(phrases)), wrong, shown


def sheet(images: Tensor, labels: Sequence[str], columns: int, scale: float = 0.75) -> Image.Image:
    """Pictures [B, 3, H, W] in rows, each over its label."""
    side = round(images.shape[-1] * scale)
    size = 12 if side > 90 else 9
    font = ImageFont.truetype(str(LABELS), size) if LABELS.exists() else ImageFont.load_default(size)
    rows = math.ceil(len(images) / columns)
    page = Image.new("RGB", (columns * side, rows * (side + 18)), "white")
    pen = ImageDraw.Draw(page)
    for i, image in enumerate(to_images(images, "pil")):
        x, y = i % columns * side, i // columns * (side + 18)
        page.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x, y))
        pen.text((x + side / 2, y + side + 1), labels[i], "black", font, anchor="ma")
    return page


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of `count` trials."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return round(middle - half, 4), round(middle + half, 4)


def main(data: Path, model: str, out: Path) -> int:
    """Measure, write, and return the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    device = best_device()
    pipe = KolorsPipeline.from_pretrained(model, device=device)
    concepts = read_concepts(data / "package")
    size = (pipe.unet.config.sample_size * pipe.vae.config.vae_scale_factor,) * 2
    known = torch.stack([load_pixels(example, size)[0] for example in read_folder(data / "pictures")])
    start, rows = time.monotonic(), []
    for language, phrases in (("english", ENGLISH_UNSEEN), ("chinese", CHINESE_UNSEEN)):
        for scale in (5.0, 1.0):
            share, wrong, images = score(pipe, concepts, known, phrases, language, scale)
            trials = len(concepts) * len(phrases)
            rows.append({"language": language, "guidance": scale, "right": share, "prompts": trials,
                         "interval_95": interval(share, trials), "wrong": wrong})  # fmt: skip
            print(f"{language}, guidance {scale}: {share:.1%} of {trials} right; {', '.join(wrong[:8])}")
            labels = [getattr(concept, language)[0] for concept in concepts]
            sheet(images, labels, 14, scale=0.6).save(out / f"{language}-{scale:.0f}.png")
    sheet(generate(pipe, SHOWN, 5.0, 7).cpu(), SHOWN, 8, scale=1.0).save(out / "samples.png")
    by = {(row["language"], row["guidance"]): row["right"] for row in rows}
    is_good = all(by[language, 5.0] >= WANTED and by[language, 5.0] > by[language, 1.0] for language, _ in by)
    result = {"concepts": len(concepts), "steps": STEPS, "sampler": "DPM++ 2M Karras", "version": VERSION,
              "device": str(device), "seconds": round(time.monotonic() - start), "rows": rows}  # fmt: skip
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (out / "quality.json").write_text(text, encoding="utf-8")
    return 0 if is_good else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="tiny", help="a checkpoint folder (default: the embedded model)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tiny"))
    options = parser.parse_args()
    raise SystemExit(main(options.data, options.model, options.out))
