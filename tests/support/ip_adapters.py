"""Small random IP-Adapters as files of the public format, and both libraries' pipelines with them loaded."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from kolors_core import KolorsPipeline
from kolors_core.adapters.clip_vision import CLIPVision
from kolors_core.adapters.ip_adapter import IPAdapter, IPAdapterConfig, cross_attentions
from kolors_core.config import UNetConfig
from kolors_core.unet import UNet
from tests.support.parity import pair
from tests.support.pipelines import Pair, picture, steps_of
from tests.support.small import SMALL, SMALL_CLIP, randomise
from weights_convert import TABLES

Both = tuple[KolorsPipeline, diffusers.KolorsPipeline]


def adapter_config(unet: UNetConfig = SMALL.unet, image_dim: int = SMALL_CLIP.hidden_size) -> IPAdapterConfig:
    """A small adapter for a UNet."""
    with torch.device("meta"):
        places = cross_attentions(UNet(unet)).values()
    return IPAdapterConfig(
        image_dim=image_dim, width=96, queries=5, heads=2, feed_forward_size=384, layers=4,
        context_dim=unet.context_dim,
        cross_attention_widths=tuple(place.to_q.in_features for place in places),
    )  # fmt: skip


def write_adapter(file: Path, seed: int = 0, config: IPAdapterConfig | None = None) -> Path:
    """A random adapter under the public names."""
    adapter = IPAdapter(adapter_config() if config is None else config)
    randomise(adapter, seed)
    state = {TABLES["ip_adapter"].to_public(k): v for k, v in adapter.state_dict().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file)
    return file


def with_image_encoder(pipes: Pair, dtype: torch.dtype) -> Both:
    """The pipelines again with copies of their UNets, which adapters will change, and the same CLIP."""
    ours, theirs = pipes
    encoder, other = pair("image_encoder", dtype)
    assert isinstance(encoder, CLIPVision)
    mine = KolorsPipeline.from_pipe(ours, unet=deepcopy(ours.unet), image_encoder=encoder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    parts = {**theirs.components, "unet": deepcopy(theirs.unet)}
    parts |= {"image_encoder": other, "feature_extractor": processor}
    reference = diffusers.KolorsPipeline(**parts, force_zeros_for_empty_prompt=False)
    reference.set_progress_bar_config(disable=True)
    return mine, reference


def load_both(pipes: tuple[Any, Any], *files: Path) -> None:
    """Load the same adapters into both."""
    for pipe in pipes:
        pipe.load_ip_adapter(
            [str(file.parent) for file in files], subfolder=[""] * len(files),
            weight_name=[file.name for file in files], image_encoder_folder=None,
        )  # fmt: skip


def guided_steps(pipe: Any, **arguments: Any) -> list[Tensor]:
    """Latents after each step, then the images, of a run that an image guides."""
    given = {"prompt": "cat", "ip_adapter_image": picture(3), "num_inference_steps": 2}
    return steps_of(pipe, **given | arguments)
