"""Low-rank adapters on linear layers and convolutions (https://arxiv.org/abs/2106.09685).

W x + scale * up(down(x)); a model can have several, each with a name. `attach` returns a handle, whose
`.detach()` restores the model bit for bit. See also lora_layers.py, lora_files.py, pipelines/lora_methods.py.
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
from kolors_core.module import all_or_nothing, apply_to_all
from kolors_core.registry import table_of
from kolors_core.unet import UNet
from kolors_core.validation import as_new_path, check_float, check_int, short_repr
from weights_convert.safetensors_files import save_tensors

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out")
TEXT_TARGETS = ("to_qkv",)
MAX_NAME = 200  # characters of an adapter's name


class LoRAAdapter:
    """Handle of an attached adapter: its layers by their path in the model."""

    def __init__(self, model: nn.Module, name: str, layers: dict[str, LoRALayer]) -> None:
        self.model, self.name, self.layers = model, name, layers

    def __repr__(self) -> str:
        """Return the name, the number of layers, and whether it acts."""
        scales = {part.strength for part in self.parts().values()}
        weight = "by layer" if len(scales) > 1 else next(iter(scales), "none")
        state = "" if self.is_active and self.is_enabled else ", off"
        layers = f"{len(self.layers)} layers of a {type(self.model).__name__}"
        return f"{type(self).__name__}({self.name!r} on {layers}, weight {weight}{state})"

    def parts(self) -> dict[str, LoRAWeights]:
        """Return the adapter's weights in each layer, by the layer's path."""
        return {path: layer.parts()[self.name] for path, layer in self.layers.items()}

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the trainable parameters: down and up of every layer."""
        return (parameter for part in self.parts().values() for parameter in part.parameters())

    @property
    def is_active(self) -> bool:
        """Whether the adapter is active, provided that adapters are enabled."""
        return any(part.is_active for part in self.parts().values())

    @property
    def is_enabled(self) -> bool:
        """Whether the model's adapters are enabled, see `enable`."""
        return all(layer.is_enabled for layer in self.layers.values())

    def set_active(self, is_active: bool) -> None:
        """Activate or deactivate the adapter; its scale stays. ValueError while adapters are fused."""
        check_not_fused(self.model, f"switch adapter {self.name!r}")
        with all_or_nothing(self.model):
            for part in self.parts().values():
                part.is_active = is_active

    def set_scale(self, scale: BlockScale) -> None:
        """Scale the adapter: 1 as trained, 0 for no effect (except DoRA, see `LoRAWeights.delta_weight`).

        On a UNet also by blocks, see `block_scales`. ValueError for another scale, or while some is fused.
        """
        self.set_scales(self.scales(scale))

    def scales(self, scale: BlockScale) -> dict[str, float]:
        """Expand a scale to one of each layer by its path; it is checked but not set.

        Layers that a mapping leaves out, or in no block with transformers, get 1; a resnet or sampler gets
        the scale of the transformer of its number, as in the reference.
        """
        scales: dict[str, Any] = dict.fromkeys(self.layers, scale)
        if isinstance(scale, Mapping):
            if not isinstance(self.model, UNet):
                kind = type(self.model).__name__
                raise ValueError(f"a {kind} has no blocks: its scale is a number, got {scale}")
            of_blocks = block_scales(scale, self.model, default=1.0)
            scales = {path: _layer_scale(path, of_blocks) for path in self.layers}
        return {path: check_float("the scale of an adapter", value) for path, value in scales.items()}

    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Set the scale of each layer, by its path. ValueError while adapters are fused."""
        check_not_fused(self.model, f"scale adapter {self.name!r}")
        with all_or_nothing(self.model):
            for path, part in self.parts().items():
                part.strength = scales[path]

    def detach(self) -> None:
        """Remove the adapter; after the last, the layers are plain again. ValueError while any is fused."""
        check_not_fused(self.model, f"detach adapter {self.name!r}")
        with all_or_nothing(self.model):
            for path, layer in self.layers.items():
                if self.name in layer.parts():  # else `unload` has removed it
                    layer.remove(self.name)
                    if not layer.lora:
                        self.model.set_submodule(path, layer.plain())
            self.layers = {}

    def public_state(self, component: str) -> dict[str, Tensor]:
        """Return the tensors in diffusers' PEFT names: `unet.<path>.lora_A.weight` [R, I], `lora_B` [O, R].

        alpha is folded into B, since files of this spelling have none and readers take alpha = rank; the
        adapter's strength is not. ValueError for what has no such name: deltas and magnitudes of columns.
        """
        table, state = table_of(component, self.model), {}
        for path, part in self.parts().items():
            public = f"{component}.{table.to_public(path)}"
            if part.down is None or part.up is None:
                raise ValueError(f"{path}: adapter {self.name!r} is a delta there (LoHa, LoKr), not factors")
            state |= {f"{public}.lora_A.weight": part.down, f"{public}.lora_B.weight": part.up * part.scale}
            if part.bias is not None:
                state[f"{public}.lora_B.bias"] = part.bias
            if part.magnitude is not None:
                if part.magnitude.numel() != len(part.up):
                    raise ValueError(f"{path}: adapter {self.name!r} has magnitudes of columns, not of rows")
                shape = (-1,) if part.up.ndim == 2 else (1, -1, 1, 1)  # PEFT's: [O] or [1, O, 1, 1]
                state[f"{public}.lora_magnitude_vector"] = part.magnitude.reshape(shape)
        return {name: tensor.detach().clone() for name, tensor in state.items()}


def attach(
    model: nn.Module, rank: int, alpha: float | None = None, targets: Sequence[str] = UNET_TARGETS,
    name: str = "default", generator: torch.Generator | None = None, dora: bool = False,
) -> LoRAAdapter:  # fmt: skip
    """Attach a new adapter, initially zero, to every linear layer whose last name is in `targets`.

    alpha: the rank if None. The factors are float32 and trainable. generator: of the down factors' first
    values, which are drawn on the CPU; torch's own if None. dora: train the norms of the weights' rows too
    (https://arxiv.org/abs/2402.09353); the adapter is then zero to the weights' rounding. ValueError for a
    rank below 1, a name that is in use or invalid, or if no layer matches.
    """
    rank = check_int("rank", rank)
    scale = 1.0 if alpha is None else check_float("alpha", alpha) / rank
    if isinstance(targets, str) or not isinstance(targets, Sequence):
        raise TypeError(f"targets must be a list of layers' last names, got {targets!r}")
    parts = {}
    for path, layer in supported_layers(model).items():
        if isinstance(layer, nn.Linear) and path.split(".")[-1] in targets:
            down = torch.empty(rank, layer.in_features, dtype=torch.float32)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)  # [R, I]
            down = down.to(layer.weight.device)
            up = down.new_zeros(layer.out_features, rank)  # [O, R]
            parts[path] = LoRAWeights({"down": down, "up": up} | (_row_norms(layer) if dora else {}), scale)
    if not parts:
        raise ValueError(f"no linear layer of this {type(model).__name__} is named {' or '.join(targets)}")
    return add_adapter(model, name, parts)


def _row_norms(layer: nn.Linear) -> dict[str, Tensor]:
    """Compute DoRA's first magnitude [O, 1], of the layer without adapters."""
    weight = layer.weight.detach().float()
    return {"magnitude": torch.linalg.vector_norm(weight, dim=1, keepdim=True)}


def add_adapter(model: nn.Module, name: str, parts: Mapping[str, LoRAWeights]) -> LoRAAdapter:
    """Attach an adapter's weights to layers, by path. ValueError as in `attach`, or if one is fused."""
    check_name(model, name)
    layers, present = {}, attached_layers(model).values()
    index = 1 + max((other.index for layer in present for other in layer.parts().values()), default=0)
    is_enabled = all(other.is_enabled for other in present)
    with all_or_nothing(model):
        for path, part in parts.items():
            layer = model.get_submodule(path)
            if not isinstance(layer, LoRALayer):
                kind = lora_class(layer)
                assert kind is not None, path
                layer = kind(layer)
                layer.is_enabled = is_enabled
                model.set_submodule(path, layer)
            part.index, layers[path] = index, layer
            layer.add(name, part)
    return LoRAAdapter(model, name, layers)


def check_name(model: nn.Module, name: str) -> None:
    """Raise ValueError unless an adapter of this name can be attached now."""
    check_not_fused(model, f"attach adapter {name!r}")
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > MAX_NAME:
        expected = f"some printable text of at most {MAX_NAME} characters"
        raise ValueError(f"an adapter's name must be {expected}, got {short_repr(name)}")
    if name in adapters(model):
        raise ValueError(f"an adapter named {name!r} is attached already")


def supported_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that can have adapters, by path, without an IP-Adapter's branches."""
    return {
        path: layer for path, layer in model.named_modules()
        if lora_class(layer) is not None and not re.search(r"\.(image_branches|lora)\.", path)
    }  # fmt: skip


def attached_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Return the layers that have adapters, by path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LoRALayer)}


def adapters(model: nn.Module) -> dict[str, LoRAAdapter]:
    """Return the attached adapters by name, in the order of attachment."""
    found, index = dict[str, LoRAAdapter](), dict[str, int]()
    for path, layer in attached_layers(model).items():
        for name, part in layer.parts().items():
            found.setdefault(name, LoRAAdapter(model, name, {})).layers[path] = layer
            index[name] = part.index
    return {name: found[name] for name in sorted(found, key=index.__getitem__)}


def fused_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters that the weights contain now."""
    return next((layer.fused for layer in attached_layers(model).values()), ())


def check_not_fused(model: nn.Module, action: str) -> None:
    """Raise ValueError if adapters are fused: neither they nor others can change until they are unfused."""
    if names := fused_names(model):
        raise ValueError(f"cannot {action} while {', '.join(names)} is fused: unfuse first")


def fuse(model: nn.Module, names: Sequence[str], factor: float = 1.0) -> None:
    """Add adapters, each at its scale times `factor`, to the base weights, which are saved on the CPU.

    Until `unfuse`, others have no effect. ValueError, and nothing is fused, if a sum is not finite.
    """
    check_not_fused(model, f"fuse {', '.join(names)}")
    try:
        for path, layer in attached_layers(model).items():
            layer.fuse(names, factor)
            if not torch.stack(torch.aminmax(layer.weight)).isfinite().all():  # a NaN becomes both
                raise ValueError(f"fused with {', '.join(names)}, {path} is not finite: nothing is fused")
    except BaseException:
        unfuse(model)
        raise


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`: restore the base weights, bit for bit. If interrupted, it restores the rest first."""
    apply_to_all(LoRALayer.unfuse, attached_layers(model).values())


def enable(model: nn.Module, is_enabled: bool) -> None:
    """Enable or disable all adapters at once, without changing which of them are active."""
    check_not_fused(model, "switch adapters")
    with all_or_nothing(model):
        for layer in attached_layers(model).values():
            layer.is_enabled = is_enabled


def unload(model: nn.Module) -> None:
    """Remove all adapters. Fused ones stay in the weights, and can no longer be unfused."""
    with all_or_nothing(model):
        for path, layer in attached_layers(model).items():
            layer.lora.clear()  # for handles that still refer to it
            model.set_submodule(path, layer.plain())


def save_adapters(handles: Mapping[str, LoRAAdapter], file: str | Path, *, overwrite: bool = False) -> None:
    """Write adapters, by component ("unet", "text_encoder"), to one file that the reference loads.

    Raises FileExistsError for an existing file, unless `overwrite`.
    """
    file, states = as_new_path("file", file, overwrite), (a.public_state(c) for c, a in handles.items())
    save_tensors({name: tensor for state in states for name, tensor in state.items()}, file)


def _layer_scale(path: str, scales: Mapping[str, Any]) -> Any:
    level = r"((?:down|up)\.\d+|mid(?=\.attentions))"  # the middle block's resnets have no transformer
    match = re.match(rf"{level}\.(?:(?:attentions|resnets)\.(\d+)\.|downsample$|upsample$)", path)
    return scales.get(f"{match[1]}.attentions.{match[2] or 0}", 1.0) if match else 1.0
