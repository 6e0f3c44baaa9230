"""Parser of prompt files, JSON Lines, CSV or text, to jobs; each line is checked by itself and fingerprinted.

A line's fields are `FIELDS`; only the prompt is required, and a line of a .txt is one. A CSV has the names in
its first row, an empty cell is a missing field, and several LoRAs in a cell are separated by `;`. In JSON,
`lora` is a string or a list of strings, each FROM[:SCALE] as on the command line.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kolors_core.validation import LARGEST_SEED, check_float, check_int
from weights_convert.untrusted_files import one_line, reject_duplicate_keys


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """Settings of one image. lora: each FROM[:SCALE]. lora_partial: take from them what fits."""

    prompt: str
    negative_prompt: str | None = None
    seed: int
    height: int | None = None
    width: int | None = None
    steps: int
    guidance: float = 5.0
    lora: tuple[str, ...] = ()
    lora_partial: bool = False


FIELDS = tuple(field.name for field in fields(JobSettings))
NUMBERS = {"seed": int, "height": int, "width": int, "steps": int, "guidance": float}
FIELD_NAMES = ", ".join(FIELDS)
FINGERPRINT_KEY = "batch_line"  # the PNG text chunk with the fingerprint of the image's line
MAX_FILE_BYTES, MAX_LINES, MAX_LINE_CHARACTERS = 2**27, 2**20, 2**20
IEND = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk of a PNG


@dataclass(frozen=True)
class Job:
    """Job of one line. number: the line's, from 1. settings: None for a bad line, with a one-line `reason`.

    fingerprint: a hash of what decides the image: the line's fields and the model, not the number.
    """

    number: int
    settings: JobSettings | None
    reason: str | None
    fingerprint: str

    @property
    def file(self) -> str | None:
        """The PNG's name: number and seed; None for a bad line."""
        return None if self.settings is None else f"{self.number:06d}-{self.settings.seed}.png"


def read_jobs(file: Path, model: Mapping[str, object], seed: int, defaults: Mapping[str, Any]) -> list[Job]:
    """Read the jobs of a file, one for each line that is not empty.

    model: what all images have in common, for the fingerprints. seed: a line without one gets this plus its
    number. defaults: of a line's other fields, `steps` among them. OSError for a file that cannot be read,
    ValueError for one without lines or too large, or a CSV whose first row does not name the fields.
    """
    text, kind = _read_text(file), file.suffix.lower()
    lines = ((number, raw) for number, raw in enumerate(text.split("\n"), 1) if raw.strip())
    rows: Iterable[tuple[int, str, Any]] = ((number, raw, raw) for number, raw in lines)
    if kind == ".csv":
        rows = _csv(text, file)
    elif kind == ".txt":
        rows = ((number, raw, {"prompt": raw.strip()}) for number, raw in lines)
    jobs = []
    for number, raw, row in rows:
        try:
            if len(raw) > MAX_LINE_CHARACTERS:
                raise ValueError(f"{len(raw):,} characters, expected at most {MAX_LINE_CHARACTERS:,}")
            settings, reason = _settings(row, {**defaults, "seed": seed + number}), None
        except (ValueError, RecursionError) as error:
            settings, reason = None, one_line(error)
        content = raw if settings is None else json.dumps([_decisive(settings), model], sort_keys=True)
        digest = hashlib.sha256(content.encode("utf-8", errors="surrogateescape")).hexdigest()[:32]
        jobs.append(Job(number, settings, reason, digest))
    if not jobs:
        raise ValueError(f"{file}: no lines, expected one for each image")
    return jobs


def _read_text(file: Path) -> str:
    """Read a file of bounded size; nothing of a larger one, and never from a FIFO, which would wait."""
    if file.exists() and not file.is_file():
        raise ValueError(f"{file}: expected a file of prompts, got a folder, FIFO, socket or device")
    with file.open("rb") as opened:
        content = opened.read(MAX_FILE_BYTES + 1) if file.stat().st_size <= MAX_FILE_BYTES else None
    if content is None or len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{file}: expected at most {MAX_FILE_BYTES:,} bytes; split it")
    if (count := content.count(b"\n")) > MAX_LINES:
        raise ValueError(f"{file}: {count:,} lines, expected at most {MAX_LINES:,}; split it")
    return content.decode("utf-8-sig", errors="surrogateescape")


def _decisive(settings: JobSettings) -> dict[str, Any]:
    """Return what decides an image, less what is unset: images of versions before keep their fingerprint."""
    return {name: value for name, value in vars(settings).items() if name != "lora_partial" or value}


def png_fingerprint(file: Path) -> str | None:
    """Read the fingerprint in a PNG: "" for whatever has none, None for a missing or truncated image."""
    from PIL import Image

    if not os.path.lexists(file):
        return None
    if not file.is_file():  # a FIFO would wait for a writer
        return ""
    try:
        with Image.open(file, formats=["PNG"]) as image:
            fingerprint = image.info.get(FINGERPRINT_KEY, "")
        with file.open("rb") as opened:
            opened.seek(-len(IEND), os.SEEK_END)
            is_whole = opened.read() == IEND
    except Exception:  # of any kind, as a damaged file has it
        return ""
    return None if fingerprint and not is_whole else fingerprint


def _csv(text: str, file: Path) -> Iterator[tuple[int, str, dict[str, Any] | ValueError]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise ValueError(f"{file}: the first row is not CSV: {error}") from None
    if unknown := [name for name in names if name not in FIELDS]:
        got = f"the first row has the name {unknown[0][:100]!r}"
        raise ValueError(f"{file}: {got}, expected some of {FIELD_NAMES}")
    if "prompt" not in names or len(set(names)) < len(names):
        raise ValueError(f"{file}: the first row must name the columns, prompt among them, each once")
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield number, f"{number}", ValueError(f"not CSV: {error}")
            continue
        if cells is None:
            return
        if any(cells):
            yield number, json.dumps(cells), _parse_cells(names, cells)


def _parse_cells(names: Sequence[str], cells: Sequence[str]) -> dict[str, Any] | ValueError:
    if len(cells) > len(names):
        return ValueError(f"{len(cells)} cells, and the first row names {len(names)}")
    row: dict[str, Any] = {name: cell for name, cell in zip(names, cells, strict=False) if cell}
    for name, cell in row.items():
        with suppress(ValueError):  # `_settings` reports what the field must be
            if name == "lora":
                row[name] = [part.strip() for part in cell.split(";")]
            elif name == "lora_partial":
                row[name] = {"true": True, "false": False}.get(cell.strip().lower(), cell)
            elif name in NUMBERS:
                row[name] = NUMBERS[name](cell)
    return row


def _settings(row: Any, defaults: Mapping[str, Any]) -> JobSettings:
    """Check a row: a line of JSON, the fields of another's row, or the error of one without any."""
    if isinstance(row, ValueError):
        raise row
    if isinstance(row, str):
        try:
            row = json.loads(row, object_pairs_hook=reject_duplicate_keys)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with the fields {FIELD_NAMES}, got {row!r}")
    if unknown := sorted(set(row) - set(FIELDS)):
        raise ValueError(f"unknown field {unknown[0]!r}, expected some of {FIELD_NAMES}")
    given = {name: value for name, value in row.items() if value is not None}
    if "prompt" not in given:
        raise ValueError("no prompt: say what to draw")
    given = {"guidance": JobSettings.guidance, "lora": (), "lora_partial": False} | dict(defaults) | given
    if not isinstance(given["lora_partial"], bool):
        raise ValueError(f"lora_partial must be true or false, got {given['lora_partial']!r}")
    lora = [given["lora"]] if isinstance(given["lora"], str) else given["lora"]
    if not isinstance(lora, list | tuple) or not all(isinstance(text, str) and text for text in lora):
        raise ValueError(f"lora must be FROM[:SCALE] or a list of them, got {given['lora']!r}")
    texts = [(name, given[name]) for name in ("prompt", "negative_prompt") if name in given]
    for name, text in [*texts, *(("lora", text) for text in lora)]:
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a string, got {text!r}")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{name} is not UTF-8: {text!r}")
    for name, multiple in (("height", 8), ("width", 8), ("steps", 1)):
        if name in given:
            check_int(name, given[name], multiple)
    check_int("seed", given["seed"], least=0, most=LARGEST_SEED)
    given |= {"guidance": check_float("guidance", given["guidance"]), "lora": tuple(lora)}
    return JobSettings(**given)
