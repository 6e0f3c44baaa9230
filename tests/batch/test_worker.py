"""Many images: alone, in company or killed, each line's image is the same bits; bad lines fail alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kolors_core.batch.__main__ import main, parser
from kolors_core.batch.prompt_file import png_fingerprint, read_jobs
from kolors_core.batch.worker import Worker
from kolors_core.cli.generate import main as draw_one
from kolors_core.pipelines.png_metadata import read_metadata
from tests.support.batch_worker import draw_unlike, measure_split
from tests.support.loras import write_noisy
from tests.support.two_processes import start_two

ROOT = Path(__file__).parents[2]
SMALL = {"height": 64, "width": 64, "steps": 5}
STEPS = {"steps": 25}
COUNT = 16


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that shows."""
    return write_noisy(tmp_path_factory.mktemp("lora") / "noisy.safetensors")


@pytest.fixture(scope="module")
def prompts(lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines with everything in them: LoRAs, sizes, seeds or none, negative prompts, no guidance."""
    lines: list[dict[str, Any]] = [SMALL | {"prompt": f"a photo of {i} apples"} for i in range(COUNT)]
    lines[1] |= {"seed": 7, "negative_prompt": "cat", "guidance": 6.5, "lora": f"{lora}:0.5"}
    lines[2] |= {"prompt": "一张瓢虫的照片", "seed": 2**62, "width": 72}
    lines[4] |= {"lora": [str(lora)], "seed": 7}
    lines[5] |= {"guidance": 1, "seed": 7}
    return write(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", lines)


def write(file: Path, lines: Sequence[Any]) -> Path:
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def undisturbed(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of one process that nobody kills."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main([str(prompts), str(out), "--device", "cpu", "-q"]) == 0
    return out


def records(out: Path) -> list[dict[str, Any]]:
    file = out / "manifest.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def assert_same(out: Path, expected: Path) -> None:
    """The same files with the same bytes, nothing else, and one record for each line."""
    files = {file.name: file.read_bytes() for file in out.iterdir() if file.name != "manifest.jsonl"}
    wanted = {file.name: file.read_bytes() for file in expected.iterdir() if file.name != "manifest.jsonl"}
    locks = files.pop(".claims"), wanted.pop(".claims")
    assert files.keys() == wanted.keys() and len(files) == COUNT
    assert not [name for name in files if files[name] != wanted[name]]
    assert not any(locks[0]), "no job is running"
    assert [record["line"] for record in records(out)] == list(range(1, COUNT + 1))
    assert {record["status"] for record in records(out)} == {"done"}


def wait_for_records(out: Path, count: int) -> None:
    end = time.monotonic() + 60
    while len(records(out)) < count:
        assert time.monotonic() < end, "nothing is drawn"
        time.sleep(0.01)


def test_names_manifest_and_fingerprints(
    undisturbed: Path, prompts: Path, capsys: pytest.CaptureFixture
) -> None:
    told = records(undisturbed)
    assert [record["line"] for record in told] == list(range(1, COUNT + 1))
    assert (told[1]["file"], told[1]["seed"], told[1]["status"]) == ("000002-7.png", 7, "done")
    assert told[0]["file"] == "000001-1.png", "without a seed, the line's number"
    assert told[2]["file"] == f"000003-{2**62}.png" and told[2]["reason"] is None
    assert all(record["seconds"] > 0 and record["process"].startswith("0 of 1, ") for record in told)
    assert all(png_fingerprint(undisturbed / record["file"]) == record["fingerprint"] for record in told)
    before = {file: file.stat().st_mtime_ns for file in undisturbed.glob("*.png")}
    assert main([str(prompts), str(undisturbed), "--device", "cpu"]) == 0
    assert f"{COUNT} of {COUNT} images are in" in capsys.readouterr().err
    assert before == {file: file.stat().st_mtime_ns for file in undisturbed.glob("*.png")}
    assert records(undisturbed) == told, "nothing is drawn again or forgotten"


def test_a_picture_is_the_command_lines_own(undisturbed: Path, lora: Path, tmp_path: Path) -> None:
    """Same seed, same bits, alone or in a batch; of the two that follow, one has a LoRA and one has none."""
    size = ["--height", "64", "--width", "64", "--steps", "5", "--device", "cpu", "-q", "-o"]
    first = ["a photo of 1 apples", "--seed", "7", "-n", "cat", "-g", "6.5", "--lora", f"{lora}:0.5"]
    assert draw_one([*first, *size, str(tmp_path / "2.png")]) == 0
    assert draw_one(["a photo of 3 apples", "--seed", "4", *size, str(tmp_path / "4.png")]) == 0
    for mine, other in (("000002-7", "2"), ("000004-4", "4")):
        mine, other = undisturbed / f"{mine}.png", tmp_path / f"{other}.png"
        assert np.array_equal(np.asarray(Image.open(mine)), np.asarray(Image.open(other)))
        told = read_metadata(mine)
        assert len(told.pop("batch_line")) == 32 and told == read_metadata(other)


def test_who_is_killed_is_replaced_by_the_other(prompts: Path, undisturbed: Path, tmp_path: Path) -> None:
    """At random moments: both; then, of two others, the one that the other has joined. That goes on alone."""
    out, log = tmp_path / "out", tmp_path / "log.txt"
    for victims in ([0, 1], [0]):
        before = len(records(out))
        processes = start_two(main, log, [str(prompts), str(out), "--device", "cpu"])
        wait_for_records(out, before + 1)
        time.sleep(random.uniform(0, 0.1))
        for victim in victims:
            processes[victim].kill()
            processes[victim].join()
            assert processes[victim].exitcode == -signal.SIGKILL
    processes[1].join(60)
    assert processes[1].exitcode == 0, log.read_text()
    assert f"{COUNT} of {COUNT} images" in log.read_text()
    assert_same(out, undisturbed)


def test_a_rerun_finishes_what_was_killed(prompts: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Under torchrun; with what a killed process, or a power cut, can leave behind."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "kolors_core.batch", str(prompts), str(tmp_path), "--device", "cpu", "-q"]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as run:
        wait_for_records(tmp_path, 2)
        workers = {record["process"].split()[-1] for record in records(tmp_path)}
        os.kill(int(workers.pop()), signal.SIGKILL)
        assert run.wait(timeout=60) != 0
    drawn = [record["file"] for record in records(tmp_path)]
    assert len(drawn) >= 2
    whole = (tmp_path / drawn[0]).read_bytes()
    (tmp_path / drawn[0]).write_bytes(whole[:-20])
    (tmp_path / f".{drawn[1]}.0a1b2c3d0a1b2c3d.partial").write_bytes(whole[:100])
    with (tmp_path / "manifest.jsonl").open("a") as manifest:
        manifest.write("[" * 100_000 + '\n{"line": true, "status": "failed"}\n{"line": 3, "fi')
    assert main([str(prompts), str(tmp_path), "--device", "cpu", "-q"]) == 0
    assert_same(tmp_path, undisturbed)


def test_guidance_split_over_two(prompts: Path, undisturbed: Path, lora: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in prompts.read_text().splitlines()[:6]]
    few = write(tmp_path / "few.jsonl", [*lines, SMALL | {"prompt": "cat", "lora": "no.safetensors"}])
    command = [str(few), str(tmp_path / "out"), "--device", "cpu", "--split-guidance"]
    log = tmp_path / "log.txt"
    for process in start_two(measure_split, log, tmp_path / "errors.txt", command):
        process.join(60)
        assert process.exitcode == 1, log.read_text()
    errors = [float(text) for text in (tmp_path / "errors.txt").read_text().split()]
    assert errors[0] < 1e-10 and errors[1] < 5e-6, errors
    told = records(tmp_path / "out")
    assert [record["status"] for record in told] == ["done"] * 6 + ["failed"]
    assert "no.safetensors" in told[6]["reason"]
    for record in told[:6]:
        split, whole = (np.asarray(Image.open(f / record["file"])) for f in (tmp_path / "out", undisturbed))
        assert abs(split.astype(int) - whole.astype(int)).max() <= 1


def test_processes_that_are_told_different_things(prompts: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Other lines are refused; what only rounds otherwise is said."""
    one, log = write(tmp_path / "one.jsonl", [SMALL | {"prompt": "cat"}]), tmp_path / "log.txt"
    commands = [[str(file), str(undisturbed), "--device", "cpu"] for file in (prompts, one)]
    for process in start_two(draw_unlike, log, *commands):
        process.join(60)
        assert process.exitcode == 2, log.read_text()
    assert "error: process 1 has other lines than process 0" in log.read_text()
    for process in start_two(draw_unlike, log, commands[0], ["no.jsonl", *commands[0][1:]]):
        process.join(60)
        assert process.exitcode == 2, log.read_text()
    assert "error: another process of this run is gone" in log.read_text()
    for process in start_two(draw_unlike, log, commands[0]):
        process.join(60)
        assert process.exitcode == 0, log.read_text()
    assert "cpu, 1 threads; torch" in log.read_text() and "cpu, 2 threads" in log.read_text()


BAD = [
    ("{", "not JSON: Expecting property name"),
    ("5", "expected an object with the fields prompt, negative_prompt, seed"),
    ('{"prompt": "cat", "stepz": 3}', "unknown field 'stepz', expected some of prompt"),
    ('{"prompt": 5}', "prompt must be a string, got 5"),
    ('{"seed": 5}', "no prompt: say what to draw"),
    ('{"prompt": "a", "prompt": "b"}', "'prompt' is given twice"),
    ('{"prompt": "a", "height": 100}', "height must be a positive multiple of 8, got 100"),
    ('{"prompt": "a", "width": "64"}', "width must be a positive multiple of 8, got '64'"),
    ('{"prompt": "a", "seed": -1}', "seed must be a whole number from 0 to"),
    ('{"prompt": "a", "seed": 1.5}', f"seed must be a whole number from 0 to {2**63 - 1}, got 1.5"),
    ('{"prompt": "a", "guidance": NaN}', "guidance must be a number, got nan"),
    ('{"prompt": "a", "lora": [3]}', "lora must be FROM[:SCALE] or a list of them, got [3]"),
    ('{"prompt": "\\ud800"}', "prompt is not UTF-8"),
    ("[" * 100000, "recursion"),
    ('{"prompt": "a", "guidance": 1' + "0" * 400 + "}", "guidance must be a number, got 1000"),
    (json.dumps({f"k{i}": "b" for i in range(50_000)}), "unknown field 'k0'"),
    (json.dumps({"prompt": ["a" * 10**6]}), "prompt must be a string, got ['aaa"),
]


def test_bad_lines_say_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("\n\n".join(["", *(text for text, _ in BAD)]))
    lines = read_jobs(tmp_path / "bad.jsonl", {}, 0, STEPS)
    assert [line.number for line in lines] == [3 + 2 * i for i in range(len(BAD))]
    for line, (text, reason) in zip(lines, BAD, strict=True):
        assert line.settings is None and reason in (line.reason or ""), text[:50]
        assert len(line.reason or "") <= 300
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    assert "prompt is not UTF-8" in str(read_jobs(tmp_path / "latin.jsonl", {}, 0, STEPS)[0].reason)


def test_a_bad_line_fails_alone_and_is_tried_again(
    tmp_path: Path, lora: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = [SMALL | {"prompt": "cat", "lora": str(tmp_path / "later.safetensors")}, {"prompt": 5},
             SMALL | {"prompt": "cat"}, SMALL | {"prompt": "cat", "steps": 2000}]  # fmt: skip
    command = [str(write(tmp_path / "p.jsonl", lines)), str(tmp_path / "out"), "--device", "cpu"]
    assert main(command) == 1
    told = records(tmp_path / "out")
    assert [record["status"] for record in told] == ["failed", "failed", "done", "failed"]
    assert (
        "later.safetensors" in told[0]["reason"] and "2000" in told[3]["reason"] and told[0]["file"] is None
    )
    said = capsys.readouterr().err
    assert "line 2 failed: prompt must be a string, got 5" in said and "1 of 4 images" in said
    (tmp_path / "later.safetensors").write_bytes(lora.read_bytes())
    assert main([*command, "-q"]) == 1
    assert [record["status"] for record in records(tmp_path / "out")] == ["done", "failed", "done", "failed"]


def test_a_changed_line_is_refused_or_drawn_under_its_own_name(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, file = tmp_path / "out", tmp_path / "p.jsonl"

    def run(*prompts: str | int, more: Sequence[str] = (), **changes: Any) -> int:
        write(file, [SMALL | {"prompt": prompt, "seed": 3} | changes for prompt in prompts])
        return main([str(file), str(out), "--device", "cpu", *more])

    def error() -> str:
        return capsys.readouterr().err

    assert run("cat", "dog") == 0
    first, second = ((out / f"{name}-3.png").read_bytes() for name in ("000001", "000002"))
    assert run("cat", "frog") == 2 and "line 2 has prompt 'frog', and there 'dog'" in error()
    assert run("cat", 5) == 2 and "line 2 was drawn, and is wrong now: prompt must be a string" in error()
    assert run("cat", "dog", seed=4) == 2 and "line 1 has seed 4, and there 3" in error()
    assert run("cat", "dog", more=["--sampler", "euler"]) == 2, "other options are other images"
    assert "line 1 was drawn with another model or other options" in error()
    assert run("cat", "dog", "bird") == 0 and run("cat") == 0, "a file that grows, or ends before"
    assert "2 more are of no line of this file" in error()
    assert (out / "000002-3.png").read_bytes() == second and not (out / "000001-4.png").exists()
    assert run("cat", "frog", more=["--force"]) == 0
    assert (out / "000001-3.png").read_bytes() == first and (out / "000002-3.png").read_bytes() != second
    (out / "000002-3.png").unlink()
    assert run("cat", "dog") == 0, "what was removed is drawn again"
    (out / "000004-9.png").write_bytes(b"mine")
    assert run("cat", "dog", "bird", "own") == 0
    (out / "manifest.jsonl").unlink()
    assert run("cat", "frog") == 1 and "line 2 failed: 000002-3.png exists" in error()


def test_what_another_run_says_of_its_own_line_is_not_believed(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Two runs with other lines in one OUT: the second is refused, whatever the first writes last."""
    first, second = (
        [str(write(tmp_path / f"{name}.jsonl", [SMALL | {"prompt": name, "seed": 3}])), str(tmp_path / "out")]
        for name in "ab"
    )
    assert main([*first, "--device", "cpu", "-q"]) == 0
    worker = Worker(parser().parse_args([*second, "--device", "cpu"]), torch.device("cpu"))
    worker._run_leader()
    assert main([*first, "--device", "cpu", "-q"]) == 0 and records(tmp_path / "out")[0]["status"] == "done"
    worker.manifest.refresh()
    assert worker._has_failed(worker.jobs[0])
    worker._finish(worker.jobs)
    worker.locks.close()
    said = capsys.readouterr().err
    assert "0 of 1 images" in said and "line 1 failed: another run on this OUT has a line" in said


def test_csv_says_the_same(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(
        "prompt,seed,lora,guidance,height,negative_prompt\n"
        '"two\nlines, and a comma",3,a.safetensors:0.5; b,2.5,64,\n'
        "cat,,,,,dog\n,1,,,,\ncat,x,,,,\ncat,1,,,,,,,\n",
        encoding="utf-8-sig",
    )
    write(tmp_path / "p.jsonl", [
        {"prompt": "two\nlines, and a comma", "seed": 3, "lora": ["a.safetensors:0.5", "b"], "guidance": 2.5,
         "height": 64}, {"prompt": "cat", "negative_prompt": "dog", "seed": 4},
    ])  # fmt: skip
    rows, lines = (read_jobs(tmp_path / name, {}, 0, STEPS) for name in ("p.csv", "p.jsonl"))
    assert [row.settings for row in rows[:2]] == [line.settings for line in lines]
    assert [row.fingerprint for row in rows[:2]] == [line.fingerprint for line in lines]
    assert [row.number for row in rows] == [2, 4, 5, 6, 7], "as an editor shows them"
    reasons = ("no prompt", "seed must be a whole number from 0", "9 cells, and the first row names 6")
    assert all(reason in str(row.reason) for row, reason in zip(rows[2:], reasons, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.jsonl", "out"], "no.jsonl"),
        (["empty.jsonl", "out"], "no lines"),
        (["bad.csv", "out"], "the first row has the name 'promt'"),
        (["torn.csv", "out"], "torn.csv: the first row is not CSV: unexpected end of data"),
        (["good.jsonl", "out", "-w", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["good.jsonl", "out", "--device", "toaster"], "expected a device of this machine"),
        (["good.jsonl", "out", "--seed", "-1"], "--seed must be a whole number from 0"),
        (["good.jsonl", "out", "--steps", "-3"], "--steps must be a positive whole number, got -3"),
        (["good.jsonl", "out", "--width", "100"], "--width must be a positive multiple of 8, got 100"),
        (
            ["good.jsonl", "out", "--split-guidance"],
            "--split-guidance needs an even number of processes, got 1",
        ),
        (["good.jsonl", "good.jsonl"], "good.jsonl"),
    ],
)
def test_what_cannot_begin_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("\n")
    Path("bad.csv").write_text("promt\ncat\n")
    Path("torn.csv").write_text('"prompt\ncat\n')
    Path("good.jsonl").write_text('{"prompt": "cat"}')
    assert main([*arguments, "-q"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1


def test_a_process_whose_torchrun_is_gone_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    told = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in (told | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    assert main([str(write(tmp_path / "p.jsonl", [{"prompt": "cat"}])), str(tmp_path / "out")]) == 2
    assert "torchrun, which started this process, cannot be reached" in capsys.readouterr().err


def test_guidance_rules_and_freeu_are_every_lines(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """An image is the command line's with the same flags; another rule is another fingerprint."""
    file = write(tmp_path / "p.jsonl", [SMALL | {"prompt": "apples", "seed": 7, "steps": 2}])
    more = ["--pag", "2", "--guidance-interval", "0", "0.5", "--freeu", "0.6", "0.4", "1.1", "1.2"]
    assert main([str(file), str(tmp_path / "out"), "--device", "cpu", "-q", *more]) == 0
    size = ["--height", "64", "--width", "64", "--steps", "2", "--seed", "7", "--device", "cpu", "-q"]
    assert draw_one(["apples", *size, "-o", str(tmp_path / "one.png"), *more]) == 0
    batch, one = (Image.open(tmp_path / name) for name in ("out/000001-7.png", "one.png"))
    assert np.array_equal(np.asarray(batch), np.asarray(one))
    for name in ("guidance", "freeu"):
        assert batch.info[name] == one.info[name]
    assert main([str(file), str(tmp_path / "out"), "--device", "cpu", "-q"]) == 2, "an image of others"
    capsys.readouterr()
    split = [str(file), str(tmp_path / "new"), "--device", "cpu", "--split-guidance"]
    assert main([*split, "--guidance-rescale", "0.5"]) == 2
    assert "error: --split-guidance splits no --pag, --guidance-rescale" in capsys.readouterr().err
