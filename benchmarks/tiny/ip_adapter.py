"""An image encoder and an IP-Adapter for the embedded model, from packages to what `load_ip_adapter` loads.

    apt-get install fonts-noto-color-emoji fonts-noto-cjk npm
    torchrun --nproc-per-node 2 -m benchmarks.tiny.ip_adapter OUT

The encoder (image_encoder.py) learns to read scenes; then a resampler and the image branches of the UNet's
cross-attentions learn to draw the things and the ground of an image prompt that shows them elsewhere, so that
they learn what there is and not where. The UNet and the encoder stay as they are. A killed run goes on
where it was. Writes `OUT/model`, a sheet (image prompt, without, with it) and ip_adapter.json.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.tiny import image_encoder
from benchmarks.tiny.__main__ import fetch_names
from benchmarks.tiny.captions import Grammar
from benchmarks.tiny.controlnet import followed
from benchmarks.tiny.emoji import SIZE, read_concepts
from benchmarks.tiny.image_encoder import ENCODER, TRAINING, ImageReading
from benchmarks.tiny.processes import is_first, processes, report_every, wait_for_all
from benchmarks.tiny.quality import sheet
from benchmarks.tiny.scenes import GROUNDS, KINDS, SIGN, Scene, compose, render
from benchmarks.tiny.sparse_scenes import PromptedBatch, PromptedScenes
from kolors_core import DPMSolverMultistepScheduler, KolorsPipeline, canny
from kolors_core.adapters.clip_vision import CLIPVision, preprocess_clip
from kolors_core.adapters.ip_adapter import IPAdapter, IPAdapterConfig, attach, cross_attentions
from kolors_core.attention import attention_kernel
from kolors_core.chatglm import TextEmbedding
from kolors_core.checkpoint import save_component
from kolors_core.context import ImagePrompt
from kolors_core.image import preprocess_vae
from kolors_core.training.trainer import Trainer, TrainingConfig
from kolors_core.unet import UNet
from weights_convert import TABLES
from weights_convert.safetensors_files import save_tensors

CONFIG = TrainingConfig(
    steps=4500, batch_size=16, learning_rate=1e-3, schedule="cosine", warmup=100, weight_decay=0.0,
    ema_decay=0.99, min_snr_gamma=5.0, max_tokens=64, dtype=torch.bfloat16, save_every=100,
)  # fmt: skip
WIDTH, QUERIES, HEADS, LAYERS = 96, 8, 2, 2  # of the resampler
GUIDANCE, STEPS = 3.0, 25
ASKED = 48  # image prompts that the figures are of: combinations never seen in training
SHOWN = 10  # of the sheet
SEEDS = 2  # images drawn of each


def new_adapter(unet: UNet, image_dim: int) -> IPAdapter:
    """An adapter for a UNet: its branches start as copies of the keys and values that read text."""
    places = cross_attentions(unet).values()
    adapter = IPAdapter(IPAdapterConfig(
        image_dim=image_dim, width=WIDTH, queries=QUERIES, heads=HEADS, feed_forward_size=2 * WIDTH,
        layers=LAYERS, context_dim=unet.config.context_dim,
        cross_attention_widths=tuple(place.to_q.in_features for place in places),
    ))  # fmt: skip
    for branch, place in zip(adapter.branches.values(), places, strict=True):
        branch.to_k.load_state_dict(place.to_k.state_dict())  # pyright: ignore[reportAttributeAccessIssue]
        branch.to_v.load_state_dict(place.to_v.state_dict())  # pyright: ignore[reportAttributeAccessIssue]
    return adapter


class ImagePromptLoss(nn.Module):
    """The diffusion loss (kolors_core/training/loss.py) of a frozen UNet with an adapter that is trained."""

    def __init__(self, unet: UNet, adapter: IPAdapter, sigmas: Tensor, config: TrainingConfig) -> None:
        super().__init__()
        self.unet, self.adapter, self.config, self.sigmas = unet, adapter, config, sigmas

    def forward(self, batch: PromptedBatch) -> Tensor:
        """The mean loss of the rank's images."""
        assert batch.states is not None
        sigma = self.sigmas.to(batch.latents.device)[batch.timesteps][:, None, None, None]  # [b, 1, 1, 1]
        noisy = (batch.latents + sigma * batch.noise) / (sigma**2 + 1).sqrt()
        prompt = ImagePrompt(self.adapter.tokens(batch.states[:, None]))  # of one image each
        text, times = batch.text, batch.timesteps.float()
        assert isinstance(text, TextEmbedding)
        inputs = noisy, times, text.tokens, text.pooled, batch.size_ids, text.counts
        predicted = self.unet(*inputs, image_prompts=[prompt])
        loss = (predicted.float() - batch.noise).square().mean(dim=(1, 2, 3))  # [b]
        if self.config.min_snr_gamma is not None:
            snr = sigma.flatten() ** -2
            loss = loss * (snr.clamp(max=self.config.min_snr_gamma) / snr)
        return loss.mean()


def train_encoder(folder: Path, training: TrainingConfig = TRAINING) -> ImageReading:
    """The trained encoder with its heads, taken from the folder if it is there already."""
    file = folder / "reading.safetensors"
    if not file.exists():
        trained = image_encoder.train(ENCODER, training, folder, torch.device("cpu"))
        if is_first():
            save_file(trained.state_dict(), file)
        wait_for_all()
    reading = ImageReading(CLIPVision(ENCODER))
    reading.load_state_dict(load_file(file))
    return reading.eval().requires_grad_(False)


def train(
    pipe: KolorsPipeline, encoder: CLIPVision, grammar: Grammar, folder: Path, config: TrainingConfig = CONFIG
) -> IPAdapter:
    """Train an adapter on the pipeline's frozen UNet, and leave it attached."""
    assert pipe.tokenizer is not None and pipe.text_encoder is not None
    torch.manual_seed(config.seed)  # of the resampler's first weights
    adapter = new_adapter(pipe.unet, encoder.config.hidden_size)
    pipe.unet.requires_grad_(False)
    attach(pipe.unet, adapter, encoder)
    data = PromptedScenes(encoder, grammar, pipe.tokenizer, pipe.text_encoder, pipe.vae, config)
    objective = ImagePromptLoss(pipe.unet, adapter, pipe.scheduler.training_sigmas(), config)
    trainer = Trainer(objective, data, config, folder, report_every(50, "IP-Adapter"))
    trainer.fit(progress=False)
    trainer.load_ema_weights()
    adapter.requires_grad_(False)
    return adapter


def save(adapter: IPAdapter, encoder: CLIPVision, folder: Path) -> None:
    """Write a folder that `load_ip_adapter` loads, of this library and the reference, in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    public = {TABLES["ip_adapter"].to_public(name): t.half() for name, t in adapter.state_dict().items()}
    save_tensors(public, folder / "ip_adapter.safetensors")
    half = CLIPVision(encoder.config).half()
    half.load_state_dict(encoder.state_dict())
    save_component(half, folder, "image_encoder")


@dataclass
class Answers:
    """Answers to image prompts: shares of their kinds that are found, of what is found that was wanted, of
    their grounds; and of their edges that are at the same place, which copying would raise.
    """

    kinds: list[float]
    wanted: list[float]
    ground: list[float]
    edges: list[float]

    def add(self, reading: ImageReading, scene: Scene, prompt: Image.Image, drawn: Image.Image) -> None:
        """Count one image."""
        is_found, ground = reading.kinds(preprocess_clip([drawn], ENCODER.image_size))
        found = {KINDS[int(i)] for i in is_found[0].nonzero().flatten()}
        self.kinds.append(float(np.mean([kind in found for kind in scene.kinds])))
        self.wanted.append(float(np.mean([kind in scene.kinds for kind in found])) if found else 0.0)
        self.ground.append(float(GROUNDS[int(ground[0])] == scene.ground))
        self.edges.append(followed(canny(prompt), drawn))

    def means(self) -> dict[str, float]:
        """Each measure's mean."""
        return {name: round(float(np.mean(values)), 3) for name, values in vars(self).items()}


def unseen_scenes(count: int) -> list[Scene]:
    """Scenes of combinations that are not trained on, without signs: those are for captions to say."""
    found, seed = [], 10**6
    while len(found) < count:
        scene = compose(seed, is_trained=False)
        seed += 1
        if SIGN not in scene.kinds:
            found.append(scene)
    return found


def compare(pipe: KolorsPipeline, reading: ImageReading, out: Path, asked: int = ASKED) -> dict[str, object]:
    """Draw from image prompts alone; write the sheet, return figures without, with and of the prompts."""
    answers = {name: Answers([], [], [], []) for name in ("read of the image prompt", "without", "with")}
    given: Any = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": SIZE, "width": SIZE}
    rows = []
    for i, scene in enumerate(unseen_scenes(asked)):
        prompt = render(scene)
        answers["read of the image prompt"].add(reading, scene, prompt, prompt)
        shown = [prompt]
        for name, scale, seeds in (("without", 0.0, 1), ("with", 1.0, SEEDS)):
            pipe.set_ip_adapter_scale(scale)
            for seed in range(seeds):
                generator = torch.Generator().manual_seed(1000 * seed + i)
                drawn = pipe("", ip_adapter_image=prompt, generator=generator, **given).images[0]
                answers[name].add(reading, scene, prompt, drawn)
                shown.append(drawn)
        rows.append(shown)
    columns = zip(*rows[:SHOWN], strict=True)
    images = torch.cat([preprocess_vae(list(column)) for column in columns])
    titles = ["image prompt", "without", *["with"] * SEEDS]
    labels = [title for title in titles for _ in rows[:SHOWN]]
    sheet(images, labels, min(SHOWN, len(rows)), scale=1.0).save(out / "ip_adapter.png", optimize=True)
    return {"image_prompts": asked, **{name: found.means() for name, found in answers.items()}}


def main(out: Path, model: str, training: TrainingConfig = TRAINING, config: TrainingConfig = CONFIG) -> int:
    """Every stage; returns 1 unless far more of an image prompt's things are drawn than without it."""
    with processes() as is_the_first:
        grammar = Grammar(read_concepts(fetch_names(out)))
        pipe = KolorsPipeline.from_pretrained(model)
        with attention_kernel("matmul"):
            reading = train_encoder(out / "encoder", training)
            adapter = train(pipe, reading.encoder, grammar, out / "run", config)
    if not is_the_first:
        return 0
    save(adapter, reading.encoder, out / "model")
    pipe = KolorsPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    pipe.load_ip_adapter(out / "model")  # as a user does
    parameters = {"adapter": adapter, "image_encoder": reading.encoder}
    result = {
        "steps": config.steps, "batch_size": config.batch_size, "encoder_steps": training.steps,
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parameters.items()},
        **compare(pipe, reading, out),
    }  # fmt: skip
    (out / "ip_adapter.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0 if result["with"]["kinds"] > result["without"]["kinds"] + 0.4 else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder for the state of the run and the results")
    parser.add_argument("--model", default="tiny", help="a checkpoint folder (default: the embedded model)")
    options = parser.parse_args()
    raise SystemExit(main(options.out, options.model))
