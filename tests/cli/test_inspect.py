"""`inspect`: two files of each kind, of a seed the same; what is wrong is one line and leaves nothing."""

import csv
from pathlib import Path

import pytest
from PIL import Image

from kolors_core.__main__ import main
from tests.support.lora_recipes import shallow_pipe

SMALL = ["--steps", "1", "--height", "32", "--width", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def weights(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("weights") / "small"
    shallow_pipe(small_tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "flags", "rows"),
    [
        ("probe", ["{a: x|y}", "--images", "4", "--layers", "mid", "up.?"], 2 * 3),
        ("activations", ["{a: x|y}", "--images", "2", "--layers", "mid.*.conv2"], 4 * 2),
        (
            "similarity",
            ["{a: x|y}", "--images", "12", "--layers", "mid", "up.?", "--other", "WEIGHTS"],
            9 + 3,
        ),
        ("patch", ["x y", "x z", "--images", "8", "--layers", "mid*cross_attention"], 0),
    ],
)
def test_each_kind_writes_both_files(
    kind: str, flags: list[str], rows: int, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    flags = [weights if flag == "WEIGHTS" else flag for flag in flags]
    assert main(["inspect", kind, *flags, "-w", weights, *SMALL, "-o", "it"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "it.png\nit.csv\n" and f"{kind}:   0%" in shown.err
    table = list(csv.reader(Path("it.csv").read_text(encoding="utf-8").splitlines()))
    assert table[0] == ["measure", "row", "column", "value", "low", "high"]
    assert len(table) == 1 + rows if rows else len(table) > 10
    assert all(float(low) <= float(value) <= float(high) for _, _, _, value, low, high in table[1:])
    assert min(Image.open("it.png").size) > 100
    if kind == "similarity":
        assert all(
            float(value) == pytest.approx(1) for _, row, column, value, *_ in table[1:] if row == column
        )
    if kind == "probe":
        before = Path("it.png").read_bytes(), Path("it.csv").read_bytes()
        assert main(["inspect", kind, *flags, "-w", weights, *SMALL, "-o", "it.png"]) == 2
        assert "it.png exists" in capsys.readouterr().err
        assert main(["inspect", kind, *flags, "-w", weights, *SMALL, "-o", "it.csv", "--force", "-q"]) == 0
        assert (Path("it.png").read_bytes(), Path("it.csv").read_bytes()) == before
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["probe", "a cat", "a dog"], "probe takes 1 prompt, got 2"),
        (["patch", "a cat"], "patch takes 2 prompts, got 1"),
        (["probe", "a {x: y|z}", "--other", "tiny"], "--other has no effect on probe"),
        (["similarity", "a cat"], "similarity needs a second model: --other or --other-lora"),
        (["probe", "a {cat}"], "got a single '{' in 'a {cat}'"),
        (["probe", "a cat"], "expected a question, such as"),
        (["activations", "a cat"], "at least 4 images in all, got 1"),
        (["probe", "a {x: y|z}", "--layers", "nowhere"], "no module is named 'nowhere'"),
        (["probe", "a {x: y|z}", "--steps", "0"], "--steps must be"),
        (["probe", "a {x: y|z}", "--seed", "-1"], "--seed must be"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], message: str, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "-w", weights, *SMALL, "-q", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1, error
    assert list(tmp_path.iterdir()) == []
