"""Models from single files, as ComfyUI's users have them, and a whole pipeline in one file.

The models of a file are detected by its tensors (weights_convert/single_file.py); their sizes are those of
its own configs, of a checkpoint that is named, or else Kolors'. Source: diffusers' loaders/single_file.py.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from torch import Tensor, nn

from kolors_core.changed_models import QUANTIZATION
from kolors_core.checkpoint import (
    MODEL_SPECS,
    ModelSpec,
    UnloadedModel,
    check_savable,
    read_json,
    resolve,
    write_json,
)
from kolors_core.config import UNetConfig
from kolors_core.devices import check_dtype, loading_device, unwrap_compiled
from kolors_core.hub import find_linked_file, hub_commit
from kolors_core.loading import check
from kolors_core.pipelines.base import Components
from kolors_core.registry import table_of
from kolors_core.validation import as_path
from weights_convert import TABLES
from weights_convert.atomic_write import locked_scratch_dir
from weights_convert.folder_to_single_file import extract_files, to_single
from weights_convert.single_file import SubModel, open_models

# The scheduler and pipeline configs of Kolors, for files without any.
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 1100, "beta_start": 0.00085,
    "beta_end": 0.014, "beta_schedule": "scaled_linear", "steps_offset": 1, "timestep_spacing": "leading",
}  # fmt: skip
INDEX = {"_class_name": "KolorsPipeline", "force_zeros_for_empty_prompt": False}
NEEDED = ("unet", "vae", "text_encoder", "tokenizer")


class OpenedQuantized(UnloadedModel):
    """Quantized ChatGLM whose linear layers keep the file's integers."""

    def fill(self, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        """Read the weights into the model and return it; scales get the dtype."""
        part, state = self.source, dict[str, Tensor]()
        assert isinstance(part, SubModel)
        for public, own in self.names.items():
            found = _buffers(part, public, own) if public in part.scales else {own: part[public]}
            for name, tensor in found.items():
                state[name] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
            part.release(public)
        self.model.load_state_dict(state, strict=True, assign=True)
        return self.model.eval()


def load_model(
    file: str | Path, component: str, *, config: str | Path | None = None,
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
) -> nn.Module:  # fmt: skip
    """Load one model of a file, "unet", "text_encoder", "vae" or "image_encoder", to pass to a pipeline.

    The file may hold others too. config: a checkpoint folder whose config.json gives the sizes, for a model
    of other sizes than Kolors'. device: on "meta" no weights are read. A ChatGLM of 8 or 4 bits stays so.
    Raises FileNotFoundError or ValueError naming the file and the tensor, before weights are read.
    """
    check_dtype(dtype)
    device = loading_device(device)
    return open_model(file, component, config=config, has_weights=device.type != "meta").fill(dtype, device)


def open_model(
    file: str | Path, component: str, *, config: str | Path | None = None, has_weights: bool = True
) -> UnloadedModel:
    """Build one model of a file and check that its tensors fit; arguments and errors as in `load_model`."""
    file = find_linked_file(file)
    with _unpacked(file) as (parts, own):
        if component not in parts:
            raise ValueError(f"{file}: expected the {component}, got the {' and the '.join(parts)}")
        place = own if (own / component / "config.json").exists() or config is None else Path(config)
        return _open(parts[component], place, has_weights, MODEL_SPECS)


class SingleFileMethods(Components):
    """Loading a pipeline from a single file, and saving it as one."""

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path: str | Path, *, config: str | Path | None = None,
        device: torch.device | str = "cpu", variant: str | None = None, revision: str | None = None,
        cache_dir: str | Path | None = None, local_files_only: bool = False, token: str | bool | None = None,
        **arguments: Any,
    ) -> Self:  # fmt: skip
        """Load a pipeline from a safetensors file with all of it, or a part.

        pretrained_model_link_or_path: the file, or its address on the hub. config: a checkpoint folder or hub
        repository, for what the file lacks and for sizes other than Kolors'; variant and revision are its.
        arguments: dtypes and components as for `from_pretrained`; a component that is given is taken, and not
        the file's. Raises FileNotFoundError or ValueError naming the file and the tensor or model.
        """
        hub = {"cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
        file = find_linked_file(pretrained_model_link_or_path, **hub)
        has_weights = loading_device(device).type != "meta"
        with _unpacked(file) as (parts, own):
            wanted = [component for component in parts if component not in arguments]
            is_whole = (own / "model_index.json").exists()
            if is_whole and config is not None:
                raise ValueError(f"config has no effect: {file} has its own configs")
            place = folder = own
            if config is not None:
                folder, hub["revision"] = config, revision
                place = resolve(config, wanted, variant, has_weights=False, **hub)
            elif (variant, revision) != (None, None):
                raise ValueError("variant and revision have no effect without config, whose they are")
            specs = cls.model_specs
            opened: dict[str, Any] = {p: _open(parts[p], place, has_weights, specs) for p in wanted}
            if config is None and not is_whole:
                _check_complete(file, {*opened, *arguments}, has_weights)
                (own / "scheduler").mkdir(exist_ok=True)
                write_json(SCHEDULER, own / "scheduler" / "scheduler_config.json")
                write_json(INDEX, own / "model_index.json")
            pipe = cls.from_pretrained(folder, device=device, variant=variant, **hub, **opened, **arguments)
            pipe.name_or_path = str(pretrained_model_link_or_path)
            pipe.revision, pipe.variant = hub_commit(file), None
            return pipe

    def save_single_file(self, file: str | Path, *, variant: str | None = None) -> None:
        """Write the whole pipeline as one new file, which `from_single_file` loads.

        UNet and VAE have SGM's names and prefixes, as ComfyUI's nodes for Kolors look for them. variant: of
        the weight files in a folder made of it. The folder of `save_pretrained` is written beside it first,
        so that the disk needs twice the room. Raises as `save_pretrained`.
        """
        file = as_path("file", file)
        if file.exists() or file.suffix != ".safetensors":
            raise ValueError(f"{file}: expected a new .safetensors file")
        for component, model in self._own_models().items():
            check_savable(plain := unwrap_compiled(model), component)
            if table_of(component, plain) is not TABLES[component]:
                kind = f"the {component} is a {type(plain).__name__}"
                raise ValueError(f"{kind}, which single files have no names for: use save_pretrained")
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked_scratch_dir(file) as scratch:
            self.save_pretrained(scratch / "folder", variant=variant)
            to_single(scratch / "folder", file)


@contextmanager
def _unpacked(file: Path) -> Iterator[tuple[dict[str, SubModel], Path]]:
    """Open a file's models, and unpack its small files into a temporary folder; errors name the file."""
    parts, whole, small = open_models(file)
    with TemporaryDirectory() as scratch:
        try:
            extract_files(whole, small, Path(scratch))
            yield parts, Path(scratch)
        except (ValueError, FileNotFoundError) as error:
            if scratch not in str(error):
                raise
            kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
            raise kind(str(error).replace(scratch, str(file))) from None


def _open(part: SubModel, place: Path, has_weights: bool, specs: Mapping[str, ModelSpec]) -> UnloadedModel:
    """Build the model by the config in its folder of `place`, or of Kolors' sizes, and check the tensors."""
    if part.component in specs:
        spec = specs[part.component]
    else:
        from kolors_core.adapters.clip_vision import IMAGE_ENCODER as spec  # of files with CLIP only
    file = place / part.component / "config.json"
    is_own = file.exists()
    public = {k: v for k, v in (read_json(file) if is_own else {}).items() if k != QUANTIZATION}  # of others
    config = spec.config.from_public(public, str(file)) if is_own else spec.config()
    is_inpainting = "conv_in.weight" in part and part.shape("conv_in.weight")[1:2] == (9,)
    if isinstance(config, UNetConfig) and not is_own and is_inpainting:
        config = replace(config, in_channels=9)
    model = spec.empty(config)
    try:
        names = check(model, part, part.component)
    except ValueError as error:
        hint = "" if is_own else "; these are Kolors' sizes, for others name a checkpoint as config"
        raise ValueError(f"{error}{hint}") from None
    if part.bits is not None:
        from kolors_core.performance.quantize import PER_ROW, quantize  # of quantized files only

        _check_quantized(model, part, names)
        quantize(model, part.bits, PER_ROW)
    if not has_weights:
        return UnloadedModel(model, None, {})
    return (UnloadedModel if part.bits is None else OpenedQuantized)(model, part, names)


def _check_quantized(model: nn.Module, part: SubModel, names: dict[str, str]) -> None:
    scaled = {names[name].removesuffix(".weight") for name in part.scales}
    layers = {path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if odd := sorted(scaled ^ layers):
        has = "has" if odd[0] in scaled else "lacks"
        raise ValueError(f"{part.where}: {odd[0]} {has} a weight_scale, expected one for each linear layer")


def _buffers(part: SubModel, public: str, own: str) -> dict[str, Tensor]:
    """Return the buffers of a `QuantizedLinear` for the weight `own`: the file's numbers."""
    layer = own.removesuffix("weight")
    q, scale = part.integers(public), part.scale(public)  # [O, I], [O]
    if part.bits == 8:
        return {f"{layer}quantized": q, f"{layer}scale": scale[:, None]}
    first, second = (q + 8).view(torch.uint8)[:, None].chunk(2, dim=-1)  # [O, 1, I/2], from 0 to 15
    scale = scale[:, None, None]  # [O, 1, 1]
    return {f"{layer}quantized": first | second << 4, f"{layer}scale": scale, f"{layer}lowest": -8 * scale}


def _check_complete(file: Path, have: Iterable[str], has_weights: bool) -> None:
    for name in NEEDED:
        if name not in have and (has_weights or name != "tokenizer"):
            wanted = "as config a checkpoint that has it, such as Kwai-Kolors/Kolors-diffusers"
            raise FileNotFoundError(f"{file}: has no {name}: give {name}, or {wanted}")
