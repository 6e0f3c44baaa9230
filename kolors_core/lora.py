"""Low-rank adapters on linear layers (https://arxiv.org/abs/2106.09685): W x + scale * up(down(x)).

A `LoRALinear` is an `nn.Linear`: the base weight keeps its name, so every table and checkpoint still fits;
adapters add keys and never rename. `attach` returns a handle, and after `.detach()` the model is what it was,
bit for bit.
Shapes: R rank, I and O the layer's widths.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from weights_convert import TABLES

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out")
TEXT_TARGETS = ("to_qkv",)


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank addition that starts at zero. alpha: `scale` is alpha / rank."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)  # the base's own parameters are taken over, none is made
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha = rank, alpha
        self.scale = alpha / rank
        place = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_down = nn.Parameter(torch.empty(rank, base.in_features, **place))  # [R, I]
        self.lora_up = nn.Parameter(torch.zeros(base.out_features, rank, **place))  # [O, R]
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., I]. Returns [..., O]."""
        added = F.linear(F.linear(input, self.lora_down.to(input.dtype)), self.lora_up.to(input.dtype))
        return F.linear(input, self.weight, self.bias) + self.scale * added


class Adapter:
    """The handle of an attached adapter: its layers by their path in the model."""

    def __init__(self, model: nn.Module, layers: dict[str, LoRALinear]) -> None:
        self.model, self.layers = model, layers

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained: down and up of every layer."""
        for layer in self.layers.values():
            yield layer.lora_down
            yield layer.lora_up

    def set_scale(self, scale: float) -> None:
        """Weigh the adapter: 1 is as trained, 0 is as if there were none."""
        for layer in self.layers.values():
            layer.scale = scale * layer.alpha / layer.rank

    def detach(self) -> None:
        """Put the plain linear layers back, with the very weights they had."""
        for path, layer in self.layers.items():
            plain = nn.Linear(
                layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
            )
            plain.weight, plain.bias = layer.weight, layer.bias
            _replace(self.model, path, plain)
        self.layers = {}

    def public_state(self, component: str) -> dict[str, Tensor]:
        """The adapter under diffusers' PEFT names: `unet.<path>.lora_A.weight` [R, I] and `lora_B` [O, R].

        alpha is folded into B, since files of this spelling carry none and readers take alpha = rank.
        """
        table, state = TABLES[component], {}
        for path, layer in self.layers.items():
            public = f"{component}.{table.to_public(path + '.weight').removesuffix('.weight')}"
            state[f"{public}.lora_A.weight"] = layer.lora_down.detach().clone()
            state[f"{public}.lora_B.weight"] = layer.lora_up.detach() * (layer.alpha / layer.rank)
        return state


def attach(
    model: nn.Module, rank: int, alpha: float | None = None, targets: Sequence[str] = UNET_TARGETS
) -> Adapter:
    """Put an adapter on every linear layer whose last name is in `targets`; alpha is the rank if None.

    Raises ValueError for a rank below 1, or where no layer matches.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    found = [
        (path, layer)
        for path, layer in model.named_modules()
        if type(layer) is nn.Linear and path.rpartition(".")[2] in targets
    ]
    if not found:
        raise ValueError(f"no linear layer of this {type(model).__name__} is named {' or '.join(targets)}")
    layers = {path: LoRALinear(layer, rank, float(rank if alpha is None else alpha)) for path, layer in found}
    for path, layer in layers.items():
        _replace(model, path, layer)
    return Adapter(model, layers)


def save_adapters(adapters: dict[str, Adapter], file: str | Path) -> None:
    """Write adapters, by component ("unet", "text_encoder"), to one file that the reference loads."""
    state = {}
    for component, adapter in adapters.items():
        state |= adapter.public_state(component)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, metadata={"format": "pt"})


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
