"""The house itself: who may import whom, what importing costs, and how long a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kolors_core"
# A room and the rooms that it may import, besides itself and the core. No feature imports another.
ROOMS: dict[str, tuple[str, ...]] = {
    "": (),
    "adapters": (),
    "performance": (),
    "inspection": (),
    "training": (),
    "pipelines": ("adapters", "performance", "inspection", "training"),
    "compat": ("adapters", "performance", "inspection", "training", "pipelines"),
    "cli": ("adapters", "performance", "inspection", "training", "pipelines"),
    "batch": ("adapters", "performance", "inspection", "training", "pipelines", "cli"),
    "ui": ("adapters", "performance", "inspection", "training", "pipelines", "cli"),
}
DOORS = {"__init__", "__main__", "utils"}  # names and commands of every room, imported when asked for
RUN_TIME = {"torch", "safetensors", "sentencepiece", "einops", "numpy", "PIL", "huggingface_hub", "tqdm"}


def imports(file: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative import"
            found.add(node.module or "")
    return found


def room_of(module: str) -> str:
    """The folder of a module of kolors_core, "" for the core."""
    room = module.removeprefix("kolors_core.").split(".")[0]
    return room if room in ROOMS else ""


FILES = sorted(PACKAGE.rglob("*.py"))
CORE = [file for file in sorted(PACKAGE.glob("*.py")) if file.stem not in DOORS]
CONVERTERS = sorted((ROOT / "weights_convert").glob("*.py"))


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    """No arrow up, and none from one feature to another."""
    assert (PACKAGE / room).is_dir()
    files = sorted((PACKAGE / room).glob("*.py")) if room else CORE
    for file in files:
        own = {name for name in imports(file) if name.startswith("kolors_core.")}
        stray = sorted(name for name in own if room_of(name) not in ("", room, *ROOMS[room]))
        assert not stray, f"{name_of(file)} imports {stray}"


def test_every_folder_is_a_room() -> None:
    folders = {file.parent.name for file in PACKAGE.glob("*/*.py")}
    assert folders == ROOMS.keys() - {""}


def test_no_circle() -> None:
    """Each file can be read after those that it imports."""
    known = {name_of(file): imports(file) for file in FILES if file.parent != PACKAGE or file in CORE}
    left = {name: own & known.keys() - {name} for name, own in known.items()}
    while left:
        ready = [name for name, own in left.items() if not own & left.keys()]
        assert ready, f"a circle among {sorted(left)}"
        for name in ready:
            del left[name]


@pytest.mark.parametrize("file", [*FILES, *CONVERTERS], ids=name_of)
def test_only_the_agreed_packages_at_run_time(file: Path) -> None:
    outside = {name.split(".")[0] for name in imports(file)} - set(sys.stdlib_module_names)
    optional = {"kolors_core.__main__": "argcomplete", "kolors_core.performance.triton_kernels": "triton"}
    outside -= {optional.get(name_of(file), "")}
    assert outside <= RUN_TIME | {"kolors_core", "weights_convert"}
    if file in CONVERTERS:
        assert outside <= {"torch", "safetensors", "weights_convert"}


# Each module is imported in a process of its own, which is forked with torch in it already.
LOADED = """
import importlib, os, sys
import torch, safetensors.torch
for name in sys.argv[1:]:
    if os.fork():
        assert os.wait()[1] == 0, name
    else:
        importlib.import_module(name)
        packages = "kolors_core", "sentencepiece", "PIL", "huggingface_hub", "einops"
        print(name, *(loaded for loaded in sys.modules if loaded.split(".")[0] in packages), flush=True)
        os._exit(0)
"""


def test_a_core_file_loads_the_core_alone() -> None:
    """No file of a feature, and no package but torch, safetensors and numpy."""
    command = [sys.executable, "-c", LOADED, *map(name_of, CORE)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    lines = [line.split() for line in run.stdout.splitlines()]
    assert [name for name, *_ in lines] == [name_of(file) for file in CORE]
    for name, *loaded in lines:
        assert name in loaded
        stray = [other for other in loaded if not other.startswith("kolors_core") or room_of(other)]
        assert not stray, f"{name} loads {stray}"


def test_importing_needs_torch_and_safetensors_only_and_prints_nothing() -> None:
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"sentencepiece", "einops", "PIL", "huggingface_hub", "tqdm", "diffusers",
        "transformers"}:
            raise ImportError(name + " imported")
sys.meta_path.insert(0, Refuse())
import kolors_core, weights_convert, kolors_core.cli.generate
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_there_is_one_attention_call() -> None:
    callers = [name_of(file) for file in FILES if "scaled_dot_product_attention(" in file.read_text()]
    assert callers == ["kolors_core.attention"]
    assert (ROOT / "kolors_core" / "attention.py").read_text().count("scaled_dot_product_attention(") == 1


def test_files_are_read_in_one_sitting() -> None:
    for folder in ("kolors_core", "weights_convert", "tests", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 400, file
    path = ("tokenizer", "chatglm", "unet", "vae", "schedule", "diffusion", "sampling", "guidance")
    lines = sum(len((ROOT / "kolors_core" / f"{name}.py").read_text().splitlines()) for name in path)
    # 150 lines more than with two schedulers: one file computes the timesteps of all. 4 let heads be gated.
    assert lines < 1704, "the text-to-image path grows too long to read"


@pytest.mark.parametrize("file", [*FILES, *CONVERTERS], ids=name_of)
def test_functions_and_ancestors_stay_few(file: Path) -> None:
    """A function body has at most 60 lines, its docstring aside, and a class at most three bases."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body and node.end_lineno else 0
            assert lines <= 60, f"{node.name} has {lines} lines"
        elif isinstance(node, ast.ClassDef):
            assert len(node.bases) <= 3, f"{node.name} has {len(node.bases)} bases"
