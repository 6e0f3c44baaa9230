"""Quantized models and files: weights quantized while they are read, and quantized models saved and loaded.

A saved model has the files of a plain one. Its `config.json` also has

    "quantization_config": {"quant_method": "kolors_core", "format": "w8a8", "group": 64,
                            "exceptions": {"8": ["mid_block.attentions.0.proj_in"], "none": []}}

with a format of `FORMATS`, that of other layers by their public paths, and "none" for layers that stay whole.
A quantized `x.weight` holds integers or float8, beside `x.weight_scale` and, with 4 bits, `x.weight_lowest`
(see `QuantizedLayer`); all other tensors are as usual. The reference refuses the method by its name.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kolors_core import changed_models, checkpoint, readable
from kolors_core.changed_models import QUANTIZATION
from kolors_core.checkpoint import MODEL_SPECS, ModelSpec, UnloadedModel
from kolors_core.devices import check_dtype, loading_device
from kolors_core.loading import Converter, assign_weights
from kolors_core.module import ReplacedModule
from kolors_core.performance.quantize import (
    FORMATS,
    GROUP,
    STORED_AS,
    Format,
    Progress,
    QuantizedLayer,
    is_quantized,
    large_layers,
    quantize,
)
from kolors_core.readable import base_state, check_known
from kolors_core.registry import table_of
from weights_convert.key_mapping import Table, summarize
from weights_convert.safetensors_files import Source

METHOD, WHOLE = "kolors_core", "none"
FILE_DTYPES: dict[Format, torch.dtype] = {8: torch.int8, 4: torch.uint8, "fp8": torch.float8_e4m3fn}
FORMAT_OF = {str(one): one for one in FORMATS}


@dataclass(frozen=True)
class QuantizedOnRead(UnloadedModel):
    """Model whose layers are quantized one after another while their full weights are read."""

    progress: Progress | None = None

    def fill(self, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        """Load and quantize the weights, and return the model: with the bits of `quantize` after loading.

        In memory are the layers quantized so far, and a part of the next.
        """
        layers = {f"{path}.weight": layer for path, layer in _quantized_layers(self.model).items()}
        done = 0

        def convert(name: str, tensor: Tensor) -> Mapping[str, Tensor] | None:
            nonlocal done
            if name not in layers:
                return None
            buffers = layers[name].encode(tensor, dtype, device)
            done += 1
            if self.progress is not None:
                self.progress(done, len(layers))
            return {f"{name.removesuffix('weight')}{key}": buffer for key, buffer in buffers.items()}

        return _fill(self, dtype, device, convert)


class SavedQuantized(UnloadedModel):
    """Quantized model and the files that hold its integers, from which they are mapped."""

    def fill(self, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        """Load the tensors and return the model; scales and other floats get the dtype."""

        def convert(name: str, tensor: Tensor) -> Mapping[str, Tensor] | None:
            if not name.endswith(".quantized"):
                return None
            is_float8 = tensor.dtype == torch.float8_e4m3fn
            return {name: (tensor.view(torch.uint8) if is_float8 else tensor).to(device)}

        return _fill(self, dtype, device, convert)


def _fill(
    part: UnloadedModel, dtype: torch.dtype, device: torch.device | str, convert: Converter
) -> nn.Module:
    """Load the weights, of which some are converted, and return the model."""
    if part.source is None:
        return UnloadedModel.fill(part, dtype, device)
    with checkpoint.gc_disabled():
        assign_weights(part.model, part.source, part.names, dtype=dtype, device=device, convert=convert)
    return part.model.eval()


def quantized_on_read(
    part: UnloadedModel, weight_format: Format, progress: Progress | None = None
) -> UnloadedModel:
    """Return a model that will be quantized while it is filled; one of quantized files stays as it is.

    ValueError for files that are quantized to another format, and as of `quantize`.
    """
    if is_quantized(part.model):
        own = {layer.weight_format for layer in _quantized_layers(part.model).values()}
        if own != {weight_format}:
            found = " and ".join(map(repr, sorted(own, key=str)))
            where = "" if part.source is None else f"{part.source.where}: "
            raise ValueError(f"{where}quantized to {found} already, and cannot be to {weight_format!r}")
        return part
    quantize(part.model, weight_format)
    return QuantizedOnRead(part.model, part.source, part.names, progress)


def load_component(
    name: str | Path, component: str, weight_format: Format | None = None, *, subfolder: str | None = None,
    variant: str | None = None, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    kind: ModelSpec | None = None, progress: Progress | None = None, **hub: Any
) -> Any:  # fmt: skip
    """Load one model, quantized while it is read, or from a folder of `save_component`.

    weight_format: None for a model as it is. Others, errors: as for `checkpoint.load_component`, `quantize`.
    """
    check_dtype(dtype)
    device, subfolder = loading_device(device), component if subfolder is None else subfolder
    has_weights = device.type != "meta"
    folder = checkpoint.fetch_component(name, component, subfolder, variant, has_weights, **hub)
    part = open_component(
        folder, component, subfolder=subfolder, variant=variant, has_weights=has_weights, kind=kind
    )
    part = part if weight_format is None else quantized_on_read(part, weight_format, progress)
    return part.fill(dtype, device)


def open_component(
    folder: str | Path, component: str, *, subfolder: str | None = None, variant: str | None = None,
    has_weights: bool = True, kind: ModelSpec | None = None
) -> UnloadedModel:  # fmt: skip
    """Build a model, quantized or plain, and check by headers that its files fit.

    ValueError names the file and the field, tensor or dtype that does not.
    """
    path = Path(checkpoint.local_name(folder)) / (component if subfolder is None else subfolder)
    file, default = (
        path / "config.json",
        checkpoint.spec_named_in(path, component) or MODEL_SPECS.get(component),
    )
    kind = default if kind is None else kind
    public = checkpoint.read_json(file) if file.is_file() else {}
    if public.get(QUANTIZATION) is None or kind is None:
        return checkpoint.open_component(
            folder, component, subfolder=subfolder, variant=variant, has_weights=has_weights, kind=kind
        )
    settings, where = public.pop(QUANTIZATION), f"{file}: {QUANTIZATION}"
    model = kind.empty(changed_models.read_config(kind.config, public, str(file)))
    if changed := changed_models.describe(public, component) if changed_models.is_ours(kind.build) else "":
        raise ValueError(f"{file}: {changed}")
    _quantize_as(model, component, settings, where)
    source = checkpoint.open_weights(path, variant) if has_weights else None
    return SavedQuantized(model, source, {} if source is None else _check(model, source, component))


def save_component(
    model: nn.Module, folder: str | Path, component: str, *, subfolder: str | None = None,
    variant: str | None = None, max_shard_size: int | str | None = None
) -> None:  # fmt: skip
    """Write a quantized model's config and tensors, without adapters; a plain one as the reference reads it.

    Arguments, errors: as for `checkpoint.save_component`.
    """
    if not is_quantized(model):
        return checkpoint.save_component(
            model, folder, component, subfolder=subfolder, variant=variant, max_shard_size=max_shard_size
        )
    layers, own, table = _quantized_layers(model), base_state(model), table_of(component, model)
    formats = {path: STORED_AS[layer.weight_format] for path, layer in layers.items()}
    tensors = dict[str, Tensor]()
    for name, tensor in own.items():
        is_float8 = name.endswith(".quantized") and formats[name.removesuffix(".quantized")] == "fp8"
        stored = tensor.view(torch.float8_e4m3fn) if is_float8 else tensor
        tensors[_public_name(name, table, layers)] = stored
    config = changed_models.public_config(model, component) | {QUANTIZATION: _settings(model, component)}
    path = Path(folder) / (component if subfolder is None else subfolder)
    checkpoint.write_component(config, tensors, path, component, variant, max_shard_size)


def check_savable(model: nn.Module, component: str) -> None:
    """Raise ValueError for a model that would not be read again, such as one quantized unlike `quantize`."""
    if is_quantized(model):
        check_known(model, component)
        _settings(model, component)
    else:
        readable.check_savable(model, component)


def _quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the quantized layers by path, also those that layers with adapters replace."""
    found = model.named_modules()
    own = ((path, part.base[0] if isinstance(part, ReplacedModule) else part) for path, part in found)
    return {path: part for path, part in own if isinstance(part, QuantizedLayer)}


def _settings(model: nn.Module, component: str) -> dict[str, Any]:
    """Return the content of `quantization_config`; ValueError for layers that `quantize` would not make."""
    layers = _quantized_layers(model)
    formats = {path: layer.weight_format for path, layer in layers.items()}
    groups = {layer.group for layer in layers.values() if layer.weight_format == 4} or {GROUP}
    choices = [one for one, _ in Counter(formats.values()).most_common()]
    common = next((one for one in choices if formats.keys() <= {*large_layers(model, one)}), None)
    if common is None or len(groups) > 1:
        what = f"groups of {groups}" if common else "other layers quantized"
        raise ValueError(f"this {type(model).__name__} has {what}, unlike any that `quantize` makes")
    exceptions = dict[str, list[str]]()
    for path in large_layers(model, common):
        if (one := formats.get(path)) != common:
            public = table_of(component, model).to_public(f"{path}.weight").removesuffix(".weight")
            exceptions.setdefault(WHOLE if one is None else str(one), []).append(public)
    return {"quant_method": METHOD, "format": common, "group": groups.pop(), "exceptions": exceptions}


def _quantize_as(model: nn.Module, component: str, settings: Any, where: str) -> None:
    """Quantize an empty model as `quantization_config` says; ValueError for what it cannot mean."""
    if not isinstance(settings, dict) or settings.get("quant_method") != METHOD:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise ValueError(f"{where}: quant_method is {repr(method)[:100]}, only {METHOD!r} is read here")
    if odd := sorted(settings.keys() ^ {"quant_method", "format", "group", "exceptions"}):
        fault = "unknown" if odd[0] in settings else "missing"
        raise ValueError(f"{where}: the field {odd[0][:100]!r} is {fault}")
    listed = settings["exceptions"]
    is_lists = isinstance(listed, dict) and all(isinstance(paths, list) for paths in listed.values())
    if not is_lists or not {*listed} <= {WHOLE, *FORMAT_OF}:
        known = ", ".join((WHOLE, *FORMAT_OF))
        raise ValueError(f"{where}: exceptions must be lists of layers by {known}")
    to_ours = partial(_own_path, table_of(component, model))
    exceptions = {to_ours(str(path)): FORMAT_OF.get(key) for key, paths in listed.items() for path in paths}
    try:
        quantize(model, settings["format"], settings["group"], exceptions=exceptions)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def _own_path(table: Table, public: str) -> str:
    return table.to_ours(f"{public}.weight").removesuffix(".weight")


def _public_name(name: str, table: Table, layers: Mapping[str, QuantizedLayer]) -> str:
    """Return the name in files of a tensor of a quantized model."""
    path, _, kind = name.rpartition(".")
    if path not in layers or kind == "bias":
        return table.to_public(name)
    weight = table.to_public(f"{path}.weight")
    return weight if kind == "quantized" else f"{weight}_{kind}"


def _check(model: nn.Module, source: Source, component: str) -> dict[str, str]:
    """Check by headers that files hold a quantized model; return file's name -> model's name."""
    layers, target, table = _quantized_layers(model), model.state_dict(), table_of(component, model)
    names = {_public_name(name, table, layers): name for name in target}
    unexpected = sorted(name for name in source.keys() - names.keys() if table.why_dropped(name) is None)
    present = [name for name in names if name in source]
    misshapen = [
        f"{name} is {list(source.shape(name))}, expected {list(target[names[name]].shape)}"
        for name in present if source.shape(name) != target[names[name]].shape
    ]  # fmt: skip
    missing = sorted(names.keys() - {*present})
    if missing or unexpected or misshapen:
        faults = summarize(missing=missing, unexpected=unexpected, misshapen=misshapen)
        raise ValueError(f"{source.where}: {component}: the tensors do not fit config.json: {faults}")
    for name in present:
        path, _, kind = names[name].rpartition(".")
        got = source.dtype(name)
        if kind == "quantized":
            expected = FILE_DTYPES[STORED_AS[layers[path].weight_format]]
            is_right = got == expected
        else:
            expected, is_right = "floats of 2 bytes or more", got.is_floating_point and got.itemsize > 1
        if not is_right:
            raise ValueError(f"{source.where}: {name} holds {got}, expected {expected}")
    return names
