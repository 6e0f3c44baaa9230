"""Conversion of a checkpoint folder <-> one file, byte for byte both ways.

The file has the models by ComfyUI's names (SGM's blocks with the prefixes `model.diffusion_model.` and
`first_stage_model.`; ChatGLM with `text_encoder.`, as no other program names it), and each small file of the
folder as a tensor of its bytes: `files.tokenizer/tokenizer.model`, as ComfyUI stores tokenizers.
`files.layout.json` records the folder's file of each tensor. A folder converted from a file of another
program has `single_file.json` instead, which records that file's naming and metadata.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from weights_convert import TABLES, detect_component
from weights_convert.atomic_write import atomic_folder, check_absent, write_bytes
from weights_convert.safetensors_files import (
    FORMAT,
    MAX_INDEX_BYTES,
    PICKLES,
    WEIGHT_FILE_STEMS,
    Source,
    pickle_message,
    walk_files,
    weight_files,
    write_tensors,
)
from weights_convert.single_file import (
    FILES,
    PREFIXES,
    SCHEMES,
    NamingScheme,
    SubModel,
    open_models,
    to_stored_names,
)
from weights_convert.untrusted_files import check_file, parse_object, read_json_object

Metadata = dict[str, str] | None
# File of the folder -> its metadata and tensors; None for all tensors of its component.
Layout = dict[str, tuple[Metadata, list[str] | None]]

LAYOUT_KEY = FILES + "layout.json"
PROVENANCE_FILE = "single_file.json"  # in a folder
MAX_FILE_BYTES = 2**28
LEFT_OUT = {
    "controlnet": "a ControlNet is a model beside the pipeline, with a file of its own",
    "ip_adapter": "an IP-Adapter is loaded into a pipeline, from files of its own",
    "lora": "a LoRA is loaded into a pipeline, from a file of its own",
}


def to_single(source: Path, destination: Path) -> list[str]:
    """Write a checkpoint folder as one file; returns the report's lines.

    Raises ValueError or FileNotFoundError naming the file; then `destination` does not exist.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder")
    check_absent(destination, ".safetensors")
    tensors, layout, report = dict[str, Tensor](), dict[str, Any](), list[str]()
    provenance = source / PROVENANCE_FILE
    is_foreign = provenance.exists()
    metadata, spellings = _read_provenance(provenance) if is_foreign else (FORMAT, {})
    for folder, files in walk_files(source):
        weights = [name for name in files if name.endswith(".safetensors")]
        component = str(folder.relative_to(source).as_posix())
        if (left_out := component.partition("/")[0]) in LEFT_OUT and weights:
            report.append(f"{folder}: skipped, {LEFT_OUT[left_out]}")
            continue
        if weights:
            part = _component_in(folder, component, weights)
            naming = "sgm" if component in ("unet", "vae") else "public"
            spelling = spellings.get(component, NamingScheme(PREFIXES[component][0], naming))
            tensors |= to_stored_names(part, component, spelling)
            for file in part.files:
                names = sorted(part.names_in(file)) if len(part.files) > 1 else None
                layout[f"{component}/{file.name}"] = {"metadata": part.metadata(file), "tensors": names}
            report.append(report_line(component, part, part, source))
        for name in sorted(set(files) - set(weights)):
            file = folder / name
            if name.endswith(PICKLES):
                report.append(f"{file}: skipped, {pickle_message(file)}")
            elif not is_foreign:
                path = _relative_path(file.relative_to(source).as_posix(), str(source))
                tensors[f"{FILES}{path}"] = _read_tensor(file)
            elif file != provenance and name != "config.json":
                raise ValueError(f"{file}: the file that {PROVENANCE_FILE} describes has no place for it")
    if not layout:
        raise FileNotFoundError(f"{source}: no safetensors weights in it")
    if not is_foreign:
        if LAYOUT_KEY in tensors:
            raise ValueError(f"{source}/layout.json: its name is taken")
        tensors[LAYOUT_KEY] = _as_tensor((json.dumps(dict(sorted(layout.items()))) + "\n").encode())
    destination.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, destination, metadata)
    return report


def to_folder(source: Path, destination: Path) -> list[str]:
    """Write a file of one or several models as a folder by public names; returns the report's lines.

    Quantized layers are dequantized. Raises ValueError or FileNotFoundError naming the file and the tensor;
    then `destination` does not exist.
    """
    parts, whole, small = open_models(source)
    for component, part in parts.items():
        TABLES[component].reject_faults({name: part.shape(name) for name in part}, part.where)
    is_foreign, quantized = LAYOUT_KEY not in small, [part for part in parts.values() if part.scales]
    layout: Layout
    if is_foreign:
        layout = {f"{name}/{WEIGHT_FILE_STEMS[name]}.safetensors": (FORMAT, None) for name in parts}
    else:
        layout = _read_layout(parts, whole, source)
    with atomic_folder(destination) as scratch:
        extract_files(whole, small, scratch)
        for path, (metadata, names) in layout.items():
            part, file = parts[path.partition("/")[0]], scratch / path
            file.parent.mkdir(exist_ok=True)
            tensors = {name: part.mapped(name).contiguous() for name in (part if names is None else names)}
            write_tensors(tensors, file, metadata)
        if is_foreign and not quantized:
            spellings = {component: [*part.spelling] for component, part in sorted(parts.items())}
            provenance = {"metadata": whole.metadata(source), "models": spellings}
            write_bytes((json.dumps(provenance, indent=2) + "\n").encode(), scratch / PROVENANCE_FILE)
    report = [report_line(component, part, part, source) for component, part in parts.items()]
    return report + [f"  its {part.bits}-bit layers are multiplied out" for part in quantized]


def is_single(source: Path) -> bool:
    """Return whether a file converts to a folder: any but one with our names alone, which stays a file."""
    if not source.is_file():
        return False
    try:
        return not detect_component(Source([source]).keys(), str(source))[1]
    except ValueError:
        return True  # prefixes, SGM's names or several models, or `to_folder` says what is wrong


def extract_files(whole: Source, small: list[str], folder: Path) -> None:
    """Write the small files stored as tensors to a folder. ValueError for a path outside of it."""
    paths = {
        name: _relative_path(name.removeprefix(FILES), whole.where) for name in small if name != LAYOUT_KEY
    }
    parents = {str(parent).lower() for path in paths.values() for parent in path.parents}
    taken = {*parents, *PREFIXES, "scheduler"}
    for name, path in paths.items():
        if (lowered := str(path).lower()) in taken:  # some file systems ignore case
            raise ValueError(f"{whole.where}: {name}: a folder or another file has its path")
        taken.add(lowered)
    for name, path in paths.items():
        if path.suffix == ".safetensors" or path.suffix in PICKLES:
            raise ValueError(f"{whole.where}: {name}: weights are no small file")
        (folder / path.parent).mkdir(parents=True, exist_ok=True)
        write_bytes(_content(whole, name), folder / path)


def report_line(component: str, source: Source, names: Collection[str], where: object) -> str:
    """Format a line of a report: the number of tensors and bytes converted."""
    return f"{component:13} {len(names):6,} tensors {sum(map(source.nbytes, names)):15,} bytes   {where}"


def _component_in(folder: Path, component: str, weights: list[str]) -> Source:
    """Open the component of a folder with these weight files, by public names; ValueError for another one."""
    if component not in PREFIXES:
        raise ValueError(f"{folder}: has weights, expected them only in {', '.join(PREFIXES)}")
    chosen = weight_files(weights, None, str(folder))
    if others := sorted(set(weights) - set(chosen)):
        raise ValueError(f"{folder}: several checkpoints side by side: {chosen[0]}, {others[0]}")
    part = Source([folder / name for name in chosen])
    table, is_ours = detect_component(part.keys(), part.where)
    if table.component != component:
        raise ValueError(f"{part.where}: expected a {component}, got a {table.component}")
    if is_ours:
        raise ValueError(f"{part.where}: has our names, expected diffusers' (--to diffusers)")
    table.reject_faults({name: part.shape(name) for name in part}, part.where)
    return part


def _content(whole: Source, name: str, longest: int = MAX_FILE_BYTES) -> bytes:
    """Return the bytes of a small file stored as a tensor. ValueError for another tensor."""
    shape, dtype = whole.shape(name), whole.dtype(name)
    if dtype != torch.uint8 or len(shape) != 1 or shape[0] > longest:
        expected = f"at most {longest:,} bytes"
        raise ValueError(f"{whole.where}: {name} is {dtype} {list(shape)}, expected {expected}")
    return bytes(whole[name].numpy())


def _read_layout(parts: Mapping[str, SubModel], whole: Source, source: Path) -> Layout:
    """Read and check the layout."""
    layout, seen = {}, {component: list[str]() for component in parts}
    content = _content(whole, LAYOUT_KEY, MAX_INDEX_BYTES)
    for file, entry in parse_object(content, f"{source}: {LAYOUT_KEY}").items():
        path = _relative_path(file, whole.where)
        where = f"{source}: {LAYOUT_KEY}: {file[:100]!r}"
        if len(path.parts) != 2 or path.parts[0] not in parts or path.suffix != ".safetensors":
            raise ValueError(f"{where}: expected a .safetensors file in the folder of a model that is here")
        if not isinstance(entry, dict) or entry.keys() != {"metadata", "tensors"}:
            raise ValueError(f"{where}: expected metadata and tensors")
        metadata, names = entry["metadata"], entry["tensors"]
        if metadata is not None and not _is_text(metadata):
            raise ValueError(f"{where}: metadata: expected texts by name")
        if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
            raise ValueError(f"{where}: tensors: expected a list of names")
        seen[path.parts[0]] += list(parts[path.parts[0]]) if names is None else names
        layout[file] = (metadata, names)
    for component, part in parts.items():
        if differing := sorted(set(seen[component]) ^ set(part)):
            fault = f"does not list the tensors of the {component}: {differing[0][:100]!r}"
            raise ValueError(f"{source}: {LAYOUT_KEY}: {fault}")
        if len(seen[component]) > len(part):
            raise ValueError(f"{source}: {LAYOUT_KEY}: lists a tensor of the {component} twice")
    return layout


def _read_provenance(file: Path) -> tuple[Metadata, dict[str, NamingScheme]]:
    """Read the metadata and naming of the file that a folder was converted from."""
    content = read_json_object(file, MAX_INDEX_BYTES)
    metadata, models = content.get("metadata"), content.get("models")
    if (metadata is not None and not _is_text(metadata)) or not isinstance(models, dict):
        raise ValueError(f"{file}: expected metadata, texts by name, and models")
    spellings = {}
    for name, pair in models.items():
        fits = isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        if name not in PREFIXES or not fits or pair[1] not in SCHEMES:
            raise ValueError(f"{file}: {name[:100]!r}: expected a prefix and one of {', '.join(SCHEMES)}")
        spellings[name] = NamingScheme(*pair)
    return metadata, spellings


def _is_text(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _relative_path(path: str, where: str) -> PurePosixPath:
    """Check a path below a folder; ValueError for one outside of it, or invalid on a disk or in a header."""
    parts, is_plain = path.split("/"), path.isprintable() and not set(path) & set("\\:")
    if not is_plain or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts):
        raise ValueError(f"{where}: {path[:100]!r}: expected a path inside the folder")
    return PurePosixPath(path)


def _read_tensor(file: Path) -> Tensor:
    """Read a small file as a tensor of its bytes."""
    check_file(file, MAX_FILE_BYTES)
    return _as_tensor(file.read_bytes())


def _as_tensor(content: bytes) -> Tensor:
    dtype = torch.uint8
    return torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
