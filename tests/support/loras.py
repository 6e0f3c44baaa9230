"""LoRAs with random weights for the tests, and what a model's weights are with them, written out."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kolors_core import KolorsPipeline
from kolors_core.adapters.lora import attach, save_adapters, supported_layers
from kolors_core.chatglm import ChatGLM
from kolors_core.pipelines.lora_methods import LoRAMethods
from kolors_core.unet import UNet
from tests.support.small import relative_error
from weights_convert import TABLES

ALPHA = 3.0  # of factors of rank 2, in the spellings that can say it
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
# diffusers' names of the attention that every spelling can write, of other linear layers, of convolutions.
ATTENTION = tuple(
    f"{block}.transformer_blocks.0.attn{i}.{layer}"
    for block in ("down_blocks.1.attentions.1", "mid_block.attentions.0", "up_blocks.0.attentions.2")
    for i in (1, 2)
    for layer in ("to_q", "to_k", "to_v", "to_out.0")
)
LINEAR = (f"{BLOCK}.ff.net.0.proj", f"{BLOCK}.ff.net.2", "up_blocks.1.attentions.0.proj_in",
          "down_blocks.2.resnets.0.time_emb_proj", "time_embedding.linear_1",
          "add_embedding.linear_2")  # fmt: skip
CONV = ("conv_in", "conv_out", "down_blocks.0.downsamplers.0.conv", "up_blocks.1.upsamplers.0.conv",
        "mid_block.resnets.1.conv2", "up_blocks.2.resnets.1.conv_shortcut")  # fmt: skip
TEXT = ("encoder.layers.0.self_attention.query_key_value", "encoder.layers.2.mlp.dense_h_to_4h")


def write_noisy(file: Path, unet: UNet | None = None) -> Path:
    """Write a LoRA of a UNet, the embedded model's if None, that shows; the UNet stays as it is."""
    adapter = attach(KolorsPipeline.from_pretrained().unet if unet is None else unet, rank=2)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    save_adapters({"unet": adapter}, file)
    adapter.detach()
    return file


class Models(LoRAMethods):
    """What LoRA needs of a pipeline."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module | None = None) -> None:
        assert isinstance(unet, UNet) and isinstance(text_encoder, ChatGLM | None)
        self.unet, self.text_encoder = unet, text_encoder


class Factors(NamedTuple):
    """down [R, I, *K] and up [O, R], of a convolution [O, R, 1, 1]."""

    down: Tensor
    up: Tensor

    def delta(self, scale: float = 1.0) -> Tensor:
        """What they add to the weight, [O, I, *K]."""
        return scale * torch.einsum("or, ri... -> oi...", self.up.flatten(1), self.down)


def factors(model: nn.Module, component: str, public: Iterable[str], seed: int = 3) -> dict[str, Factors]:
    """Random factors of rank 2 for layers of ours, by diffusers' names."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in public:
        layer = model.get_submodule(to_ours(component, name))
        out, *rest = layer.weight.shape
        down = torch.randn(2, *rest, generator=generator, dtype=torch.float64) / 8
        up = torch.randn(out, 2, *(1 for _ in rest[1:]), generator=generator, dtype=torch.float64) / 8
        found[name] = Factors(down, up)
    return found


def to_ours(component: str, public: str) -> str:
    """Our path of a module."""
    return TABLES[component].to_ours(f"{public}.weight").removesuffix(".weight")


def peft_names(component: str, made: Mapping[str, Factors], prefix: str = "") -> dict[str, Tensor]:
    """Factors in diffusers' present spelling."""
    state = {}
    for name, one in made.items():
        state |= {f"{prefix}{name}.lora_A.weight": one.down, f"{prefix}{name}.lora_B.weight": one.up}
    return state


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights and biases of every layer that can have adapters, as they are now."""
    found = {}
    for path, layer in supported_layers(model).items():
        found[f"{path}.weight"] = layer.weight.detach().clone()
        if layer.bias is not None:
            found[f"{path}.bias"] = layer.bias.detach().clone()
    return found


def fused(models: Models, component: str = "unet", lora_scale: float = 1.0) -> dict[str, Tensor]:
    """The weights with the active adapters in them; the models are left as they were."""
    models.fuse_lora(components=[component], lora_scale=lora_scale)
    found = weights(getattr(models, component))
    models.unfuse_lora()
    return found


def assert_weights(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> None:
    """The same layers with the same weights; fails naming the first that differs."""
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        error = relative_error(tensor, wanted[name])
        assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"


def with_deltas(
    base: Mapping[str, Tensor],
    component: str,
    made: Mapping[str, Factors],
    change: Callable[[Factors], Tensor],
) -> dict[str, Tensor]:
    """Weights plus what each layer's factors make of it, by our names."""
    wanted = dict(base)
    for name, one in made.items():
        wanted[f"{to_ours(component, name)}.weight"] = wanted[f"{to_ours(component, name)}.weight"] + change(
            one
        )
    return wanted
