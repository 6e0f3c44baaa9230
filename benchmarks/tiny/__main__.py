"""The recipe of the embedded model, from packages to a folder that `from_pretrained` loads.

    apt-get install fonts-noto-color-emoji npm && python -m benchmarks.tiny OUT

Pictures and captions, a tokenizer, the autoencoder, the text encoder, then the UNet, with both of them
frozen. A run that was killed goes on where it was. An accelerator is used if there is one.
"""

import argparse
import json
import subprocess
import tarfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny import autoencoder, text
from benchmarks.tiny.concepts import write_concepts
from benchmarks.tiny.emoji import (
    CHINESE_AFTER,
    CHINESE_BEFORE,
    CONCEPTS,
    ENGLISH_AFTER,
    ENGLISH_BEFORE,
    Concept,
    read_concepts,
    read_names,
    write,
)
from kolors_core.attention import attention_kernel
from kolors_core.chatglm import ChatGLM
from kolors_core.config import TINY
from kolors_core.devices import best_device
from kolors_core.pipelines.fingerprint import fingerprint
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.schedule import EulerDiscreteScheduler
from kolors_core.tokenizer import SPECIAL_TOKENS, Tokenizer
from kolors_core.training.data import Batches, Example, LatentDataset, read_folder
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer, TrainingConfig
from kolors_core.unet import UNet
from kolors_core.vae import VAE

NAMES = "emojibase-data@17.0.0"
AUTOENCODER = TrainingConfig(
    steps=4000, batch_size=16, learning_rate=2e-3, schedule="cosine", warmup=100, weight_decay=1e-3,
    dtype=torch.bfloat16,
)  # fmt: skip
WHOLE_FROM = 3600  # the autoencoder's first step on whole pictures
TEXT_ENCODER = TrainingConfig(
    steps=800, batch_size=128, learning_rate=1e-3, schedule="cosine", warmup=100
)  # fmt: skip
DENOISER = TrainingConfig(
    steps=3000, batch_size=64, learning_rate=1e-3, schedule="cosine", warmup=200, weight_decay=0.01,
    ema_decay=0.998, min_snr_gamma=1.0, dtype=torch.bfloat16,
)  # fmt: skip


def fetch_names(folder: Path) -> Path:
    """The names of emoji in both languages, from the npm registry; the folder they are in."""
    package = folder / "package"
    if not package.exists():
        packed = subprocess.run(
            ["npm", "pack", "--silent", NAMES], cwd=folder, check=True, capture_output=True, text=True
        )
        with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
            archive.extractall(folder, filter="data")
    return package


def train_tokenizer(package: Path, concepts: list[Concept], folder: Path) -> Tokenizer:
    """A SentencePiece model of all emoji's names and the phrasings' words; bytes for anything else."""
    from sentencepiece import SentencePieceTrainer

    if not (folder / "tokenizer.model").exists():
        folder.mkdir(parents=True, exist_ok=True)
        lines = [name for language in ("en", "zh") for name in read_names(package, language).values()]
        ours = [name for concept in concepts for name in concept.english + concept.chinese]
        lines += 20 * [*ours, *ENGLISH_BEFORE, *ENGLISH_AFTER, *CHINESE_BEFORE, *CHINESE_AFTER]
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), model_type="bpe",
            vocab_size=TINY.text_encoder.vocab_size - len(SPECIAL_TOKENS) - 1, byte_fallback=True, pad_id=-1,
            character_coverage=1.0, minloglevel=2,
        )  # fmt: skip
        (folder / "tokenizer.vocab").unlink()
    return Tokenizer(folder)


def train_vae(package: Path, folder: Path, device: torch.device) -> VAE:
    """The trained autoencoder, taken from the folder if it is there already."""
    file, vae = folder / "vae.safetensors", VAE(TINY.vae).eval()
    if not file.exists():
        others = [character for character in read_names(package, "en") if character not in CONCEPTS]
        vae = autoencoder.train(
            TINY.vae, [*CONCEPTS, *others], len(CONCEPTS), AUTOENCODER, folder, device, WHOLE_FROM
        )
        save_file(vae.state_dict(), file)
    vae.load_state_dict(load_file(file))
    return vae.to(device).requires_grad_(False)


def train_text_encoder(
    examples: Sequence[Example], tokenizer: Tokenizer, folder: Path, device: torch.device
) -> ChatGLM:
    """The trained text encoder, taken from the folder if it is there already."""
    file, text_encoder = folder / "text_encoder.safetensors", ChatGLM(TINY.text_encoder).eval()
    if not file.exists():
        trained = text.train(TINY.text_encoder, examples, tokenizer, TEXT_ENCODER, folder, device)
        save_file(trained.text_encoder.state_dict(), file)
    text_encoder.load_state_dict(load_file(file))
    return text_encoder.to(device).requires_grad_(False)


def train_unet(
    examples: Sequence[Example], vae: VAE, text_encoder: ChatGLM, tokenizer: Tokenizer, folder: Path
) -> UNet:
    """The UNet, on the frozen encoders; the losses go to `losses.jsonl`, a line each."""
    config, device = DENOISER, vae.post_quant_conv.weight.device
    batches = Batches(examples, [(TINY.vae.sample_size,) * 2], config.batch_size, config.seed)
    data = LatentDataset(examples, batches, vae, tokenizer, config, frozen_text=None)
    torch.manual_seed(config.seed)  # of the first weights
    unet = UNet(TINY.unet).to(device, memory_format=torch.channels_last)  # faster convolutions in bfloat16
    objective = DiffusionLoss(unet, text_encoder, EulerDiscreteScheduler().training_sigmas(), config)
    folder.mkdir(parents=True, exist_ok=True)
    losses = (folder / "losses.jsonl").open("a", encoding="utf-8")
    start = time.monotonic()

    def report(step: int, loss: float) -> None:
        seconds = time.monotonic() - start
        losses.write(json.dumps({"step": step, "loss": loss, "seconds": round(seconds, 1)}) + "\n")
        if step % 50 == 0:
            losses.flush()
            print(f"UNet step {step}: loss {loss:.4f}, {seconds:.0f} s", flush=True)

    trainer = Trainer(objective, data, config, folder, report)
    trainer.fit(progress=False)
    trainer.load_ema_weights()
    return unet.eval()


def main(out: Path) -> None:
    """Every stage, each kept in `out`; the model is `out/model`."""
    device = best_device()
    out.mkdir(parents=True, exist_ok=True)
    package = fetch_names(out)
    concepts = read_concepts(package)
    write(concepts, out / "pictures")
    examples = read_folder(out / "pictures")
    tokenizer = train_tokenizer(package, concepts, out / "tokenizer")
    # At these sizes the plain products are faster than a fused kernel on a CPU, above all backwards.
    with attention_kernel("matmul") if device.type == "cpu" else nullcontext():
        vae = train_vae(package, out / "autoencoder", device)
        text_encoder = train_text_encoder(examples, tokenizer, out / "text", device)
        unet = train_unet(examples, vae, text_encoder, tokenizer, out / "unet")
    pipe = KolorsPipeline(vae, text_encoder, tokenizer, unet, EulerDiscreteScheduler())
    for model in (pipe.vae, pipe.text_encoder, pipe.unet):
        model.to("cpu", torch.float16)  # as stored; the VAE computes in float32 when it is loaded
    pipe.save_pretrained(out / "model")
    write_concepts(concepts, fingerprint(pipe.unet), out / "model" / "concepts.json")
    print(f"wrote {out / 'model'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the embedded model from packages alone.")
    parser.add_argument("out", type=Path, help="a folder for the data, the state of the run and the model")
    main(parser.parse_args().out)
