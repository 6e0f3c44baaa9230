"""Checkpoints: selecting the files of a folder or hub repository, loading models from them, saving.

A model is built on the meta device, checked name by name and shape by shape against the file headers, and
only then loaded (loading.py). Only safetensors are read.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kolors_core import changed_models
from kolors_core.config import EMBEDDED_NAME
from kolors_core.devices import check_dtype, loading_device, unwrap_compiled
from kolors_core.hub import fetch
from kolors_core.loading import Initializer, LoadReport, assign_weights, check, load
from kolors_core.readable import base_state, check_savable
from kolors_core.registry import (
    MODEL_SPECS,
    ModelSpec,
    described_class,
    described_name,
    fields_of,
    gc_disabled,
    read_fields,
    registered_spec,
    spec_of,
    table_of,
)
from kolors_core.schedule import Scheduler
from kolors_core.schedulers import SCHEDULERS
from kolors_core.tokenizer import Tokenizer
from weights_convert import safetensors_files
from weights_convert.atomic_write import write_bytes
from weights_convert.safetensors_files import Source, is_weight_file, weight_files
from weights_convert.untrusted_files import one_line, printable, read_json_object

SCHEDULER_FILE = "scheduler_config.json"
# The files of a saved pipeline's folders other than its models.
TOKENIZER_FILE = "tokenizer_config.json"
OWN_FILES = {"tokenizer": {"tokenizer.model", TOKENIZER_FILE}, "scheduler": {SCHEDULER_FILE}}
OPTIONAL_COMPONENTS = {"image_encoder"}  # a checkpoint may lack them

EMBEDDED = Path(__file__).parent / "tiny"  # the small Kolors in this package, named "tiny" for `resolve`
EMBEDDED_NOTICE = (
    "using the embedded tiny model, which draws scenes of 127 things at 128x128; for the real one (17 GB) "
    "name Kwai-Kolors/Kolors-diffusers with the variant fp16"
)
MAX_CONFIG_BYTES = 2**18  # real ones have less than 2**13
AnyScheduler = TypeVar("AnyScheduler", bound=Scheduler)
logger = logging.getLogger("kolors_core")


def _make_printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()  # names and texts may be from files
    return True


logger.addFilter(_make_printable)


def local_name(name: str | Path) -> str | Path:
    """Return the embedded model's folder for its name "tiny", and any other name as it is."""
    return EMBEDDED if name == EMBEDDED_NAME else name


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

    folder = fetch(local_name(name), select, **hub)
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

    return fetch(local_name(name), select, **hub)


def load_component(
    name: str | Path, component: str, *, subfolder: str | None = None, variant: str | None = None,
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", kind: ModelSpec | None = None,
    **hub: Any
) -> Any:  # fmt: skip
    """Load one model from a checkpoint folder or hub repository, in public names or ours.

    name, hub: as for `resolve`. subfolder: the component's folder; its name if None. device: on "meta" no
    weights are read. kind: of one not in `MODEL_SPECS`. Errors name the file, field or tensor.
    """
    check_dtype(dtype)
    device, subfolder = loading_device(device), component if subfolder is None else subfolder
    has_weights = device.type != "meta"
    folder = fetch_component(name, component, subfolder, variant, has_weights, **hub)
    return open_component(
        folder, component, subfolder=subfolder, variant=variant, has_weights=has_weights, kind=kind
    ).fill(dtype, device)


@dataclass(frozen=True)
class UnloadedModel:
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
    path = _existing_folder(folder, component, subfolder)
    kind = spec_named_in(path, component) or MODEL_SPECS[component] if kind is None else kind
    public = read_json(file := path / "config.json")
    is_ours = changed_models.is_ours(kind.build) and changed_models.is_ours(kind.config)
    changed = changed_models.describe(public, component) if is_ours else ""
    try:
        model = kind.empty(changed_models.read_config(kind.config, public, str(file)))
        source = open_weights(path, variant) if has_weights else None
        names = {} if source is None else check(model, source, component, kind.table)
    except ValueError as error:
        raise ValueError(f"{error}; {changed}" if changed else str(error)) from None
    if changed:  # it fits, and computes something else
        raise ValueError(f"{file}: {changed}")
    return UnloadedModel(model, source, names)


def _existing_folder(folder: str | Path, component: str, subfolder: str | None = None) -> Path:
    """Return a component's folder; FileNotFoundError unless it is there."""
    path = Path(local_name(folder)) / (component if subfolder is None else subfolder)
    if not path.is_dir():
        expected = f"expected the {component} of a Kolors checkpoint; `resolve` fetches a Hub repository's"
        raise FileNotFoundError(f"{path}: no such folder, {expected}")
    return path


def spec_named_in(path: Path, component: str) -> ModelSpec | None:
    """Return the registered class that a model's folder names, None if it names none."""
    file = path / "config.json"
    return registered_spec(component, read_json(file).get("_class_name")) if file.is_file() else None


def load_modified(
    folder: str | Path, component: str, build: "Callable[[Any], nn.Module] | ModelSpec",
    partial: Mapping[str, Initializer], *, variant: str | None = None, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu"
) -> tuple[Any, LoadReport]:  # fmt: skip
    """Load a checkpoint's fitting weights into a modified model; return the model and a report.

    build: builds the model from the checkpoint's config: a subclass of `UNet`, or
    `lambda config: UNet(replace(config, in_channels=9))`; a `ModelSpec` for a config with more fields.
    Others: see `loading.load`, `load_component`.
    """
    path = _existing_folder(folder, component)
    own = spec_named_in(path, component) or MODEL_SPECS[component]
    kind = build if isinstance(build, ModelSpec) else replace(own, build=build)
    file = path / "config.json"
    model = kind.empty(changed_models.read_config(kind.config, read_json(file), str(file)))
    source, device = open_weights(path, variant), loading_device(device)
    report = load(model, source, component, dtype=dtype, device=device, partial=partial, table=kind.table)
    return model.eval(), report


def open_weights(folder: Path, variant: str | None) -> Source:
    """Open the weights of a folder; ValueError for a damaged index."""
    listing = sorted(file.name for file in folder.iterdir())
    for index in (name for name in listing if ".safetensors.index." in name):
        safetensors_files.read_shard_index(folder / index)
    return Source([folder / name for name in weight_files(listing, variant, str(folder))])


def load_scheduler(folder: str | Path) -> Scheduler:
    """Load the scheduler of a checkpoint folder, of the class named in its config, see registry.py."""
    file = Path(folder) / "scheduler" / SCHEDULER_FILE
    name = read_json(file).get("_class_name")
    if (kind := described_class("scheduler", name)) is None:
        hint = "a class of your own is registered first: kolors_core.registry.register('scheduler', ...)"
        raise ValueError(f"{file}: _class_name is {name!r}, expected one of {', '.join(SCHEDULERS)}; {hint}")
    return open_scheduler(file, kind)


def open_scheduler(file: Path, kind: type[AnyScheduler]) -> AnyScheduler:
    """Build a scheduler of this class from a config file, whatever class it names."""
    config = read_json(file)
    # The reference's defaults for these are not Kolors', so a missing field would be ambiguous.
    own = {field.name for field in fields(kind)}
    for field in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "timestep_spacing"):
        if field in own and field not in config:
            raise ValueError(f"{file}: the field {field} is missing")
    try:
        return kind.from_config({"steps_offset": 0} | config)
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


def save_component(
    model: nn.Module, folder: str | Path, component: str, *, subfolder: str | None = None,
    variant: str | None = None, max_shard_size: int | str | None = None
) -> None:  # fmt: skip
    """Write a model's config and weights under public names, as the reference reads it, without adapters.

    subfolder: the component if None. max_shard_size: such as "5GB", of a file. ValueError if quantized.
    """
    check_savable(model, component)
    table, config = table_of(component, model), changed_models.public_config(model, component)
    tensors = {table.to_public(name): tensor for name, tensor in base_state(model).items()}
    path = Path(folder) / (component if subfolder is None else subfolder)
    write_component(config, tensors, path, component, variant, max_shard_size)


def write_component(
    config: dict[str, Any], tensors: Mapping[str, Tensor], path: Path, component: str, variant: str | None,
    max_shard_size: int | str | None,
) -> None:  # fmt: skip
    """Write a model's folder: its `config.json` and public tensors; ValueError for a bad variant or size."""
    if max_shard_size is not None:
        safetensors_files.parse_size(max_shard_size)
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"\w+", variant)):
        raise ValueError(f"variant must be letters, digits and underscores, such as fp16, got {variant!r}")
    path.mkdir(parents=True, exist_ok=True)
    write_json(config, path / "config.json")
    stem = safetensors_files.WEIGHT_FILE_STEMS[component]
    safetensors_files.save_shards(tensors, path, stem, variant, max_shard_size)


def is_own_folder(folder: Path) -> bool:
    """Return whether a folder is a saved Kolors or a part of one, and holds only files that we write.

    Such a folder may be replaced by a newer one: `atomic_folder(folder, is_own_folder)`.
    """
    entries = {entry.name for entry in folder.iterdir()}
    if "config.json" in entries:
        return _holds_only(folder, {"config.json"}, has_weights=True)
    if "model_index.json" not in entries:
        return any(_holds_only(folder, names) for names in OWN_FILES.values())
    try:
        load_index(folder)
    except (OSError, ValueError):
        return False
    others = entries - {"model_index.json"}
    models = others & safetensors_files.WEIGHT_FILE_STEMS.keys()
    return (
        all(_holds_only(folder / name, {"config.json"}, has_weights=True) for name in models)
        and all(_holds_only(folder / name, OWN_FILES.get(name, set())) for name in others - models)
        and others <= models | OWN_FILES.keys()
    )


def _holds_only(folder: Path, names: set[str], has_weights: bool = False) -> bool:
    """Return whether a folder, and no link, has only files of these names, and perhaps a model's weights."""
    return folder.is_dir() and not folder.is_symlink() and all(
        (file.name in names or (has_weights and is_weight_file(file.name)))
        and file.is_file() and not file.is_symlink()
        for file in folder.iterdir()
    )  # fmt: skip


def save_metadata(folder: Path, pipeline: str, components: dict[str, Any]) -> None:
    """Write a pipeline's files other than its models: tokenizer, scheduler and `model_index.json`."""
    scheduler, tokenizer = components["scheduler"], components["tokenizer"]
    for name in ("tokenizer", "scheduler"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder / "tokenizer")
    name = described_name("scheduler", scheduler) or type(scheduler).__name__
    write_json(scheduler.to_public() | {"_class_name": name}, folder / "scheduler" / SCHEDULER_FILE)
    write_json(model_index(pipeline, components), folder / "model_index.json")


def model_index(pipeline: str, components: dict[str, Any]) -> dict[str, Any]:
    """Return the content of `model_index.json`: the reference's class of each component, by its library.

    A registered class has its module in the library's place.
    """
    names = {
        "scheduler": ["diffusers", type(components["scheduler"]).__name__],
        "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["kolors", "ChatGLMModel"],
        "tokenizer": ["kolors", "ChatGLMTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    }  # fmt: skip
    for name in names:
        part = unwrap_compiled(components[name])
        spec, described = spec_of(name, part), described_name(name, part)
        if own := described if spec is None else spec.name:
            names[name] = [type(part).__module__, own]
    classes = {name: [None, None] if components[name] is None else entry for name, entry in names.items()}
    force_zeros = {"force_zeros_for_empty_prompt": components["force_zeros_for_empty_prompt"]}
    return {"_class_name": pipeline} | force_zeros | classes | {"feature_extractor": [None, None]}


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files, as the reference reads them; of a registered class its fields alone."""
    if (name := described_name("tokenizer", tokenizer)) is None:
        write_bytes(tokenizer.model_bytes, folder / "tokenizer.model")
        config = {"tokenizer_class": "ChatGLMTokenizer", "padding_side": "left"}
    else:
        config = fields_of(tokenizer) | {"tokenizer_class": name}
    write_json(config, folder / TOKENIZER_FILE)


def load_tokenizer(folder: Path, kind: type[Tokenizer]) -> Any:
    """Load a checkpoint's tokenizer, of the registered class that its config names or else of this one."""
    file = folder / "tokenizer" / TOKENIZER_FILE
    public = read_json(file) if file.is_file() else {}
    if (own := described_class("tokenizer", public.get("tokenizer_class"))) is not None:
        return read_fields(own, public, str(file))
    try:
        return kind(folder / "tokenizer")
    except FileNotFoundError as error:
        name = str(public.get("tokenizer_class"))[:100]
        if name in ("None", "ChatGLMTokenizer"):
            raise
        how = f"kolors_core.registry.register('tokenizer', {name!r}, ...)"
        raise FileNotFoundError(
            f"{error}; if {name} is a class of your own, register it first: {how}"
        ) from None


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; FileNotFoundError or ValueError naming the file."""
    return read_json_object(file, MAX_CONFIG_BYTES)


def write_json(content: dict[str, Any], file: Path) -> None:
    """Write JSON as the reference does: indented by two spaces, sorted."""
    write_bytes((json.dumps(content, indent=2, sort_keys=True) + "\n").encode(), file)
