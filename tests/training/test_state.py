"""States of sharded runs: written by shards, read by another number of processes or by none, never half."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from kolors_core.training.state import SavedState
from kolors_core.training.trainer import Trainer
from tests.support.small_training import SETTINGS, Fit, Points, fit_sharded, read_log
from tests.support.two_processes import start
from tests.support.versions import shards_on_cpu
from weights_convert.safetensors_files import Source, save_tensors

CONFIG = replace(SETTINGS, steps=6, schedule="constant", save_every=2, evaluate_every=2)


def run(processes: int, folder: Path, steps: int) -> None:
    for process in start(processes, fit_sharded, log := folder.parent / "log", folder, steps):
        process.join(120)
        assert process.exitcode == 0, log.read_text()[-3000:]


def trainer(folder: Path) -> Trainer:
    def draw() -> list[Image.Image]:
        value = loss.out(loss.blocks[0](torch.ones(1, 6))).item()
        return [Image.new("L", (1, 1), round(100 + 50 * value))]

    loss = Fit()
    return Trainer(loss, Points(), CONFIG, folder, held_out=Points(seed=7), draw=draw)


@shards_on_cpu
def test_a_sharded_run_goes_on_with_fewer_processes_and_with_one(tmp_path: Path) -> None:
    """Four steps on four, the fifth and sixth on two or in this one, as all six in one."""
    whole = trainer(tmp_path / "whole")
    losses = whole.fit(progress=False)
    run(4, sharded := tmp_path / "sharded", 4)
    [shards] = [path for path in sharded.iterdir() if path.name.startswith("state-")]
    files = sorted(shards.iterdir())
    assert len(files) == 4 and all(file.suffix == ".safetensors" for file in files)
    for file in files[:2]:
        with safe_open(file, "pt") as part:
            assert list(part.get_slice("weights.blocks.0.linear.weight").get_shape()) == [2, 6]
            assert list(part.get_slice("ema.blocks.0.linear.weight").get_shape()) == [2, 6]
            assert list(part.get_slice("exp_avg.blocks.0.linear.weight").get_shape()) == [2, 6]
    assert Source([sharded / "state.safetensors"]).keys() == {"losses", "held_out"}

    one = trainer(tmp_path / "sharded")
    one._resume()
    assert one.step == 4 and one.losses == pytest.approx(losses[:4], rel=1e-5)
    assert one.load_best_weights() == min(one.held_out_losses, key=one.held_out_losses.__getitem__)

    run(2, sharded, 6)
    log, expected = read_log(sharded), read_log(tmp_path / "whole")
    assert [row["step"] for row in log] == [str(i) for i in range(6)]
    for column in ("loss", "gradient_norm", "error_right", "held_out_loss"):
        for found, row in zip(log, expected, strict=True):
            assert float(found[column] or -1) == pytest.approx(float(row[column] or -1), rel=1e-5), column
    state = SavedState(sharded / "state.safetensors")
    assert [path.name for path in sharded.glob("state-*")] == [state.metadata["shards"]], (
        "earlier ones are gone"
    )
    tensors = {name: torch.empty(size) for name, size in state.shapes.items() if "." in name}
    state.copy_to(tensors)
    for name, parameter in whole.named.items():
        assert torch.allclose(tensors[f"weights.{name}"], parameter, rtol=1e-4, atol=1e-6), name
        assert torch.allclose(tensors[f"ema.{name}"], whole.ema[name], rtol=1e-4, atol=1e-6), name
        assert tensors[f"step.{name}"] == 6
    for image in sorted((tmp_path / "whole" / "samples").iterdir()):
        with Image.open(image) as own, Image.open(sharded / "samples" / image.name) as other:
            assert abs(own.getpixel((0, 0)) - other.getpixel((0, 0))) <= 1
    _check_damage(sharded, state)


def _check_damage(folder: Path, state: SavedState) -> None:
    """What of a state is not there, or not its own, is named."""
    file, shards = state.file, folder / state.metadata["shards"]
    for name in ("../elsewhere", "state-1", "/tmp/state-00000001.0"):
        save_tensors({"losses": torch.zeros(1)}, file, state.metadata | {"shards": name})
        with pytest.raises(ValueError, match="its metadata give shards .*expected the name of a folder"):
            SavedState(file)
    save_tensors({"losses": torch.zeros(1)}, file, state.metadata)
    with pytest.raises(ValueError, match="it has no weights.new"):
        SavedState(file).copy_to({"weights.new": torch.zeros(1)})
    part = next(shards.iterdir())
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{part.name}: not a whole safetensors file"):
        SavedState(file)
    shards.rename(folder / "elsewhere")
    with pytest.raises(
        FileNotFoundError, match=f"{shards.name}: the shards of state.safetensors are not there"
    ):
        SavedState(file)
