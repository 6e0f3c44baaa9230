"""A room can be deleted, and what is left works: the package is copied without it, and draws."""

import re
import shutil
from pathlib import Path

import pytest

from tests.support.processes import run_program

ROOT = Path(__file__).parents[1]
FEATURES = ("adapters", "performance", "inspection", "training", "pipelines", "compat", "cli", "batch", "ui")
PIPELINE = """
import torch
from kolors_core import KolorsPipeline
pipe = KolorsPipeline.from_pretrained("tiny")
generator = torch.Generator().manual_seed(0)
pipe("a ladybug", num_inference_steps=2, generator=generator).images[0].save("ladybug.png")
"""
WRITTEN_OUT = (ROOT / "tests" / "examples" / "plain.py").read_text().replace("schedule(8)", "schedule(2)")


# With a folder of features go its methods in pipelines/, a base of `Task` in stages.py, and these files; and
# compat/, which has the reference's names for all of them.
METHODS = {
    "adapters": ("AdapterMethods", [
        "adapter_methods", "control_images", "controlnet", "face_prompts", "image_prompts", "lora_methods",
        "lora_recipe", "memory_plan", "quantization_report",
    ]),
    "performance": ("PerformanceMethods", ["performance_methods", "memory_plan", "quantization_report"]),
}  # fmt: skip


def delete_methods(pipelines: Path, folder: str) -> None:
    """Delete the methods of a folder of features from a copy of pipelines/."""
    base, files = METHODS[folder]
    for name in files:
        (pipelines / f"{name}.py").unlink(missing_ok=True)
    text = (pipelines / "stages.py").read_text()
    text, imports = re.subn(rf"^from .* import {base}\n", "", text, flags=re.MULTILINE)
    text, bases = re.subn(rf"\b{base}, ", "", text)
    assert imports == bases == 1
    (pipelines / "stages.py").write_text(text)


def draw(place: Path, without: tuple[str, ...], program: str) -> bytes:
    """Run a program on a copy of the package without these folders; returns the image that it writes."""
    left_out = shutil.ignore_patterns("*.pyc.*", "tiny")  # compiled files, but for those being written
    for package in ("kolors_core", "weights_convert"):
        shutil.copytree(ROOT / package, place / package, ignore=left_out)
    for folder in {*without} | ({"compat"} if METHODS.keys() & {*without} else set()):
        shutil.rmtree(place / "kolors_core" / folder)
        if folder in METHODS and "pipelines" not in without:
            delete_methods(place / "kolors_core" / "pipelines", folder)
    (place / "kolors_core" / "tiny").symlink_to(ROOT / "kolors_core" / "tiny")
    check = f"import kolors_core; assert kolors_core.__file__.startswith({str(place)!r})"
    run = run_program(f"{check}\n{program}", cwd=place)
    assert run.returncode == 0, run.stderr
    return (place / "ladybug.png").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return draw(tmp_path_factory.mktemp("whole"), (), PIPELINE)


@pytest.mark.parametrize(
    "without",
    [
        ("inspection",),
        ("training",),
        ("cli",),
        ("batch", "ui"),
        ("inspection", "training", "compat", "cli", "batch", "ui"),
        ("adapters",),
        ("performance",),
        ("adapters", "performance", "inspection", "training", "cli", "batch", "ui"),
    ],  # fmt: skip
    ids="+".join,
)
def test_the_pipeline_draws_without(without: tuple[str, ...], whole: bytes, tmp_path: Path) -> None:
    assert draw(tmp_path, without, PIPELINE) == whole


def test_without_compat_the_names_are_the_plain_classes_and_draw(whole: bytes, tmp_path: Path) -> None:
    program = """
import kolors_core
assert kolors_core.KolorsPipeline.__module__ == "kolors_core.pipelines.text_to_image"
assert kolors_core.EulerDiscreteScheduler.__module__ == "kolors_core.schedulers"
assert not hasattr(kolors_core, "DiffusionPipeline")
"""
    assert draw(tmp_path, ("compat",), program + PIPELINE) == whole


def test_the_written_out_path_needs_the_core_alone(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "core").mkdir()
    everything = draw(tmp_path / "all", (), WRITTEN_OUT)
    assert draw(tmp_path / "core", FEATURES, WRITTEN_OUT) == everything


def test_it_can_fail(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="No module named 'kolors_core.pipelines'"):
        draw(tmp_path, FEATURES, PIPELINE)
