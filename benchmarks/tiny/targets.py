"""Other targets: the embedded model fine-tuned to predict v, and the velocity of a rectified flow.

    python -m benchmarks.tiny.targets OUT [--model tiny] [--steps 600] [--prompts 100]

OUT: a folder, best that of the model's recipe (`python -m benchmarks.tiny OUT`), whose names and detector are
used; a run that was killed goes on. Each fine-tuned model is saved and read again, and draws held-out prompts
in both languages by three samplers, as does the model as it is; judge.py says what is right.
Writes targets.json, targets.png and the models to OUT/targets.
"""

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tiny.captions import Grammar
from benchmarks.tiny.detector import Detector
from benchmarks.tiny.few_steps import decode, draw, open_all, train
from benchmarks.tiny.judge import LANGUAGES, Prompt, write_prompts
from benchmarks.tiny.quality import SHOWN, measure_prompts, sheet
from benchmarks.tiny.scene_data import SceneLatents
from kolors_core.config import VERSION
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.schedule import Scheduler
from kolors_core.schedulers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)  # fmt: skip
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import TrainingConfig

STEPS, GUIDANCE, SHOWN_AT_MOST = 25, 5.0, 8
CONFIG = TrainingConfig(
    steps=600, batch_size=32, learning_rate=5e-4, schedule="cosine", warmup=50, weight_decay=0.01,
    adam_beta2=0.99, max_grad_norm=0.5, ema_decay=0.99, min_snr_gamma=5.0, dtype=torch.bfloat16,
    save_every=100, seed=13,
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """A target, and the samplers that draw it: the first's sigmas are trained on, and it is saved."""

    prediction_type: str
    samplers: dict[str, Scheduler]


def _diffusion(prediction_type: str) -> Way:
    given: dict[str, Any] = {"prediction_type": prediction_type}
    return Way(prediction_type, {
        "Euler": EulerDiscreteScheduler(**given),
        "DPM++ 2M Karras": DPMSolverMultistepScheduler(use_karras_sigmas=True, **given),
        "Heun": HeunDiscreteScheduler(**given),
    })  # fmt: skip


_FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
WAYS = {
    "epsilon": _diffusion("epsilon"), "v": _diffusion("v_prediction"),
    "velocity": Way("flow_prediction", {
        "Euler of flows": FlowMatchEulerDiscreteScheduler(num_train_timesteps=1100),
        "DPM++ 2M": DPMSolverMultistepScheduler(**_FLOW), "UniPC": UniPCMultistepScheduler(**_FLOW),
    }),
}  # fmt: skip
AS_IT_IS = "epsilon"


def fine_tune(
    pipe: KolorsPipeline, grammar: Grammar, way: Way, config: TrainingConfig, folder: Path
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune a copy of the UNet, or take a finished one; save model and scheduler in folder/model.

    Returns how it went. The pipeline stays as it is.
    """
    assert pipe.tokenizer is not None and pipe.text_encoder is not None
    config = replace(config, prediction_type=way.prediction_type)
    scheduler = next(iter(way.samplers.values()))
    sigmas, unet = scheduler.training_sigmas(), copy.deepcopy(pipe.unet).requires_grad_(True)
    data = SceneLatents(grammar, pipe.tokenizer, pipe.text_encoder, pipe.vae, config, len(sigmas))
    trained = train(DiffusionLoss(unet, None, sigmas, config), data, config, folder, pipe.device)
    tuned = KolorsPipeline(pipe.vae, pipe.text_encoder, pipe.tokenizer, unet, scheduler)
    tuned.save_pretrained(folder / "model")
    return trained


def measure(
    pipe: KolorsPipeline, detector: Detector, name: str, asked: Sequence[Sequence[Prompt]]
) -> tuple[list[dict[str, Any]], list[Tensor], list[str]]:  # fmt: skip
    """Measure a model by each of its samplers: rows, and images of the first of `SHOWN` with their labels."""
    rows, images, labels = list[dict[str, Any]](), list[Tensor](), list[str]()
    for sampler, scheduler in WAYS[name].samplers.items():
        for language, prompts in enumerate(asked):
            latents, _ = draw(pipe, [prompt.text for prompt in prompts], scheduler, STEPS, GUIDANCE)
            shares = measure_prompts(detector, prompts, decode(pipe, latents))[0]
            row = {"target": name, "sampler": sampler, "language": LANGUAGES[language], "shares": shares}
            told = ", ".join(
                f"{part} {shares[part]['share'] or 0:.1%}" for part in ("all", "present", "ground")
            )
            print(f"{name}, {sampler}, {row['language']}: {told}", flush=True)
            rows.append(row)
        shown, _ = draw(pipe, SHOWN[:SHOWN_AT_MOST], scheduler, STEPS, GUIDANCE, seed=7)
        images.append(decode(pipe, shown))
        labels += [f"{name}, {sampler}"] * len(shown)
    return rows, images, labels


def run(
    pipe: KolorsPipeline, detector: Detector, grammar: Grammar, out: Path, config: TrainingConfig,
    prompts: int,
) -> dict[str, Any]:  # fmt: skip
    """Measure the model as it is, then fine-tune and measure each; returns what is written to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    asked = [write_prompts(grammar, prompts, language) for language in (0, 1)]
    rows, images, labels, trained = list[dict[str, Any]](), list[Tensor](), list[str](), dict[str, Any]()
    for name, way in WAYS.items():
        own = pipe
        if name != AS_IT_IS:
            trained[name] = fine_tune(pipe, grammar, way, config, out / name)
            own = KolorsPipeline.from_pretrained(out / name / "model", device=pipe.device)
            if own.scheduler != next(iter(way.samplers.values())):
                raise RuntimeError(f"{name}: the scheduler that was saved is not the one that was read")
        own.set_progress_bar_config(disable=True)
        for all_of, part in zip((rows, images, labels), measure(own, detector, name, asked), strict=True):
            all_of.extend(part)
    page = sheet(torch.cat(images), labels, SHOWN_AT_MOST, 1.0)
    page.quantize(128).save(out / "targets.png", optimize=True)
    result = {"version": VERSION, "prompts": prompts, "steps": STEPS, "guidance": GUIDANCE,
              "device": str(pipe.device), "trained": trained, "rows": rows}  # fmt: skip
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (out / "targets.json").write_text(text, encoding="utf-8")
    return result


def main(out: Path, model: str, steps: int, prompts: int) -> None:
    """Load what is needed, and run."""
    run(*open_all(out, model), out / "targets", replace(CONFIG, steps=steps), prompts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder, best that of the model's recipe")
    parser.add_argument("--model", default="tiny", help="a checkpoint folder (default: the embedded model)")
    parser.add_argument("--steps", type=int, default=CONFIG.steps, help="of training (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=100, help="of each language (default: %(default)s)")
    options = parser.parse_args()
    main(options.out, options.model, options.steps, options.prompts)
