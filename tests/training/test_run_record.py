"""A state goes on only as the run that wrote it: what differs is named, or asked to be taken all the same."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kolors_core.adapters.lora import attach
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.training.run_record import Losses, differences, digest, digest_model
from kolors_core.training.trainer import Trainer
from tests.support.small import randomise
from tests.support.train_worker import CONFIG, make_trainer
from tests.training.test_data import write_pictures
from weights_convert.safetensors_files import save_tensors

SHORT = replace(CONFIG, steps=2, save_every=2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pictures: Path, small_tokenizer: Path) -> Path:
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("finished")
    make_trainer(folder, pictures, small_tokenizer, SHORT).fit()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def edit_metadata(folder: Path, change: Callable[[list[dict]], object]) -> Path:
    file = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change(rows)
    file.write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_the_same_run_says_where_it_is(
    run: Path, pictures: Path, small_tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also with settings that do not change the result, and for images that moved."""
    moved = Path(shutil.copytree(pictures, run.parent / "elsewhere"))
    free = replace(SHORT, save_every=1, checkpoint_blocks=True, gradient_accumulation_steps=2)
    with caplog.at_level(logging.WARNING, "kolors_core"):
        trainer = make_trainer(run, moved, small_tokenizer, free)
        assert trainer.fit() == []
    assert caplog.messages == [f"{run / 'state.safetensors'}: already at step 2 of 2"]
    assert len(trainer.losses) == 2 and trainer.losses.first == 0, "of the earlier call"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 2e-3}, "learning_rate: 0.001 there, 0.002 here"),
        ({"seed": 1}, "seed: 0 there, 1 here; data: 'LatentDataset, 0, .*there, 'LatentDataset, 1"),
        ({"steps": 3}, "steps: 2 there, 3 here"),
        ({"min_snr_gamma": 5.0}, "min_snr_gamma: None there, 5.0 here"),
        ({"dtype": torch.bfloat16}, "dtype: 'torch.float32' there, 'torch.bfloat16' here"),
    ],
)
def test_another_setting_is_refused(
    changes: dict, message: str, run: Path, pictures: Path, small_tokenizer: Path
) -> None:
    before = (run / "state.safetensors").read_bytes()
    with pytest.raises(ValueError, match=rf"state.safetensors: is of another run: {message}.*resume='never'"):
        make_trainer(run, pictures, small_tokenizer, replace(SHORT, **changes)).fit()
    assert (run / "state.safetensors").read_bytes() == before


def test_other_data_are_refused_with_how_many_differ(
    run: Path, pictures: Path, tmp_path: Path, small_tokenizer: Path
) -> None:
    def refused(change: Callable[[Path], object], message: str) -> None:
        folder = Path(shutil.copytree(pictures, tmp_path / "changed"))
        change(folder)
        with pytest.raises(ValueError, match=rf"another run: {message}\. resume="):
            make_trainer(run, folder, small_tokenizer, SHORT).fit()
        shutil.rmtree(folder)

    refused(
        lambda folder: edit_metadata(folder, lambda rows: rows[2].update(text="a word")),
        "captions: 1 of 6 are new, 1 of the 6 there are gone",
    )
    refused(
        lambda folder: shutil.copy(folder / "5.png", folder / "3.png"),
        "images: 1 of 6 are new, 1 of the 6 there are gone",
    )
    refused(
        lambda folder: edit_metadata(folder, lambda rows: rows.pop()),
        "images: 0 of 5 are new, 1 of the 6 there are gone; captions: 0 of 5 .*",
    )
    refused(
        lambda folder: edit_metadata(folder, lambda rows: rows.reverse()),
        "images: in another order; captions: in another order",
    )


def test_another_model_is_refused(run: Path, pictures: Path, small_tokenizer: Path) -> None:
    trainer = make_trainer(run, pictures, small_tokenizer, SHORT)
    randomise(trainer.loss, 5)
    with pytest.raises(ValueError, match="another run: unet: not the same. resume="):
        Trainer(trainer.loss, trainer.data, SHORT, run).fit()
    other = make_trainer(run, pictures, small_tokenizer, SHORT)
    other.loss.sigmas = EulerDiscreteScheduler(beta_end=0.02).training_sigmas()
    with pytest.raises(ValueError, match="another run: objective: not the same. resume="):
        Trainer(other.loss, other.data, SHORT, run).fit()


def test_an_adapters_first_weights_are_no_difference_but_its_layout_is(
    pictures: Path, tmp_path: Path, small_tokenizer: Path
) -> None:
    def fit(rank: int, alpha: float) -> list[float]:
        trainer = make_trainer(tmp_path / "unused", pictures, small_tokenizer, SHORT)
        trainer.loss.unet.requires_grad_(False)
        attach(trainer.loss.unet, rank, alpha)  # its first weights are drawn from torch's generator
        return Trainer(trainer.loss, trainer.data, SHORT, tmp_path / "lora").fit()

    assert len(fit(2, 2.0)) == 2 and fit(2, 2.0) == []
    with pytest.raises(ValueError, match="run: trained weights: not the same. resume"):
        fit(3, 3.0)
    with pytest.raises(ValueError, match="another run: unet: not the same"):
        fit(2, 1.0)


def test_a_run_starts_anew_or_goes_on_where_that_is_asked_for(
    run: Path, pictures: Path, small_tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fit(resume: str, **changes: object) -> Trainer:
        first = make_trainer(run, pictures, small_tokenizer, SHORT)
        trainer = Trainer(first.loss, first.data, replace(SHORT, **changes), run, resume=resume)
        trainer.fit(progress=False)
        return trainer

    with caplog.at_level(logging.WARNING, "kolors_core"):
        onward = fit("always", steps=3)
    assert len(onward.losses) == 3 and onward.step == 3
    assert caplog.messages[-1].endswith("at step 2 of 3 of another run (steps: 2 there, 3 here)")
    anew = fit("never", learning_rate=2e-3)
    assert len(anew.losses) == 2 and anew.losses[0] == onward.losses[0] and anew.losses != onward.losses[:2]
    assert fit("same", learning_rate=2e-3).losses == anew.losses, "its state replaced the other's"
    with pytest.raises(ValueError, match="resume must be 'same', 'always' or 'never', got True"):
        fit(True)  # type: ignore[arg-type]


def test_a_constant_schedule_goes_on_for_more_steps_and_not_for_fewer(
    pictures: Path, tmp_path: Path, small_tokenizer: Path
) -> None:
    constant = replace(SHORT, schedule="constant")
    make_trainer(tmp_path, pictures, small_tokenizer, constant).fit()
    more = make_trainer(tmp_path, pictures, small_tokenizer, replace(constant, steps=3))
    assert len(more.fit()) == 1
    with pytest.raises(ValueError, match="another run: steps: 3 done there, 2 here"):
        make_trainer(tmp_path, pictures, small_tokenizer, constant).fit()


def test_a_state_of_an_older_version_is_refused_unless_asked_for(
    run: Path, pictures: Path, small_tokenizer: Path
) -> None:
    file = run / "state.safetensors"
    state = {name: tensor for name, tensor in load_file(file).items() if name != "losses"}
    save_tensors(state, file, {"step": "2"})
    with pytest.raises(ValueError, match="older version, which did not record .*resume='always' goes on"):
        make_trainer(run, pictures, small_tokenizer, SHORT).fit()
    first = make_trainer(run, pictures, small_tokenizer, SHORT)
    trainer = Trainer(first.loss, first.data, replace(SHORT, steps=3), run, resume="always")
    assert trainer.fit() == trainer.losses and trainer.losses.first == 2
    save_tensors(state, file, {"step": "2", "run": "[" * 9999})
    with pytest.raises(ValueError, match="the record of its run: not JSON"):
        make_trainer(run, pictures, small_tokenizer, SHORT).fit()


def test_progress_shows_step_loss_and_rate_and_is_silent_on_request(
    pictures: Path, tmp_path: Path, small_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(tmp_path / "silent", pictures, small_tokenizer, SHORT).fit(progress=False)
    assert capsys.readouterr() == ("", "")
    losses = make_trainer(tmp_path / "shown", pictures, small_tokenizer, SHORT).fit()
    last = capsys.readouterr().err.split("\r")[-1]
    assert "training: 100%" in last and "2/2" in last
    assert f"loss {sum(losses) / 2:.4f}, learning rate 1.0e-03" in last


def test_losses_have_a_short_repr() -> None:
    losses = Losses([4.0] * 5 + [2.0] * 15, first=3)
    assert repr(losses) == "Losses(steps 3 to 22: 4.0000 -> 2.0000, means of 2)"
    assert repr(Losses()) == "Losses(no steps)" and losses == [4.0] * 5 + [2.0] * 15


def test_digests_change_with_a_value_a_name_and_a_setting() -> None:
    model = torch.nn.Linear(3, 2).double()
    first = digest_model(model)
    assert digest_model(model) == first and first.startswith("sha256:")
    with torch.no_grad():
        model.weight[1, 2] += 1e-12
    assert digest_model(model) != first
    assert digest(b"a", torch.zeros(2)) != digest(b"a", torch.zeros(3))
    record = {"\x1b[2J": 1, "same": [1]}
    assert differences('{"\\u001b[2J": "\\u001b", "same": [1]}', record) == [
        "\\x1b[2J: '\\x1b' there, 1 here"
    ]
