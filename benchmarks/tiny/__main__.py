"""The recipe of the embedded model, from packages to a folder that `from_pretrained` loads.

    apt-get install fonts-noto-color-emoji fonts-noto-cjk npm
    torchrun --nproc-per-node 2 -m benchmarks.tiny OUT

A tokenizer, the autoencoder and the text encoder, then the UNet, with both of them frozen; its scenes are
made while it trains. A run that was killed goes on where it was. On a CPU two processes of one thread each
are faster than one of two; on an accelerator, which is used if there is one: `python -m benchmarks.tiny OUT`.
"""

import argparse
import re
import subprocess
import tarfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny import autoencoder, text
from benchmarks.tiny.captions import Grammar
from benchmarks.tiny.concepts import write_concepts
from benchmarks.tiny.emoji import CONCEPTS, read_concepts, read_names
from benchmarks.tiny.processes import is_first, processes, wait_for_all
from benchmarks.tiny.scene_data import SceneLatents
from benchmarks.tiny.scene_loss import SceneLoss
from benchmarks.tiny.scenes import CHARACTERS, compose, pixels
from kolors_core.attention import attention_kernel
from kolors_core.chatglm import ChatGLM
from kolors_core.config import TINY
from kolors_core.devices import best_device
from kolors_core.pipelines.fingerprint import fingerprint
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.tokenizer import SPECIAL_TOKENS, Tokenizer
from kolors_core.training.loss_curve import draw_curve
from kolors_core.training.step import Step
from kolors_core.training.trainer import Trainer, TrainingConfig
from kolors_core.unet import UNet
from kolors_core.vae import VAE

NAMES = "emojibase-data@17.0.0"
ON_EMOJI = TrainingConfig(
    steps=4000, batch_size=16, learning_rate=2e-3, schedule="cosine", warmup=100, weight_decay=1e-3,
    ema_decay=0.998, dtype=torch.bfloat16,
)  # fmt: skip
ON_SCENES = TrainingConfig(
    steps=3200, batch_size=16, learning_rate=1.5e-3, schedule="cosine", warmup=100, weight_decay=1e-3,
    ema_decay=0.998, dtype=torch.bfloat16, seed=1,
)  # fmt: skip
DISTURBED = TrainingConfig(
    steps=6000, batch_size=16, learning_rate=1.2e-3, schedule="cosine", warmup=100, weight_decay=1e-3,
    ema_decay=0.998, dtype=torch.bfloat16, seed=2,
)  # fmt: skip
DISTURBANCE = 0.2  # of the latents, in their deviations, at most
ON_NAMES = TrainingConfig(
    steps=7000, batch_size=128, learning_rate=1.5e-3, schedule="cosine", warmup=200, dtype=torch.bfloat16,
)  # fmt: skip
ON_PLACES = TrainingConfig(
    steps=3000, batch_size=128, learning_rate=1e-3, schedule="cosine", warmup=100, adam_beta2=0.99,
    dtype=torch.bfloat16, seed=1,
)  # fmt: skip
DENOISER = TrainingConfig(
    steps=16_000, batch_size=64, learning_rate=7e-4, schedule="cosine", warmup=200, weight_decay=0.01,
    adam_beta2=0.99, max_grad_norm=0.5, ema_decay=0.9985, min_snr_gamma=5.0, dtype=torch.bfloat16,
    save_every=250,
)  # fmt: skip
HAN, APART = "[\u4e00-\u9fff，。：！？“”]", "|"  # what is in no piece with others, and what tells so
PIECES_FROM = range(20_000)  # seeds of the scenes whose captions the tokenizer's pieces are from
STANDARD_FROM = range(10**6, 10**6 + 256)  # seeds of the scenes whose latents have mean 0 and variance 1


def fetch_names(folder: Path) -> Path:
    """The names of emoji in both languages, from the npm registry; the folder they are in."""
    package = folder / "package"
    if is_first() and not package.exists():
        folder.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", NAMES], cwd=folder, check=True, capture_output=True, text=True
        )
        with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
            archive.extractall(folder, filter="data")
    wait_for_all()
    return package


def train_tokenizer(grammar: Grammar, folder: Path) -> Tokenizer:
    """A SentencePiece model of the captions; each character of a sign and each Chinese name is one piece.

    No other piece has two Chinese characters: words of places would be hidden in whole phrases.
    """
    from sentencepiece import SentencePieceTrainer

    if is_first() and not (folder / "tokenizer.model").exists():
        folder.mkdir(parents=True, exist_ok=True)
        names = [name for concept in grammar.names.values() for name in concept.english + concept.chinese]
        whole = [name for concept in grammar.names.values() for name in concept.chinese if len(name) > 1]
        lines = [
            re.sub(f"(?<={HAN})|(?={HAN})", APART, line).strip(APART)
            for line in text.tokenizer_lines(grammar, PIECES_FROM) + 20 * names
        ]
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), model_type="bpe",
            vocab_size=TINY.text_encoder.vocab_size - len(SPECIAL_TOKENS) - 1, byte_fallback=True, pad_id=-1,
            character_coverage=1.0, minloglevel=2, user_defined_symbols=[*CHARACTERS, *whole],
            pretokenization_delimiter=APART,
        )  # fmt: skip
        (folder / "tokenizer.vocab").unlink()
    wait_for_all()
    return Tokenizer(folder)


def train_vae(package: Path, folder: Path, device: torch.device) -> VAE:
    """The trained autoencoder, taken from the folder if it is there already."""
    file, vae = folder / "vae.safetensors", VAE(TINY.vae).eval()
    if not file.exists():
        torch.manual_seed(ON_EMOJI.seed)  # of the first weights
        vae = autoencoder.new_vae(TINY.vae).to(device)
        others = [character for character in read_names(package, "en") if character not in CONCEPTS]
        glyphs = autoencoder.read_glyphs([*CONCEPTS, *others])
        emoji = autoencoder.EmojiCrops(glyphs, len(CONCEPTS), ON_EMOJI.batch_size, ON_EMOJI.seed)
        autoencoder.train(vae, emoji, ON_EMOJI, folder / "emoji")
        for training, name, disturbed in (
            (ON_SCENES, "scenes", 0.0),
            (DISTURBED, "disturbed", DISTURBANCE),
        ):
            scenes = autoencoder.SceneCrops(training.batch_size, training.seed)
            autoencoder.train(vae, scenes, training, folder / name, disturbed)
        vae.eval().requires_grad_(False)
        images = torch.stack([pixels(compose(seed)) for seed in STANDARD_FROM])
        autoencoder.standardise(vae, images.to(device))
        if is_first():
            print(f"autoencoder: {autoencoder.psnr(vae, images.to(device)):.2f} dB", flush=True)
            save_file(vae.state_dict(), file)
        return vae
    vae.load_state_dict(load_file(file))
    return vae.to(device).requires_grad_(False)


def train_text_encoder(grammar: Grammar, tokenizer: Tokenizer, folder: Path, device: torch.device) -> ChatGLM:
    """The trained text encoder, taken from the folder if it is there already."""
    torch.manual_seed(ON_NAMES.seed)  # of the first weights
    text_encoder = ChatGLM(TINY.text_encoder).to(device).eval()
    for training, name in ((ON_NAMES, "names"), (ON_PLACES, "places")):
        file = folder / f"{name}.safetensors"
        if not file.exists():
            source = text.CaptionSource(grammar, tokenizer, training)
            whitening = text.whiten(text_encoder, source, device) if name == "places" else None
            text.train(text_encoder, whitening, source, training, folder / name, device)
            if is_first():
                save_file(text_encoder.state_dict(), file)
            wait_for_all()
        text_encoder.load_state_dict(load_file(file))
    return text_encoder.requires_grad_(False)


def train_unet(data: SceneLatents, whitening: text.Whitening, folder: Path, device: torch.device) -> UNet:
    """The UNet, on the frozen encoders; its losses are drawn to `loss.png`.

    whitening: of the text encoder's tokens, with which the text projection starts.
    """
    torch.manual_seed(DENOISER.seed)  # of the first weights
    unet = UNet(TINY.unet).to(device)  # not channels last: torch's GroupNorm of few channels is slow there
    unet.text_proj.load_state_dict(whitening.state_dict())
    objective = SceneLoss(unet, EulerDiscreteScheduler().training_sigmas(), DENOISER).to(device)
    start = time.monotonic()

    def report(step: Step) -> None:
        if is_first() and step.step % 50 == 0:
            seconds = time.monotonic() - start
            print(f"UNet step {step.step}: loss {step.loss:.4f}, {seconds:.0f} s", flush=True)

    trainer = Trainer(objective, data, DENOISER, folder, report)
    trainer.fit(progress=False)
    trainer.load_ema_weights()
    if is_first():
        draw_curve(trainer.losses, trainer.losses.first).save(folder / "loss.png")
    objective.stop_hearing()
    return unet.eval()


def main(out: Path) -> None:
    """Every stage, each kept in `out`; the model is `out/model`."""
    device = best_device()
    # At these sizes the plain products are faster than a fused kernel on a CPU, above all backwards.
    kernel = attention_kernel("matmul") if device.type == "cpu" else nullcontext()
    with processes() as is_the_first, kernel:
        package = fetch_names(out)
        concepts = read_concepts(package)
        grammar = Grammar(concepts)
        tokenizer = train_tokenizer(grammar, out / "tokenizer")
        vae = train_vae(package, out / "autoencoder", device)
        text_encoder = train_text_encoder(grammar, tokenizer, out / "text", device)
        data = SceneLatents(grammar, tokenizer, text_encoder, vae, DENOISER)
        captions = text.CaptionSource(grammar, tokenizer, DENOISER)
        unet = train_unet(data, text.whiten(text_encoder, captions, device), out / "unet", device)
    if not is_the_first:
        return
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
