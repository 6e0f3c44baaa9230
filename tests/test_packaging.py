"""The package as others get it: the wheel's files, an image drawn from it, and what an editor follows."""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import kolors_core

ROOT = Path(__file__).parents[1]
PACKAGES = ("kolors_core", "weights_convert")
DRAW = """
import sys
from pathlib import Path
site, clone = sys.argv[1:]
sys.path[:] = [site, *(path for path in sys.path if path and Path(path).resolve() != Path(clone))]
import kolors_core, weights_convert
import kolors_core.later
from kolors_core.__main__ import main
for module in (kolors_core, weights_convert):
    assert Path(module.__file__).is_relative_to(site), module.__file__
options = ["--steps", "1", "--seed", "3", "--device", "cpu", "-q"]
assert main(["a cat", "-o", "cat.png", *options]) == 0
assert main(["explain", "a cat", "-o", "told.png", *options]) == 0
pipe = kolors_core.KolorsPipeline.from_pretrained("tiny")
assert weights_convert.detect_component(pipe.unet.state_dict(), "the UNet")[1]
kolors_core.KolorsControlNet.from_pretrained("tiny")
"""


def files(folder: Path) -> set[str]:
    """List the files of both packages below a folder, as paths from it."""
    return {
        path.relative_to(folder).as_posix()
        for package in PACKAGES
        for path in (folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what is built, and add a sub-package."""
    place = tmp_path_factory.mktemp("packaging") / "clone"
    place.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, place)
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    later = place / "kolors_core" / "later"
    later.mkdir()
    (later / "__init__.py").write_text('"""A sub-package, with data."""\n')
    (later / "page.html").write_text("<!doctype html>\n")
    return place


def build(kind: str, clone: Path, into: Path) -> Path:
    """Call a hook of the build backend (PEP 517), as pip does, and return the file that it wrote."""
    before = sorted(clone.rglob("*"))
    program = f"import hatchling.build as backend, sys; print(backend.build_{kind}(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(into)]
    run = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert sorted(clone.rglob("*")) == before, "a build leaves nothing in the clone"
    return into / run.stdout.split()[-1]


def test_a_wheel_holds_every_file_and_draws_where_nothing_else_is(clone: Path, tmp_path: Path) -> None:
    wheel = build("wheel", clone, tmp_path)
    assert wheel.name == f"kolors_core-{kolors_core.__version__}-py3-none-any.whl"
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert files(site) == files(clone) and {"kolors_core/later/page.html"} < files(site)
    information = f"kolors_core-{kolors_core.__version__}.dist-info"
    assert {path.name for path in site.iterdir()} == {*PACKAGES, information}, "no tests, no benchmarks"
    script = (site / information / "entry_points.txt").read_text()
    assert script == "[console_scripts]\nkolors = kolors_core.__main__:main\n"
    assert (site / information / "licenses" / "kolors_core" / "inspection" / "font" / "OFL.txt").exists()
    run = subprocess.run(
        [sys.executable, "-I", "-c", DRAW, str(site), str(ROOT)], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("cat.png", "told.png", "told.html"))


def test_a_source_archive_holds_what_a_wheel_is_built_from(clone: Path, tmp_path: Path) -> None:
    archive = build("sdist", clone, tmp_path)
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    assert files(clone) | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_editors_see_an_editable_install(clone: Path, tmp_path: Path) -> None:
    """A .pth file with the folder's path: an editor runs no import hook."""
    with zipfile.ZipFile(build("editable", clone, tmp_path)) as wheel:
        written = [name for name in wheel.namelist() if ".dist-info/" not in name]
        assert [Path(name).suffix for name in written] == [".pth"]
        assert wheel.read(written[0]).decode().splitlines() == [str(clone)]


def test_an_environment_keeps_the_torch_that_it_has() -> None:
    """pyproject.toml has ranges alone, and the constraints of CI an exact version of each package in it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *extras["test"], *extras["bench"]]
    assert all("==" not in line and "<" not in line for line in named), named
    assert not any(line.startswith("torch") for lines in extras.values() for line in lines)
    pinned = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    exact = {line.partition("==")[0] for line in pinned if not line.startswith("#")}
    for line in [*project["dependencies"], *extras["test"]]:
        assert line.partition(">=")[0].partition("[")[0] in exact, line


def test_a_citation_names_this_version() -> None:
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {kolors_core.__version__}" in lines
