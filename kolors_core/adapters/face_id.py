"""IP-Adapter-FaceID-Plus: a face as a prompt in addition to text, by its identity vector and its image.

A face's id vector becomes 6 tokens of the text's width; a resampler, in which they attend to CLIP's states of
the face, adds to them. The tokens pass through the UNet's projection of the text, and then into branches like
those of ip_adapter.py. The unconditional half is computed from a zero vector and zero states.
Source: kolors/models/ipa_faceid_plus and kolors/pipelines/pipeline_stable_diffusion_xl_chatglm_256_ipadapter_
FaceID.py in https://github.com/Kwai-Kolors/Kolors; `IPAdapterFaceIDPlusImageProjection` in diffusers'
models/embeddings.py. The model of the id vector, insightface's antelopev2 there, is not included.
Shapes: B faces, Q tokens each (6), C width (the text's, 4096), P patches of an image (577).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.adapters.ip_adapter import ImagePromptAdapter, IPAdapterConfig, ResamplerLayer
from kolors_core.hub import find_file
from kolors_core.unet import UNet
from kolors_core.validation import as_path
from weights_convert.safetensors_files import Source
from weights_convert.untrusted_files import check_file, one_line


@dataclass(frozen=True, kw_only=True)
class FaceIDConfig(IPAdapterConfig):
    """Sizes of Kolors-IP-Adapter-FaceID-Plus. id_dim: of the id vector. width: of the UNet's text."""

    id_dim: int = 512
    width: int = 4096
    queries: int = 6
    heads: int = 64
    feed_forward_size: int = 16384

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], where: str) -> Self:
        """Infer sizes from shapes by our names, as the file has no config. ValueError for another adapter."""
        try:
            tokens, width = shapes["resampler.id_out.weight"][0], shapes["resampler.proj_in.weight"][0]
            inferred = {  # shapes of IP-Adapter-Plus's tensors that are missing here, or have another shape
                "resampler.latents": (1, tokens // width, width),
                "resampler.proj_out.weight": shapes["branches.1.to_k.weight"][1:],
            }
            id_dim = shapes["resampler.id_in.weight"][1]
        except (KeyError, IndexError, ZeroDivisionError) as error:
            raise ValueError(f"{where}: not an IP-Adapter-FaceID-Plus: {error}") from None
        return replace(super().from_shapes({**shapes, **inferred}, where), id_dim=id_dim)


class FaceResampler(nn.Module):
    """Resampler from an id vector and CLIP's states of the face to a few tokens of the text's width."""

    def __init__(self, config: FaceIDConfig) -> None:
        super().__init__()
        self.queries = config.queries
        self.id_in = nn.Linear(config.id_dim, 2 * config.id_dim)
        self.id_out = nn.Linear(2 * config.id_dim, config.queries * config.width)
        self.id_norm = nn.LayerNorm(config.width)
        self.proj_in = nn.Linear(config.image_dim, config.width)
        self.layers = nn.ModuleList([ResamplerLayer(config) for _ in range(config.layers)])
        self.proj_out, self.norm_out = nn.Linear(config.width, config.width), nn.LayerNorm(config.width)

    def forward(self, ids: Tensor, states: Tensor) -> Tensor:
        """Map ids [B, id_dim] and states [B, P, image_dim], CLIP's last but one, to tokens [B, Q, C]."""
        face = self.id_out(F.gelu(self.id_in(ids)))  # [B, Q * C]
        face = self.id_norm(face.unflatten(-1, (self.queries, -1)))  # [B, Q, C]
        image, latents = self.proj_in(states), face  # [B, P, C], [B, Q, C]
        for layer in self.layers:
            latents = layer(latents, image)
        return face + self.norm_out(self.proj_out(latents))


class FaceIDAdapter(ImagePromptAdapter):
    """IP-Adapter-FaceID-Plus; `ip_adapter.attach` adds it to a UNet."""

    config: FaceIDConfig
    resampler: FaceResampler

    def __init__(self, config: FaceIDConfig) -> None:
        super().__init__(config, FaceResampler(config))

    def tokens(self, unet: UNet, ids: Tensor, states: Tensor) -> Tensor:
        """Resample ids [B, id_dim], states [B, P, image_dim] to [B, 1, Q, context_dim] by unet.text_proj."""
        return unet.text_proj(self.resampler(ids, states).to(unet.text_proj.weight.dtype))[:, None]

    def check_fits(self, unet: UNet) -> None:
        """Raise ValueError if the adapter is for a UNet of another shape, or for another text encoder."""
        super().check_fits(unet)
        if (own := self.config.width) != (text := unet.config.text_dim):
            raise ValueError(f"the face adapter makes tokens {own} wide, and the UNet reads text {text} wide")


def load_face_embeds(file: str | Path) -> Tensor:
    """Read an id vector [1, id_dim] from a file: numpy's .npy, or the only tensor of a .safetensors.

    Raises FileNotFoundError, or ValueError naming the file if it holds something else.
    """
    file = as_path("file", file)
    if file.suffix == ".npy":
        vector = _read_npy(file)
    else:
        source = Source([find_file(file)])
        if len(source) != 1:
            raise ValueError(f"{file}: expected one tensor, a face's id vector, got {len(source)}")
        vector = next(iter(source.values()))
    if vector.ndim not in (1, 2) or not vector.numel() or vector.numel() != vector.shape[-1]:
        raise ValueError(f"{file}: expected one id vector, got {list(vector.shape)}")
    if not vector.is_floating_point():
        raise ValueError(f"{file}: expected an id vector of floats, got {vector.dtype}")
    return vector.reshape(1, -1)


def _read_npy(file: Path) -> Tensor:
    """Read a .npy file whose header agrees with the file's size; ValueError naming any other."""
    size = check_file(file)
    try:
        with file.open("rb") as stream:
            if (version := np.lib.format.read_magic(stream)) != (1, 0):  # numpy's own for every plain array
                raise ValueError(f"its format is {version}, expected (1, 0)")
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            expected, got = math.prod(shape) * dtype.itemsize, size - stream.tell()
        if any(type(side) is not int or side < 0 for side in shape) or expected != got:
            raise ValueError(f"its header has the shape {shape} of {dtype}, and {got:,} bytes follow")
        return torch.as_tensor(np.load(file, allow_pickle=False))
    except (ValueError, TypeError, EOFError, OSError) as error:
        raise ValueError(f"{file}: not an array of numbers: {one_line(error, 200)}") from None
