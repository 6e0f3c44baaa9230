"""Small random face adapters as files of the public format, and the reference's UNet with one built in."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterFaceIDPlusImageProjection
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kolors_core.adapters.face_id import FaceIDAdapter, FaceIDConfig
from kolors_core.config import UNetConfig
from tests.support.ip_adapters import adapter_config
from tests.support.pipelines import picture
from tests.support.small import SMALL, randomise
from weights_convert import TABLES

TOKENS = 4  # what the reference's loader takes for granted; Kolors has 6
FACE: dict[str, Any] = {
    "face_embeds": torch.linspace(-2, 3, 12, dtype=torch.float64)[None].sin(),
    "face_image": picture(7, 64, 64),
}


def face_config(unet: UNetConfig = SMALL.unet) -> FaceIDConfig:
    """A small adapter for a UNet."""
    plus = adapter_config(unet)
    return FaceIDConfig(
        id_dim=12, image_dim=plus.image_dim, width=unet.text_dim, queries=TOKENS, heads=2,
        feed_forward_size=4 * unet.text_dim, context_dim=unet.context_dim,
        cross_attention_widths=plus.cross_attention_widths,
    )  # fmt: skip


def write_face(file: Path, config: FaceIDConfig | None = None) -> Path:
    """A random adapter under the public names, as `weights_convert --pickle` writes it."""
    adapter = FaceIDAdapter(face_config() if config is None else config)
    randomise(adapter, 5)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({TABLES["face_id"].to_public(k): v for k, v in adapter.state_dict().items()}, file)
    return file


def parts_of(file: Path) -> dict[str, dict[str, Tensor]]:
    """The two dicts of the published pickle."""
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "adapter_modules": {}}
    for name, tensor in load_file(file).items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    return parts


class ReferenceFace:
    """A face adapter in the reference's pipeline, as upstream builds it in: the tokens stand behind the text.

    Its projection is loaded by the reference's own converter, its processors in the order of the UNet's.
    """

    def __init__(self, pipe: diffusers.KolorsPipeline, file: Path, scale: float = 1.0) -> None:
        parts, unet = parts_of(file), pipe.unet
        self.pipe, dtype = pipe, unet.dtype
        made = unet._convert_ip_adapter_image_proj_to_diffusers(parts["image_proj"])
        assert isinstance(made, IPAdapterFaceIDPlusImageProjection)
        made.shortcut = True
        self.projection = made.to(dtype).eval()
        processors = dict[str, Any]()
        for name, present in unet.attn_processors.items():
            attention = unet.get_submodule(name.removesuffix(".processor"))
            if name.endswith("attn1.processor"):
                processors[name] = present
            else:
                processors[name] = IPAdapterAttnProcessor2_0(
                    attention.to_q.in_features, attention.to_k.in_features, (TOKENS,), scale
                )
        unet.set_attn_processor(processors)
        layers = [p if isinstance(p, nn.Module) else nn.Identity() for p in unet.attn_processors.values()]
        renamed = {name.replace("_ip.", "_ip.0."): t for name, t in parts["adapter_modules"].items()}
        nn.ModuleList(layers).load_state_dict(renamed, strict=True)
        unet.to(dtype)

    @torch.no_grad()
    def tokens(self, embeds: Tensor, image: Any) -> tuple[Tensor, Tensor]:
        """The face's tokens [n, Q, text_dim], and those of no face."""
        encoder, dtype = self.pipe.image_encoder, self.pipe.unet.dtype
        pixels = self.pipe.feature_extractor(image, return_tensors="pt").pixel_values.to(dtype)
        states = encoder(pixels, output_hidden_states=True).hidden_states[-2]
        found = []
        for ids, seen in ((embeds, states), (torch.zeros_like(embeds), torch.zeros_like(states))):
            self.projection.clip_embeds = seen[:, None]
            found.append(self.projection(ids.to(dtype)))
        return found[0], found[1]

    def arguments(self, prompt: Any, is_guided: bool = True, copies: int = 1) -> dict[str, Any]:
        """Embeddings to give to the reference's pipeline in place of prompt and `FACE`."""
        texts = self.pipe.encode_prompt(prompt, torch.device("cpu"), copies, is_guided)
        text, negative, pooled, negative_pooled = texts
        faces = self.tokens(FACE["face_embeds"], FACE["face_image"])
        face, no_face = (tokens.expand(len(text), -1, -1) for tokens in faces)
        both = torch.cat([text, face], dim=1)
        given = {"prompt": None, "prompt_embeds": both, "pooled_prompt_embeds": pooled}
        if is_guided:
            given["negative_prompt_embeds"] = torch.cat([negative, no_face], dim=1)
            given["negative_pooled_prompt_embeds"] = negative_pooled
        return given
