"""Convert a Kolors checkpoint to our names, or back: `python -m weights_convert SRC DST [--to diffusers]`.

SRC is a pipeline folder, a component's folder or one safetensors file. DST gets the same files under the same
names, with the tensors renamed; a tensor that the model never reads stays in its file behind `unused.`, so
the way back is byte-equal. DST appears whole or not at all.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from weights_convert import recognise
from weights_convert.rules import UNUSED, Table
from weights_convert.source import PICKLES, Source, weight_files


def convert(source: Path, destination: Path, *, to_public: bool = False, prune: bool = False) -> list[str]:
    """Convert one file or folder; returns the report's lines.

    to_public: from our names to diffusers'. prune: leave the dropped tensors out for good.
    Raises ValueError or FileNotFoundError naming the file; then `destination` does not exist.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if destination.exists():
        raise FileExistsError(f"{destination}: exists already, and is not overwritten")
    if source.resolve() in destination.resolve().parents:
        raise ValueError(f"{destination}: lies inside {source}, which is to be converted")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as scratch:
        whole = Path(scratch) / "whole"
        if source.is_file():
            report = _convert_files([source], whole.parent, to_public, prune)
            (whole.parent / source.name).rename(whole)
        else:
            report = _convert_folder(source, whole, to_public, prune)
            if not report:
                raise FileNotFoundError(f"{source}: no safetensors weights in it")
        os.replace(whole, destination)
    return report


def _convert_folder(source: Path, destination: Path, to_public: bool, prune: bool) -> list[str]:
    report = []
    destination.mkdir()
    for folder, _, files in os.walk(source, followlinks=True):
        here, there = Path(folder), destination / Path(folder).relative_to(source)
        there.mkdir(exist_ok=True)
        weights = [name for name in files if name.endswith(".safetensors")]
        for variant in sorted({_variant(name) for name in weights}, key=str) if weights else []:
            chosen = [here / name for name in weight_files(weights, variant, str(here))]
            report += _convert_files(chosen, there, to_public, prune)
        for name in sorted(set(files) - set(weights)):
            if name.endswith(PICKLES):
                report.append(f"{here / name}: skipped, a pickle can run code and is never opened")
            elif ".safetensors.index." in name:
                _convert_index(here / name, there / name, to_public, prune)
            else:
                shutil.copyfile(here / name, there / name)
    return report


def _convert_files(files: list[Path], destination: Path, to_public: bool, prune: bool) -> list[str]:
    where = str(files[0].parent if len(files) > 1 else files[0])
    source = Source(files)
    table, is_ours = recognise(source.keys(), where)
    if is_ours is not to_public:
        raise ValueError(f"{where}: has {'our' if is_ours else 'public'} names already")
    public = {name: table.to_public(name) if to_public else name for name in source}
    if faults := table.faults({public[name]: source.shape(name) for name in source}):
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise ValueError(f"{where}: {faults[0]}{more}")
    renamed = {name: public[name] if to_public else table.to_ours(name) for name in source}
    if collisions := [name for name in source if not to_public and table.to_public(renamed[name]) != name]:
        raise ValueError(f"{where}: {collisions[0]} cannot be renamed both ways")
    kept = [name for name in source if not (prune and _is_dropped(name, table))]
    for file in files:
        tensors = {renamed[name]: source[name] for name in source.names_in(file) if name in kept}
        save_file(tensors, destination / file.name, metadata=source.metadata(file))
    return _report(where, table, source, public, prune)


def _report(where: str, table: Table, source: Source, public: dict[str, str], prune: bool) -> list[str]:
    dropped = [name for name in source if _is_dropped(name, table)]
    used = [name for name in source if name not in dropped]
    lines = [
        f"{table.component:13} {len(used):6,} tensors {sum(map(source.nbytes, used)):15,} bytes   {where}"
    ]
    for name in dropped:
        kept = "dropped" if prune else f"dropped, kept aside as {UNUSED}*"
        lines.append(
            f"  {kept}: {public[name]}, {source.nbytes(name):,} bytes: {table.why_dropped(public[name])}"
        )
    return lines


def _convert_index(source: Path, destination: Path, to_public: bool, prune: bool) -> None:
    try:
        index = json.loads(source.read_text(encoding="utf-8"))
        weight_map = {str(name): str(file) for name, file in index["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: not an index of shards: {error}") from None
    shards = Source([source.parent / file for file in sorted(set(weight_map.values()))])
    if set(weight_map) != set(shards):
        odd = sorted(set(weight_map) ^ set(shards))[0]
        raise ValueError(f"{source}: does not list the tensors of its shards: {odd}")
    table, _ = recognise(weight_map, str(source))
    rename = table.to_public if to_public else table.to_ours
    renamed = {rename(name): file for name, file in weight_map.items()}
    if prune:
        renamed = {name: file for name, file in renamed.items() if not _is_dropped(name, table)}
        index.pop("metadata", None)  # its total size counts the dropped tensors
    index["weight_map"] = dict(sorted(renamed.items()))
    destination.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _is_dropped(name: str, table: Table) -> bool:
    return table.why_dropped(name.removeprefix(UNUSED)) is not None


def _variant(name: str) -> str | None:
    parts = name.split(".")
    return parts[1].split("-")[0] if len(parts) > 2 else None


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m weights_convert",
        description="Rename a Kolors checkpoint's tensors to kolors_core's, or back, checking every one.",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="a folder, or one .safetensors file")
    parser.add_argument("destination", type=Path, metavar="DST", help="what to write; must not exist")
    parser.add_argument("--to", choices=("kolors_core", "diffusers"), default="kolors_core", help="direction")
    parser.add_argument(
        "--prune", action="store_true", help="leave out the tensors that the model never reads"
    )
    options = parser.parse_args(arguments)
    try:
        report = convert(
            options.source, options.destination, to_public=options.to == "diffusers", prune=options.prune
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted, nothing written", file=sys.stderr)
        return 130
    print("\n".join(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
