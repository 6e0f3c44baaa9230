"""Files are written whole or not at all: killed writers, a full disk, what is left behind."""

import ast
import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.processes import run_program
from weights_convert.atomic_write import atomic_file, atomic_folder, copy_file, write_bytes
from weights_convert.safetensors_files import Source, save_tensors

ROOT = Path(__file__).parents[2]

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from PIL import Image
from safetensors.torch import load_file
from kolors_core.pipelines.png_metadata import save_png
from weights_convert.safetensors_files import save_tensors
from weights_convert.atomic_write import atomic_folder, write_bytes

torch.set_num_threads(1)
folder, rng = Path(sys.argv[1]), random.Random(0)
file, png, text = folder / "w.safetensors", folder / "p.png", folder / "index.json"

def write(version):
    save_tensors({name: torch.full((50_000,), float(version)) for name in "ab"}, file)
    save_png(Image.new("L", (64, 64), version % 256), png)
    write_bytes(str(version).encode() * 10_000, text)

def versions():
    tensors = load_file(file)
    values = {value for tensor in tensors.values() for value in tensor.unique().tolist()}
    assert sorted(tensors) == ["a", "b"] and len(values) == 1, values
    image = Image.open(png)
    (low, high), content = image.getextrema(), text.read_bytes()
    length = len(content) // 10_000
    assert low == high and content == content[:length] * 10_000, "torn"
    return int(values.pop()), low, int(content[:length])

write(0)
left = 0
for start in range(1, 25_001, 1000):
    child = os.fork()
    if child == 0:
        for version in range(start, start + 1000):
            write(version)
        os._exit(0)
    time.sleep(rng.uniform(0.002, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen = versions()
    assert all(version == 0 or version < start + 1000 for version in seen), seen
    left += sum(path.name.endswith(".partial") for path in folder.iterdir())
    write(0)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["index.json", "p.png", "w.safetensors"], names
    assert versions() == (0, 0, 0)

child = os.fork()
if child == 0:
    with atomic_folder(folder / "whole") as scratch:
        write_bytes(b"half", scratch / "config.json")
        os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(child, 0)
assert not (folder / "whole").exists() and any(path.is_dir() for path in folder.iterdir())
with atomic_folder(folder / "whole") as scratch:
    write_bytes(b"all", scratch / "config.json")
assert [path.name for path in folder.iterdir() if path.is_dir()] == ["whole"]
print(left)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_killed_writer_leaves_a_whole_file_and_no_rubbish(tmp_path: Path) -> None:
    """Twenty-five writers, each killed within 30 ms; what they left behind is gone after the next write."""
    run = run_program(KILLED, str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 5, "so many were killed in the middle of a write"


FULL = """
import resource, sys
from pathlib import Path
import torch
from PIL import Image
from kolors_core.pipelines.png_metadata import save_png
from weights_convert.safetensors_files import save_tensors
from weights_convert.atomic_write import write_bytes

folder = Path(sys.argv[1])
noise = Image.effect_noise((300, 300), 100)
writers = {
    "w.safetensors": lambda file, size: save_tensors({"a": torch.ones(size)}, file),
    "p.png": lambda file, size: save_png(noise.resize((size, size)) if size < 10 else noise, file),
    "t.txt": lambda file, size: write_bytes(b"x" * size, file),
}
for name, write in writers.items():
    write(folder / name, 4)
before = {name: (folder / name).read_bytes() for name in writers}
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for name, write in writers.items():
    try:
        write(folder / name, 1_000_000)
    except OSError as error:
        print(error)
    assert (folder / name).read_bytes() == before[name], name
assert sorted(path.name for path in folder.iterdir()) == sorted(writers)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_disk_that_is_full_leaves_the_old_file(tmp_path: Path) -> None:
    """Files may not grow beyond 20,000 bytes, which a write is told as on a full disk."""
    run = run_program(FULL, str(tmp_path))
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 3
    for name, line in zip(("w.safetensors", "p.png", "t.txt"), lines, strict=True):
        assert "cannot be written" in line and "File too large" in line and str(tmp_path / name) in line


def test_an_error_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    write_bytes(b"old", tmp_path / "a")
    with pytest.raises(KeyError), atomic_file(tmp_path / "a") as scratch:
        scratch.write_bytes(b"half")
        raise KeyError
    with pytest.raises(KeyError), atomic_folder(tmp_path / "b") as scratch:
        write_bytes(b"half", scratch / "a")
        raise KeyError
    with pytest.raises(FileExistsError, match="exists already"), atomic_folder(tmp_path):
        pass
    with pytest.raises(FileNotFoundError, match="cannot be written: No such file or directory: .*none/a'"):
        write_bytes(b"", tmp_path / "none" / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_two_writers_of_one_file_do_not_take_each_others_scratch(tmp_path: Path) -> None:
    file = tmp_path / "a"
    with atomic_file(file) as first, atomic_file(file) as second:
        assert first != second and first.parent.exists()
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert file.read_bytes() == b"first", "who ends last counts"
    (tmp_path / f".a.{'0' * 16}.partial").write_bytes(b"of a killed writer")
    (tmp_path / ".a.mine.partial").write_bytes(b"of somebody else")
    copy_file(file, tmp_path / "b")
    write_bytes(b"new", file)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.mine.partial", "a", "b"]


@pytest.mark.skipif(sys.platform == "win32", reason="locks")
def test_the_next_write_sweeps_what_the_dead_left_and_nothing_else(tmp_path: Path) -> None:
    """Of any name; not a writer's that lives, a link's target, a FIFO, or what only looks alike."""
    kept = tmp_path / "kept"
    kept.mkdir()
    names = {kind: f".{kind}.{number:016x}.partial" for number, kind in enumerate(["dead", "link", "fifo"])}
    (tmp_path / names["dead"]).mkdir()
    (tmp_path / names["dead"] / "half").write_bytes(b"half")
    (tmp_path / names["link"]).symlink_to(kept)
    os.mkfifo(tmp_path / names["fifo"])
    (tmp_path / ".a.0123.partial").mkdir()
    with atomic_file(tmp_path / "alive") as scratch:
        write_bytes(b"new", tmp_path / "b")
        assert scratch.parent.exists() and not (tmp_path / names["dead"]).exists()
        scratch.write_bytes(b"")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"kept", "alive", "b", ".a.0123.partial", names["link"], names["fifo"]}


def test_errors_name_the_target_and_not_its_scratch(tmp_path: Path) -> None:
    for arguments in ((errno.ENOSPC, "No space left", "{}/unet/a"), ("{}/unet/a: cannot be written",)):
        with pytest.raises(OSError) as raised, atomic_folder(tmp_path / "whole") as scratch:
            raise OSError(*(str(part).replace("{}", str(scratch)) if part != errno.ENOSPC else part
                            for part in arguments))  # fmt: skip
        assert f"{tmp_path}/whole/unet/a" in str(raised.value) and "partial" not in str(raised.value)
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_folder(tmp_path / "whole"):
        raise FileNotFoundError(errno.ENOENT, "no such file", "elsewhere")
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_a_file_within_a_file_is_named_once_and_a_link_to_itself_too(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised, atomic_file(tmp_path / "a"), atomic_file(tmp_path / "b"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(raised.value).count("cannot be written") == 1
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"), atomic_folder(tmp_path / "loop"):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="locks")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_where_there_are_no_locks_files_are_written_and_no_scratch_is_swept(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Lustre mounted without flock: who is alive cannot be known."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    other = tmp_path / f".a.{'0' * 16}.partial"
    other.mkdir()
    write_bytes(b"new", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"new" and list(tmp_path.glob(".*")) == [other]


def test_long_names_and_a_file_that_is_mapped(tmp_path: Path) -> None:
    long = tmp_path / ("猫" * 80 + ".safetensors")  # 252 bytes
    save_tensors({"a": torch.ones(3)}, long)
    mapped = Source([long])["a"]
    save_tensors({"a": mapped * 2, "b": mapped}, long)
    assert {name: tensor.tolist() for name, tensor in load_file(long).items()} == {
        "a": [2.0] * 3,
        "b": [1.0] * 3,
    }
    assert isinstance(mapped, Tensor) and mapped.tolist() == [1.0] * 3


REPLACED = """
import os, signal, sys
from contextlib import suppress
from itertools import count
from pathlib import Path
from weights_convert import atomic_write
from weights_convert.atomic_write import atomic_folder, write_bytes

root, folder = Path(sys.argv[1]), Path(sys.argv[1]) / "model"
if sys.argv[2] == "renames":
    atomic_write._exchange_in_one_step = lambda one, other: False

def write(version):
    with atomic_folder(folder, lambda _: True) as scratch:
        for name in "ab":
            write_bytes(version.encode() * 5_000, scratch / f"{name}-{version}")

def killed_before(number):
    # Whether the file system was touched so often that a writer of the new version died before.
    if (child := os.fork()) == 0:
        calls = count()
        def hook(event, _):
            if event.startswith(("os.", "open", "shutil.")) and next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        write("new")
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0

missing, found = 0, []
for number in count():
    write("old")
    assert [path.name for path in root.iterdir()] == ["model"], list(root.iterdir())
    is_dead = killed_before(number)
    if not folder.exists():
        missing += 1
        with suppress(FileExistsError), atomic_folder(folder):
            raise AssertionError("the old folder is not back")
    names = sorted(file.name for file in folder.iterdir())
    version = names[0].split("-")[1]
    assert names == [f"{name}-{version}" for name in "ab"], names
    assert {file.read_bytes() for file in folder.iterdir()} == {version.encode() * 5_000}
    found.append(version)
    if not is_dead:
        break
assert sorted(found, reverse=True) == found and {*found} == {"old", "new"}, found
print(missing, number)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_a_killed_writer_leaves_the_old_folder_or_the_new_one(way: str, tmp_path: Path) -> None:
    """It is killed before each of its calls of the file system in turn; without an exchange of folders, the
    next write puts the old one back.
    """
    run = run_program(REPLACED, str(tmp_path), way)
    assert run.returncode == 0, run.stderr
    missing, calls = map(int, run.stdout.split())
    assert missing == (way == "renames") and calls > 20


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for version in ("old", "new"):
        with atomic_folder(folder, lambda _: True) as scratch:
            write_bytes(version.encode(), scratch / version)
    assert [path.name for path in folder.iterdir()] == ["new"]
    with pytest.raises(KeyError), atomic_folder(folder, lambda _: True) as scratch:
        write_bytes(b"half", scratch / "half")
        raise KeyError
    with pytest.raises(FileExistsError, match="exists already"), atomic_folder(folder, lambda _: False):
        pass
    (tmp_path / "link").symlink_to(folder)
    with atomic_folder(tmp_path / "link", lambda _: True) as scratch:
        write_bytes(b"through a link", scratch / "linked")
    assert (tmp_path / "link").is_symlink() and [path.name for path in folder.iterdir()] == ["linked"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model"]


TEXTS = {
    f"k{i}": text for i, text in enumerate(['"\\/', "\b\f\n\r\t", "\x00\x1f\x7f", "猫 \u2028 🐱", "", "{}:,"])
}


def test_metadata_are_written_in_their_order_and_all_else_as_by_the_library(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.ones(5, dtype=torch.int8), "c": torch.ones(2).double()}
    metadata, file, theirs = dict(reversed(TEXTS.items())), tmp_path / "ours", tmp_path / "theirs"
    save_tensors(tensors, file, metadata)
    save_file(tensors, theirs, metadata={"format": "pt"} | metadata)
    with safe_open(theirs, "pt") as opened:
        assert Source([file]).metadata(file) == opened.metadata() == {"format": "pt"} | metadata
    assert list(Source([file]).metadata(file) or ()) == ["format", *metadata]
    one, other = file.read_bytes(), theirs.read_bytes()
    length = int.from_bytes(one[:8], "little")
    ours, library = ({**json.loads(content[8 : 8 + length])} for content in (one, other))
    assert ours == library and one[:8] == other[:8] and one[8 + length :] == other[8 + length :]
    rest = one.index(b'},"')  # behind the metadata
    assert len(one) == len(other) and one[rest:] == other[rest:]


def test_equal_tensors_and_metadata_give_equal_bytes_in_every_process(tmp_path: Path) -> None:
    """Two processes, which hash strings differently."""
    script = "import sys, torch; from pathlib import Path\n"
    script += "from weights_convert.safetensors_files import save_tensors\n"
    script += "save_tensors({'a': torch.ones(3)}, Path(sys.argv[1]), {f'k{i}': 'v' for i in range(9)})\n"
    run = run_program(f"{script}print(hash('k'))", str(tmp_path / "other"))
    assert run.returncode == 0 and int(run.stdout) != hash("k"), run.stderr
    save_tensors({"a": torch.ones(3)}, tmp_path / "own", {f"k{i}": "v" for i in range(9)})
    assert (tmp_path / "own").read_bytes() == (tmp_path / "other").read_bytes()


def test_all_files_are_written_in_one_place() -> None:
    """Whoever writes by another way is found here; `training` and the rest go through atomic_write.py."""
    writes = {"write_text", "write_bytes", "save_file", "mkstemp", "copyfile", "copy2"}
    found = []
    for file in [*(ROOT / "kolors_core").rglob("*.py"), *(ROOT / "weights_convert").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and file.name != "atomic_write.py":
                name = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                of = node.args[0].id if node.args and isinstance(node.args[0], ast.Name) else ""
                is_ours = isinstance(node.func, ast.Name) and name == "write_bytes"
                into = node.args[1] if name == "save_file" and len(node.args) > 1 else node.func
                is_scratch = ast.unparse(into).removesuffix(".write_bytes").endswith("scratch")
                mode = [ast.unparse(arg) for arg in node.args] if name == "open" else []
                if (name in writes and not is_ours and not is_scratch) or any(
                    m in mode for m in ("'w'", "'wb'")
                ):
                    found.append(f"{file.name}: {name}({of})")
    assert found == []
