"""Low-rank adapters on linear layers and convolutions (https://arxiv.org/abs/2106.09685).

W x + scale * up(down(x)); several at once on a model, each under its own name. `attach` returns a handle, and
after `.detach()` the model is what it was, bit for bit. The layers themselves are in lora_layers.py, reading
files is in lora_file.py, and what pipelines offer in lora_loading.py.
Shapes: R rank, I and O the layer's widths.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kolors_core.adapters.block_scales import BlockScale, block_scales
from kolors_core.adapters.lora_layers import LoRALayer, LoRAWeights, lora_class
from kolors_core.unet import UNet
from kolors_core.validation import as_new_path, check_float, check_int
from weights_convert import TABLES
from weights_convert.safetensors_files import save_tensors

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out")
TEXT_TARGETS = ("to_qkv",)


class Adapter:
    """The handle of an attached adapter: its layers by their path in the model."""

    def __init__(self, model: nn.Module, name: str, layers: dict[str, LoRALayer]) -> None:
        self.model, self.name, self.layers = model, name, layers

    def parts(self) -> dict[str, LoRAWeights]:
        """Its share of each layer, by the layer's path."""
        return {path: layer.parts()[self.name] for path, layer in self.layers.items()}

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained: down and up of every layer."""
        for part in self.parts().values():
            yield from part.parameters()

    @property
    def is_active(self) -> bool:
        """Whether it acts, wherever adapters are enabled."""
        return any(part.is_active for part in self.parts().values())

    @property
    def is_enabled(self) -> bool:
        """Whether the model's adapters are switched on, see `enable`."""
        return all(layer.is_enabled for layer in self.layers.values())

    def set_active(self, is_active: bool) -> None:
        """Switch it on or off; its scale stays. ValueError while adapters are fused."""
        check_not_fused(self.model, f"switch adapter {self.name!r}")
        for part in self.parts().values():
            part.is_active = is_active

    def set_scale(self, scale: BlockScale) -> None:
        """Scale the adapter: 1 is as trained, 0 is as if there were none (except DoRA, see `LoRAWeights`).

        On a UNet also by blocks, see `blocks.block_scales`. ValueError for another kind of scale, or while
        adapters are fused.
        """
        self.set_scales(self.scales(scale))

    def scales(self, scale: BlockScale) -> dict[str, float]:
        """The scale of each layer by its path, checked but not set.

        What a mapping leaves out, and what is in no block with transformers, keeps 1; a resnet or sampler
        goes with the transformer of its number, as in the reference.
        """
        scales: dict[str, Any] = dict.fromkeys(self.layers, scale)
        if isinstance(scale, Mapping):
            if not isinstance(self.model, UNet):
                kind = type(self.model).__name__
                raise ValueError(f"a {kind} has no blocks: its scale is a number, got {scale}")
            by_transformer = block_scales(scale, self.model, default=1.0)
            scales = {path: _of_layer(path, by_transformer) for path in self.layers}
        return {path: check_float("the scale of an adapter", value) for path, value in scales.items()}

    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Weigh each layer by itself. ValueError while adapters are fused."""
        check_not_fused(self.model, f"scale adapter {self.name!r}")
        for path, part in self.parts().items():
            part.strength = scales[path]

    def detach(self) -> None:
        """Take the adapter out; the last one leaves the plain layers, with the very weights they had.

        ValueError while adapters are fused.
        """
        check_not_fused(self.model, f"detach adapter {self.name!r}")
        for path, layer in self.layers.items():
            if self.name not in layer.lora:
                continue  # the model has been unloaded since
            del layer.lora[self.name]
            if not layer.lora:
                _replace(self.model, path, layer.plain())
        self.layers = {}

    def public_state(self, component: str) -> dict[str, Tensor]:
        """The adapter under diffusers' PEFT names: `unet.<path>.lora_A.weight` [R, I] and `lora_B` [O, R].

        alpha is folded into B, since files of this spelling carry none and readers take alpha = rank; how
        much of the adapter is expected is not. Raises ValueError for what these names cannot say: deltas, and
        magnitudes of columns.
        """
        table, state = TABLES[component], {}
        for path, part in self.parts().items():
            public = f"{component}.{table.to_public(path)}"
            if part.down is None or part.up is None:
                raise ValueError(f"{path}: adapter {self.name!r} is a delta there (LoHa, LoKr), not factors")
            state[f"{public}.lora_A.weight"] = part.down.detach().clone()
            state[f"{public}.lora_B.weight"] = part.up.detach() * part.scale
            if part.bias is not None:
                state[f"{public}.lora_B.bias"] = part.bias.detach().clone()
            if part.magnitude is not None:
                if part.magnitude.numel() != len(part.up):
                    raise ValueError(f"{path}: adapter {self.name!r} has magnitudes of columns, not of rows")
                # PEFT's shape: [O], of a convolution [1, O, 1, 1].
                shape = (-1,) if part.up.ndim == 2 else (1, -1, 1, 1)
                state[f"{public}.lora_magnitude_vector"] = part.magnitude.detach().reshape(shape).clone()
        return state


def attach(
    model: nn.Module,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = UNET_TARGETS,
    name: str = "default",
) -> Adapter:
    """Put a new adapter, which starts at zero, on every linear layer whose last name is in `targets`.

    alpha is the rank if None. Its factors are float32, to be trained. Raises ValueError for a rank below 1,
    where no layer matches, or for a name that is in use or no name.
    """
    rank = check_int("rank", rank)
    scale = 1.0 if alpha is None else check_float("alpha", alpha) / rank
    if isinstance(targets, str) or not isinstance(targets, Sequence):
        raise TypeError(f"targets must be a list of layers' last names, got {targets!r}")
    parts = {}
    for path, layer in linear_and_conv(model).items():
        if isinstance(layer, nn.Linear) and path.split(".")[-1] in targets:
            place = {"device": layer.weight.device, "dtype": torch.float32}
            down = torch.empty(rank, layer.in_features, **place)  # [R, I]
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            up = torch.zeros(layer.out_features, rank, **place)  # [O, R]
            parts[path] = LoRAWeights({"down": down, "up": up}, scale)
    if not parts:
        raise ValueError(f"no linear layer of this {type(model).__name__} is named {' or '.join(targets)}")
    return install(model, name, parts)


def install(model: nn.Module, name: str, parts: Mapping[str, LoRAWeights]) -> Adapter:
    """Put an adapter's parts on the layers of these paths. ValueError as in `attach`, or if one is fused."""
    check_name(model, name)
    layers, present = {}, attached_layers(model).values()
    order = 1 + max((other.order for layer in present for other in layer.parts().values()), default=0)
    for path, part in parts.items():
        layer = model.get_submodule(path)
        if not isinstance(layer, LoRALayer):
            kind = lora_class(layer)
            assert kind is not None, path
            layer = kind(layer)
            layer.is_enabled = all(other.is_enabled for other in present)
            _replace(model, path, layer)
        layer.lora[name], part.order = part, order
        layers[path] = layer
    return Adapter(model, name, layers)


def check_name(model: nn.Module, name: str) -> None:
    """ValueError unless an adapter of this name can be attached now."""
    check_not_fused(model, f"attach adapter {name!r}")
    if not isinstance(name, str) or re.fullmatch(r"[\w-]+", name) is None or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"an adapter's name is letters, digits, _ and -, and no word of torch, got {name!r}")
    if name in adapters(model):
        raise ValueError(f"an adapter named {name!r} is attached already")


def linear_and_conv(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can have adapters, by path; an IP-Adapter's branches are not the model's own."""
    return {
        path: layer
        for path, layer in model.named_modules()
        if (isinstance(layer, LoRALayer) or lora_class(layer) is not None)
        and ".image_branches." not in path
        and ".lora." not in path
    }


def attached_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The layers that have adapters, by path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LoRALayer)}


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Every adapter that is attached, by name, in the order in which they came."""
    found, order = dict[str, Adapter](), dict[str, int]()
    for path, layer in attached_layers(model).items():
        for name, part in layer.parts().items():
            found.setdefault(name, Adapter(model, name, {})).layers[path] = layer
            order[name] = part.order
    return {name: found[name] for name in sorted(found, key=order.__getitem__)}


def fused_names(model: nn.Module) -> tuple[str, ...]:
    """The adapters that the weights contain now."""
    return next((layer.fused for layer in attached_layers(model).values()), ())


def check_not_fused(model: nn.Module, wish: str) -> None:
    """ValueError if adapters are fused: their scales and neighbours are fixed until they are unfused."""
    if names := fused_names(model):
        raise ValueError(f"cannot {wish} while {', '.join(names)} is fused: unfuse first")


def fuse(model: nn.Module, names: Sequence[str], share: float = 1.0) -> None:
    """Add adapters, each at its scale times `share`, to the base weights, which are kept on the CPU.

    Until `unfuse` the model is this sum and nothing else: adapters that are not named do nothing. ValueError
    if a weight is then not finite; nothing is fused in that case.
    """
    check_not_fused(model, f"fuse {', '.join(names)}")
    layers = attached_layers(model)
    try:
        for path, layer in layers.items():
            layer.fuse(names, share)
            if not torch.isfinite(layer.weight).all():
                raise ValueError(f"fused with {', '.join(names)}, {path} is not finite: nothing is fused")
    except BaseException:
        unfuse(model)
        raise


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`: the base weights are what they were, bit for bit."""
    for layer in attached_layers(model).values():
        layer.unfuse()


def enable(model: nn.Module, is_enabled: bool) -> None:
    """Switch all adapters on or off at once; which of them are active stays as it is."""
    check_not_fused(model, "switch adapters")
    for layer in attached_layers(model).values():
        layer.is_enabled = is_enabled


def unload(model: nn.Module) -> None:
    """Take all adapters out. What is fused stays in the weights, and can then no more be unfused."""
    for path, layer in attached_layers(model).items():
        layer.lora.clear()  # for handles that are still held
        _replace(model, path, layer.plain())


def save_adapters(of: Mapping[str, Adapter], file: str | Path, *, overwrite: bool = False) -> None:
    """Write adapters, by component ("unet", "text_encoder"), to one file that the reference loads.

    Raises FileExistsError for a file that is there, unless `overwrite`.
    """
    state, file = {}, as_new_path("file", file, overwrite)
    for component, adapter in of.items():
        state |= adapter.public_state(component)
    save_tensors(state, file)


def _of_layer(path: str, scales: Mapping[str, Any]) -> Any:
    """The scale of one layer; `scales` are those of the transformers."""
    for transformer, value in scales.items():
        if path.startswith(f"{transformer}."):
            return value
    if match := re.match(r"((?:down|up)\.\d+)\.(?:resnets\.(\d+)\.|downsample$|upsample$)", path):
        return scales.get(f"{match[1]}.attentions.{match[2] or 0}", 1.0)
    return 1.0


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
