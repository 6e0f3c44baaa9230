"""What the READMEs show runs and gives what they say; what they name and link to is there."""

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from kolors_core import (
    KolorsControlNetPipeline,
    KolorsImg2ImgPipeline,
    KolorsPipeline,
    LCMScheduler,
    registry,
)
from kolors_core.__main__ import COMMANDS
from kolors_core.batch import __main__ as batch
from kolors_core.checkpoint import EMBEDDED
from kolors_core.cli import inspect_parser, parsers
from kolors_core.cli.train_lora import parser as train_lora_parser
from tests.support.images import noise_image
from tests.support.processes import COMMAND, run_program

ROOT = Path(__file__).parents[1]
FRONT = "README.md"
ROOMS = ("adapters", "performance", "inspection", "training", "pipelines", "compat", "cli", "batch", "ui")
LINES = {
    FRONT: 250,
    **{f"kolors_core/{room}/README.md": 150 for room in ROOMS},
    "kolors_core/README.md": 150,
    "kolors_core/CHANGING.md": 100,
    "kolors_core/TUTORIAL.md": 150,
    "kolors_core/SAMPLERS.md": 100,
    "kolors_core/TROUBLESHOOTING.md": 100,
    "kolors_core/performance/MEMORY.md": 100,
    "kolors_core/DRAWING.md": 130,
    "kolors_core/performance/EXPORT.md": 100,
    "kolors_core/training/RUNS.md": 150,
    "kolors_core/training/DATA.md": 120,
    "kolors_core/training/RECIPES.md": 120,
    "weights_convert/README.md": 150,
    "benchmarks/README.md": 150,
    "benchmarks/speed/gpu/README.md": 50,
    "tests/README.md": 60,
}
PAGES = [*LINES, "CHANGELOG.md"]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Blocks that need the published weights, or files that the page does not make; their names are checked.
NOT_RUN = {
    FRONT: ["Kwai-Kolors/Kolors-diffusers"],
    "kolors_core/adapters/README.md": ["Kolors-IP-Adapter-Plus", "zorp", "Kolors-ControlNet-Canny", "face"],
    "kolors_core/pipelines/README.md": ["kolors_unet.safetensors"],
    "kolors_core/training/RECIPES.md": ["plan_training("],
}
RUN = {
    FRONT: ["Tokenizer(folder"],
    "kolors_core/README.md": ["zero_padded", "GatedUNet"],
    "kolors_core/CHANGING.md": ["class Pointwise"],
    "kolors_core/TUTORIAL.md": ["class Gated", "measure_unet", "Trainer(", "HeatMap("],  # by test_tutorial.py
    "kolors_core/pipelines/README.md": ["strength=0.5", "repainted.png", "perturbed, pag_scale"],
    "kolors_core/compat/README.md": ["make_image_grid(images"],
    "kolors_core/performance/README.md": ["enable_fused_kernels()", "enable_step_cache()"],
    "kolors_core/performance/MEMORY.md": ["quantize(pipe", "quantization={", "plan(pipe"],  # by it too
    "kolors_core/DRAWING.md": ["pipe.enable_model_cpu_offload()"],  # by test_memory_pages.py
    "kolors_core/performance/EXPORT.md": ["InferenceSession"],  # by tests/cli/test_export.py
    "kolors_core/inspection/README.md": ["record_attention("],
    "kolors_core/training/README.md": ["train_lora(", "ConsistencyLoss("],
    "kolors_core/training/RUNS.md": ["class Huber("],  # by tests/training/test_own_training.py
    "kolors_core/training/DATA.md": ['CachedDataset("images.cache"', "class Scored"],
}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(text_of(page)) if found == language]


def block_with(part: str, page: str) -> str:
    """Return the one Python block of a page that has this part."""
    [block] = [code for code in blocks(page, "python") if part in code]
    return block


def block_after(heading: str, language: str) -> str:
    """Return the first block of the README behind a heading."""
    found = re.search(rf"{re.escape(heading)}.*?```{language}\n(.*?)```", text_of(FRONT), re.DOTALL)
    assert found, heading
    return found[1]


def run(code: str, page: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, page, "exec"), names)
    return names


def test_the_path_written_out_gives_the_pipelines_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = block_after("## The whole path", "python")
    assert "schedule(25)" in code, "as many steps as the command takes"
    run(code.replace("schedule(25)", "schedule(8)"), FRONT)
    command = ["一张瓢虫的照片", "-o", "pipeline.png", "--seed", "7", "--steps", "8", "--device", "cpu", "-q"]
    assert run_program(COMMAND, *command, cwd=tmp_path).returncode == 0
    written, made = (np.asarray(Image.open(name)).astype(int) for name in ("ladybug.png", "pipeline.png"))
    assert written.shape == made.shape == (128, 128, 3)
    assert abs(written - made).max() <= 1


def test_the_image_to_image_example_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = "kolors_core/pipelines/README.md"
    run(block_with("strength=0.5", page), page)
    made = np.asarray(Image.open("ladybug.png")).astype(int)
    assert made.shape == (128, 128, 3)
    red, black = (made[..., 0] > 180) & (made[..., 1] < 90), made.max(axis=2) < 90
    assert red.mean() > 0.1 and black.mean() > 0.03, "a red sketch became a ladybug with black spots and legs"


def test_the_drop_in_example_draws_a_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = "kolors_core/compat/README.md"
    run(block_with("make_image_grid(images", page), page)
    assert Image.open("apples.png").size == (256, 128)


def test_the_inpainting_example_keeps_what_the_mask_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = "kolors_core/pipelines/README.md"
    names = run(block_with("repainted.png", page), page)
    made, given = (np.asarray(image) for image in (Image.open("repainted.png"), names["image"]))
    same = (made == given).all(axis=-1)
    assert same[:64].all() and same[:, :64].all() and not same[64:, 64:].all()


def test_the_guidance_example_draws() -> None:
    page = "kolors_core/pipelines/README.md"
    names = run(block_with("perturbed, pag_scale", page), page)
    assert names["pipe"].freeu == {"s1": 0.9, "s2": 0.2, "b1": 1.1, "b2": 1.2}


def test_the_example_of_looking_inside_runs() -> None:
    page = "kolors_core/inspection/README.md"
    block = block_with("record_attention(", page)
    names = run(block.replace("num_inference_steps=25", "num_inference_steps=15"), page)
    assert names["maps"]["mid.attentions.0.blocks.0.cross_attention"].ndim == 4
    assert [len(kept) for kept in names["kept"].values()] == [15, 15]


def test_the_lora_example_trains_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        (tmp_path / "images").mkdir(exist_ok=True)
        noise_image("RGB", 128, 128, seed=i).save(tmp_path / "images" / f"{i}.png")
    page = "kolors_core/training/README.md"
    quick = """LoRARecipe(
        training=TrainingConfig(steps=2, batch_size=2), others=("cat",), kept=("dog",), inference_steps=2)"""
    imports = "from kolors_core.training.trainer import TrainingConfig\n"
    run(imports + block_with("train_lora(", page).replace("LoRARecipe())", f"{quick})"), page)
    assert Image.open("zorp.png").size == (128, 128) and Image.open("zorp_sheet.png").height > 256
    assert all(name.startswith("unet.") for name in load_file("zorp.safetensors"))


def test_the_few_step_example_trains_a_lora_that_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the embedded model in the place of the published one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    noise_image("RGB", 128, 128).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("a cat")
    code = block_with("ConsistencyLoss(", "kolors_core/training/README.md")
    for published, here in (
        ("Kwai-Kolors/Kolors-diffusers", "tiny"), ('device="cuda"', 'device="cpu"'),
        ("buckets(1024)", "[(128, 128)]"), ("steps=1500, batch_size=16", "steps=1, batch_size=4"),
        ("rank=64", "rank=2"),
    ):  # fmt: skip
        assert published in code
        code = code.replace(published, here)
    run(code, "kolors_core/training/README.md")
    pipe = KolorsPipeline.from_pretrained("tiny")
    pipe.load_lora_weights("kolors_lcm.safetensors")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    [image] = pipe("a cat", num_inference_steps=1, guidance_scale=1.0).images
    assert image.size == (128, 128)


def test_the_examples_of_data_on_a_disk_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for i in range(4):
        noise_image("RGB", 128, 128, seed=i).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(f"thing {i}")
    page = "kolors_core/training/DATA.md"
    first, second = (block_with(part, page) for part in RUN[page])
    names = run(f"{first.replace('steps=1000, batch_size=16', 'steps=1, batch_size=4')}\n{second}", page)
    assert names["loss"].score.weight.abs().min() > 0
    assert all((tmp_path / name / "state.safetensors").exists() for name in ("run", "scored.run"))


def test_the_example_of_fewer_kernels_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = "kolors_core/performance/README.md"
    run(block_with("enable_fused_kernels()", page), page)
    assert capsys.readouterr().out.startswith("torch.float16 {torch.float16: 0.")


def test_the_example_of_a_step_cache_runs() -> None:
    page = "kolors_core/performance/README.md"
    assert run(block_with("enable_step_cache()", page), page)["pipe"].step_cache is None


def test_the_example_of_loading_in_part_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = "kolors_core/README.md"
    run(block_with("zero_padded", page).replace('"kolors"', repr(str(EMBEDDED))), page)
    assert capsys.readouterr().out.rstrip().endswith(" loaded; 1 misshapen: conv_in.weight")


def test_the_example_of_a_changed_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = "kolors_core/README.md"
    names = run(block_with("GatedUNet", page).replace('"kolors"', repr(str(EMBEDDED))), page)
    assert names["report"].missing == ["gates.bias", "gates.weight"]
    assert type(names["pipe"].unet) is names["GatedUNet"] and names["unet"].config.gates == 1
    with pytest.raises(ValueError, match=r"GatedUNet: load it by .*from_pretrained\(FOLDER, unet="):
        KolorsPipeline.from_pretrained("gated")


def test_the_example_of_a_denoiser_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("_models", "_described"):
        monkeypatch.setattr(registry, name, {})
    page = "kolors_core/CHANGING.md"
    names = run(block_with("class Pointwise", page), page)
    assert type(names["pipe"].unet) is names["Pointwise"]


def test_the_path_written_out_is_about_thirty_lines() -> None:
    assert len(block_after("## The whole path", "python").splitlines()) <= 32


@pytest.mark.parametrize("page", LINES)
def test_a_page_is_short(page: str) -> None:
    assert len(text_of(page).splitlines()) <= LINES[page]


def test_every_readme_is_checked() -> None:
    """But for data's own: cards, fonts and what benchmarks write."""
    found = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/**/README.md")} | {FRONT}
    data = ("kolors_core/tiny/", "kolors_core/inspection/font/", "benchmarks/results/", ".")
    listed = {page for page in LINES if page.endswith("README.md")}
    assert {page for page in found if not page.startswith(data)} == listed


@pytest.mark.parametrize("page", LINES)
def test_each_python_block_is_run_or_needs_what_is_not_here(page: str) -> None:
    """Of those that are not run, what they import and the pipeline's methods that they call are there."""
    waiting = blocks(page, "python")
    for part in RUN.get(page, []):
        waiting.remove(block_with(part, page))
    assert len(waiting) == len(NOT_RUN.get(page, []))
    for part, block in zip(NOT_RUN.get(page, []), waiting, strict=True):
        assert part in block
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), node.module
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pipe":
                assert node.attr in attributes(), node.attr


@cache
def attributes() -> set[str]:
    kinds = KolorsPipeline, KolorsImg2ImgPipeline, KolorsControlNetPipeline
    return {*dir(KolorsPipeline.from_pretrained("tiny", device="meta")), *(n for k in kinds for n in dir(k))}


PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "kolors_core": parsers.draw_parser,
    "kolors_core explain": parsers.explain_parser,
    "kolors_core inspect": inspect_parser.parser,
    "kolors_core info": parsers.info_parser,
    "kolors_core plan": parsers.plan_parser,
    "kolors_core export": parsers.export_parser,
    "kolors_core batch": batch.parser,
    "kolors_core train-lora": train_lora_parser,
    "kolors_core.batch": batch.parser,
}


@pytest.mark.parametrize("page", LINES)
def test_commands_are_there_and_have_these_flags(page: str) -> None:
    shown = [command for block in blocks(page, "bash") for command in block.replace("\\\n", " ").splitlines()]
    spoken = re.findall(r"`((?:python -m|kolors) [^`]+)`", text_of(page))
    for command in [*shown, *spoken]:
        if "&& python" in command:
            command = command.partition("&& ")[2]
        if command.startswith("kolors "):
            command = f"python -m kolors_core {command.removeprefix('kolors ')}"
        _, found, rest = command.partition(" -m ")
        if not found:
            continue
        module, *arguments = shlex.split(rest, comments=True)
        assert importlib.util.find_spec(module) is not None, module
        if module == "kolors_core" and arguments[:1] and arguments[0] in COMMANDS:
            module, arguments = f"{module} {arguments[0]}", arguments[1:]
        if module in PARSERS and arguments and "--help" not in arguments:
            PARSERS[module]().parse_args(arguments)  # ends the process, and so the test, at an unknown flag


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        path, _, anchor = target.partition("#")
        place = ((ROOT / page).parent / path) if path else ROOT / page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_every_page_is_two_clicks_from_the_front() -> None:
    reached, found = {FRONT}, {FRONT}
    for _ in range(2):
        links = {(page, link) for page in found for link in re.findall(r"\]\(([^)\s#]+\.md)", text_of(page))}
        found = {((ROOT / page).parent / link).resolve().relative_to(ROOT).as_posix() for page, link in links}
        reached |= found
    assert {*PAGES} - reached == set()


@pytest.mark.parametrize("page", PAGES)
def test_rows_of_a_table_are_of_one_length(page: str) -> None:
    """Also where code in a cell has a bar, which ends the cell on GitHub."""
    text = BLOCK.sub("", text_of(page))
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        counts = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(counts) == 1, table.partition("\n")[0]


@cache
def words_of_the_source() -> set[str]:
    folders = ("kolors_core", "weights_convert", "benchmarks", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    words: set[str] = set()
    for file in files:
        if file != Path(__file__):
            words |= {file.stem, file.parent.name, *re.findall(r"\w+", file.read_text(encoding="utf-8"))}
    return words


@pytest.mark.parametrize("page", PAGES)
def test_every_name_in_backticks_is_in_the_source(page: str) -> None:
    """Files by their paths, names such as `a`, `a.b` and `a(b=, ...)`; of a changelog the new ones."""
    text = BLOCK.sub("", text_of(page))
    if page == "CHANGELOG.md":
        rows = [row.split("|") for row in text.splitlines() if row.startswith("| ")]
        text = "\n".join(row[2] for row in rows if row[1].strip() != "before")
        assert len(rows) > 60
    for name in re.findall(r"`([\w./]+(?:\([^`]*\))?)`", text):
        if name.endswith((".py", "/")):
            here = (ROOT, ROOT / "kolors_core", (ROOT / page).parent)
            assert any((folder / name).exists() for folder in here), name
        elif re.match(r"[A-Za-z_][\w.]*(\(|$)", name) and not name.endswith((".png", ".txt", ".jsonl")):
            parts = re.findall(r"[A-Za-z_]\w*", name.partition("(")[0])
            missing = [part for part in parts if part not in words_of_the_source()]
            assert not missing, name


def test_what_a_page_quotes_is_what_the_library_says() -> None:
    """Of the page for when something goes wrong, but for what is typed."""
    text = re.sub("`[^`]*`", "", (ROOT / "kolors_core/TROUBLESHOOTING.md").read_text())
    quoted = re.findall('"([^"]+)"', text)
    files = [*(ROOT / "kolors_core").rglob("*.py"), *(ROOT / "weights_convert").glob("*.py")]
    code = "\n".join(file.read_text() for file in files)
    assert len(quoted) > 10 and [sentence for sentence in quoted if sentence not in code] == []
