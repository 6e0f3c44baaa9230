"""The house itself: who may import whom, what importing costs, and how long a file may be."""

import ast
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import kolors_core.unet

ROOT = Path(__file__).parents[1]
ORDER = """
    fields module config attention image masks canny tokenizer chatglm clip_vision context unet blocks
    vae_tiles vae ip_adapter face_id controlnet conditioning quantize lora_layers lora lora_file graphs
    compiling prompt_cache running schedule sampling holding tempering reading guidance freeu placement
    perturbed offload hub loading checkpoint lora_loading textual_inversion fitting components single_file
    text_prompt image_prompt face_prompt control_image quantize_report callback task plan from_picture
    pipeline inpaint pag_pipeline control_pipeline dataset objective training masked_data options lines
    claims split_guidance capturing attention_maps explanation explain batch __init__ __main__
""".split()  # noqa: SIM905
RUN_TIME = {"torch", "safetensors", "sentencepiece", "einops", "numpy", "PIL", "huggingface_hub", "tqdm"}


def imports(file: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative import"
            found.add(node.module or "")
    return found


FILES = sorted((ROOT / "kolors_core").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_file_imports_only_from_files_above_it(file: Path) -> None:
    own = {name.split(".")[1] for name in imports(file) if name.startswith("kolors_core.")}
    late = [name for name in own if ORDER.index(name) >= ORDER.index(file.stem)]
    assert not late, f"{file.name} imports {late}, which stand below it"


@pytest.mark.parametrize(
    "file", [*FILES, *sorted((ROOT / "weights_convert").glob("*.py"))], ids=lambda f: f.stem
)
def test_only_the_agreed_packages_at_run_time(file: Path) -> None:
    outside = {name.split(".")[0] for name in imports(file)} - set(sys.stdlib_module_names)
    assert outside <= RUN_TIME | {"kolors_core", "weights_convert"}
    if file.parent.name == "weights_convert":
        assert outside <= {"torch", "safetensors", "weights_convert"}


def test_importing_needs_torch_and_safetensors_only_and_prints_nothing() -> None:
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"sentencepiece", "einops", "PIL", "huggingface_hub", "tqdm", "diffusers",
        "transformers"}:
            raise ImportError(name + " imported")
sys.meta_path.insert(0, Refuse())
import kolors_core, weights_convert, kolors_core.cli.generate
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_there_is_one_attention_call() -> None:
    callers = [file.name for file in FILES if "scaled_dot_product" in file.read_text()]
    assert callers == ["attention.py"]
    assert (ROOT / "kolors_core" / "attention.py").read_text().count("scaled_dot_product_attention(") == 1


def test_files_are_read_in_one_sitting() -> None:
    for folder in ("kolors_core", "weights_convert", "tests", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 400, file
    path = ("tokenizer", "chatglm", "unet", "vae", "schedule", "sampling", "guidance")
    lines = sum(len((ROOT / "kolors_core" / f"{name}.py").read_text().splitlines()) for name in path)
    assert lines < 1500, "the text-to-image path grows too long to read"


def test_help_reads_like_a_chapter() -> None:
    """What a model's file says, in full, and nothing of torch's own methods; an instance still has these."""
    text = pydoc.plain(pydoc.render_doc(kolors_core.unet))
    assert len(text.splitlines()) < 500 and "load_state_dict" not in text
    assert "Predict the noise in `latents`." in text and "ResBlocks around 10 blocks" in text
    block = kolors_core.unet.FeedForward(32)
    assert {"proj_in", "state_dict", "forward"} <= set(dir(block))
