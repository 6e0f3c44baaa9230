"""Helpers of the parity tests: the same random model on both sides, compared, with the first difference
named.

Every parameter is randomised: with default initialisation many mistakes, such as two norms swapped, change
nothing.
"""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig as ReferenceChatGLMConfig
from diffusers.pipelines.kolors.text_encoder import ChatGLMModel
from torch import Tensor, nn
from transformers import CLIPVisionConfig as ReferenceCLIPVisionConfig
from transformers import CLIPVisionModelWithProjection

from kolors_core.chatglm import ChatGLM
from kolors_core.clip_vision import CLIPVision
from kolors_core.config import ChatGLMConfig, CLIPVisionConfig, KolorsConfig, UNetConfig, VAEConfig
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.small import SMALL, SMALL_CLIP, randomise, relative_error
from weights_convert import TABLES
from weights_convert.rules import UNUSED, compare

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

    The image encoder stands outside of a Kolors: it is always `SMALL_CLIP`.
    """
    theirs, ours = {
        "text_encoder": lambda: (reference_chatglm(config.text_encoder), ChatGLM(config.text_encoder)),
        "unet": lambda: (reference_unet(config.unet), UNet(config.unet)),
        "vae": lambda: (reference_vae(config.vae), VAE(config.vae)),
        "image_encoder": lambda: (reference_clip(SMALL_CLIP), CLIPVision(SMALL_CLIP)),
    }[component]()
    randomise(theirs)
    theirs, ours = theirs.to(dtype), ours.to(dtype).eval()
    transfer(theirs, ours, component)
    return ours, theirs


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
    tolerance.

    A module with weights has its counterpart where the table maps the weights, so the walk needs no list of
    its own.
    """
    table = TABLES[component]
    counterpart = {
        name.rpartition(".")[0]: table.to_public(name).rpartition(".")[0]
        for name, _ in ours.named_parameters()
    }
    expected: dict[str, list[Tensor]] = {}
    for name, output in _record(theirs, set(counterpart.values()), run_theirs):
        expected.setdefault(name, []).append(output)
    for name, output in _record(ours, set(counterpart), run_ours):
        other = expected[counterpart[name]].pop(0)
        if other.shape != output.shape and other.transpose(0, 1).shape == output.shape:
            other = other.transpose(0, 1)  # the reference's ChatGLM has the sequence first
        elif output.ndim == other.ndim == 3 and output.shape[1] == 1 < len(other):
            other = other.transpose(0, 1)[:, -1:]  # of its last layer ours computes the last position only
        if (error := relative_error(output, other)) > tolerance:
            return f"{name} ({counterpart[name]} in the reference), relative error {error:.1e}"
    return NO_MODULE


def _record(model: nn.Module, names: set[str], run: Callable[[], object]) -> list[tuple[str, Tensor]]:
    """The outputs of the named modules, in the order in which they ran."""
    outputs: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: outputs.append((name, output.detach().clone()))

    handles = [
        module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name in names
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return outputs
