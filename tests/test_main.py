"""The command: its light door, help, suggestions, completion, and what goes to which stream."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kolors_core.__main__ import COMMANDS, HELP, main
from kolors_core.config import VERSION
from tests.support.processes import COMMAND, run_program

ROOT = Path(__file__).parents[1]
LIGHT = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numpy", "PIL", "safetensors"):
            raise ImportError(name + " imported")
sys.meta_path.insert(0, Refuse())
sys.argv[0] = "kolors"
runpy.run_module("kolors_core", run_name="__main__", alter_sys=False)
"""


def light(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command where importing torch fails."""
    command = [sys.executable, "-c", LIGHT, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"COLUMNS": "100"} | environment
    )


def test_the_version_is_there_at_once() -> None:
    """In under 0.2 s on a machine that is not busy, which this test does not ask for."""
    assert (run := light("--version")).stdout == f"kolors_core {VERSION}\n", run.stderr
    start = time.process_time()
    main(["--version"])
    assert time.process_time() - start < 0.01


def test_help_is_one_screen_and_has_an_example_for_each_command() -> None:
    assert light("--help").stdout == light("-h").stdout == HELP
    assert len(HELP.splitlines()) <= 40 and max(map(len, HELP.splitlines())) <= 100
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", HELP, re.MULTILINE), name
        example = "kolors" if name == "draw" else f"kolors {name}"
        assert re.search(rf"^ {{17}}{example} ", HELP, re.MULTILINE), name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_is_short_and_imports_nothing_heavy(name: str) -> None:
    """Those of `train-lora` and `convert` have the library's own defaults, and import torch."""
    is_light = name not in ("train-lora", "convert")
    wide = os.environ | {"COLUMNS": "100"}
    run = light(name, "--help") if is_light else run_program(COMMAND, name, "--help", env=wide)
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and "Example: " in run.stdout, run.stderr
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 40 or name == "draw"
    if name == "draw":
        groups = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
        assert len(groups) == 8, groups


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a cat", "--stpes", "3"], "unknown flag '--stpes', did you mean --steps?"),
        (["explain", "a cat", "--image", "a.png"], "unknown flag '--image'\n"),
        (["a cat", "--sampler", "eulr"], "--sampler/--scheduler: unknown 'eulr', did you mean euler?"),
        (["a cat", "--sampler", "x"], "unknown 'x', expected one of euler, euler-karras"),
        (["explian", "a cat"], "got 'explian' and 'a cat', did you mean explain?"),
        (["batc", "prompts.txt", "OUT"], "did you mean batch?"),
        (["a", "red", "car"], "got 'a' and 'red': put a prompt of several words in quotes"),
        (["batch", "prompts.txt", "OUT", "--guidence", "3"], "did you mean --guidance?"),
        (["a cat", "--steps", "1e3"], "-steps: expected a whole number, got '1e3'"),
        (["a cat", "--steps", "3", "cat"], "unknown argument 'cat'"),
        (["a cat", "-g", "nan"], "--guidance: expected a number, got 'nan'"),
        (["a cat", "--strength", "inf"], "--strength: expected a number, got 'inf'"),
        (["a cat", "--sigmas", "3,nan"], "--sigmas: expected a number, got 'nan'"),
        (["a cat", "--crop", "3"], "--crop: expected two whole numbers, got '3'"),
        (["a cat", "--seed", "9" * 5000], "--seed: expected a whole number, got '999"),
        (
            ["batch", "prompts.txt", "OUT", "--height", "1_0"],
            "--height: expected a whole number, got '1_0'",
        ),
        (["info"], "the following arguments are required: FILE"),
        ([], "no prompt: say what to draw, or kolors --help"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_imported(arguments: list[str], message: str) -> None:
    run = light(*arguments)
    assert run.returncode == 2 and message in run.stderr, run.stderr
    assert run.stdout == "" and len(run.stderr.splitlines()) == 1 and run.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train-lora", "images"], "the following arguments are required: WORD"),
        (["convert", "a", "b", "--to", "x"], "--to: invalid choice: 'x'"),
        (["convert", "a"], "the following arguments are required: DST"),
    ],
)
def test_what_is_wrong_is_one_line_also_where_torch_is_imported(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1


def complete(line: str, tmp_path: Path) -> list[str]:
    out = tmp_path / "completions"
    run = light(
        _ARGCOMPLETE="1", COMP_LINE=line, COMP_POINT=str(len(line)), _ARGCOMPLETE_IFS="\n",
        _ARGCOMPLETE_STDOUT_FILENAME=str(out), COMP_TYPE="9",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [word.strip() for word in out.read_text().split("\n")]


def test_completion(tmp_path: Path) -> None:
    pytest.importorskip("argcomplete", reason="argcomplete is an extra")
    assert complete("kolors ba", tmp_path) == ["batch"]
    assert complete("kolors batch prompts.txt OUT --spl", tmp_path) == ["--split-guidance"]
    assert complete("kolors 'a cat' --sampler eu", tmp_path) == ["euler", "euler-karras", "euler-ancestral"]


def test_without_argcomplete_nothing_is_lost() -> None:
    blocked = LIGHT.replace('("torch",', '("argcomplete", "torch",')
    environment = os.environ | {"_ARGCOMPLETE": "1", "COMP_LINE": "kolors "}
    command = [sys.executable, "-c", blocked, "--version"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.stdout == f"kolors_core {VERSION}\n", run.stderr


def test_a_png_on_standard_output_is_all_that_is_there(tmp_path: Path) -> None:
    small = ["--steps", "1", "--height", "64", "--width", "64", "--seed", "3", "--device", "cpu"]
    command = [sys.executable, "-m", "kolors_core", "draw", "a cat", *small]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([*command, "-o", "-"], capture_output=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0 and b"seed 3" in run.stderr and list(tmp_path.iterdir()) == []
    assert main(["a cat", *small, "-q", "-o", str(tmp_path / "cat.png")]) == 0
    assert run.stdout == (tmp_path / "cat.png").read_bytes()


def test_a_reader_that_has_gone_is_no_error() -> None:
    """As `head` is after ten lines."""
    gone = "import os; read, write = os.pipe(); os.close(read); os.dup2(write, 1); os.close(write)"
    run = run_program(f"{gone}\n{COMMAND}", "--concepts")
    assert (run.returncode, run.stderr) == (141, "")


def test_ctrl_c_is_one_line_and_130(tmp_path: Path) -> None:
    """While modules are imported, and while an image is drawn."""
    command = [sys.executable, "-m", "kolors_core", "a cat", "--steps", "900", "-o", str(tmp_path / "x.png")]
    for moment in (0.4, None):
        process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a job behind `&`
        )
        assert process.stderr is not None
        seen = b""
        if moment is not None:
            time.sleep(moment)
        while moment is None and b"/900" not in seen:
            seen += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130, error
        assert b"Traceback" not in error and error.splitlines()[-1].startswith(b"interrupted")
        assert moment is not None or error.endswith(b"interrupted, nothing written\n")
    assert list(tmp_path.iterdir()) == []
