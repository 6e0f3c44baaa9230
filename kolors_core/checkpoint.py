"""Checkpoints: which files of a folder or hub repository, strict loading, saving.

A model is built on the meta device, checked name by name and shape by shape against the file headers, and
only then filled: each tensor goes from the memory-mapped file to its place once. Only safetensors are read.
"""

import gc
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kolors_core.chatglm import ChatGLM
from kolors_core.clip_vision import CLIPVision
from kolors_core.config import ChatGLMConfig, CLIPVisionConfig, UNetConfig, VAEConfig
from kolors_core.hub import fetch
from kolors_core.quantize import refuse_quantized
from kolors_core.schedule import SCHEDULERS, Scheduler
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from weights_convert import TABLES, recognise
from weights_convert.rules import UNUSED, compare
from weights_convert.source import Source, Tensors, save_tensors, weight_files

Model = ChatGLM | UNet | VAE | CLIPVision


@dataclass(frozen=True)
class Kind:
    """How one component is built and saved: its config's reader, its class, its public file stem."""

    read_config: Callable[[dict[str, Any], str], Any]
    build: Callable[[Any], Model]
    stem: str


KINDS = {
    "text_encoder": Kind(ChatGLMConfig.from_public, ChatGLM, "model"),
    "unet": Kind(UNetConfig.from_public, UNet, "diffusion_pytorch_model"),
    "vae": Kind(VAEConfig.from_public, VAE, "diffusion_pytorch_model"),
    "image_encoder": Kind(CLIPVisionConfig.from_public, CLIPVision, "model"),
}


OPTIONAL = {"image_encoder"}  # what a checkpoint may lack

# Where attached LoRAs (lora.py) and IP-Adapters (ip_adapter.py) have their tensors in a model.
ADAPTERS = {"lora", "image_branches"}

# The small Kolors that this package carries, and the name that `resolve` knows it by.
EMBEDDED = Path(__file__).parent / "tiny"
EMBEDDED_NAME = "tiny"
EMBEDDED_NOTICE = (
    "using the embedded tiny model, which draws emoji at 128x128; for the real one (17 GB) name "
    "Kwai-Kolors/Kolors-diffusers with the variant fp16"
)

RELEASE_AFTER = 2**26  # bytes that were copied out of a mapped file, whose pages are then let go

logger = logging.getLogger("kolors_core")


def resolve(
    name: str | Path,
    components: Iterable[str],
    variant: str | None = None,
    has_weights: bool = True,
    **hub: Any,
) -> Path:
    """The local folder of a checkpoint; of a hub repository only the components' files are fetched.

    "tiny" is the embedded model, which a log line says; a folder of that name is "./tiny". has_weights: False
    for configs alone. hub: as for `kolors_core.hub.fetch`, which raises the errors.
    """
    components = list(components)

    def pick(listing: list[str]) -> list[str]:
        folders = {path.partition("/")[0] for path in listing}
        wanted = [component for component in components if component not in OPTIONAL - folders]
        return needed_files(listing, wanted, variant, str(name), has_weights)

    folder = fetch(EMBEDDED if name == EMBEDDED_NAME else name, pick, **hub)
    if name == EMBEDDED_NAME:
        logger.warning(EMBEDDED_NOTICE)
    return folder


def needed_files(
    listing: Iterable[str],
    components: Iterable[str],
    variant: str | None,
    where: str,
    has_weights: bool = True,
) -> list[str]:
    """Of a repository's files, those that the components load: configs, and tokenizer and chosen weights."""
    listing = list(listing)
    needed = [path for path in listing if path == "model_index.json"]
    for component in components:
        needed += component_files(listing, component, component, variant, where, has_weights)
    return needed


def component_files(
    listing: Iterable[str],
    component: str,
    subfolder: str,
    variant: str | None,
    where: str,
    has_weights: bool = True,
) -> list[str]:
    """Of a repository's files, those that one component in a subfolder loads."""
    paths = [path for path in map(PurePosixPath, listing) if path.parent == PurePosixPath(subfolder)]
    if not paths:
        raise FileNotFoundError(f"{where}: has no {subfolder}/ folder")
    names = [path.name for path in paths]
    chosen = [name for name in names if name.endswith(".json") and ".index." not in name]
    chosen += [name for name in names if name == "tokenizer.model" and has_weights]
    if component in KINDS and has_weights:
        chosen += weight_files(names, variant, f"{where}/{subfolder}")
    return [str(PurePosixPath(subfolder) / name) for name in chosen]


def load_component(
    folder: str | Path,
    component: str,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """One model of `KINDS` from a checkpoint folder, in public names or ours.

    subfolder: where in the folder; the component's name if None. device: on "meta" no weights are read.

    Raises FileNotFoundError or ValueError naming the file, field or tensor, before weights are read.
    """
    kind, place = KINDS[component], Path(folder) / (component if subfolder is None else subfolder)
    if not place.is_dir():
        raise FileNotFoundError(f"{place}: no such folder, wanted the {component} of a Kolors checkpoint")
    config = kind.read_config(read_json(place / "config.json"), str(place / "config.json"))
    with uncollected():
        with torch.device("meta"), Unfilled():
            model = kind.build(config)
        if torch.device(device).type == "meta":
            return model.to(dtype).eval()
        files = [
            place / name for name in weight_files([f.name for f in place.iterdir()], variant, str(place))
        ]
        load(model, Source(files), component, dtype=dtype, device=device)
        return model.eval()


@contextmanager
def uncollected() -> Iterator[None]:
    """Within it Python looks for no garbage: among thousands of new modules it would do so again and again,
    for a third of the time that loading takes."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Unfilled(TorchFunctionMode):
    """Within it new parameters get no initial values, which a model that is then loaded does not need.

    On the meta device they cost nothing but the import of torch's decompositions, half of the time to start.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """A function of `nn.init` returns its tensor as it is; all others run."""
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def load(
    model: nn.Module,
    source: Source | Tensors,
    component: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> None:
    """Fill a model from a checkpoint, strictly. The model may be on the meta device; nothing is left on it.

    Raises ValueError naming the first tensors that are missing, unexpected or misshapen, or for a quantised
    model, which is then untouched.
    """
    where = source.where
    refuse_quantized(model, f"load {where} into it; load a plain model, then quantise")
    table, is_ours = recognise(source.keys(), where)
    if table is not TABLES[component]:
        raise ValueError(f"{where}: wanted the {component} of a Kolors checkpoint, got a {table.component}")
    ours = {name: name if is_ours else table.to_ours(name) for name in source}
    target = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if mismatch := compare(table, {ours[name]: source.shape(name) for name in source}, target):
        raise ValueError(f"{where}: {mismatch}")
    for name in source:
        if not (ours[name].startswith(UNUSED) or source.dtype(name).is_floating_point):
            raise ValueError(f"{where}: {name} holds {source.dtype(name)}, wanted floating-point weights")
    state, copied = dict[str, Tensor](), 0
    for name in source:
        if ours[name].startswith(UNUSED):
            continue
        tensor = source[name]
        state[ours[name]] = tensor.to(device=device, dtype=dtype)
        copied += tensor.nbytes if state[ours[name]] is not tensor else 0
        if isinstance(source, Source) and copied > RELEASE_AFTER:
            source.release(name)
            copied = 0
    model.load_state_dict(state, strict=True, assign=True)


def load_scheduler(folder: str | Path) -> Scheduler:
    """The scheduler of a checkpoint folder, by the class that its config names."""
    file = Path(folder) / "scheduler" / "scheduler_config.json"
    config = read_json(file)
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise ValueError(f"{file}: _class_name is {name!r}, wanted one of {', '.join(SCHEDULERS)}")
    # The reference's own defaults for these are not Kolors', so that leaving one out would mean two things.
    for field in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "timestep_spacing"):
        if field not in config:
            raise ValueError(f"{file}: the field {field} is missing")
    try:
        return SCHEDULERS[name].from_config({"steps_offset": 0} | config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def load_index(folder: Path) -> dict[str, Any]:
    """The `model_index.json` of a Kolors pipeline; that of another pipeline is refused by its class.

    "has": which of the components it names.
    """
    file = folder / "model_index.json"
    index = {"force_zeros_for_empty_prompt": False} | read_json(file)
    if not str(index.get("_class_name")).startswith("Kolors"):
        raise ValueError(f"{file}: _class_name is {index.get('_class_name')!r}, wanted Kolors")
    force_zeros = index["force_zeros_for_empty_prompt"]
    if not isinstance(force_zeros, bool):
        raise ValueError(f"{file}: force_zeros_for_empty_prompt is {force_zeros!r}, wanted true or false")
    named = {
        name for name, entry in index.items() if isinstance(entry, list) and entry and entry[0] is not None
    }
    return index | {"has": {component: component in named for component in OPTIONAL}}


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder that takes the name `folder` if the block ends well, and vanishes if not."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists already, and is not overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        yield whole
        whole.replace(folder)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors, without those of attached adapters."""
    state = model.state_dict()
    return {name: state[name] for name in state if not ADAPTERS.intersection(name.split("."))}


def check_savable(model: nn.Module, component: str) -> None:
    """ValueError for a quantised model: its tensors have no public names."""
    refuse_quantized(model, f"save the {component} for the reference, which reads full weights only")


def save_component(model: Model, folder: str | Path, component: str, *, variant: str | None = None) -> None:
    """Write a model to `folder`/`component` under public names, as the reference reads it, without adapters.

    Raises ValueError for a quantised model, which the reference has no names for, and a variant that is not
    letters, digits and underscores.
    """
    check_savable(model, component)
    if variant is not None and re.fullmatch(r"\w+", variant) is None:
        raise ValueError(f"variant must be letters, digits and underscores, such as fp16, got {variant!r}")
    place = Path(folder) / component
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / "config.json", model.config.to_public())
    table = TABLES[component]
    tensors = {table.to_public(name): tensor for name, tensor in base_state(model).items()}
    name = ".".join(part for part in (KINDS[component].stem, variant, "safetensors") if part)
    save_tensors(tensors, place / name)


def save_frame(folder: Path, pipeline: str, components: dict[str, Any]) -> None:
    """Write what stands around the models: tokenizer, scheduler and `model_index.json`."""
    scheduler, tokenizer = components["scheduler"], components["tokenizer"]
    for name in ("tokenizer", "scheduler"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer" / "tokenizer.model").write_bytes(tokenizer.file.read_bytes())
    config = {"tokenizer_class": "ChatGLMTokenizer", "padding_side": "left"}
    write_json(folder / "tokenizer" / "tokenizer_config.json", config)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler.to_public())
    index = {
        "_class_name": pipeline,
        "force_zeros_for_empty_prompt": components["force_zeros_for_empty_prompt"],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["kolors", "ChatGLMModel"],
        "tokenizer": ["kolors", "ChatGLMTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
    }
    if components["image_encoder"] is not None:
        index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
    write_json(folder / "model_index.json", index)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; FileNotFoundError or ValueError naming the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: wanted a JSON object, got {type(content).__name__}")
    return content


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write as the reference does: two spaces, sorted."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
