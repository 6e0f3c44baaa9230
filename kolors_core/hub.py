"""Checkpoint files on this machine: in a local folder, or fetched from a hub repository.

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

_LINK = re.compile(r"https?://[^/]+/([^/]+/[^/]+)/(?:blob|resolve)/([^/]+)/([^?]+)")  # repo, revision, path
FileSelector = Callable[[list[str]], list[str]]  # a repository's listing -> the files to download


def fetch(
    name: str | Path, select: FileSelector, *, revision: str | None = None,
    cache_dir: str | Path | None = None, local_files_only: bool = False, token: str | bool | None = None,
    force_download: bool = False,
) -> Path:  # fmt: skip
    """Return the local folder of a checkpoint: `name` itself if it is one, else a hub repository's.

    select: not called for a local folder, nor for a cache that is used without the hub; it and this raise
    FileNotFoundError, in one line, naming what was looked for. force_download: fetch cached files again.
    """
    if not isinstance(name, str | Path) or not str(name):
        raise TypeError(f"expected a checkpoint folder or hub repository, got {name!r}")
    check_token(token)
    check_strings(revision=revision, cache_dir=cache_dir)
    folder = Path(name)
    if _safe_stat(folder.is_dir):
        if revision is not None:
            raise ValueError(f"revision {revision!r} has no effect: {folder} is a local folder")
        return folder
    if _safe_stat(folder.is_file):
        hint = "from_single_file loads one" if folder.suffix == ".safetensors" else "this is none of weights"
        raise FileNotFoundError(f"{name}: expected a folder or a hub repository, got a file: {hint}")
    if _safe_stat(folder.exists) or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name}: no such folder, and not a hub repository of the form owner/name")
    from huggingface_hub import HfApi, errors, snapshot_download
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    repo, listing, reason = str(name), None, "local_files_only is set"
    if not local_files_only:
        try:
            info = HfApi(token=token).model_info(repo, revision=revision)
            listing = [file.rfilename for file in info.siblings or ()]
        except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError, ValueError) as error:
            raise FileNotFoundError(f"{repo}: cannot be had from the hub: {first_lines(error)}") from None
        except (OSError, HTTPError) as error:  # no connection, or offline mode: try the cache
            reason = f"the hub cannot be reached: {first_lines(error)}"
    # Without a listing, request a file that no repository has: the default is all of a repository's files,
    # and the client refuses a cache that lacks one of them, as ours lacks those that were not needed.
    selected = ["no file"] if listing is None else select(listing)
    try:
        return Path(snapshot_download(
            repo, revision=revision, cache_dir=cache_dir, token=token, allow_patterns=selected,
            local_files_only=listing is None, force_download=force_download and listing is not None,
        ))  # fmt: skip
    except (errors.LocalEntryNotFoundError, HTTPError, errors.HFValidationError) as error:
        if listing is None:
            raise FileNotFoundError(f"{repo}: not in the local cache, and {reason}") from None
        raise FileNotFoundError(f"{repo}: cannot be had from the hub: {first_lines(error)}") from None


def hub_commit(path: Path) -> str | None:
    """Return the commit of a file or folder in the hub's cache, which its path contains; None elsewhere."""
    parts = Path(path).parts
    places = [i for i, part in enumerate(parts[:-1]) if part == "snapshots"]
    found = [parts[i + 1] for i in places if re.fullmatch(r"[0-9a-f]{40}", parts[i + 1])]
    return found[-1] if found else None


def named_source(name: Any, path: Path, **places: str | None) -> str:
    """Describe where a file was found, for metadata: repository@commit, or its path.

    places: `weight_name` or `subfolder`, beside which the repository's name would not be enough.
    """
    commit = hub_commit(path)
    is_enough = commit is not None and not any(places.values())
    return f"{name}@{commit}" if is_enough else str(path if commit or any(places.values()) else name)


def find_file(
    source: str | Path, weight_name: str | None = None, subfolder: str | None = None, *,
    preferred: Sequence[str] = (), with_files: Collection[str] = (), **hub: Any
) -> Path:  # fmt: skip
    """Find a safetensors file: `source` itself, or a file of that folder or hub repository.

    weight_name: its name; if None the first existing one of `preferred`, or the only file. with_files: names
    of files of its folder to fetch too. hub: as for `fetch`. Errors name the files found.
    """
    check_strings(weight_name=weight_name, subfolder=subfolder)
    file = as_path("the source", source)
    if _safe_stat(file.is_file) or file.suffix in (".safetensors", *PICKLES):
        if any(given is not None for given in (weight_name, subfolder or None, hub.get("revision"))):
            raise ValueError(f"{source} is a file: weight_name, subfolder and revision have no effect on it")
        if file.suffix != ".safetensors":
            is_pickle = file.suffix in PICKLES
            raise ValueError(f"{file}: {pickle_message(file) if is_pickle else 'is not a .safetensors file'}")
        return file
    inside = PurePosixPath(subfolder or ".")
    if weight_name is not None:
        inside, weight_name = (inside / weight_name).parent, PurePosixPath(weight_name).name

    def select(listing: list[str]) -> list[str]:
        names = [path.name for path in map(PurePosixPath, listing) if path.parent == inside]
        chosen = _choose(names, weight_name, preferred, f"{source}/{inside}".removesuffix("/."))
        return [str(inside / name) for name in (chosen, *(name for name in names if name in with_files))]

    folder = fetch(source, select, **hub) / inside
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    return folder / _choose([file.name for file in folder.iterdir()], weight_name, preferred, str(folder))


def find_linked_file(source: str | Path, **hub: Any) -> Path:
    """Find a local safetensors file as `find_file`, or fetch that of an address on the hub."""
    link = _LINK.fullmatch(str(source))
    return find_file(source) if link is None else find_file(link[1], link[3], revision=link[2], **hub)


def _choose(names: Sequence[str], weight_name: str | None, preferred: Sequence[str], where: str) -> str:
    found = sorted(name for name in names if name.endswith(".safetensors"))
    accepted = preferred if weight_name is None else (weight_name,)
    if chosen := next((name for name in accepted if name in found), None):
        return chosen
    if weight_name is None and len(found) == 1:
        return found[0]
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if file := next((f"{where}/{name}" for name in pickles if name == weight_name or not found), None):
        raise ValueError(f"{file}: {pickle_message(file)}")
    expected = "one .safetensors file, or a weight_name" if weight_name is None else weight_name
    got = ", ".join(found) or "no .safetensors file"
    raise FileNotFoundError(f"{where}: expected {expected}, found {got}")


def reject_unused(source: str, **given: Any) -> None:
    """Raise ValueError for an argument about files that is given for a source without files."""
    if unused := [name for name, value in given.items() if value not in (None, "", False)]:
        raise ValueError(f"{unused[0]} has no effect on {source}")


def check_token(token: Any) -> None:
    """Raise TypeError or ValueError for what is no token, without showing it."""
    if not isinstance(token, str | bool | None):
        raise TypeError(f"token must be a string, True, False or None, got {type(token).__name__}")
    if isinstance(token, str) and re.fullmatch(r"[!-~]*", token) is None:  # the client would show it
        raise ValueError("token has a space, a line break or another character that no token has")


def check_strings(**given: Any) -> None:
    """Raise TypeError naming an argument that is neither a string, a path nor None."""
    for name, value in given.items():
        if not isinstance(value, str | PathLike | None):
            raise TypeError(f"{name} must be a string, got {value!r}")


def _safe_stat(test: Callable[[], bool]) -> bool:
    """Call a path's test, such as `is_dir`; return False for a name too long for the disk."""
    try:
        return test()
    except OSError:
        return False


def first_lines(error: Exception) -> str:
    """Join the first two lines of a hub client's error; advice follows them."""
    return " ".join([line for line in str(error).splitlines() if line][:2]) or type(error).__name__
