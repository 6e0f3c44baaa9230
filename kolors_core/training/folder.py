"""Folders of captioned images: `name.png` with `name.txt`, or `metadata.jsonl`.

A folder holds `name.png`, or another format that pillow decodes, with `name.txt` (one caption a line), or
`metadata.jsonl` with lines of `{"file_name": ..., "text": caption or list of captions}`.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kolors_core import image as images
from kolors_core.validation import as_path, short_repr
from weights_convert.untrusted_files import check_file, check_inside, parse_object

if TYPE_CHECKING:
    from PIL.Image import Image

# Formats that pillow knows by name, and decodes by other programs only or not at all.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
MAX_METADATA_BYTES, MAX_CAPTION_BYTES = 2**28, 2**20
Captioned = tuple[Path, tuple[str, ...], dict[str, Any]]  # with what else its line of metadata.jsonl has
logger = logging.getLogger("kolors_core")


@dataclass(frozen=True)
class Example:
    """Image, a file or in memory; its captions (each use draws one), and its upright size in pixels."""

    file: "Path | Image"
    captions: tuple[str, ...]
    height: int
    width: int


def read_folder(
    folder: str | Path, *, default_captions: Sequence[str] = (), allow_outside: bool = False
) -> list[Example]:
    """List the captioned images of a folder; a log line counts the files that are left out.

    default_captions: captions of an image without a .txt, which else is left out.
    allow_outside: read files too that leave the folder, by a link or by their name in `metadata.jsonl`; else
    they are an error, except a Hugging Face cache's own links. Raises FileNotFoundError or ValueError naming
    the file and line at fault, such as a captioned image that is damaged.
    """
    from PIL import ExifTags

    examples = list[Example]()
    for file, captions, _ in captioned_files(folder, default_captions, allow_outside):
        with images.open_image(file) as image:
            is_rotated = image.getexif().get(ExifTags.Base.Orientation, 1) > 4  # `load_image` rotates back
            examples.append(Example(file, captions, *(image.size if is_rotated else image.size[::-1])))
    return examples


def captioned_files(
    folder: str | Path, default_captions: Sequence[str] = (), allow_outside: bool = False
) -> list[Captioned]:
    """List the captioned images of a folder, which are not opened, as of `read_folder`."""
    folder = as_path("folder", folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    root, metadata = None if allow_outside else folder, folder / "metadata.jsonl"
    has_metadata = metadata.exists()
    defaults = tuple(default_captions)
    found = list(_from_metadata(metadata, root) if has_metadata else _from_text_files(folder, root, defaults))
    used = {file for file, *_ in found}
    for file, *_ in found:
        check_place(file, root)
        check_file(file)
    texts = {metadata} if has_metadata else {file.with_suffix(".txt") for file in used}
    folders = {folder} | {p for file in used for p in file.parents if p.is_relative_to(folder)}
    left_out = _left_out(folders, used | texts, has_metadata)
    if not found:
        there = f"; {left_out}" if left_out else ""
        wanted = "name.png + name.txt, or metadata.jsonl"
        raise FileNotFoundError(f"{folder}: no images with captions ({wanted}){there}")
    if left_out:
        logger.warning("%s: %d captioned images are read, others left out; %s", folder, len(used), left_out)
    return found


def image_suffixes() -> set[str]:
    """Return the suffixes, such as ".png", of the image formats that pillow decodes."""
    from PIL import Image

    formats = Image.registered_extensions().items()
    return {suffix for suffix, name in formats if name in Image.OPEN and name not in NOT_DECODED}


def _left_out(folders: set[Path], used: set[Path], has_metadata: bool) -> str:
    """Count, by kind and with an example, what is in the folders beside the files that are used."""
    kinds, suffixes = dict[str, list[str]](), image_suffixes()
    for file in sorted({file for folder in folders for file in folder.iterdir()} - used - folders):
        kind = "other files or folders"
        if (suffix := file.suffix.lower()) in suffixes:
            kind = "images without a caption"
        elif suffix == ".txt" and not has_metadata:
            kind = "captions without an image"
        kinds.setdefault(kind, []).append(file.name)
    return "; ".join(f"{kind}: {len(names)} ({short_repr(names[0])})" for kind, names in kinds.items())


def check_place(file: Path, root: Path | None) -> None:
    """Raise ValueError for a file that leaves the dataset's folder, `root`, unless that is None."""
    if root is not None:
        try:
            check_inside(file, root)
        except ValueError as error:
            raise ValueError(f"{error}: allow_outside=True reads such files") from None


def _read_text(file: Path, longest: int, root: Path | None) -> str:
    check_place(file, root)
    check_file(file, longest)
    with images.image_errors(file):
        return file.read_text(encoding="utf-8-sig")


def _from_text_files(folder: Path, root: Path | None, defaults: tuple[str, ...]) -> Iterator[Captioned]:
    suffixes = image_suffixes()
    for file in sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes):
        if (text := file.with_suffix(".txt")).exists():
            yield file, caption_lines(_read_text(text, MAX_CAPTION_BYTES, root)), {}
        elif defaults:
            yield file, defaults, {}


def caption_lines(text: str) -> tuple[str, ...]:
    """Split a text into captions, one a line; at least one, which may be empty."""
    return tuple(line.strip() for line in text.splitlines() if line.strip()) or ("",)


def as_captions(value: Any, where: str) -> tuple[str, ...]:
    """Return a caption, or a list of them, as a tuple; ValueError naming `where` for anything else."""
    captions = tuple(value) if isinstance(value, list) else (value,)
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{where}: text must be a caption or a list of them, got {short_repr(value)}")
    return captions


def _from_metadata(file: Path, root: Path | None) -> Iterator[Captioned]:
    lines = _read_text(file, MAX_METADATA_BYTES, root).split("\n")  # `splitlines` would also split captions
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        row = parse_object(line.encode(), where)
        if missing := [name for name in ("file_name", "text") if name not in row]:
            raise ValueError(
                f"{where}: expected a JSON object with file_name and text, {missing[0]} is missing"
            )
        name = row.pop("file_name")
        if not isinstance(name, str):
            raise ValueError(f"{where}: file_name must be a string, got {short_repr(name)}")
        captions = as_captions(row.pop("text"), where)
        if not (image := file.parent / name).is_file():
            raise FileNotFoundError(f"{where}: {image} does not exist")
        yield image, captions, row
