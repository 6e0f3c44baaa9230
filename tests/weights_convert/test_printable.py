"""Texts from files never control the terminal: escapes, returns and bidirectional overrides are escaped."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kolors_core.batch.__main__ import main as batch
from kolors_core.checkpoint import EMBEDDED, logger
from kolors_core.cli.generate import main
from kolors_core.pipelines.png_metadata import attach_metadata, save_png
from kolors_core.tokenizer import Tokenizer
from tests.support.images import noise_image
from weights_convert.__main__ import main as convert
from weights_convert.untrusted_files import one_line, printable

HOSTILE = "a\x1b[31mb\rc\x9b2Jd\u202ee\u2066f\x00g\ud800h\u2028i"
SAFE = r"a\x1b[31mb\rc\x9b2Jd\u202ee\u2066f\x00g\ud800h\u2028i"
CONTROLS = [char for char in HOSTILE if not char.isprintable()]


def assert_clean(text: str) -> None:
    assert not [char for char in CONTROLS if char in text], ascii(text)


def test_what_controls_a_terminal_is_escaped_and_letters_stay() -> None:
    assert printable(HOSTILE) == SAFE
    text = "一张瓢虫的照片，微距　宽 空格 naïve 👩\u200d🚀 ❤️ \u00a0 'quoted' \\"
    assert printable(text) == text
    assert one_line(ValueError(HOSTILE)) == SAFE.replace(r"\r", " ").replace(r"\u2028", " ")
    assert printable(Path("x\n")) == r"x\n"


def test_no_metadata_of_an_image_control_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    image, text = noise_image(), HOSTILE.replace("\ud800", "").replace("\x00", "")
    attach_metadata(image, {"prompt": text, "seed\x1b]0;x\x07": "1"})
    save_png(image, tmp_path / "x.png")
    assert main(["--info", str(tmp_path / "x.png")]) == 0
    out = capsys.readouterr().out
    assert_clean(out)
    assert r"prompt: a\x1b[31mb" in out and len(out.splitlines()) == 2


def test_no_error_controls_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Names of files on the command line, of tensors in a file, texts of a batch's lines."""
    name = "\x1b[2J\u202ex"
    assert main(["cat", "-w", str(tmp_path / name), "-o", str(tmp_path / "x.png")]) == 2
    assert main(["--info", str(tmp_path / f"{name}.png")]) == 2
    assert convert([str(tmp_path / name), str(tmp_path / "y")]) == 2
    (tmp_path / f"{name}.safetensors").write_bytes(b"")
    assert convert([str(tmp_path / f"{name}.safetensors"), str(tmp_path / "y")]) == 2
    save_file({"\x1b[31m.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    lora = ["--lora", str(tmp_path / "lora.safetensors"), "--steps", "1", "-o", str(tmp_path / "x.png")]
    assert main(["cat", *lora]) == 2
    lines = '{"prompt": "cat", "x\\u001b[31m": 1}\n{"prompt": 3}\n{"lora": "\\u202e"}\n\x1b[2J\n'
    (tmp_path / f"{name}.jsonl").write_text(lines)
    assert batch([str(tmp_path / f"{name}.jsonl"), str(tmp_path / "out"), "--device", "cpu"]) == 1
    err = capsys.readouterr().err.replace("\r", "")  # of the progress bar
    assert_clean(err)
    assert r"\x1b[2J\u202ex" in err and err.count("error: ") == 5 and err.count("line 4 failed") == 1


def test_no_log_line_has_controls_of_a_prompt_or_file(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Tokenizer(EMBEDDED / "tokenizer")(["a " * 300 + HOSTILE.replace("\ud800", "")], 16)
    logger.warning("%s has %d faults", HOSTILE, 3)
    assert len(caplog.records) == 2
    for record in caplog.records:
        assert_clean(record.getMessage())
