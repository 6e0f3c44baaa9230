"""Quality of the embedded model: does it draw what it is asked for?

    python -m benchmarks.tiny.quality DATA [--model tiny] [--out FOLDER] [--prompts 300]

DATA: the folder of the recipe (`python -m benchmarks.tiny DATA`), for the names; the detector (detector.py)
is kept in DATA/detector, and trained if it is not there. Prompts are captions of scenes that are held out
(judge.py) in both languages, and every thing alone; images have guidance 5, and 1 for comparison.
Writes quality.json and sheets of images; exits with 1 where a goal is missed.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.tiny import detector as detection
from benchmarks.tiny.attention_share import measure_attention, of_two_things
from benchmarks.tiny.captions import Grammar
from benchmarks.tiny.detector import Detector, Found
from benchmarks.tiny.emoji import read_concepts
from benchmarks.tiny.judge import LANGUAGES, Prompt, Verdict, judge, write_prompts, write_single_prompts
from benchmarks.tiny.scenes import pixels
from benchmarks.tiny.sparse_scenes import another
from kolors_core.conditioning import Conditioning, size_ids
from kolors_core.config import VERSION
from kolors_core.devices import best_device
from kolors_core.guidance import guided
from kolors_core.image import to_images
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.sampling import dpmpp_2m
from kolors_core.schedulers import DPMSolverMultistepScheduler

STEPS, BATCH, GUIDANCE = 25, 50, 5.0
GOALS = {"present": 0.85, "claims": 0.8, "number": 0.75, "ground": 0.95, "characters": 0.7, "single": 0.97}
GOAL_OF_ATTENTION = 2.0  # density inside a thing's box to that outside
ALIKE = 40  # prompts that are drawn with two seeds, and whose attention is measured
SHEET = 40  # images of a language's sheet
SHOWN = (
    'a ladybug holding a sign that says "可图"', "一张瓢虫的照片，拿着一个牌子，写着“可图”",
    "two foxes to the left of a fire truck, at night", "夜空下，一只猫头鹰在城堡的上面",
    "three penguins on a blue background", "草地上，两只绵羊和一个房屋",
    "a rocket above a UFO in the night sky",
    "左边是一个苹果，右边是一个香蕉，粉色背景", 'a panda holding a sign that says "A1"',
    "一只熊猫拿着一个牌子，写着“你好”", "a small butterfly in the top right corner, on the grass",
    "天空中，三个气球", "a big pizza on a yellow background",
    "一只狐狸，一个雪人和一个圣诞树", "a guitar, a drum and a violin", "一块写着“大山”的牌子，绿色背景",
)  # fmt: skip
LABELS = Path("/usr/share/fonts/truetype/wqy/wqy-zenhei.ttc")  # Debian's fonts-wqy-zenhei


@torch.no_grad()
def generate(pipe: KolorsPipeline, prompts: Sequence[str], scale: float, seed: int) -> Tensor:
    """Generate an image for each prompt, at the model's own size: [B, 3, H, W] in [-1, 1]; i has seed + i."""
    assert pipe.tokenizer is not None and pipe.text_encoder is not None
    side, count = pipe.unet.config.sample_size, len(prompts)
    size = (side * pipe.vae.config.vae_scale_factor, side * pipe.vae.config.vae_scale_factor)
    text = pipe.text_encoder(pipe.tokenizer([*prompts, ""]).merge_padding().to(pipe.device))
    assert text.counts is not None
    ids = size_ids(size, (0, 0), size).to(pipe.device).expand(count, -1)
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


def generate_all(pipe: KolorsPipeline, prompts: Sequence[str], scale: float, seed: int) -> Tensor:
    """Generate images [B, 3, H, W] of any number of prompts, on the CPU; i has seed + i."""
    parts = [
        generate(pipe, prompts[i : i + BATCH], scale, seed + i).cpu() for i in range(0, len(prompts), BATCH)
    ]
    return torch.cat(parts)


def load_detector(folder: Path, device: torch.device) -> Detector:
    """Load the detector that is kept in a folder, or train it there."""
    file = folder / "detector.safetensors"
    if not file.exists():
        save_file(detection.train(folder, device).state_dict(), file)
    detector = Detector().eval().requires_grad_(False)
    detector.load_state_dict(load_file(file))
    return detector.to(device)


def summarize(verdicts: Sequence[Verdict]) -> dict[str, dict[str, object]]:
    """Count what is right: name -> its share, the number of trials, Wilson's interval."""
    trials: dict[str, list[bool]] = {
        "present": [v.present for v in verdicts],
        "exact": [v.exact for v in verdicts],
        "number": [v.number for v in verdicts if v.number is not None],
        "claims": [right for v in verdicts for right in v.places + v.relations],
        "places": [right for v in verdicts for right in v.places],
        "relations": [right for v in verdicts for right in v.relations],
        "ground": [v.ground for v in verdicts],
        "characters": [right for v in verdicts for right in v.characters],
        "signs": [v.text for v in verdicts if v.text is not None],
        "all": [v.is_right for v in verdicts],
    }
    return {name: count(rows) for name, rows in trials.items()}


def count(rows: Sequence[bool]) -> dict[str, object]:
    """Count the share of trials that are right; None of none."""
    share = sum(rows) / len(rows) if rows else None
    bounds = None if share is None else interval(share, len(rows))
    return {"share": share, "trials": len(rows), "interval_95": bounds}


def missed(name: str, row: dict[str, object]) -> bool:
    """Return whether a share is below its goal; with no trials it is not."""
    share = row["share"]
    return name in GOALS and isinstance(share, float) and share < GOALS[name]


def describe(found: Found) -> str:
    """Describe what was found, in a line."""
    things = " ".join(f"{kind}{number if number > 1 else ''}" for kind, number in found.kinds.items())
    return f"{things or 'nothing'}{f' “{found.text}”' if found.text else ''}, {found.ground}"


def measure_prompts(
    detector: Detector, prompts: Sequence[Prompt], images: Tensor
) -> tuple[dict[str, dict[str, object]], list[dict[str, str]], list[int]]:  # fmt: skip
    """Judge the images of prompts: the shares, what was found in wrong ones, and the wrong ones' indices."""
    found = detector.detect(images.to(detector.to_ground.weight.device))
    verdicts = [judge(prompt, each) for prompt, each in zip(prompts, found, strict=True)]
    failures = [i for i, verdict in enumerate(verdicts) if not verdict.is_right]
    wrong = [{"prompt": prompts[i].text, "found": describe(found[i])} for i in failures]
    return summarize(verdicts), wrong, failures


def measure_singles(pipe: KolorsPipeline, detector: Detector, grammar: Grammar, language: int
                    ) -> tuple[dict[str, object], list[dict[str, str]]]:  # fmt: skip
    """Measure in how many images of one thing it is alone there; and what was found in the others."""
    asked = write_single_prompts(grammar, language)
    images = generate_all(pipe, [text for text, _ in asked], GUIDANCE, 20_000)
    found = detector.detect(images.to(pipe.device))
    rows = [each.kinds == {kind: 1} for (_, kind), each in zip(asked, found, strict=True)]
    wrong = [
        {"prompt": text, "found": describe(each)}
        for (text, _), each, right in zip(asked, found, rows, strict=True) if not right
    ]  # fmt: skip
    return count(rows), wrong


def measure_seeds(pipe: KolorsPipeline, detector: Detector, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Measure the mean feature distance of two seeds' images of a prompt, and what to compare it with.

    "scenes": of renders of the prompt's scene and of another with the same kinds, numbers and ground, which
    is as far as two images of a prompt may be. "same": of a render and its reconstruction by the VAE.
    """
    texts, device = [prompt.text for prompt in prompts], pipe.device
    first, second = (generate_all(pipe, texts, GUIDANCE, seed).to(device) for seed in (30_000, 40_000))
    renders = torch.stack([pixels(prompt.scene) for prompt in prompts]).to(device)
    others = torch.stack([pixels(another(prompt.scene, prompt.scene.seed)) for prompt in prompts]).to(device)
    pairs = {
        "seeds": (first, second), "scenes": (renders, others),
        "same": (renders, detection.reconstructed(pipe.vae, renders)),
    }  # fmt: skip
    return {name: float(detector.distance(a, b).mean()) for name, (a, b) in pairs.items()}


def sheet(
    images: Tensor, labels: Sequence[str], columns: int, scale: float = 0.75, marked: Collection[int] = ()
) -> Image.Image:
    """Lay out images [B, 3, H, W] in rows, each over its label, in lines as needed. marked: labels in red."""
    side = round(images.shape[-1] * scale)
    size = 12 if side > 90 else 9
    font = ImageFont.truetype(str(LABELS), size) if LABELS.exists() else ImageFont.load_default(size)
    texts = [wrap(label, side - 4, font.getlength) for label in labels]
    below = 4 + (size + 2) * max(text.count("\n") + 1 for text in texts)
    rows = math.ceil(len(images) / columns)
    page = Image.new("RGB", (columns * side, rows * (side + below)), "white")
    pen = ImageDraw.Draw(page)
    for i, image in enumerate(to_images(images, "pil")):
        x, y = i % columns * side, i // columns * (side + below)
        page.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x, y))
        color = "red" if i in marked else "black"
        pen.multiline_text((x + side / 2, y + side + 1), texts[i], color, font, "ma", 2, "center")
    return page


def wrap(text: str, width: float, measure: Callable[[str], float]) -> str:
    """Break a text into lines of at most `width`, at a space of the line if it has one."""
    lines, line = list[str](), ""
    for character in text:
        if line and measure(line + character) > width:
            head, space, tail = (line + character).rpartition(" ")
            lines.append(head if space else line)
            line = tail if space else character
        else:
            line += character
    return "\n".join([*lines, line])


def interval(share: float, count: int) -> tuple[float, float]:
    """Compute Wilson's 95% interval of a share of `count` trials."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return round(middle - half, 4), round(middle + half, 4)


def measure_language(
    pipe: KolorsPipeline, detector: Detector, grammar: Grammar, language: int, prompts: int, out: Path
) -> list[dict[str, object]]:
    """Measure one language with and without guidance, and write its sheet."""
    rows, asked = list[dict[str, object]](), write_prompts(grammar, prompts, language)
    for scale in (GUIDANCE, 1.0):
        images = generate_all(pipe, [prompt.text for prompt in asked], scale, 0)
        shares, wrong, failures = measure_prompts(detector, asked, images)
        row = {"language": LANGUAGES[language], "guidance": scale, "prompts": prompts}
        if scale == GUIDANCE:
            shares["single"], singles = measure_singles(pipe, detector, grammar, language)
            row["goals_missed"] = [name for name, share in shares.items() if missed(name, share)]
            row["wrong_singles"] = singles
            labels = [prompt.text for prompt in asked[:SHEET]]
            sheet(images[:SHEET], labels, 8, 1.0, failures).save(out / f"{LANGUAGES[language]}.png")
        rows.append({**row, "shares": shares, "wrong": wrong[:60]})
        told = ", ".join(f"{n} {s['share']:.1%}" for n, s in shares.items() if s["share"] is not None)
        print(f"{LANGUAGES[language]}, guidance {scale}, {prompts} prompts: {told}", flush=True)
    return rows


def main(data: Path, model: str, out: Path, prompts: int) -> int:
    """Measure, write, and return the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    device, start = best_device(), time.monotonic()
    grammar = Grammar(read_concepts(data / "package"))
    detector = load_detector(data / "detector", device)
    pipe = KolorsPipeline.from_pretrained(model, device=device)
    vaes = {"renders": None, "decoded": pipe.vae}
    own = {name: detection.accuracy(detector, 400, vae) for name, vae in vaes.items()}
    print(f"the detector's own accuracy: {own}", flush=True)
    rows = [row for i in (0, 1) for row in measure_language(pipe, detector, grammar, i, prompts, out)]
    asked = write_prompts(grammar, min(ALIKE, prompts), 0)
    distances = measure_seeds(pipe, detector, asked)
    pairs = [p for i in (0, 1) for p in of_two_things(write_prompts(grammar, prompts, i))[: ALIKE // 2]]
    draw = partial(generate, pipe, scale=GUIDANCE)
    attention = measure_attention(pipe, detector, grammar.names, pairs, draw)
    print(f"distances: {distances}; attention inside to outside: {attention}", flush=True)
    sheet(generate_all(pipe, SHOWN, GUIDANCE, 7), SHOWN, 8, 1.0).save(out / "samples.png")
    ratio = attention["ratio"]
    is_good = not any(row.get("goals_missed") for row in rows) and (ratio or 0) >= GOAL_OF_ATTENTION
    result = {
        "version": VERSION, "model": model, "steps": STEPS, "sampler": "DPM++ 2M Karras",
        "device": str(device), "seconds": round(time.monotonic() - start), "detector": own,
        "goals": GOALS, "rows": rows, "distances": distances,
        "attention": {**attention, "goal": GOAL_OF_ATTENTION},
    }  # fmt: skip
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (out / "quality.json").write_text(text, encoding="utf-8")
    return 0 if is_good else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="tiny", help="a checkpoint folder (default: the embedded model)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tiny"))
    parser.add_argument("--prompts", type=int, default=300, help="of each language (default: 300)")
    options = parser.parse_args()
    raise SystemExit(main(options.data, options.model, options.out, options.prompts))
