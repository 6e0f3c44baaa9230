"""The parity page: faults planted in our models are named on it; it is of any folder of the public layout."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.full_size import cast, run_unet
from benchmarks.pairs import WeightsAs
from benchmarks.parity.__main__ import VARIABLE, main
from benchmarks.parity.checkpoint import opened
from benchmarks.parity.components import cases
from benchmarks.parity.measure import BETWEEN, Case, Side, measure
from benchmarks.parity.pipelines import measure_pipelines
from benchmarks.parity.report import details, overview, parting, verdict, write
from benchmarks.parity.texts import measure_tokenizer
from kolors_core.checkpoint import EMBEDDED

pytestmark = pytest.mark.numerical

CPU = torch.device("cpu")
EXACTLY, TWO = (torch.float64,), (torch.float64, torch.bfloat16)


@pytest.fixture(scope="module")
def tiny() -> Iterator[dict[str, Case]]:
    """What is compared of the embedded model, by name."""
    with opened(EMBEDDED, CPU) as checkpoint:
        yield {case.name: case for case in cases(checkpoint)}


def wrong_eps(model: Any) -> None:
    model.up[1].attentions[0].blocks[0].norm2.eps = 1e-4


def swapped_weights(model: Any) -> None:
    attention = model.layers[1].attention_norm, model.layers[1].mlp_norm
    attention[0].weight.data, attention[1].weight.data = attention[1].weight.data, attention[0].weight.data


def wrong_branch(unet: Any, adapter: Any) -> None:
    adapter.branches["5"].to_v.weight.data.mul_(1.01)


FAULTS = [
    ("UNet", wrong_eps, "up.1.attentions.0.blocks.0.norm2",
     "up_blocks.1.attentions.0.transformer_blocks.0.norm2"),
    ("ChatGLM", swapped_weights, "layers.1.attention_norm", "encoder.layers.1.input_layernorm"),
    ("IP-Adapter", wrong_branch, "branches.5.to_v",
     "up_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_v_ip.0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "module", "counterpart"), FAULTS, ids=[row[0] for row in FAULTS])
def test_a_planted_fault_is_named(
    tiny: dict[str, Case], name: str, spoil: Callable[..., None], module: str, counterpart: str
) -> None:
    case = tiny[name]

    def ours() -> Side:
        side = case.ours()
        spoil(*side.models)
        return side

    result = measure(replace(case, ours=ours), CPU, EXACTLY)
    assert parting(result) == f"{module} (float64)"
    assert result.measured[0].worst.max_relative > 1e-7
    assert f"`{module}` (`{counterpart}`)" in details(result)
    assert f"1 of 1 components diverge: {name} at {module} (float64)." in verdict([result])
    assert f"| {module} (float64) |" in overview([result])


def test_a_fault_between_modules_is_one(tiny: dict[str, Case]) -> None:
    case = tiny["CLIP vision"]

    def ours() -> Side:
        side = case.ours()
        return replace(side, run=lambda given: {name: x * 1.001 for name, x in side.run(given).items()})

    assert parting(measure(replace(case, ours=ours), CPU, EXACTLY)) == f"{BETWEEN} (float64)"


def test_without_a_fault_nothing_is_named(tiny: dict[str, Case]) -> None:
    result = measure(tiny["CLIP vision"], CPU, TWO)
    exact, rounded = result.measured
    assert verdict([result]) == "**Nothing diverges, in any component and any dtype.**\n"
    assert len(exact.layers) == 37 and exact.unpaired == []
    assert exact.worst.reference_from_float64 == 0 < rounded.worst.reference_from_float64 < 0.05


def test_a_model_runs_as_if_loaded_in_another_dtype(tiny: dict[str, Case]) -> None:
    model: nn.Module = tiny["UNet"].ours().models[0]
    assert next(model.parameters()).dtype == torch.float16
    for dtype in TWO:
        given, loaded = cast(tiny["UNet"].inputs, dtype), deepcopy(model).to(dtype)
        with torch.no_grad():
            wanted = run_unet(loaded, given)["noise"]
            with WeightsAs(dtype):
                assert torch.equal(run_unet(model, given)["noise"], wanted)


def test_the_page_of_a_folder_that_the_reference_wrote(reference_folder: Path, tmp_path: Path) -> None:
    """Shards of a float16 variant, as KOLORS_WEIGHTS would name them: models, and pipelines."""
    with opened(reference_folder, CPU) as checkpoint:
        assert checkpoint.variant("unet") == "fp16" and checkpoint.dtype("unet") == torch.float16
        results = [measure_tokenizer(checkpoint.tokenizer())]
        results += [measure(case, CPU, EXACTLY) for case in islice(cases(checkpoint), 2)]
        tasks, pictures = measure_pipelines(checkpoint, 3, [torch.float32])
        write(tmp_path, checkpoint, [*results, *tasks], pictures, "a small one")
    for result in (*results, *tasks):
        assert parting(result) == "none", f"{result.name}: {parting(result)}"
    assert all(one.psnr > 70 and one.levels <= 1 for one in pictures)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert str(reference_folder) not in page and "a small one" in page
    assert all((tmp_path / f"{name}.png").exists() for name in ("text-to-image", "inpainting"))
    numbers = json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8"))
    assert {result["name"]: len(result["ours"]) for result in numbers["results"]} == {
        "Tokenizer": 28, "ChatGLM": 19, "UNet": 362, "text to image": 3, "inpainting": 2, "image to image": 1,
    }  # fmt: skip


@pytest.mark.exact
def test_a_folder_that_is_none_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere"))
    assert main([str(tmp_path / "page")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: KOLORS_WEIGHTS=") and "no such file" in said
    assert not (tmp_path / "page").exists()


@pytest.mark.exact
def test_a_checkpoint_that_is_not_whole_is_refused_before_it_runs(
    reference_folder: Path, tmp_path: Path
) -> None:
    for part in reference_folder.iterdir():
        if part.name != "vae":
            (tmp_path / part.name).symlink_to(part)
    with pytest.raises(FileNotFoundError, match="vae: no such folder"), opened(tmp_path, CPU):
        pass


@pytest.mark.exact
def test_a_checkpoint_s_own_image_encoder_is_compared(whole_folder: Path) -> None:
    with opened(whole_folder, CPU) as checkpoint:
        assert checkpoint.random == {"ip_adapter", "controlnet"}
        assert checkpoint.places["image_encoder"].parent == whole_folder
