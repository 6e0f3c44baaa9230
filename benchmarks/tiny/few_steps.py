"""Few steps: what distillation (kolors_core/training/distillation.py) gains on the embedded model.

    python -m benchmarks.tiny.few_steps OUT [--model tiny] [--students lcm-1 lcm-5] [--steps 800]

OUT: a folder, best that of the model's recipe (`python -m benchmarks.tiny OUT`), whose names and detector are
used; a run that was killed goes on. Each student is trained to draw at guidance 1 what its teacher draws at
1 or 5, as a LoRA or as a whole, and then draws held-out prompts in both languages in 1, 2, 4 and 8 steps, as
does the model as it is. Measured are the share of images that are right (judge.py), the squared distance of
latents to the right ones, which are the model's own of many steps from the same noise, and the time.
Writes few_steps.json, few_steps.png and each LoRA to OUT/few_steps; nothing is shipped by itself.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tiny.__main__ import fetch_names
from benchmarks.tiny.captions import Grammar
from benchmarks.tiny.detector import Detector
from benchmarks.tiny.emoji import read_concepts
from benchmarks.tiny.judge import LANGUAGES, Prompt, write_prompts
from benchmarks.tiny.processes import report_every
from benchmarks.tiny.quality import BATCH, SHOWN, load_detector, measure_prompts, sheet
from benchmarks.tiny.scene_data import SceneLatents
from kolors_core.adapters.lora import attach, save_adapters
from kolors_core.attention import attention_kernel
from kolors_core.config import VERSION
from kolors_core.devices import best_device
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.schedule import Scheduler
from kolors_core.schedulers import DPMSolverMultistepScheduler, LCMScheduler, TCDScheduler
from kolors_core.training.distillation import ConsistencyLoss
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer, TrainingConfig

COUNTS, RIGHT_STEPS, SHOWN_AT_MOST = (1, 2, 4, 8), 100, 8
ETA = 0.3  # of TCD, the reference's
SCHEDULERS: dict[str, Scheduler] = {
    "dpm++ 2m karras": DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "lcm": LCMScheduler(), "tcd": TCDScheduler(),
}  # fmt: skip
CONFIG = TrainingConfig(
    steps=800, batch_size=32, learning_rate=5e-4, schedule="cosine", warmup=50, weight_decay=0.0,
    adam_beta2=0.99, ema_decay=0.98, dtype=torch.bfloat16, save_every=50, seed=11,
)  # fmt: skip


@dataclass(frozen=True)
class Student:
    """What is trained. guidance: baked in. rank: of the LoRA, None for all weights. rate: of learning."""

    guidance: float
    trajectory: bool = False
    rank: int | None = 8
    rate: float = 5e-4

    @property
    def sampler(self) -> str:
        """The name of the sampler that it is made for."""
        return "tcd" if self.trajectory else "lcm"


STUDENTS = {
    "lcm-1": Student(1.0), "lcm-5": Student(5.0), "tcd-5": Student(5.0, trajectory=True),
    "lcm-5-whole": Student(5.0, rank=None, rate=1e-4),
}  # fmt: skip


def train(
    loss: DiffusionLoss, data: SceneLatents, config: TrainingConfig, folder: Path, device: torch.device
) -> dict[str, Any]:
    """Train in a folder, or take what is finished there, to the weights' average; returns how it went."""
    start = time.monotonic()
    trainer = Trainer(loss, data, config, folder, report_every(50, folder.name))
    with attention_kernel("matmul") if device.type == "cpu" else nullcontext():
        trainer.fit(progress=False)
    trainer.load_ema_weights()
    return {"steps": config.steps, "batch": config.batch_size, "seconds": time.monotonic() - start,
            "losses": repr(trainer.losses)}  # fmt: skip


@contextmanager
def distilled(
    pipe: KolorsPipeline, grammar: Grammar, student: Student, config: TrainingConfig, folder: Path
) -> Iterator[dict[str, Any]]:
    """Train a student, or take a finished one from the folder; within, it is the pipeline's UNet.

    Yields how its training went. After it the pipeline is as it was.
    """
    assert pipe.tokenizer is not None and pipe.text_encoder is not None
    teacher, config = pipe.unet.requires_grad_(False), replace(config, learning_rate=student.rate)
    sigmas, adapter = pipe.scheduler.training_sigmas(), None
    with torch.no_grad():
        nothing = pipe.text_encoder(pipe.tokenizer([""]).merge_padding().to(pipe.device))
    if student.rank is None:
        unet = copy.deepcopy(teacher).requires_grad_(True)
    else:
        unet, generator = teacher, torch.Generator().manual_seed(config.seed)
        adapter = attach(unet, student.rank, generator=generator)
    loss = ConsistencyLoss(
        unet, sigmas, config, teacher=teacher if adapter is None else None, trajectory=student.trajectory,
        guidance_scale=student.guidance, negative=nothing if student.guidance > 1 else None,
    )  # fmt: skip
    data = SceneLatents(grammar, pipe.tokenizer, pipe.text_encoder, pipe.vae, config, len(sigmas))
    try:
        trained = train(loss, data, config, folder, pipe.device)
        if adapter is not None:
            file = folder.with_suffix(".safetensors")
            save_adapters({"unet": adapter}, file, overwrite=True)
            trained["bytes"] = file.stat().st_size
        pipe.unet = unet.requires_grad_(False)
        yield trained
    finally:
        pipe.unet = teacher
        if adapter is not None:
            adapter.detach()


@torch.no_grad()
def draw(
    pipe: KolorsPipeline, prompts: Sequence[str], scheduler: Scheduler, steps: int, guidance: float,
    seed: int = 0,
) -> tuple[Tensor, float]:  # fmt: skip
    """Draw latents [B, 4, H/8, W/8] on the CPU, of which i has seed + i; and the seconds an image takes.

    The time is that of batches, from prompts, whose embeddings the pipeline keeps, to latents.
    """
    pipe.scheduler, parts, start = scheduler, list[Tensor](), time.monotonic()
    for first in range(0, len(prompts), BATCH):
        own = list(prompts[first : first + BATCH])
        seeds = [torch.Generator().manual_seed(seed + first + i) for i in range(len(own))]
        parts.append(pipe(
            own, num_inference_steps=steps, guidance_scale=guidance, generator=seeds, output_type="latent",
            eta=ETA if isinstance(scheduler, TCDScheduler) else 0.0,
        ).images.float().cpu())  # fmt: skip
    return torch.cat(parts), (time.monotonic() - start) / len(prompts)


@torch.no_grad()
def decode(pipe: KolorsPipeline, latents: Tensor) -> Tensor:
    """Decode latents to images [B, 3, H, W] in [-1, 1], on the CPU."""
    parts = [
        pipe.vae.decode_latents(part.to(pipe.device)).clamp(-1, 1).cpu() for part in latents.split(BATCH)
    ]
    return torch.cat(parts)


class Measurement:
    """Measurement of models on the same prompts and noise: rows of numbers, and images of the first prompts.

    asked: prompts of each language.
    """

    def __init__(self, pipe: KolorsPipeline, detector: Detector, asked: Sequence[Sequence[Prompt]]) -> None:
        self.pipe, self.detector, self.asked = pipe, detector, asked
        self.rows = list[dict[str, Any]]()
        self.images, self.labels = list[Tensor](), list[str]()
        self.right: dict[tuple[float, int], Tensor] = {}
        for guidance in sorted({student.guidance for student in STUDENTS.values()}):
            self.measure("none", "dpm++ 2m karras", RIGHT_STEPS, guidance, guidance)

    def measure(self, student: str, sampler: str, steps: int, guidance: float, baked: float) -> None:
        """Measure one way to draw. guidance: when drawing; baked: of the right images."""
        for language, prompts in enumerate(self.asked):
            texts = [prompt.text for prompt in prompts]
            latents, seconds = draw(self.pipe, texts, SCHEDULERS[sampler], steps, guidance)
            right = self.right.setdefault((baked, language), latents)  # the first is of `RIGHT_STEPS`
            images = decode(self.pipe, latents)
            shares = measure_prompts(self.detector, prompts, images)[0]
            row = {
                "student": student, "sampler": sampler, "steps": steps, "guidance_in_drawing": guidance,
                "guidance": baked, "language": LANGUAGES[language],
                "distance": (latents - right).square().mean().item(), "seconds": seconds, "shares": shares,
            }  # fmt: skip
            self.rows.append(row)
            print(describe(row), flush=True)
        shown, _ = draw(self.pipe, SHOWN[:SHOWN_AT_MOST], SCHEDULERS[sampler], steps, guidance, seed=7)
        self.images.append(decode(self.pipe, shown))
        self.labels += [f"{student}, {sampler} {steps}, guidance {baked:g}"] * len(shown)


def describe(row: dict[str, Any]) -> str:
    """Describe a row in a line."""
    shares = ", ".join(f"{name} {row['shares'][name]['share'] or 0:.1%}" for name in ("all", "present"))
    return (
        f"{row['student']:12} {row['sampler']:15} {row['steps']:3} steps, guidance {row['guidance']:g}, "
        f"{row['language']}: {shares}, distance {row['distance']:.4f}, {1000 * row['seconds']:.0f} ms"
    )


def run(
    pipe: KolorsPipeline, detector: Detector, grammar: Grammar, out: Path, students: Sequence[str],
    config: TrainingConfig, prompts: int, counts: Sequence[int] = COUNTS,
) -> dict[str, Any]:  # fmt: skip
    """Measure the model as it is, then train and measure each student; returns what is written to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    pipe.set_progress_bar_config(disable=True)
    own = pipe.scheduler
    measured = Measurement(pipe, detector, [write_prompts(grammar, prompts, language) for language in (0, 1)])
    trained: dict[str, Any] = {}
    for guidance in sorted({STUDENTS[name].guidance for name in students}):
        for sampler in SCHEDULERS:
            for steps in counts:
                measured.measure("none", sampler, steps, guidance, guidance)
    for name in students:
        student, pipe.scheduler = STUDENTS[name], own
        with distilled(pipe, grammar, student, config, out / name) as trained[name]:
            for steps in counts:
                measured.measure(name, student.sampler, steps, 1.0, student.guidance)
    pipe.scheduler = own
    images = torch.cat(measured.images)
    page = sheet(images, measured.labels, SHOWN_AT_MOST, 1.0)
    page.quantize(64).save(out / "few_steps.png", optimize=True)
    result = {"version": VERSION, "prompts": prompts, "right": RIGHT_STEPS, "device": str(pipe.device),
              "trained": trained, "rows": measured.rows}  # fmt: skip
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (out / "few_steps.json").write_text(text, encoding="utf-8")
    return result


def open_all(out: Path, model: str) -> tuple[KolorsPipeline, Detector, Grammar]:
    """Load the model, and load or make what judges it in the recipe's folder."""
    device = best_device()
    grammar = Grammar(read_concepts(fetch_names(out)))
    detector = load_detector(out / "detector", device)
    return KolorsPipeline.from_pretrained(model, device=device), detector, grammar


def main(out: Path, model: str, students: Sequence[str], steps: int, prompts: int) -> None:
    """Load what is needed, and run."""
    run(*open_all(out, model), out / "few_steps", students, replace(CONFIG, steps=steps), prompts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder, best that of the model's recipe")
    parser.add_argument("--model", default="tiny", help="a checkpoint folder (default: the embedded model)")
    parser.add_argument(
        "--students", nargs="+", choices=STUDENTS, default=list(STUDENTS), help="(default: all)"
    )
    parser.add_argument("--steps", type=int, default=CONFIG.steps, help="of training (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=300, help="of each language (default: %(default)s)")
    options = parser.parse_args()
    main(options.out, options.model, options.students, options.steps, options.prompts)
