"""Files of prompts: text, defaults of the command, and bounds before memory."""

import json
import os
import time
from pathlib import Path

import pytest

from kolors_core.batch import prompt_file
from kolors_core.batch.__main__ import main
from kolors_core.batch.prompt_file import png_fingerprint, read_jobs

STEPS = {"steps": 25}


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text('a cat\r\n\n  一张瓢虫的照片 \n{"prompt": 5}\n', encoding="utf-8-sig")
    jobs = read_jobs(tmp_path / "p.txt", {}, 0, STEPS)
    assert [(job.number, job.settings and job.settings.prompt) for job in jobs] == [
        (1, "a cat"), (3, "一张瓢虫的照片"), (4, '{"prompt": 5}'),
    ]  # fmt: skip
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat"}')
    assert read_jobs(tmp_path / "p.jsonl", {}, 0, STEPS)[0].fingerprint == jobs[0].fingerprint


def test_defaults_are_for_lines_without_their_own(tmp_path: Path) -> None:
    defaults = {"steps": 7, "guidance": 3.0, "negative_prompt": "dog", "height": 64, "lora_partial": True}
    lines = [{"prompt": "a"}, {"prompt": "a", "steps": 9, "guidance": 1, "negative_prompt": "", "height": 72}]
    (tmp_path / "p.jsonl").write_text(
        "\n".join(map(json.dumps, [*lines, lines[0] | {"lora_partial": False}]))
    )
    first, second, third = (job.settings for job in read_jobs(tmp_path / "p.jsonl", {}, 0, defaults))
    assert first and second and third
    assert (first.steps, first.guidance, first.negative_prompt, first.height) == (7, 3.0, "dog", 64)
    assert (second.steps, second.guidance, second.negative_prompt, second.height) == (9, 1.0, "", 72)
    assert (first.lora_partial, third.lora_partial) == (True, False)


def test_a_fingerprint_is_that_of_earlier_versions(tmp_path: Path) -> None:
    """What is new and unset is no part of it: a batch of an earlier version resumes."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat"}')
    [job] = read_jobs(tmp_path / "p.jsonl", {"weights": "tiny"}, 0, STEPS)
    assert job.fingerprint == "519159e748f32c63b02ed5358748906b"


BAD = [
    ('{"prompt": "a", "lora_partial": 1}', "lora_partial must be true or false, got 1"),
    ('{"prompt": "a", "guidance": Infinity}', "guidance must be a number, got inf"),
    ('{"prompt": "a", "steps": NaN}', "steps must be a positive whole number, got nan"),
    ('{"prompt": "a", "seed": 1, "seed": 1}', "'seed' is given twice"),
    ('{"prompt": "' + "a" * 2**20 + '"}', "1,048,590 characters, expected at most 1,048,576"),
]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_lines_that_are_refused(kind: str, tmp_path: Path) -> None:
    if kind == "jsonl":
        (tmp_path / "p.jsonl").write_text("\n".join(text for text, _ in BAD))
        found = [job.reason for job in read_jobs(tmp_path / "p.jsonl", {}, 0, STEPS)]
        assert [reason for _, reason in BAD] == found
        return
    (tmp_path / "p.csv").write_text("prompt,guidance,lora_partial\na,nan,\na,inf,\na,,yes\na,,true\n")
    jobs = read_jobs(tmp_path / "p.csv", {}, 0, STEPS)
    assert [job.reason for job in jobs] == [
        "guidance must be a number, got nan", "guidance must be a number, got inf",
        "lora_partial must be true or false, got 'yes'", None,
    ]  # fmt: skip


def test_a_file_is_bounded_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = tmp_path / "huge.jsonl"
    with huge.open("wb") as file:
        file.truncate(2**42)  # sparse
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"huge.jsonl: expected at most 134,217,728 bytes; split it"):
        read_jobs(huge, {}, 0, STEPS)
    assert time.monotonic() - start < 1
    huge.write_bytes(b"\n" * (2**20 + 1))
    with pytest.raises(ValueError, match="1,048,577 lines, expected at most 1,048,576"):
        read_jobs(huge, {}, 0, STEPS)
    assert prompt_file.MAX_LINE_CHARACTERS < prompt_file.MAX_FILE_BYTES


def test_a_fifo_is_no_file_of_prompts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    os.mkfifo(tmp_path / "p.jsonl")
    assert main([str(tmp_path / "p.jsonl"), str(tmp_path / "out"), "-q"]) == 2
    assert "p.jsonl: expected a file of prompts, got a folder, FIFO" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"", b"mine", b"\0\0\0\x1cftypavif\0\0\0\0avif" + b"\xff" * 99, b"GIF89a\xff\xff"]
)
def test_an_image_that_is_none_has_no_fingerprint(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(content)
    assert png_fingerprint(tmp_path / "x.png") == ""
    (tmp_path / "x.png").unlink()
    assert png_fingerprint(tmp_path / "x.png") is None
    (tmp_path / "x.png").symlink_to(tmp_path / "nowhere")
    assert png_fingerprint(tmp_path / "x.png") == ""
