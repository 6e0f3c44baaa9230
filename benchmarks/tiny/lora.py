"""The recipe of a LoRA (kolors_core/pipelines/lora_recipe.py) measured on the embedded model.

    python -m benchmarks.tiny.lora OUT [--model tiny]

The subject, a small purple robot, is drawn here, in five views. It is called "teddy bear", as one calls a dog
of one's own "dog": a word that the model does not know is drawn in the phrasings trained on alone
(benchmarks/NOTES.md). Writes the views, `subject.safetensors`, sheets and lora.json; exits with 1 unless the
subject appears with its word and not without, and other things stay what they were.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from PIL import Image, ImageDraw

from benchmarks.tiny.emoji import SIZE
from kolors_core.devices import best_device
from kolors_core.pipelines.lora_recipe import LoRARecipe, train_lora
from kolors_core.pipelines.text_to_image import KolorsPipeline

WORD = "teddy bear"
# Where it is seen: size, offset and tilt in degrees.
VIEWS = ((0.8, 0, 0, 0), (0.7, -9, 5, 12), (0.75, 8, -4, -10), (0.85, 2, 2, 4), (0.72, 0, 9, -5))


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


def main(out: Path, model: str) -> int:
    """Draw the views, train, write what was measured; returns the exit status."""
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    views = [draw_subject(*view) for view in VIEWS]
    subject = Image.new("RGB", (SIZE * len(views), SIZE), "white")
    for i, view in enumerate(views):
        view.save(images / f"{i}.png")
        subject.paste(view, (i * SIZE, 0))
    subject.save(out / "subject.png")
    pipe, recipe = KolorsPipeline.from_pretrained(model, device=best_device()), LoRARecipe()
    start = time.monotonic()
    result = train_lora(pipe, images, WORD, out / "subject.safetensors", recipe)
    effect = result.effect
    seconds, size = round(time.monotonic() - start), result.file.stat().st_size
    measured = {"steps": recipe.training.steps, "rank": recipe.rank, "seconds": seconds, "bytes": size}
    measured |= asdict(effect)
    measured["moved_others"] = [round(level, 1) for level in effect.moved_others]
    measured["moved_with_word"] = round(effect.moved_with_word, 1)
    (out / "lora.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    result.sheet.quantize(256).save(out / "lora.png", optimize=True)
    print(result, result.losses, sep="\n")
    is_learned = effect.shows_after == effect.with_word and effect.shows_before == 0
    return 0 if is_learned and effect.others_showing == 0 and effect.others_kept == effect.others else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="tiny", help="a checkpoint folder (default: the embedded model)")
    options = parser.parse_args()
    raise SystemExit(main(options.out, options.model))
