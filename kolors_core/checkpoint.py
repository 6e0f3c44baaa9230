"""Checkpoints: selecting the files of a folder or hub repository, loading models from them, saving.

A model is built on the meta device, checked name by name and shape by shape against the file headers, and
only then loaded (loading.py). Only safetensors are read.
"""

import gc
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kolors_core.chatglm import ChatGLM
from kolors_core.config import ChatGLMConfig, UNetConfig, VAEConfig
from kolors_core.devices import check_dtype, loading_device
from kolors_core.hub import fetch
from kolors_core.loading import Initializer, LoadReport, assign_weights, check, load
from kolors_core.module import require_plain
from kolors_core.schedule import SCHEDULERS, Scheduler
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from weights_convert import TABLES, safetensors_files
from weights_convert.atomic_write import write_bytes
from weights_convert.safetensors_files import Source, weight_files
from weights_convert.untrusted_files import one_line, read_json_object


@dataclass(frozen=True)
class ModelSpec:
    """Specification of a component: the class of its config, and the function that builds it from one."""

    config: Any
    build: Callable[[Any], nn.Module]

    def empty(self, config: Any) -> nn.Module:
        """Build a model on the meta device, without values."""
        with gc_disabled(), torch.device("meta"), SkipInit():
            return self.build(config)


MODEL_SPECS = {
    "text_encoder": ModelSpec(ChatGLMConfig, ChatGLM),
    "unet": ModelSpec(UNetConfig, UNet),
    "vae": ModelSpec(VAEConfig, VAE),
}
OPTIONAL_COMPONENTS = {"image_encoder"}  # a checkpoint may lack them

# The small Kolors in this package, and its name for `resolve`.
EMBEDDED, EMBEDDED_NAME = Path(__file__).parent / "tiny", "tiny"
EMBEDDED_NOTICE = (
    "using the embedded tiny model, which draws emoji at 128x128; for the real one (17 GB) name "
    "Kwai-Kolors/Kolors-diffusers with the variant fp16"
)
MAX_CONFIG_BYTES = 2**18  # real ones have less than 2**13
logger = logging.getLogger("kolors_core")


def resolve(
    name: str | Path, components: Sequence[str], variant: str | None = None, has_weights: bool = True,
    **hub: Any
) -> Path:  # fmt: skip
    """Return the local folder of a checkpoint; fetch only the components' files of a hub repository.

    "tiny" is the embedded model, and a log line says so; a folder of that name is "./tiny". has_weights:
    False for configs alone. hub: as for `kolors_core.hub.fetch`, which raises the errors.
    """

    def select(listing: list[str]) -> list[str]:
        folders = {path.partition("/")[0] for path in listing}
        present = [component for component in components if component not in OPTIONAL_COMPONENTS - folders]
        return files_to_download(listing, present, variant, str(name), has_weights)

    folder = fetch(EMBEDDED if name == EMBEDDED_NAME else name, select, **hub)
    if name == EMBEDDED_NAME:
        logger.warning(EMBEDDED_NOTICE)
    return folder


def files_to_download(
    listing: list[str], components: Iterable[str], variant: str | None, where: str, has_weights: bool = True
) -> list[str]:
    """Select the files of a repository that the components load: configs, tokenizer and chosen weights."""
    files = [path for path in listing if path == "model_index.json"]
    for name in components:
        files += component_files(listing, name, name, variant, where, has_weights)
    return files


def component_files(
    listing: list[str], component: str, subfolder: str, variant: str | None, where: str, has_weights: bool
) -> list[str]:
    """Select the files of a repository that one component in a subfolder loads."""
    inside = PurePosixPath(subfolder)
    names = [path.name for path in map(PurePosixPath, listing) if path.parent == inside]
    if not names:
        raise FileNotFoundError(f"{where}: has no {subfolder}/ folder")
    chosen = [name for name in names if name.endswith(".json") and ".index." not in name]
    chosen += [name for name in names if name == "tokenizer.model" and has_weights]
    if component not in ("tokenizer", "scheduler") and has_weights:
        chosen += weight_files(names, variant, f"{where}/{subfolder}")
    return [str(inside / name) for name in chosen]


def fetch_component(
    name: str | Path, component: str, subfolder: str, variant: str | None, has_weights: bool, **hub: Any
) -> Path:
    """Return the local folder of a checkpoint; fetch only one component. Arguments as for `resolve`."""

    def select(listing: list[str]) -> list[str]:
        return component_files(listing, component, subfolder or ".", variant, str(name), has_weights)

    return fetch(name, select, **hub)


def load_component(
    name: str | Path, component: str, *, subfolder: str | None = None, variant: str | None = None,
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", kind: ModelSpec | None = None,
    **hub: Any
) -> Any:  # fmt: skip
    """Load one model from a checkpoint folder or hub repository, in public names or ours.

    subfolder: the component's folder; its name if None. device: on "meta" no weights are read. kind: of one
    not in `MODEL_SPECS`. hub: as for `resolve`. FileNotFoundError or ValueError names file, field or tensor.
    """
    check_dtype(dtype)
    device, subfolder = loading_device(device), component if subfolder is None else subfolder
    has_weights = device.type != "meta"
    folder = fetch_component(name, component, subfolder, variant, has_weights, **hub)
    return open_component(
        folder, component, subfolder=subfolder, variant=variant, has_weights=has_weights, kind=kind
    ).fill(dtype, device)


class UnloadedModel(NamedTuple):
    """Model without weights, and the files that fit it; None for a model on the meta device."""

    model: nn.Module
    source: Source | None
    names: dict[str, str]  # checkpoint name -> model name

    def fill(self, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        """Load the weights and return the model."""
        if self.source is None:
            return self.model.to(dtype).eval()
        with gc_disabled():
            assign_weights(self.model, self.source, self.names, dtype=dtype, device=device)
        return self.model.eval()


def open_component(
    folder: str | Path, component: str, *, subfolder: str | None = None, variant: str | None = None,
    has_weights: bool = True, kind: ModelSpec | None = None
) -> UnloadedModel:  # fmt: skip
    """Build one model and check by headers that its files fit it; arguments, errors: see `load_component`."""
    if kind is None and component not in MODEL_SPECS:
        raise ValueError(f"component must be of {', '.join(MODEL_SPECS)}, or have a kind, got {component!r}")
    kind = MODEL_SPECS[component] if kind is None else kind
    path = Path(folder) / (component if subfolder is None else subfolder)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder, expected the {component} of a Kolors checkpoint")
    file = path / "config.json"
    model = kind.empty(kind.config.from_public(read_json(file), str(file)))
    source = open_weights(path, variant) if has_weights else None
    return UnloadedModel(model, source, {} if source is None else check(model, source, component))


def load_modified(
    folder: str | Path, component: str, build: Callable[[Any], nn.Module], partial: Mapping[str, Initializer],
    *, variant: str | None = None, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Any, LoadReport]:  # fmt: skip
    """Load a checkpoint's fitting weights into a modified model; return the model and a report.

    build: builds the model from the checkpoint's config: a subclass of `UNet`, or
    `lambda config: UNet(replace(config, in_channels=9))`. Others: see `loading.load`, `load_component`.
    """
    kind = replace(MODEL_SPECS[component], build=build)
    model = open_component(folder, component, has_weights=False, kind=kind).model
    source = open_weights(Path(folder) / component, variant)
    report = load(model, source, component, dtype=dtype, device=loading_device(device), partial=partial)
    return model.eval(), report


def open_weights(folder: Path, variant: str | None) -> Source:
    """Open the weights of a folder; ValueError for a damaged index."""
    listing = sorted(file.name for file in folder.iterdir())
    for index in (name for name in listing if ".safetensors.index." in name):
        safetensors_files.read_shard_index(folder / index)
    return Source([folder / name for name in weight_files(listing, variant, str(folder))])


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Disable garbage collection: building thousands of modules triggers it, a third of loading's time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class SkipInit(TorchFunctionMode):
    """Mode in which new parameters stay uninitialized, for models whose weights are loaded.

    On the meta device it saves the import of torch's decompositions, half of the time to start.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the tensor of an `nn.init` function unchanged; run all other functions."""
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def load_scheduler(folder: str | Path) -> Scheduler:
    """Load the scheduler of a checkpoint folder, of the class named in its config."""
    file = Path(folder) / "scheduler" / "scheduler_config.json"
    name = (config := read_json(file)).get("_class_name")
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise ValueError(f"{file}: _class_name is {name!r}, expected one of {', '.join(SCHEDULERS)}")
    # The reference's defaults for these are not Kolors', so a missing field would be ambiguous.
    for field in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "timestep_spacing"):
        if field not in config:
            raise ValueError(f"{file}: the field {field} is missing")
    try:
        return SCHEDULERS[name].from_config({"steps_offset": 0} | config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {one_line(error)}") from None


def load_index(folder: Path) -> tuple[bool, set[str]]:
    """Read Kolors' `model_index.json`: force_zeros_for_empty_prompt, and the optional components it lacks."""
    index = read_json(file := folder / "model_index.json")
    if not str(index.get("_class_name")).startswith("Kolors"):
        raise ValueError(f"{file}: _class_name is {index.get('_class_name')!r}, expected Kolors")
    force_zeros = index.get("force_zeros_for_empty_prompt", False)
    if not isinstance(force_zeros, bool):
        raise ValueError(f"{file}: force_zeros_for_empty_prompt is {force_zeros!r}, expected true or false")
    named = {name for name, entry in index.items() if isinstance(entry, list) and any(entry[:1])}  # not null
    return force_zeros, OPTIONAL_COMPONENTS - named


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's own tensors, without those of attached adapters."""
    adapters = tuple(f"{path}." for path, m in model.named_modules() if getattr(m, "is_adapter", False))
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(adapters)}


def check_savable(model: nn.Module, component: str) -> None:
    """Raise ValueError for a quantized model: its tensors have no public names."""
    require_plain(model, f"save the {component} for the reference, which reads full weights only")


def save_component(
    model: nn.Module, folder: str | Path, component: str, *, subfolder: str | None = None,
    variant: str | None = None
) -> None:  # fmt: skip
    """Write a model's config and weights under public names, as the reference reads it, without adapters.

    subfolder: the component's folder; its name if None. ValueError for a quantized model or a bad variant.
    """
    check_savable(model, component)
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"\w+", variant)):
        raise ValueError(f"variant must be letters, digits and underscores, such as fp16, got {variant!r}")
    path = Path(folder) / (component if subfolder is None else subfolder)
    path.mkdir(parents=True, exist_ok=True)
    config: Any = model.config
    write_json(config.to_public(), path / "config.json")
    stem = safetensors_files.WEIGHT_FILE_STEMS[component] + (f".{variant}" if variant else "")
    tensors = {TABLES[component].to_public(name): tensor for name, tensor in base_state(model).items()}
    safetensors_files.save_tensors(tensors, path / f"{stem}.safetensors")


def save_metadata(folder: Path, pipeline: str, components: dict[str, Any]) -> None:
    """Write a pipeline's files other than its models: tokenizer, scheduler and `model_index.json`."""
    scheduler, tokenizer, clip = (components[name] for name in ("scheduler", "tokenizer", "image_encoder"))
    for name in ("tokenizer", "scheduler"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_bytes(tokenizer.model_bytes, folder / "tokenizer" / "tokenizer.model")
    config = {"tokenizer_class": "ChatGLMTokenizer", "padding_side": "left"}
    write_json(config, folder / "tokenizer" / "tokenizer_config.json")
    write_json(scheduler.to_public(), folder / "scheduler" / "scheduler_config.json")
    index = {
        "_class_name": pipeline,
        "force_zeros_for_empty_prompt": components["force_zeros_for_empty_prompt"],
        "scheduler": ["diffusers", type(scheduler).__name__], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["kolors", "ChatGLMModel"], "tokenizer": ["kolors", "ChatGLMTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "feature_extractor": [None, None],
        "image_encoder": [None, None] if clip is None else ["transformers", "CLIPVisionModelWithProjection"],
    }  # fmt: skip
    write_json(index, folder / "model_index.json")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; FileNotFoundError or ValueError naming the file."""
    return read_json_object(file, MAX_CONFIG_BYTES)


def write_json(content: dict[str, Any], file: Path) -> None:
    """Write JSON as the reference does: indented by two spaces, sorted."""
    write_bytes((json.dumps(content, indent=2, sort_keys=True) + "\n").encode(), file)
