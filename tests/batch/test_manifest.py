"""What lies in OUT never stops or blocks a batch, nor is anybody's own file lost; prompts are kept."""

import json
import os
import resource
from pathlib import Path

import pytest

from kolors_core.__main__ import main

SMALL = ["--height", "64", "--width", "64", "--steps", "1", "--device", "cpu"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    return tmp_path / "p.txt"


def run(prompts: Path, *more: str) -> int:
    return main(["batch", str(prompts), str(prompts.parent / "out"), *SMALL, *more])


def records(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def test_the_manifest_keeps_prompts_and_settings(prompts: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(prompts, "-n", "frog", "-g", "3", "--seed", "5") == 0
    out = prompts.parent / "out"
    said = capsys.readouterr()
    assert said.out == f"{out}/000001-6.png\n{out}/000002-7.png\n", "what was written, and nothing else"
    assert "2/2" in said.err and "image/s" in said.err and "2 of 2 images are in" in said.err
    first = records(out)[0]
    expected = {"prompt": "a cat", "negative_prompt": "frog", "seed": 6, "steps": 1, "guidance": 3.0,
                "height": 64, "width": 64, "lora": [], "lora_partial": False, "status": "done"}  # fmt: skip
    assert expected.items() <= first.items()
    assert run(prompts, "-n", "frog", "-g", "3", "--seed", "5", "-q") == 0
    assert capsys.readouterr() == ("", ""), "nothing is written, and nothing said"


@pytest.mark.parametrize("kind", ["fifo", "folder", "broken", "link"])
def test_what_is_no_image_fails_its_line_alone(
    kind: str, prompts: Path, capsys: pytest.CaptureFixture
) -> None:
    out = prompts.parent / "out"
    place = out / "000001-1.png"
    out.mkdir()
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind == "broken":
        place.write_bytes(b"\0\0\0\x1cftypavif\0\0\0\0avif" + b"\xff" * 99)
    else:
        place.symlink_to(prompts.parent / "nowhere")
    before = place.lstat()
    assert run(prompts) == 1
    error = capsys.readouterr().err
    assert "1 of 2 images" in error and "line 1 failed: 000001-1.png exists" in error
    assert place.lstat() == before and [record["status"] for record in records(out)] == ["failed", "done"]
    assert run(prompts, "--force", "-q") == (1 if kind == "folder" else 0), "a folder is not overwritten"
    assert not (prompts.parent / "nowhere").exists()


@pytest.mark.parametrize("name", ["manifest.jsonl", ".claims"])
@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_a_manifest_that_is_no_file_is_refused(
    name: str, kind: str, prompts: Path, capsys: pytest.CaptureFixture
) -> None:
    out = prompts.parent / "out"
    out.mkdir()
    os.mkfifo(out / name) if kind == "fifo" else (out / name).mkdir()
    assert run(prompts) == 2
    assert f"error: {out}/{name}: expected a file, got a folder" in capsys.readouterr().err


def test_a_full_disk_names_the_files_of_out(prompts: Path, capsys: pytest.CaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, name in ((2000, "000001-1.png"), (100, "manifest.jsonl")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            assert run(prompts, "-q") in (1, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        error = capsys.readouterr().err + (prompts.parent / "out" / "manifest.jsonl").read_text()
        assert f"{name}" in error and "cannot be written" in error and ".partial" not in error


def test_scratch_of_the_dead_is_swept(prompts: Path) -> None:
    out = prompts.parent / "out"
    stale = out / f".other.png.{0:016x}.partial"
    stale.mkdir(parents=True)
    assert run(prompts, "-q") == 0 and not stale.exists()


def test_a_second_file_of_prompts_does_not_mix(prompts: Path, capsys: pytest.CaptureFixture) -> None:
    """Nothing of it is drawn, under whatever names; test_worker.py has what differs."""
    assert run(prompts, "-q") == 0
    (prompts.parent / "q.txt").write_text("a frog\na dog\na bird\n")
    capsys.readouterr()
    assert run(prompts.parent / "q.txt", "--seed", "100", "-q") == 2
    error = capsys.readouterr().err
    assert "line 1 has prompt 'a frog', and there 'a cat'" in error and len(error.splitlines()) == 1
    assert len(list((prompts.parent / "out").glob("*.png"))) == 2
