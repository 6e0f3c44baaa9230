"""Convert a Kolors checkpoint to our names, or back: `python -m weights_convert SRC DST [--to diffusers]`.

`--to single` converts a folder to one file, and `--to diffusers` such a file, or one of another program with
one model or several, to a folder: see folder_to_single_file.py.

SRC is a pipeline folder, a component's folder or one safetensors file. DST gets the same files under the same
names, with the tensors renamed; a tensor that the model never reads stays in its file with the prefix
`unused.`, so that converting back is byte-equal. DST appears whole or not at all.

With --pickle, SRC is a file written by torch.save, and DST a safetensors file of its tensors under the same
names: the only place where a pickle is opened, and then for tensors alone.
"""

import argparse
import json
import pickle
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from weights_convert import detect_component
from weights_convert.atomic_write import atomic_folder, check_absent, copy_file, write_bytes
from weights_convert.folder_to_single_file import is_single, report_line, to_folder, to_single
from weights_convert.key_mapping import UNUSED, Table
from weights_convert.safetensors_files import (
    MAX_INDEX_BYTES,
    PICKLES,
    Source,
    pickle_message,
    read_shard_index,
    save_tensors,
    walk_files,
    weight_files,
    write_tensors,
)
from weights_convert.untrusted_files import check_file, one_line, printable, read_json_object


def convert(source: Path, destination: Path, *, to_public: bool = False, prune: bool = False) -> list[str]:
    """Convert one file or folder; returns the report's lines.

    to_public: from our names to diffusers'. prune: leave out the dropped tensors.
    Raises ValueError or FileNotFoundError naming the file; then `destination` does not exist.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    check_absent(destination)
    if source.resolve() in destination.resolve().parents:
        raise ValueError(f"{destination}: lies inside {source}, which is to be converted")
    if source.is_file():
        destination.parent.mkdir(parents=True, exist_ok=True)
        return _convert_files([source], [destination], to_public, prune)
    with atomic_folder(destination) as scratch:
        report = _convert_folder(source, scratch, to_public, prune)
        if not report:
            raise FileNotFoundError(f"{source}: no safetensors weights in it")
    return report


def convert_pickle(source: Path, destination: Path) -> list[str]:
    """Write a pickle's tensors as safetensors under the same names; returns the report's lines.

    Of a training checkpoint only "state_dict" is converted. Names of nested dicts are joined by dots.
    Raises ValueError or FileNotFoundError naming the file and the entry that is not a tensor; then
    `destination` does not exist.
    """
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file")
    if source.suffix not in PICKLES:
        raise ValueError(f"{source}: expected a pickle ({', '.join(PICKLES)}) with --pickle")
    check_absent(destination, ".safetensors")
    try:
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, IndexError,
            AttributeError, OSError, zipfile.BadZipFile) as error:  # fmt: skip
        reason = one_line(error, 200)
        raise ValueError(f"{source}: not a whole pickle of tensors alone: {reason}") from None
    left_out: list[str] = []
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        left_out, content = [str(name) for name in content if name != "state_dict"], content["state_dict"]
    tensors, size = {}, source.stat().st_size
    for name, value in _flatten(content, ""):
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            got = f"{name or 'all of it'} is {type(value).__name__}"
            raise ValueError(f"{source}: {got}, expected a plain tensor")
        if value.nbytes > size:
            raise ValueError(f"{source}: {name} would be {value.nbytes:,} bytes, of a file of {size:,}")
        if name in tensors:
            raise ValueError(f"{source}: {name} is in it twice")
        tensors[name] = value
    if not tensors:
        raise ValueError(f"{source}: has no tensors")
    destination.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, destination)
    line = f"{len(tensors):,} tensors {sum(value.nbytes for value in tensors.values()):,} bytes   {source}"
    return [line, *(f"  left out: {name}, which is beside the state_dict" for name in left_out)]


def _flatten(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dicts by joined names."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, part in value.items():
        yield from _flatten(part, f"{name}.{key}" if name else str(key))


def _convert_folder(source: Path, destination: Path, to_public: bool, prune: bool) -> list[str]:
    """Convert the weights of a folder, and copy its other files; returns the report's lines."""
    report = []
    for folder, files in walk_files(source):
        target = destination / folder.relative_to(source)
        target.mkdir(exist_ok=True)
        weights = [name for name in files if name.endswith(".safetensors")]
        for variant in sorted({_variant(name) for name in weights}, key=str):
            chosen = [folder / name for name in weight_files(weights, variant, str(folder))]
            report += _convert_files(chosen, [target / file.name for file in chosen], to_public, prune)
        for name in sorted(set(files) - set(weights)):
            if name.endswith(PICKLES):
                report.append(f"{folder / name}: skipped, {pickle_message(folder / name)}")
            elif ".safetensors.index." in name:
                _convert_index(folder / name, target / name, to_public, prune)
            else:
                check_file(folder / name)
                copy_file(folder / name, target / name)
    return report


def _convert_files(files: list[Path], destinations: list[Path], to_public: bool, prune: bool) -> list[str]:
    """Write the files of one component with their tensors renamed; returns the report's lines."""
    source = Source(files)
    where = source.where
    table, is_ours = detect_component(source.keys(), where)
    if is_ours is not to_public:
        raise ValueError(f"{where}: has {'our' if is_ours else 'public'} names already")
    public = {name: table.to_public(name) if to_public else name for name in source}
    table.reject_faults({public[name]: source.shape(name) for name in source}, where)
    renamed = {name: public[name] if to_public else table.to_ours(name) for name in source}
    if collisions := [name for name in source if not to_public and table.to_public(renamed[name]) != name]:
        raise ValueError(f"{where}: {collisions[0]} cannot be renamed both ways")
    dropped = [name for name in source if _is_dropped(name, table)]
    left_out = set(dropped if prune else ())
    for file, destination in zip(files, destinations, strict=True):
        kept = [name for name in source.names_in(file) if name not in left_out]
        tensors = {renamed[name]: source.mapped(name) for name in kept}
        write_tensors(tensors, destination, source.metadata(file))
    report = [report_line(table.component, source, source.keys() - set(dropped), where)]
    fate = "dropped" if prune else f"dropped, kept aside as {UNUSED}*"
    for name in dropped:
        why = table.why_dropped(public[name])
        report.append(f"  {fate}: {public[name]}, {source.nbytes(name):,} bytes: {why}")
    return report


def _convert_index(source: Path, destination: Path, to_public: bool, prune: bool) -> None:
    """Write an index of shards with its tensors renamed."""
    weight_map = read_shard_index(source)
    index = read_json_object(source, MAX_INDEX_BYTES)
    shards = Source([source.parent / file for file in sorted(set(weight_map.values()))])
    if set(weight_map) != set(shards):
        differing = min(set(weight_map) ^ set(shards))
        raise ValueError(f"{source}: does not list the tensors of its shards: {differing}")
    table, _ = detect_component(weight_map, str(source))
    rename = table.to_public if to_public else table.to_ours
    renamed = {rename(name): file for name, file in weight_map.items()}
    if prune:
        renamed = {name: file for name, file in renamed.items() if not _is_dropped(name, table)}
        index.pop("metadata", None)  # its total size counts the dropped tensors
    index["weight_map"] = dict(sorted(renamed.items()))
    write_bytes((json.dumps(index, indent=2) + "\n").encode(), destination)


def _is_dropped(name: str, table: Table) -> bool:
    """Return whether the model never reads this tensor, by its public name or ours."""
    return table.why_dropped(name.removeprefix(UNUSED)) is not None


def _variant(name: str) -> str | None:
    """Return the variant in a weight file's name: "fp16" of `model.fp16-00001-of-00007.safetensors`."""
    parts = name.split(".")
    return parts[1].split("-")[0] if len(parts) > 2 else None


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """End the process with status 2 and one line."""
        print("error:", message.removeprefix("argument "), file=sys.stderr)
        raise SystemExit(2)


def parser() -> Parser:
    """Build the parser of all flags."""
    top = Parser(
        prog="kolors convert",
        description="Rename a Kolors checkpoint's tensors to kolors_core's, or back, checking every one.",
        epilog="Example: kolors convert Kolors-diffusers Kolors.safetensors --to single",
    )
    add = top.add_argument
    add("source", type=Path, metavar="SRC", help="a folder, or one .safetensors file")
    add("destination", type=Path, metavar="DST", help="what to write; must not exist")
    add("--to", choices=("kolors_core", "diffusers", "single"), help="direction; kolors_core if not given")
    add("--prune", action="store_true", help="leave out the tensors that the model never reads")
    add("--pickle", action="store_true",
        help="open SRC, a pickle from where you trust, for tensors alone; keep their names")  # fmt: skip
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        if options.pickle:
            if options.to is not None or options.prune:
                raise ValueError("--to and --prune have no effect with --pickle: convert its result")
            report = convert_pickle(options.source, options.destination)
        elif options.to == "single" or (options.to == "diffusers" and is_single(options.source)):
            if options.prune:
                raise ValueError("--prune has no effect on one file of a folder, and back")
            report = (to_single if options.to == "single" else to_folder)(options.source, options.destination)
        else:
            to_public = options.to == "diffusers"
            report = convert(options.source, options.destination, to_public=to_public, prune=options.prune)
    except (OSError, ValueError) as error:
        print(f"error: {one_line(error, None)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted, nothing written", file=sys.stderr)
        return 130
    print(*map(printable, report), sep="\n", file=sys.stderr)
    print(options.destination)
    return 0


if __name__ == "__main__":
    sys.exit(main())
