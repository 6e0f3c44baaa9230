"""Single files as other programs have them, made of a folder or full-size without room."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kolors_core.config import KOLORS
from tests.support.parity import reference_unet
from weights_convert.safetensors_files import Source
from weights_convert.sgm import is_1x1_conv, public_to_sgm

State = dict[str, Tensor]
LINEAR = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


def public(folder: Path, component: str) -> State:
    source = Source(sorted((folder / component).glob("*.safetensors")))
    return {name: source[name].clone() for name in source}


def in_sgm(component: str, state: State) -> State:
    """As ComfyUI and SGM have them, the VAE's attention as convolutions."""
    names = public_to_sgm(component, state)
    return {
        names[name]: tensor[:, :, None, None] if component == "vae" and is_1x1_conv(name) else tensor
        for name, tensor in state.items()
    }


def behind(prefix: str, state: State) -> State:
    return {prefix + name: tensor.contiguous() for name, tensor in state.items()}


FOREIGN: dict[str, Callable[[Path], State]] = {
    "UNet, diffusers' names": lambda f: public(f, "unet"),
    "UNet behind unet.": lambda f: behind("unet.", public(f, "unet")),
    "UNet, diffusers' names behind model.diffusion_model.": lambda f: behind(
        "model.diffusion_model.", public(f, "unet")
    ),
    "UNet, SGM's names": lambda f: behind("model.diffusion_model.", in_sgm("unet", public(f, "unet"))),
    "UNet, SGM's names alone": lambda f: in_sgm("unet", public(f, "unet")),
    "VAE, diffusers' names": lambda f: public(f, "vae"),
    "VAE, SGM's names alone": lambda f: behind("", in_sgm("vae", public(f, "vae"))),
    "ChatGLM": lambda f: public(f, "text_encoder"),
    "ChatGLM, THUDM's": lambda f: behind("transformer.", public(f, "text_encoder")),
    "CLIP": lambda f: public(f, "image_encoder"),
    "UNet and VAE, as ComfyUI saves them": lambda f: (
        behind("model.diffusion_model.", in_sgm("unet", public(f, "unet")))
        | behind("first_stage_model.", in_sgm("vae", public(f, "vae")))
    ),
}


def thudm(state: State, bits: int) -> tuple[State, State]:
    """THUDM's format of a ChatGLM, written out number by number; and what it stands for, in float64."""
    made, meant = dict(state), dict(state)
    for name in [name for name in state if any(name.endswith(f"{layer}.weight") for layer in LINEAR)]:
        weight = state[name].double().numpy()
        top = 2 ** (bits - 1) - 1
        scale = (np.abs(weight).max(axis=1) / top).astype(np.float16)
        q = np.clip(np.round(weight / scale[:, None].astype(float)), -top - 1, top).astype(int)
        meant[name] = torch.from_numpy(q * scale[:, None].astype(float))
        if bits == 4:  # the even column in the high half
            q = np.array([[(row[i] % 16) * 16 + row[i + 1] % 16 for i in range(0, len(row), 2)] for row in q])
        made[name] = torch.from_numpy(q.astype(np.uint8).view(np.int8))
        made[name + "_scale"] = torch.from_numpy(scale)
    return made, meant


def sparse(file: Path, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str] | None = None) -> Path:
    """A file of full-size tensors that takes no room: all but its header is a hole."""
    header, at = {}, 0
    for name, shape in shapes.items():
        code = (dtypes or {}).get(name, "F16")
        end = at + int(np.prod(shape)) * (1 if code == "I8" else 2)
        header[name], at = {"dtype": code, "shape": list(shape), "data_offsets": [at, end]}, end
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + at)
    return file


def full_size_unet() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = reference_unet(KOLORS.unet).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
