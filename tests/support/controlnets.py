"""Small random ControlNets on both sides, and files of them written by the reference."""

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from kolors_core import KolorsControlNet
from kolors_core.adapters.controlnet import ControlNetConfig
from tests.support.parity import transfer
from tests.support.small import SMALL, randomise

NET = ControlNetConfig(**vars(SMALL.unet), conditioning_widths=(8, 12, 16, 24))


def reference_controlnet(config: ControlNetConfig = NET) -> ControlNetModel:
    """The reference's ControlNet of our config."""
    return ControlNetModel.from_config(config.to_public()).eval()


def net_pair(seed: int, dtype: torch.dtype, config: ControlNetConfig = NET) -> tuple[KolorsControlNet, Any]:
    """Ours and the reference's with the same random weights."""
    theirs, ours = reference_controlnet(config), KolorsControlNet(config)
    randomise(theirs, seed)
    theirs, ours = theirs.to(dtype), ours.to(dtype).eval()
    transfer(theirs, ours, "controlnet")
    return ours, theirs


def write_controlnet(folder: Path, seed: int) -> Path:
    """A random ControlNet as the reference saves it."""
    theirs = reference_controlnet()
    randomise(theirs, seed)
    theirs.save_pretrained(folder)
    return folder


def reference_residuals(
    model: nn.Module, given: dict[str, Tensor], image: Tensor, scale: float = 1.0
) -> list[Tensor]:
    """All residuals, the middle's last; the reference leaves the text projection to its caller."""
    text = model.encoder_hid_proj(given["text_tokens"])
    skips, mid = model(
        given["latents"], given["timestep"], encoder_hidden_states=text,
        controlnet_cond=image, conditioning_scale=scale,
        added_cond_kwargs={"text_embeds": given["pooled_text"], "time_ids": given["size_ids"]},
        return_dict=False,
    )  # fmt: skip
    return [*skips, mid]
