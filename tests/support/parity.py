"""Helpers of the parity tests: the same random model on both sides, compared, with the first difference
named.

Every parameter is randomised: with default initialisation many mistakes, such as two norms swapped, change
nothing.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig as ReferenceChatGLMConfig
from diffusers.pipelines.kolors.text_encoder import ChatGLMModel
from torch import Tensor, nn
from transformers import CLIPVisionConfig as ReferenceCLIPVisionConfig
from transformers import CLIPVisionModelWithProjection

from benchmarks.parity.layers import our_modules, pairs, record, their_modules
from kolors_core.adapters.clip_vision import CLIPVision, CLIPVisionConfig
from kolors_core.chatglm import ChatGLM
from kolors_core.config import ChatGLMConfig, KolorsConfig, UNetConfig, VAEConfig
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.small import SMALL, SMALL_CLIP, randomise, relative_error
from weights_convert import TABLES
from weights_convert.key_mapping import UNUSED, compare

NO_MODULE = "no module differs, so it lies between modules"


def reference_chatglm(config: ChatGLMConfig) -> ChatGLMModel:
    """The reference's text encoder of our config."""
    return ChatGLMModel(ReferenceChatGLMConfig(**config.to_public())).eval()


def reference_unet(config: UNetConfig) -> UNet2DConditionModel:
    """The reference's UNet of our config."""
    return UNet2DConditionModel.from_config(config.to_public()).eval()


def reference_vae(config: VAEConfig) -> AutoencoderKL:
    """The reference's autoencoder of our config."""
    return AutoencoderKL.from_config(config.to_public()).eval()


def reference_clip(config: CLIPVisionConfig) -> CLIPVisionModelWithProjection:
    """The reference's image encoder of our config."""
    return CLIPVisionModelWithProjection(ReferenceCLIPVisionConfig(**config.to_public())).eval()


def pair(component: str, dtype: torch.dtype, config: KolorsConfig = SMALL) -> tuple[nn.Module, nn.Module]:
    """Ours and the reference's with the same random weights, put across by the real table, strictly.

    The image encoder stands outside of a Kolors: it is always `SMALL_CLIP`. Both are a test's own, to change.
    """
    ours, theirs = _made(component, config)
    return deepcopy(ours).to(dtype), deepcopy(theirs).to(dtype)


@lru_cache(maxsize=8)
def _made(component: str, config: KolorsConfig) -> tuple[nn.Module, nn.Module]:
    """Make what `pair` copies, in float32."""
    theirs, ours = {
        "text_encoder": lambda: (reference_chatglm(config.text_encoder), ChatGLM(config.text_encoder)),
        "unet": lambda: (reference_unet(config.unet), UNet(config.unet)),
        "vae": lambda: (reference_vae(config.vae), VAE(config.vae)),
        "image_encoder": lambda: (reference_clip(SMALL_CLIP), CLIPVision(SMALL_CLIP)),
    }[component]()
    randomise(theirs)
    transfer(theirs, ours, component)
    return ours.eval(), theirs


def transfer(theirs: nn.Module, ours: nn.Module, component: str) -> None:
    """Load their weights into our model through the component's table."""
    table = TABLES[component]
    source = {table.to_ours(name): tensor for name, tensor in theirs.state_dict().items()}
    target = ours.state_dict()
    mismatch = compare(
        table, {k: tuple(v.shape) for k, v in source.items()}, {k: tuple(v.shape) for k, v in target.items()}
    )
    assert not mismatch, mismatch
    ours.load_state_dict(
        {name: tensor for name, tensor in source.items() if not name.startswith(UNUSED)}, strict=True
    )


def assert_parity(
    ours: Tensor, theirs: Tensor, tolerance: float, explain: Callable[[], str] = lambda: "not searched for"
) -> None:
    """Fail, with what `explain` says of the first divergence, if the relative error exceeds the tolerance."""
    error = relative_error(ours, theirs)
    assert error <= tolerance, f"relative error {error:.1e} > {tolerance:.0e}; first divergence: {explain()}"


def first_divergence(
    ours: nn.Module,
    theirs: nn.Module,
    component: str,
    run_ours: Callable[[], object],
    run_theirs: Callable[[], object],
    tolerance: float,
) -> str:
    """Run both again and name the first module, in our order, whose output differs by more than the
    tolerance. See benchmarks/parity/layers.py.
    """
    their = their_modules(theirs, TABLES[component])
    expected, _ = record(their, run_theirs)
    outputs, _ = record(our_modules(ours), run_ours)
    for name, output, other in pairs(outputs, expected):
        if (error := relative_error(output, other)) > tolerance:
            return f"{name} ({their[name][0]} in the reference), relative error {error:.1e}"
    return NO_MODULE
