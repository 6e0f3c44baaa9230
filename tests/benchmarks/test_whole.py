"""The benchmark of a whole Kolors at the embedded model's size: the folder, the processes, and the tables."""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.speed import RESULTS
from benchmarks.speed.report import front, read, table
from benchmarks.speed.whole import DTYPES, fresh, prepare, psnr
from benchmarks.speed.whole_folder import public_shapes, write_folder, write_lora
from benchmarks.speed.whole_once import draw, lora
from kolors_core.checkpoint import EMBEDDED
from kolors_core.config import KOLORS, TINY
from tests.support.parity import reference_chatglm, reference_unet, reference_vae

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Kolors, its text encoder in shards, and a LoRA."""
    place = tmp_path_factory.mktemp("whole") / "kolors"
    write_folder(place, TINY, torch.float16, EMBEDDED / "tokenizer", shard=10**6)
    assert write_lora(place / "lora.safetensors", TINY.unet, 4, torch.float16) == 8 * 7
    return place


def test_the_folder_has_every_tensor_of_the_references_models() -> None:
    with torch.device("meta"):
        models = {
            "text_encoder": reference_chatglm(TINY.text_encoder),
            "unet": reference_unet(TINY.unet),
            "vae": reference_vae(TINY.vae),
        }
    for name, model in models.items():
        wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        assert public_shapes(name, getattr(TINY, name)) == wanted, name


def test_at_full_size_it_is_as_large_as_the_published_one() -> None:
    """Bytes of the published float16 files: the text encoder's index says so, the others by parameters."""
    sizes = {
        name: 2 * sum(int(np.prod(shape)) for shape in public_shapes(name, getattr(KOLORS, name)).values())
        for name in ("text_encoder", "unet", "vae")
    }
    assert sizes == {"text_encoder": 12_487_168_064, "unet": 2 * 2_579_458_820, "vae": 2 * 83_653_863}


@pytest.mark.numerical
def test_both_libraries_draw_the_same_image_of_it(folder: Path, tmp_path: Path) -> None:
    images = {library: tmp_path / f"{library}.png" for library in ("kolors_core", "diffusers")}
    for library, out in images.items():
        stages = draw(library, str(folder), str(out), "64", "2")
        assert list(stages)[:2] == ["importing", "loading"] and min(stages.values()) > 0
    shown = np.asarray(Image.open(images["kolors_core"]), dtype=float)
    assert shown.shape == (64, 64, 3) and 20 < shown.std() < 120  # noise, neither flat nor black and white
    assert psnr(*images.values()) > 35
    assert len(list((folder / "text_encoder").glob("model.fp16-*-of-*.safetensors"))) > 2


def test_a_lora_changes_all_its_layers_and_ours_restores_them(folder: Path) -> None:
    for library in ("kolors_core", "diffusers"):
        found = lora(library, str(folder), str(folder / "lora.safetensors"))
        assert found["changed_by_fuse"] == 8 * 7
        assert found["total"] == found["load"] + found["fuse"] + found["unfuse"]
        if library == "kolors_core":
            assert found["changed_by_unfuse"] == 0


def test_a_process_is_measured_from_outside(tmp_path: Path) -> None:
    out = tmp_path / "written"
    program = f"""
import json, time
kept = b"x" * (200 << 20)
while time.process_time() < 0.2: pass
open({str(out)!r}, "w")
print("loading")
print(json.dumps({{"stage": 3}}))
"""
    found = fresh([sys.executable, "-c", program], threads=1, out=out)()
    assert found["stage"] == 3
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert 0.19 < found["peak_gib"] < 0.3 + own
    assert 0.2 <= found["cpu_seconds"] < 2 and found["seconds"] > 0.15
    with pytest.raises(subprocess.CalledProcessError):
        fresh([sys.executable, "-c", "raise SystemExit(3)"], threads=1)()
    with pytest.raises(subprocess.CalledProcessError):  # an image of an earlier run does not count
        fresh([sys.executable, "-c", ""], threads=1, out=out)()


def test_images_are_so_many_decibels_apart(tmp_path: Path) -> None:
    for name, value in {"a": 100, "b": 101}.items():
        Image.new("RGB", (8, 8), (value, value, value)).save(tmp_path / f"{name}.png")
    assert psnr(tmp_path / "a.png", tmp_path / "b.png") == pytest.approx(48.13, abs=0.01)


def test_a_scratch_folder_is_used_again_and_no_other_is_written_to(tmp_path: Path) -> None:
    options = argparse.Namespace(files="bfloat16", small=True, tokenizer=EMBEDDED / "tokenizer")
    layers = prepare(tmp_path / "new", options)
    before = (tmp_path / "new" / "lora.safetensors").stat().st_mtime_ns
    assert prepare(tmp_path / "new", options) == layers
    assert (tmp_path / "new" / "lora.safetensors").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="holds .*bfloat16.*, not .*float16"):
        prepare(tmp_path / "new", argparse.Namespace(**vars(options) | {"files": "float16"}))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "letter.txt").write_text("dear")
    with pytest.raises(SystemExit, match="is not empty"):
        prepare(tmp_path / "theirs", options)
    assert set(DTYPES) == {"float16", "bfloat16"}


def test_the_readme_shows_what_was_measured() -> None:
    rows = read(RESULTS)
    assert front(rows) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert table(rows) in (RESULTS / "README.md").read_text(encoding="utf-8")


def test_the_tables_leave_out_what_was_not_measured(tmp_path: Path) -> None:
    row = json.loads((RESULTS / "unet_step.json").read_text(encoding="utf-8"))
    (tmp_path / "unet_step.json").write_text(json.dumps(row | {"is_rehearsal": True}))
    (tmp_path / "whole.json").write_text((RESULTS / "whole.json").read_text(encoding="utf-8"))
    rows = read(tmp_path)
    assert "UNet step" not in front(rows) and "whole Kolors" in front(rows)
    assert "| not measured |" in table(rows)
