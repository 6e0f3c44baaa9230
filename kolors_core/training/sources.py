"""Sources of captioned images for a cache: folders, tar files as of webdataset, tables of Hugging Face.

A source is any iterable of records. It is read once, in its order, so it may be a generator over a stream. An
image is opened where it is encoded: of a source that is in the cache already, names, sizes and times of files
are read. `datasets` is not imported: a table is used by its methods, if one is given.
"""

import logging
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kolors_core import image as images
from kolors_core.training.folder import (
    MAX_CAPTION_BYTES,
    as_captions,
    caption_lines,
    captioned_files,
    check_place,
    image_suffixes,
)
from kolors_core.training.run_record import digest
from kolors_core.validation import as_path, short_repr
from weights_convert.untrusted_files import check_file, one_line, parse_object

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGE_BYTES = 2**30  # of an image's file
FILE_NAME = "_file_name"  # end of the names in metadata.jsonl whose values are files of images
TEXTS = ("txt", "json")  # suffixes in a tar file
TAIL_BYTES = 2**20  # read behind a tar file's end marker
logger = logging.getLogger("kolors_core")


@dataclass(frozen=True)
class Stored:
    """Image that is read where it is needed: `read()` returns a file's bytes, or an image of pillow.

    name: for messages. stamp: a text that is another one if the image is, and takes no reading to know.
    """

    name: str
    stamp: str
    read: Callable[[], "bytes | Image"]

    def open(self, content: "bytes | Image | None" = None) -> "Image":
        """Decode the image, upright, RGB, on white; ValueError naming it. content: if it is read already."""
        content = self.read() if content is None else content
        flatten = partial(images.flatten_alpha, name=self.name)
        if not isinstance(content, bytes):
            return images.load_image(content, flatten)
        with images.open_image(self.name, BytesIO(content)) as opened:
            return images.load_image(opened, flatten)


@dataclass(frozen=True)
class Record:
    """Image and its captions, of which each use draws one. more: what else the source says of it.

    Values of `more` are of JSON, or `Stored`; they are not read unless the function that makes a cache's own
    tensors reads them.
    """

    image: Stored
    captions: tuple[str, ...]
    more: Mapping[str, Any] = field(default_factory=dict)

    def stamp(self) -> str:
        """Return a digest of the captions and of what tells without reading that an image changed."""
        more = [(name, value.stamp if isinstance(value, Stored) else value) for name, value in self._sorted()]
        return digest(repr((self.image.stamp, self.captions, more)).encode())

    def contents(self, content: "bytes | Image | None" = None) -> str:
        """Return a digest of captions, images and all else. content: the image's, if it is read already."""
        more = [
            (name, digest_image(value.read()) if isinstance(value, Stored) else value)
            for name, value in self._sorted()
        ]
        image = digest_image(self.image.read() if content is None else content)
        return digest(repr((image, self.captions, more)).encode())

    def _sorted(self) -> list[tuple[str, Any]]:
        return sorted(self.more.items(), key=lambda item: item[0])


class Records(Iterable[Record]):
    """Records of a source that can be read again: each time by a call of `read`."""

    def __init__(self, read: Callable[[], Iterator[Record]]) -> None:
        self.read = read

    def __iter__(self) -> Iterator[Record]:
        return self.read()


def digest_image(content: "bytes | Image") -> str:
    """Hash an image's file, or the pixels of an image in memory and what else decides how it is shown."""
    from PIL import ExifTags

    if isinstance(content, bytes):
        return digest(content)
    shown = content.convert("RGBA") if content.mode == "P" else content
    rotation = content.getexif().get(ExifTags.Base.Orientation)
    how = (shown.mode, shown.size, rotation, content.info.get("transparency"))
    return digest(repr(how).encode(), shown.tobytes())


def stored_image(image: "str | Path | Image") -> Stored:
    """Return a file, which is not read yet, or an image in memory as `Stored`."""
    if not isinstance(image, str | Path):
        return Stored("an image in memory", digest_image(image), lambda: image)
    file = Path(image)
    check_file(file, MAX_IMAGE_BYTES)
    return Stored(str(file), _stamp(file), file.read_bytes)


def _stamp(file: Path) -> str:
    status = file.stat()
    return f"{status.st_size} bytes of {status.st_mtime_ns}"


def folder_records(
    folder: str | Path, *, default_captions: Sequence[str] = (), allow_outside: bool = False
) -> Records:
    """Read the images of a folder, as `read_folder` lists them, without opening them.

    `more` has the other values of a line of metadata.jsonl; "mask_file_name", or another name with that end,
    gives the image of that file as "mask". Errors as of `read_folder`, except of images.
    """
    return Records(lambda: _in_folder(folder, default_captions, allow_outside))


def _in_folder(
    folder: str | Path, default_captions: Sequence[str], allow_outside: bool
) -> Iterator[Record]:  # fmt: skip
    root = None if allow_outside else as_path("folder", folder)
    for file, captions, row in captioned_files(folder, default_captions, allow_outside):
        more = dict[str, Any]()
        for name, value in row.items():
            if name.endswith(FILE_NAME) and isinstance(value, str):
                check_place(other := as_path("folder", folder) / value, root)
                more[name.removesuffix(FILE_NAME)] = stored_image(other)
            else:
                more[name] = value
        yield Record(stored_image(file), captions, more)


def dataset_records(rows: Iterable[Mapping[str, Any]], image: str = "image", text: str = "text") -> Records:
    """Read the rows of a table: a `datasets.Dataset`, one that streams, or any iterable of mappings.

    image, text: the names of the columns of images, of pillow, and of captions, or lists of them. Other
    columns are in `more`. The images of a `Dataset`, also of one that streams, are not decoded until they are
    encoded: a damaged one is named, or left out, there.
    ValueError naming the row that lacks one of them.
    """
    return Records(lambda: _in_table(rows, image, text))


def _in_table(rows: Iterable[Mapping[str, Any]], image: str, text: str) -> Iterator[Record]:
    fingerprint, features = getattr(rows, "_fingerprint", None), getattr(rows, "features", None) or {}
    pictures = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    is_table = fingerprint is not None and hasattr(rows, "select_columns") and image in pictures
    table: Any = rows
    columns = {name: table.select_columns([name]) for name in pictures} if is_table else {}
    streamed = pictures if not is_table and hasattr(table, "cast_column") else []
    for name in streamed:
        table = table.cast_column(name, type(features[name])(decode=False))
    for number, row in enumerate(table.remove_columns(pictures) if is_table else table):
        where, more = f"row {number}", dict(row)
        for name in streamed:
            more[name] = _undecoded(more[name], features[name], f"{name} of {where}")
        if missing := [name for name in (image, text) if name not in more and name not in columns]:
            has = ", ".join([*map(str, more), *columns])
            expected = f"expected the columns {image} and {text}"
            raise ValueError(f"{where}: {expected}, {missing[0]} is not in {has}")
        for name, column in columns.items():
            stamp = f"{fingerprint}, {name} of {where}"
            more[name] = Stored(f"{name} of {where}", stamp, partial(_cell, column, number, name))
        more = {name: _as_stored(value, f"{name} of {where}") for name, value in more.items()}
        if not isinstance(found := more.pop(image), Stored):
            raise ValueError(f"{where}: {image} must be an image, got {short_repr(found)}")
        yield Record(found, as_captions(more.pop(text), where), more)


def _cell(column: Any, number: int, name: str) -> Any:
    with images.image_errors(f"{name} of row {number}"):
        if (found := column[number][name]) is None:
            raise ValueError("expected an image, got None")
    return found


def _undecoded(value: Any, feature: Any, name: str) -> Any:
    """Return a stream's undecoded image as `Stored`: its bytes, or what its file is decoded to."""
    if not isinstance(value, Mapping):
        return value
    if (content := value.get("bytes")) is not None:
        return Stored(name, digest(content), lambda: content)
    path = str(value.get("path"))
    stamp = _stamp(file) if (file := Path(path)).is_file() else path
    return Stored(name, stamp, partial(_decoded, feature, value, name))


def _decoded(feature: Any, value: Mapping[str, Any], name: str) -> "Image":
    with images.image_errors(name):
        return type(feature)().decode_example(value)


def _as_stored(value: Any, name: str) -> Any:
    """Return an image of pillow as `Stored`, anything else as it is."""
    return Stored(name, digest_image(value), lambda: value) if hasattr(value, "getexif") else value


def tar_records(*files: str | Path) -> Records:
    """Read the images of tar files laid out as webdataset's: `a.jpg`, `a.txt` or `a.json` side by side.

    Captions are the lines of `a.txt`, else "text" or "caption" of `a.json`, whose other values are in `more`;
    so are other files, such as "mask" of `a.mask.png`. Nothing is unpacked: an image is read from its place
    in the file. The package webdataset is not needed for it, and its order depends on the number of workers.
    A log line counts what has no image or no caption. ValueError naming a file that is compressed or damaged.
    """
    return Records(lambda: _in_tars(files))


def _in_tars(files: Sequence[str | Path]) -> Iterator[Record]:
    count, first, suffixes = 0, "", image_suffixes()
    for file in (as_path("a tar file", name) for name in files):
        check_file(file)
        for key, parts in _groups(file):
            if (found := _tar_record(f"{file}, {key}", parts, suffixes)) is not None:
                yield found
            else:
                count, first = count + 1, first or f"{file}, {key}"
    if count:
        logger.warning("%d without an image or a caption are left out, such as %s", count, first)


def _groups(file: Path) -> Iterator[tuple[str, dict[str, Stored]]]:
    """Yield (name, files by suffix) of neighbors in a tar file whose names are the same up to a dot."""
    stamp, key, parts = _stamp(file), "", dict[str, Stored]()
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                folder, slash, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if not member.isreg() or member.issparse() or not stem or not dot:
                    continue
                if (own := f"{folder}{slash}{stem}") != key and parts:
                    yield key, parts
                    parts = {}
                key, suffix = own, suffix.lower()
                if suffix in parts:
                    raise ValueError(f"{file}: {short_repr(member.name)} is given twice")
                place, name = (member.offset_data, member.size), f"{file}, {member.name}"
                longest = MAX_CAPTION_BYTES if suffix in TEXTS else MAX_IMAGE_BYTES
                read = partial(_read_part, file, *place, name, longest)
                parts[suffix] = Stored(name, f"{place} of {stamp}", read)
            _check_end(file, archive.offset)
    except tarfile.TarError as error:
        expected = "expected a whole tar file, not compressed"
        raise ValueError(f"{file}: {expected}: {one_line(error)}") from None
    if parts:
        yield key, parts


def _check_end(file: Path, offset: int) -> None:
    """Raise ValueError for a tar file that is cut off between two members, or has more behind its end."""
    with file.open("rb") as stream:
        stream.seek(offset)
        tail = stream.read(TAIL_BYTES)
    if len(tail) < tarfile.BLOCKSIZE:
        raise ValueError(f"{file}: a tar file without its end marker: it was not written to the end")
    if any(tail):
        raise ValueError(f"{file}: more follows the end marker, as of tar files that were concatenated")


def _read_part(file: Path, offset: int, size: int, name: str, longest: int) -> bytes:
    if size > longest:
        raise ValueError(f"{name}: {size:,} bytes, expected at most {longest:,}")
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(size)


def _tar_record(where: str, parts: dict[str, Stored], suffixes: set[str]) -> Record | None:
    """Build a record from the files of one name; None without an image or a caption."""
    more, found = dict[str, Any](), None
    pictures = [name for name in parts if f".{name}" in suffixes]
    texts: dict[str, Any] = {name: parts[name].read() for name in TEXTS if name in parts}
    if "json" in texts:
        more = parse_object(texts["json"], f"{where}.json")
        found = more.pop("text" if "text" in more else "caption", None)
    if "txt" in texts:
        with images.image_errors(f"{where}.txt"):
            found = list(caption_lines(texts["txt"].decode("utf-8-sig")))
    if len(pictures) > 1:
        raise ValueError(f"{where}: expected one image, got {', '.join(pictures)}")
    if not pictures or found is None:
        return None
    for name, stored in parts.items():
        stem, _, suffix = name.rpartition(".")
        if name not in (*TEXTS, *pictures):
            more[stem if stem and f".{suffix}" in suffixes else name] = stored
    return Record(parts[pictures[0]], as_captions(found, where), more)
