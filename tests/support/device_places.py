"""Models with random weights, and where a run has them: on the CPU, on a device, or offloaded to one."""

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import kolors_core as kc
from kolors_core.adapters.clip_vision import CLIPVision
from kolors_core.adapters.controlnet import ControlNet, ControlNetConfig
from kolors_core.chatglm import ChatGLM
from kolors_core.tokenizer import Tokenizer
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.face_ids import face_config, write_face
from tests.support.ip_adapters import adapter_config, write_adapter
from tests.support.small import SHALLOW, SMALL_CLIP, randomise

CONFIG = replace(SHALLOW, text_encoder=replace(SHALLOW.text_encoder, layers=2))
SIZE = {"height": 32, "width": 40}


def seeded(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def made(model: Any, seed: int = 0) -> Any:
    """A model with random weights."""
    randomise(model, seed)
    return model.eval()


@dataclass
class Models:
    """What runs are made of. folder: for files."""

    pipe: kc.KolorsPipeline
    nine: UNet
    nets: list[ControlNet]
    clip: CLIPVision
    ip_adapter: Path
    face: Path
    folder: Path

    @classmethod
    def make(cls, tokenizer: Path, folder: Path) -> "Models":
        unet = CONFIG.unet
        pipe = kc.KolorsPipeline(
            text_encoder=made(ChatGLM(CONFIG.text_encoder)), unet=made(UNet(unet)),
            vae=made(VAE(CONFIG.vae)), tokenizer=Tokenizer(tokenizer),
            scheduler=kc.EulerDiscreteScheduler(),
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        net = ControlNetConfig(**vars(unet), conditioning_widths=(4, 4, 8, 8))
        return cls(
            pipe, made(UNet(replace(unet, in_channels=9))), [made(ControlNet(net), i) for i in (1, 2)],
            made(CLIPVision(SMALL_CLIP)),
            write_adapter(folder / "ip" / "ip.safetensors", 0, adapter_config(unet)),
            write_face(folder / "face" / "face.safetensors", face_config(unet)), folder,
        )  # fmt: skip


@dataclass
class Place:
    """Where a run's models are. name: "cpu", a device, or "model" or "block" for offload to `device`."""

    name: str
    device: str
    models: Models

    @property
    def own(self) -> str:
        """The device that the run's tensors may be on."""
        return "cpu" if self.name == "cpu" else self.device

    def pipe(self, kind: Any = None, **changes: Any) -> Any:
        """A pipeline of its own, still on the CPU."""
        pipe = deepcopy(self.models.pipe)
        return pipe if kind is None else kind.from_pipe(pipe, **deepcopy(changes))

    def put(self, pipe: Any) -> Any:
        """Move the pipeline there."""
        if self.name == "model":
            pipe.enable_model_cpu_offload(device=self.device)
        elif self.name == "block":
            pipe.enable_sequential_cpu_offload(device=self.device)
        elif self.name != "cpu":
            pipe.to(self.device)
        return pipe
