"""Checkpoints: finding the files of a folder or hub repository, strict loading, saving.

A model is built on the meta device, checked name by name and shape by shape against the file headers, and
only then
filled: each tensor goes from the memory-mapped file to its place once. Only safetensors are read.
"""

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
from safetensors.torch import save_file
from torch import nn

from kolors_core.chatglm import ChatGLM
from kolors_core.config import ChatGLMConfig, UNetConfig, VAEConfig
from kolors_core.schedule import SCHEDULERS, Scheduler
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from weights_convert import TABLES, recognise
from weights_convert.rules import UNUSED, compare
from weights_convert.source import Source, weight_files


@dataclass(frozen=True)
class Kind:
    """How one component is built and saved: its config's reader, its class, its public file stem."""

    read_config: Callable[[dict[str, Any], str], Any]
    build: Callable[[Any], ChatGLM | UNet | VAE]
    stem: str


KINDS = {
    "text_encoder": Kind(ChatGLMConfig.from_public, ChatGLM, "model"),
    "unet": Kind(UNetConfig.from_public, UNet, "diffusion_pytorch_model"),
    "vae": Kind(VAEConfig.from_public, VAE, "diffusion_pytorch_model"),
}


# The small Kolors that this package carries, and the name that `resolve` knows it by.
EMBEDDED = Path(__file__).parent / "tiny"
EMBEDDED_NAME = "tiny"
EMBEDDED_NOTICE = (
    "using the embedded tiny model, which draws emoji at 128x128; for the real one (17 GB) name "
    "Kwai-Kolors/Kolors-diffusers with the variant fp16"
)
logger = logging.getLogger("kolors_core")


def resolve(
    name: str | Path,
    components: Iterable[str],
    *,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """The local folder of a checkpoint: `name` itself if it is one, else a hub repository's, downloaded.

    "tiny" is the embedded model, which a log line says; a folder of that name is "./tiny".
    Of a repository only the files of `components` in `variant` are fetched; `HF_ENDPOINT`, `HF_HUB_OFFLINE`
    and the hub's cache are respected, and the cache serves when the hub cannot be reached. Raises
    FileNotFoundError, in one line, naming what was looked for.
    """
    if not isinstance(name, str | Path) or not str(name):
        raise TypeError(f"wanted a checkpoint folder or hub repository, got {name!r}")
    folder = EMBEDDED if name == EMBEDDED_NAME else Path(name)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision!r} has no effect: {folder} is a local folder")
        if name == EMBEDDED_NAME:
            logger.warning(EMBEDDED_NOTICE)
        return folder
    if folder.exists() or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name}: no such folder, and not a hub repository of the form owner/name")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage] (of the HTTP client, which differs by release)
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
    )

    repo, listing, reason = str(name), None, "local_files_only is set"
    if not local_files_only:
        try:
            info = HfApi(token=token).model_info(repo, revision=revision)
            listing = [file.rfilename for file in info.siblings or ()]
        except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
            raise FileNotFoundError(f"{repo}: cannot be had from the hub: {_one_line(error)}") from None
        except (OSError, HTTPError) as error:  # no connection, or offline mode: the cache may serve
            reason = f"the hub cannot be reached: {_one_line(error)}"
    # Without a listing one file stands for all: the hub's client refuses a cache that lacks a file asked for,
    # by default any of the repository, and ours lacks those that were not needed.
    wanted = ["model_index.json"] if listing is None else needed_files(listing, components, variant, repo)
    try:
        return Path(
            snapshot_download(
                repo, revision=revision, cache_dir=cache_dir, token=token, allow_patterns=wanted,
                local_files_only=listing is None,
            )
        )  # fmt: skip
    except (LocalEntryNotFoundError, HTTPError, HFValidationError) as error:
        if listing is None:
            raise FileNotFoundError(f"{repo}: not in the local cache, and {reason}") from None
        raise FileNotFoundError(f"{repo}: cannot be had from the hub: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    """What went wrong and where; after two lines, messages of the hub's client turn to advice."""
    lines = [line for line in str(error).splitlines() if line]
    return " ".join(lines[:2]) or type(error).__name__


def needed_files(
    listing: Iterable[str], components: Iterable[str], variant: str | None, where: str
) -> list[str]:
    """Of a repository's files, those that the components load: configs, tokenizer, chosen weights."""
    listing, needed = list(listing), []
    folders: dict[str, list[str]] = {}
    for path in map(PurePosixPath, listing):
        folders.setdefault(str(path.parent), []).append(path.name)
    if "model_index.json" in folders.get(".", []):
        needed.append("model_index.json")
    for component in components:
        names = folders.get(component, [])
        if not names:
            raise FileNotFoundError(f"{where}: has no {component}/ folder")
        chosen = [name for name in names if name.endswith(".json") and ".index." not in name]
        chosen += [name for name in names if name == "tokenizer.model"]
        if component in KINDS:
            chosen += weight_files(names, variant, f"{where}/{component}")
        needed += [f"{component}/{name}" for name in chosen]
    return needed


def load_component(
    folder: str | Path,
    component: str,
    *,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """One model ("text_encoder", "unet" or "vae") of a checkpoint folder, in public names or ours.

    Raises FileNotFoundError or ValueError naming the file, field or tensor, before weights are read.
    """
    kind, place = KINDS[component], Path(folder) / component
    if not place.is_dir():
        raise FileNotFoundError(f"{place}: no such folder, wanted the {component} of a Kolors checkpoint")
    config = kind.read_config(read_json(place / "config.json"), str(place / "config.json"))
    files = [place / name for name in weight_files([f.name for f in place.iterdir()], variant, str(place))]
    with torch.device("meta"):
        model = kind.build(config)
    load(model, Source(files), component, dtype=dtype, device=device)
    return model.eval()


def load(
    model: nn.Module,
    source: Source,
    component: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> None:
    """Fill a model from a checkpoint, strictly. The model may be on the meta device; nothing is left on it.

    Raises ValueError naming the first tensors that are missing, unexpected or misshapen; the model is then
    untouched.
    """
    where = str(source.files[0].parent if len(source.files) > 1 else source.files[0])
    table, is_ours = recognise(source.keys(), where)
    if table is not TABLES[component]:
        raise ValueError(f"{where}: wanted the {component} of a Kolors checkpoint, got a {table.component}")
    ours = {name: name if is_ours else table.to_ours(name) for name in source}
    target = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if mismatch := compare(table, {ours[name]: source.shape(name) for name in source}, target):
        raise ValueError(f"{where}: {mismatch}")
    for name in source:
        if not source.dtype(name).is_floating_point:
            raise ValueError(f"{where}: {name} holds {source.dtype(name)}, wanted floating-point weights")
    state = {
        ours[name]: source[name].to(device=device, dtype=dtype)
        for name in source
        if not ours[name].startswith(UNUSED)
    }
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
    """The `model_index.json` of a Kolors pipeline; that of another pipeline is refused by its class."""
    file = folder / "model_index.json"
    index = {"force_zeros_for_empty_prompt": False} | read_json(file)
    if not str(index.get("_class_name")).startswith("Kolors"):
        raise ValueError(f"{file}: _class_name is {index.get('_class_name')!r}, wanted Kolors")
    force_zeros = index["force_zeros_for_empty_prompt"]
    if not isinstance(force_zeros, bool):
        raise ValueError(f"{file}: force_zeros_for_empty_prompt is {force_zeros!r}, wanted true or false")
    return index


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


def save_component(
    model: ChatGLM | UNet | VAE, folder: str | Path, component: str, *, variant: str | None = None
) -> None:
    """Write a model to `folder`/`component` under public names, as the reference reads it.

    Raises ValueError for a variant that is not letters, digits and underscores.
    """
    if variant is not None and re.fullmatch(r"\w+", variant) is None:
        raise ValueError(f"variant must be letters, digits and underscores, such as fp16, got {variant!r}")
    place = Path(folder) / component
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / "config.json", model.config.to_public())
    table = TABLES[component]
    tensors = {table.to_public(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    name = ".".join(part for part in (KINDS[component].stem, variant, "safetensors") if part)
    save_file(tensors, place / name, metadata={"format": "pt"})


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
    }
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
