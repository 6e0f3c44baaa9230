"""Write a small, random Kolors checkpoint with the reference's own `save_pretrained`.

`python -m tests.support.reference_folder DIR` makes a folder that both libraries load, without any download:
its images are coloured noise, but every file, name and format is the real one.
"""

import argparse
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, KolorsPipeline
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

from kolors_core.config import KolorsConfig
from tests.support.parity import reference_chatglm, reference_unet, reference_vae
from tests.support.small import SMALL, randomise

KOLORS_SCHEDULER = {
    "num_train_timesteps": 1100, "beta_start": 0.00085, "beta_end": 0.014, "beta_schedule": "scaled_linear",
    "steps_offset": 1, "timestep_spacing": "leading",
}  # fmt: skip


def train_tokenizer(folder: Path) -> Path:
    """Train a SentencePiece model of ChatGLM's kind with a few hundred pieces; return its path."""
    from sentencepiece import SentencePieceTrainer

    words = [
        "a photo of the",
        "red",
        "green",
        "small",
        "ladybug",
        "cat",
        "一张",
        "照片",
        "的",
        "瓢虫",
        "猫",
        "在",
    ]
    words += ["木", "牌", "上", "holding", "sign", "quality", "film", "macro", "zoom", "high"]
    order = random.Random(0)
    sentences = [" ".join(order.choices(words, k=8)) for _ in range(400)]
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(folder / "tokenizer"), vocab_size=400,
        model_type="bpe", byte_fallback=True, minloglevel=2, pad_id=-1,
    )  # fmt: skip
    return folder / "tokenizer.model"


def reference_pipeline(
    tokenizer: Path, config: KolorsConfig = SMALL, force_zeros: bool = False
) -> KolorsPipeline:
    """The reference's pipeline with random weights, and at least the tokenizer's vocabulary."""
    reference_tokenizer = ChatGLMTokenizer(str(tokenizer))
    vocabulary = max(config.text_encoder.vocab_size, reference_tokenizer.vocab_size)
    parts = {
        "text_encoder": reference_chatglm(replace(config.text_encoder, vocab_size=vocabulary)),
        "unet": reference_unet(config.unet),
        "vae": reference_vae(config.vae),
    }
    for seed, model in enumerate(parts.values()):
        randomise(model, seed)
    pipe = KolorsPipeline(
        **parts, tokenizer=reference_tokenizer, scheduler=EulerDiscreteScheduler(**KOLORS_SCHEDULER),
        force_zeros_for_empty_prompt=force_zeros,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write(folder: Path, tokenizer: Path) -> None:
    """The layout of Kwai-Kolors/Kolors-diffusers: float16 variant, sharded."""
    pipe = reference_pipeline(tokenizer).to(torch.float16)
    pipe.save_pretrained(folder, variant="fp16", max_shard_size="400KB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Write a small random Kolors checkpoint, as the reference saves it."
    )
    parser.add_argument("folder", type=Path)
    target = parser.parse_args().folder
    if target.exists():
        parser.exit(message=f"{target} is there already\n")
    with tempfile.TemporaryDirectory() as scratch:
        write(target, train_tokenizer(Path(scratch)))
    print(f"wrote a small random Kolors to {target}")
