"""`train-lora`: a folder and a word in, a file, a sheet and one line out; errors before weights are read."""

from pathlib import Path

import pytest
from PIL import Image

from kolors_core.cli.train_lora import main, parser
from kolors_core.pipelines.lora_recipe import LoRARecipe
from kolors_core.pipelines.text_to_image import KolorsPipeline
from tests.support.lora_recipes import SIDE, shallow_pipe, write_five_images

QUICK = ["--steps", "1", "--batch-size", "2", "--inference-steps", "1", "--keep", "cat", "--device", "cpu"]


@pytest.fixture(scope="module")
def weights(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("weights") / "small"
    shallow_pipe(small_tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def images(tmp_path: Path) -> str:
    return str(write_five_images(tmp_path / "images"))


def test_five_images_and_a_word_make_a_file_and_a_sheet(
    weights: str, images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, sheet = tmp_path / "out" / "zorp.safetensors", tmp_path / "out" / "zorp.png"
    command = [images, "zorp", "-o", str(out), "-w", weights, *QUICK]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{out}\n{sheet}\n"
    assert "training: 100%" in shown.err and shown.err.rstrip().splitlines()[-1].startswith("zorp: in ")
    assert Image.open(sheet).width == 64 + 4 * (SIDE + 16)
    assert KolorsPipeline.from_pretrained(weights).load_lora_weights(out).unmatched == ()

    before = out.read_bytes()
    assert main([*command, "--rank", "8"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "is of another run: trained weights: not the same" in error
    assert "--force starts anew" in error and "resume=" not in error, error
    assert out.read_bytes() == before
    assert main([*command, "--rank", "8", "--force", "-q"]) == 0
    assert capsys.readouterr().err == ""
    assert len(out.read_bytes()) < len(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "zorp.pt"], "--out must end in .safetensors, got zorp.pt"),
        (["--sheet", "zorp.jpg"], "--sheet must end in .png, got zorp.jpg"),
        (["--learning-rate", "nan"], "--learning-rate must be a number, got nan"),
        (["--steps", "0"], "steps must be a positive whole number, got 0"),
        (["--accumulate", "3"], "batch_size must be a multiple of 1 processes times"),
        (["--offload", "model"], "--offload only draws"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], message: str, weights: str, images: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([images, "zorp", "-w", weights, *QUICK, "-q", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("zorp.safetensors").exists()


def test_bad_images_are_named_before_weights_are_read(
    images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(images) / "3.txt").write_text("a thing")
    assert main([images, "zorp", "-w", "no/such/weights", "-o", str(tmp_path / "a.safetensors")]) == 2
    assert "3.png: its caption 'a thing' lacks the word 'zorp'" in capsys.readouterr().err


def test_the_defaults_are_the_measured_recipe() -> None:
    options, recipe = parser().parse_args(["images", "zorp"]), LoRARecipe()
    training = recipe.training
    assert (options.steps, options.batch_size, options.rank) == (
        training.steps,
        training.batch_size,
        recipe.rank,
    )
    assert (options.inference_steps, options.seed) == (recipe.inference_steps, training.seed)
