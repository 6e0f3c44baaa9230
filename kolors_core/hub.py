"""Where a checkpoint's files are on this machine: in a folder, or fetched from a hub repository.

No network is touched unless a repository is named. `HF_ENDPOINT`, `HF_HUB_OFFLINE` and the hub's cache are
respected, and the cache serves when the hub cannot be reached.
"""

import re
from collections.abc import Callable, Collection, Sequence
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

from kolors_core.validation import as_path
from weights_convert.safetensors_files import PICKLES, pickle_message

Pick = Callable[[list[str]], list[str]]


def fetch(
    name: str | Path,
    pick: Pick,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """The local folder of a checkpoint: `name` itself if it is one, else a hub repository's.

    pick: of a repository's listing, the files to download; it raises FileNotFoundError for what is not there.
    A local folder, or a cache that serves without the hub, has what it has, and is not listed.
    Raises FileNotFoundError, in one line, naming what was looked for.
    """
    if not isinstance(name, str | Path) or not str(name):
        raise TypeError(f"expected a checkpoint folder or hub repository, got {name!r}")
    if not isinstance(token, str | bool | None):
        raise TypeError(f"token must be a string, True, False or None, got {type(token).__name__}")
    if isinstance(token, str) and re.fullmatch(r"[!-~]*", token) is None:  # or errors of the client show it
        raise ValueError("token has a space, a line break or another character that no token has")
    _must_be_text(revision=revision, cache_dir=cache_dir)
    folder = Path(name)
    if _is(folder.is_dir):
        if revision is not None:
            raise ValueError(f"revision {revision!r} has no effect: {folder} is a local folder")
        return folder
    if _is(folder.exists) or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
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
        except (HfHubHTTPError, LocalTokenNotFoundError, ValueError) as error:  # or no hub at all
            raise FileNotFoundError(f"{repo}: cannot be had from the hub: {_one_line(error)}") from None
        except (OSError, HTTPError) as error:  # no connection, or offline mode: the cache may serve
            reason = f"the hub cannot be reached: {_one_line(error)}"
    # Without a listing a file is asked for that no repository has: by default all of a repository's are, and
    # the client refuses a cache that lacks one, as ours lacks those that were not needed.
    wanted = ["no file"] if listing is None else pick(listing)
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


def find_file(
    source: str | Path,
    weight_name: str | None = None,
    subfolder: str | None = None,
    *,
    preferred: Sequence[str] = (),
    beside: Collection[str] = (),
    **hub: Any,
) -> Path:
    """The safetensors file that is meant: `source` itself, or one of its folder or hub repository.

    weight_name: which; if None the first of the `preferred` names that there is, or the only one.
    beside: names to fetch with it. hub: as for `fetch`. Raises FileNotFoundError or ValueError naming what
    there is.
    """
    _must_be_text(weight_name=weight_name, subfolder=subfolder)
    file = as_path("the source", source)
    if _is(file.is_file) or file.suffix in (".safetensors", *PICKLES):
        if any(given is not None for given in (weight_name, subfolder or None, hub.get("revision"))):
            raise ValueError(f"{source} is a file: weight_name, subfolder and revision have no effect on it")
        if file.suffix != ".safetensors":
            is_pickle = file.suffix in PICKLES
            raise ValueError(f"{file}: {pickle_message(file) if is_pickle else 'is not a .safetensors file'}")
        return file
    inside = PurePosixPath(subfolder or ".")
    if weight_name is not None:
        inside, weight_name = (inside / weight_name).parent, PurePosixPath(weight_name).name

    def pick(listing: list[str]) -> list[str]:
        names = [path.name for path in map(PurePosixPath, listing) if path.parent == inside]
        chosen = _choose(names, weight_name, preferred, f"{source}/{inside}".removesuffix("/."))
        return [str(inside / name) for name in (chosen, *(name for name in names if name in beside))]

    place = fetch(source, pick, **hub) / inside
    if not place.is_dir():
        raise FileNotFoundError(f"{place}: no such folder")
    return place / _choose([file.name for file in place.iterdir()], weight_name, preferred, str(place))


def _choose(names: Sequence[str], weight_name: str | None, preferred: Sequence[str], where: str) -> str:
    """Of a folder's files, the one that is meant."""
    found = sorted(name for name in names if name.endswith(".safetensors"))
    wanted = preferred if weight_name is None else (weight_name,)
    if chosen := next((name for name in wanted if name in found), None):
        return chosen
    if weight_name is None and len(found) == 1:
        return found[0]
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickle := next((name for name in pickles if name == weight_name or not found), None):
        file = f"{where}/{pickle}"
        raise ValueError(f"{file}: {pickle_message(file)}")
    want = "one .safetensors file, or a weight_name" if weight_name is None else weight_name
    raise FileNotFoundError(f"{where}: expected {want}, found {', '.join(found) or 'no .safetensors file'}")


def reject_unused(source: str, **given: Any) -> None:
    """ValueError for an argument that says where files are, of a source that has no files."""
    if unused := [name for name, value in given.items() if value not in (None, "", False)]:
        raise ValueError(f"{unused[0]} has no effect on {source}")


def _must_be_text(**given: Any) -> None:
    """TypeError for an argument that is neither text, nor a path, nor left out."""
    for name, value in given.items():
        if not isinstance(value, str | PathLike | None):
            raise TypeError(f"{name} must be a string, got {value!r}")


def _is(asked: Callable[[], bool]) -> bool:
    """What a path says of itself; False for a name too long for the disk."""
    try:
        return asked()
    except OSError:
        return False


def _one_line(error: Exception) -> str:
    """What went wrong and where; after two lines, messages of the hub's client turn to advice."""
    lines = [line for line in str(error).splitlines() if line]
    return " ".join(lines[:2]) or type(error).__name__
