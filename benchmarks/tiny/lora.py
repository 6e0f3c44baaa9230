"""A LoRA on the embedded model, from five pictures of a subject to a file that the reference loads.

    python -m benchmarks.tiny.lora OUT [--model tiny]

The subject, a small purple robot called "zorp", is drawn here. Beside its five pictures stand pictures
that the model itself draws of other things, so that it keeps them (DreamBooth's prior preservation,
https://arxiv.org/abs/2208.12242, section 3.2). Writes the pictures, `zorp.safetensors`, a sheet (without and
with the LoRA) and lora.json; exits with 1 unless the subject appears with its word and not without.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.tiny.emoji import SIZE
from benchmarks.tiny.quality import generate, nearest, sheet
from kolors_core.adapters.lora import attach, save_adapters
from kolors_core.attention import attention_kernel
from kolors_core.devices import best_device
from kolors_core.image import to_images
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.training.data import Batches, LatentDataset, load_pixels, read_folder
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer, TrainingConfig

WORD = "zorp"
PHRASES = ("a photo of a {x}", "a {x}", "{x}", "一张{x}的照片", "画一个{x}", "the {x}", "show me a {x}")
# Two English phrasings, two Chinese.
UNSEEN = ("please draw a {x} for me", "I would like to see a {x}", "请给我画{x}", "我想看{x}的图片")
OTHERS = ("cat", "ladybug", "rocket", "apple", "car", "panda", "sunflower", "pizza", "guitar", "house",
          "猫", "瓢虫", "火箭", "公交车", "熊猫", "蝴蝶", "西瓜", "鲸鱼", "恐龙", "月亮")  # fmt: skip
KEPT = (
    "dog",
    "tiger",
    "banana",
    "chair",
    "狮子",
    "柠檬",
    "青蛙",
    "自行车",
)  # not trained on here: unchanged?
# Where it is seen: size, offset and tilt in degrees.
VIEWS = ((0.8, 0, 0, 0), (0.7, -9, 5, 12), (0.75, 8, -4, -10), (0.85, 2, 2, 4), (0.72, 0, 9, -5))
CONFIG = TrainingConfig(
    steps=800, batch_size=16, learning_rate=3e-3, schedule="cosine", warmup=20, weight_decay=0.0,
    min_snr_gamma=1.0, dtype=torch.bfloat16,
)  # fmt: skip
RANK = 16


def draw_subject(size: float, right: int, down: int, tilt: int) -> Image.Image:
    """The robot on white, SIZE pixels wide, drawn four times as large for smooth edges."""
    page = Image.new("RGB", (4 * SIZE, 4 * SIZE), "white")
    pen = ImageDraw.Draw(page)
    purple, green, dark = (132, 62, 190), (90, 220, 90), (60, 30, 90)
    pen.line((256, 110, 256, 40), dark, 14)
    pen.ellipse((232, 16, 280, 64), (250, 90, 60))
    pen.rounded_rectangle((126, 104, 386, 284), 50, purple, dark, 8)
    for x in (170, 282):
        pen.ellipse((x, 146, x + 60, 206), green, dark, 6)
        pen.ellipse((x + 20, 166, x + 40, 186), "black")
    pen.rounded_rectangle((196, 232, 316, 256), 10, "white", dark, 5)
    pen.rounded_rectangle((166, 296, 346, 430), 30, purple, dark, 8)
    pen.ellipse((226, 330, 286, 390), (250, 210, 60), dark, 5)
    for left, x in ((90, 150), (362, 422)):
        pen.rounded_rectangle((left, 310, x, 400), 24, green, dark, 6)
    for left, x in ((190, 240), (272, 322)):
        pen.rounded_rectangle((left, 436, x, 496), 14, dark)
    side = round(4 * SIZE * size)
    small = page.resize((side, side)).rotate(tilt, Image.Resampling.BICUBIC, fillcolor="white")
    framed = Image.new("RGB", page.size, "white")
    framed.paste(small, ((4 * SIZE - side) // 2 + 4 * right, (4 * SIZE - side) // 2 + 4 * down))
    return framed.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def write_pictures(pipe: KolorsPipeline, folder: Path) -> None:
    """The five pictures of the subject, four times each, and the model's own of the others."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, view in enumerate(VIEWS):
        draw_subject(*view).save(folder / f"{WORD}-{i}.png")
        row = {"file_name": f"{WORD}-{i}.png", "text": [phrase.format(x=WORD) for phrase in PHRASES]}
        rows += 4 * [row]
    prompts = [PHRASES[i % len(PHRASES)].format(x=name) for i, name in enumerate(OTHERS)]
    for i, image in enumerate(to_images(generate(pipe, prompts, 5.0, seed=100), "pil")):
        image.save(folder / f"other-{i:02}.png")
        rows.append({"file_name": f"other-{i:02}.png", "text": prompts[i]})
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def train(pipe: KolorsPipeline, pictures: Path, folder: Path) -> None:
    """Train the LoRA, leave it on the pipeline's UNet, and save it."""
    examples = read_folder(pictures)
    assert pipe.tokenizer is not None
    pipe.unet.requires_grad_(False)
    adapter = attach(pipe.unet, RANK)
    data = LatentDataset(
        examples, Batches(examples, [(SIZE, SIZE)], CONFIG.batch_size, CONFIG.seed), pipe.vae, pipe.tokenizer,
        CONFIG, frozen_text=pipe.text_encoder,
    )  # fmt: skip

    def report(step: int, loss: float) -> None:
        if step % 50 == 0:
            print(f"LoRA step {step}: loss {loss:.4f}", flush=True)

    objective = DiffusionLoss(pipe.unet, None, pipe.scheduler.training_sigmas(), CONFIG)
    with attention_kernel("matmul" if pipe.device.type == "cpu" else "sdpa"):
        Trainer(objective, data, CONFIG, folder / "run", report).fit()
    save_adapters({"unet": adapter}, folder / f"{WORD}.safetensors")


def main(out: Path, model: str) -> int:
    """Draw before, train, draw after, compare; returns the exit status."""
    pipe = KolorsPipeline.from_pretrained(model, device=best_device())
    torch.manual_seed(CONFIG.seed)  # of the adapter's first weights
    with_word = [phrase.format(x=WORD) for phrase in UNSEEN]
    without = [UNSEEN[i % 2 if name.isascii() else 2 + i % 2].format(x=name) for i, name in enumerate(KEPT)]
    before = generate(pipe, with_word + without, 5.0, seed=7).cpu()
    write_pictures(pipe, out / "pictures")
    start = time.monotonic()
    train(pipe, out / "pictures", out)
    seconds = time.monotonic() - start
    after = generate(pipe, with_word + without, 5.0, seed=7).cpu()

    # The nearest picture: one of the subject's views, or what the model drew before of other things.
    pixels = [load_pixels(example, (SIZE, SIZE))[0] for example in read_folder(out / "pictures")]
    views, others = torch.stack(pixels[: 4 * len(VIEWS) : 4]), torch.stack(pixels[4 * len(VIEWS) :])
    known: Tensor = torch.cat([views, before[len(with_word) :], others])
    is_subject = [found < len(views) for found in nearest(after, known)]
    appears, strays = sum(is_subject[: len(with_word)]), sum(is_subject[len(with_word) :])
    was_there = sum(found < len(views) for found in nearest(before[: len(with_word)], known))
    kept = sum(found == len(views) + i for i, found in enumerate(nearest(after[len(with_word) :], known)))
    result = {"steps": CONFIG.steps, "seconds": round(seconds), "rank": RANK,
              "with_word": f"{appears} of {len(with_word)}", "before_training": was_there,
              "without_word": f"{strays} of {len(without)}", "others_kept": f"{kept} of {len(without)}",
              "bytes": (out / f"{WORD}.safetensors").stat().st_size}  # fmt: skip
    (out / "lora.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    labels = [WORD] * len(with_word) + list(KEPT)
    sheet(torch.cat([before, after]), 2 * labels, len(labels)).save(out / "lora.png")
    sheet(views, [f"view {i + 1}" for i in range(len(views))], len(views)).save(out / "subject.png")
    return 0 if appears == len(with_word) and was_there == 0 and strays == 0 and kept == len(without) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="tiny", help="a checkpoint folder (default: the embedded model)")
    options = parser.parse_args()
    raise SystemExit(main(options.out, options.model))
