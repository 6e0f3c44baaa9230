"""`export`: a folder of programs that draw alone; what is wrong is one line before weights are read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kolors_core.__main__ import main
from kolors_core.performance import export as programs
from kolors_core.pipelines.text_to_image import KolorsPipeline
from tests.support.lora_recipes import shallow_pipe
from tests.support.loras import write_noisy
from tests.test_readme import block_with, run

PAGE = "kolors_core/performance/EXPORT.md"
DRAWN = ["text_encoder", "unet_context", "unet_step", "vae_decoder"]
ONNX = [name for name in programs.EXTRA["onnx"] if programs.find_spec(name) is None]


@pytest.mark.skipif(bool(ONNX), reason=f"the extra `export` is not installed: no {', '.join(ONNX)}")
def test_the_loop_of_the_page_draws_the_pipelines_image_from_the_files_alone(
    tmp_path: Path, small_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a LoRA, which is in the weights, and --check of other sizes than those that are traced."""
    monkeypatch.chdir(tmp_path)
    pipe = shallow_pipe(small_tokenizer)
    pipe.save_pretrained("weights")
    lora = write_noisy(tmp_path / "lora.safetensors", pipe.unet)
    command = ["export", "weights", "exported", "--to", "onnx", "--check", "--lora", f"{lora}:0.5"]
    assert main([*command, "--programs", *DRAWN]) == 0
    shown = capsys.readouterr()
    files = [f"exported/{name}.onnx" for name in DRAWN]
    assert shown.out.split() == files
    assert all(f"{name}.onnx: within " in shown.err for name in DRAWN), shown.err
    weights = [f"{name}.onnx.data" for name in DRAWN]
    written = {path.name for path in Path("exported").iterdir()}
    assert written == {"tokenizer.model", *weights, *(Path(file).name for file in files)}
    assert not any(str(programs.__file__).encode() in Path(file).read_bytes() for file in files)

    code = block_with("InferenceSession", PAGE)
    assert len(code.splitlines()) <= 60 and "torch" not in code and "kolors_core" not in code
    assert ", 25, 5.0, 128, 128, 7" in code
    names = run(code.replace(", 25, 5.0, 128, 128, 7", ", 3, 5.0, 72, 104, 7"), PAGE)
    plain = draw(pipe, names)
    pipe.load_lora_weights(lora, adapter_name="noisy")
    pipe.set_adapters("noisy", 0.5)
    found = np.asarray(Image.open("ladybug.png")).astype(int)
    assert found.shape == (72, 104, 3)
    assert abs(found - draw(pipe, names)).max() <= 1
    assert abs(found - plain).max() > 10, "the LoRA acts"


def draw(pipe: KolorsPipeline, names: dict[str, Any]) -> np.ndarray:
    """Draw what the page's loop did."""
    [image] = pipe(
        names["PROMPT"], num_inference_steps=3, guidance_scale=5.0, height=72, width=104,
        latents=torch.from_numpy(names["noise"]),
    ).images  # fmt: skip
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/weights", ".", "--to", "torch"], "exists already, and is not overwritten"),
        (["no/such/weights", "new", "--to", "torch"], "no/such/weights"),
        (["tiny", "new", "--to", "onnx", "--device", "cuda"], "--device has no effect on --to onnx"),
        (["tiny", "new", "--to", "onnx", "--check", "--dtype", "bfloat16"], "--check cannot run bfloat16"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(programs, "EXTRA", {})
    assert main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named_before_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(programs, "EXTRA", {"onnx": ("torch", "no_such_package")})
    assert main(["export", "no/such/weights", "new", "--to", "onnx"]) == 2
    expected = "error: format onnx needs no_such_package: pip install 'kolors_core[export]'\n"
    assert capsys.readouterr().err == expected
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["export", "no/such/weights", "new", "--to", "aot"]) == 2
    assert "aot needs a C++ compiler, and there is no no-such-compiler" in capsys.readouterr().err


def test_a_failed_export_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the program that differs from the model nor those that were written before it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(programs, "TOLERANCES", {torch.float32: -1.0})
    command = ["export", "tiny", "new", "--to", "torch", "--check", "--programs", "unet_context"]
    assert main(command) == 2
    assert "unet_context.pt2: differs by 0.0e+00 from the model, expected" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
