"""A small pipeline to train a LoRA on, and images of a subject."""

from dataclasses import replace
from pathlib import Path

from kolors_core.chatglm import ChatGLM
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.tokenizer import Tokenizer
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.images import noise_image
from tests.support.small import SHALLOW, SMALL, randomise

SIDE = 64


def shallow_pipe(tokenizer: Path) -> KolorsPipeline:
    """A pipeline of small random models, whose own size is SIDE."""
    unet = UNet(replace(SHALLOW.unet, sample_size=SIDE // 8))
    made = {"text_encoder": ChatGLM(SMALL.text_encoder), "unet": unet, "vae": VAE(SMALL.vae)}
    for seed, model in enumerate(made.values()):
        randomise(model.eval(), seed)
    return KolorsPipeline(**made, tokenizer=Tokenizer(tokenizer), scheduler=EulerDiscreteScheduler())


def write_five_images(folder: Path) -> Path:
    """Images of noise without captions, one of them wider."""
    folder.mkdir()
    for i in range(5):
        noise_image("RGB", SIDE + 8 * (i == 4), SIDE, seed=i).save(folder / f"{i}.png")
    return folder
