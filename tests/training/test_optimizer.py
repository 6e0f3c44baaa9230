"""Any optimizer and any groups of parameters: trained, saved, resumed, on one process and on two."""

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kolors_core.training.config import ParameterGroup, TrainingConfig
from kolors_core.training.optimizer import MakeOptimizer
from kolors_core.training.trainer import Trainer
from tests.support.small_training import (
    ON_TWO,
    SETTINGS,
    EightBit,
    Fit,
    Points,
    fit_killed_and_resumed,
    fit_on_two,
    momentum_sgd,
    read_log,
)
from tests.support.two_processes import start_two
from tests.support.versions import shards_on_cpu
from weights_convert.safetensors_files import Source, save_tensors


class Particular(torch.optim.SGD):
    """Keeps its rate as a tensor, which torchao's insist on, and finds a number late, as Prodigy does."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, momentum=0.9)
        for group in self.param_groups:
            group["lr"] = torch.tensor(group["lr"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            if not isinstance(group["lr"], torch.Tensor):
                raise RuntimeError("lr was changed to a non-Tensor object")
            norm = sum(p.grad.norm().item() for p in group["params"])
            if norm:
                group["distance"] = group.get("distance", 0.0) + norm
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p *= 1 - 1e-3 * group.get("distance", 0.0)


OPTIMIZERS: dict[str, MakeOptimizer | None] = {
    "AdamW of the config": None, "Adafactor": torch.optim.Adafactor, "SGD": momentum_sgd,
    "8 bits": EightBit, "a rate as a tensor": Particular,
    "NAdam": torch.optim.NAdam, "Rprop": torch.optim.Rprop, "ASGD": torch.optim.ASGD,
}  # fmt: skip


def train(folder: Path, config: TrainingConfig = SETTINGS, **options: Any) -> Trainer:
    trainer = Trainer(Fit(), Points(), config, folder, **options)
    trainer.fit(progress=False)
    return trainer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_goes_on_to_the_same_losses(name: str, tmp_path: Path) -> None:
    make = OPTIMIZERS[name]
    whole = train(tmp_path / "whole", optimizer=make)
    assert fit_killed_and_resumed(tmp_path / "parts", make, SETTINGS) == whole.losses[3:]
    first, second = (load_file(tmp_path / run / "state.safetensors") for run in ("whole", "parts"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert whole.losses != train(tmp_path / "other", replace(SETTINGS, learning_rate=2e-2),
                                 optimizer=make).losses  # fmt: skip


def test_a_state_of_a_version_that_saved_adamws_moments_alone_goes_on(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")

    def age(file: Path) -> None:
        metadata = Source([file]).metadata(file) or {}
        state = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("step.")}
        assert len(state) == 4 * len(whole.named) + 1, "weights, two moments, average; losses"
        save_tensors(state, file, {name: metadata[name] for name in ("step", "run")})

    assert fit_killed_and_resumed(tmp_path / "parts", None, SETTINGS, age) == whole.losses[3:]


@shards_on_cpu
def test_two_processes_with_any_optimizer_train_as_one_does(tmp_path: Path) -> None:
    """DDP and FSDP2, killed and resumed, with parts of batches."""
    for process in start_two(fit_on_two, log := tmp_path / "log", tmp_path):
        process.join(120)
        assert process.exitcode == 0, log.read_text()[-3000:]
    found = dict(line.split("|") for line in (tmp_path / "losses.txt").read_text().splitlines())
    counts = found.pop("exchanges and buckets")
    assert counts == "(3, 1)", "an exchange a batch, not a part; gradients stay in the one bucket"
    compiled, expected = ast.literal_eval(found["compiled"]), train(tmp_path / "one").losses
    assert compiled == pytest.approx(expected, rel=1e-5)
    for (name, _), make in ON_TWO.items():
        expected = train(tmp_path / name, optimizer=make).losses[3:]
        assert ast.literal_eval(found[name]) == pytest.approx(expected, rel=1e-5), name
        logs = (read_log(tmp_path / run) for run in (f"{name} on two", name))
        for one, other in zip(*logs, strict=True):
            for column in ("step", "loss", "gradient_norm", "error_right"):
                assert float(one[column]) == pytest.approx(float(other[column]), rel=1e-4), (name, column)


def test_another_optimizer_is_another_run_and_starts_anew_where_that_is_asked_for(tmp_path: Path) -> None:
    before = train(tmp_path, replace(SETTINGS, steps=3, schedule="constant"))
    config = replace(SETTINGS, schedule="constant")
    with pytest.raises(ValueError, match="another run: optimizer: None there, 'SGD' here; parameter groups"):
        train(tmp_path, config, optimizer=momentum_sgd)
    onward = train(tmp_path, config, optimizer=momentum_sgd, resume="always")
    assert len(onward.losses) == 6 and onward.losses[:3] == before.losses
    assert {key for state in onward.optimizer.state.values() for key in state} == {"momentum_buffer"}
    with pytest.raises(ValueError, match="parameter groups: 1 of 1 are new"):
        train(tmp_path, config, optimizer=lambda groups: torch.optim.SGD(groups, momentum=0.5))
    assert "optimizer" not in Trainer(Fit(), Points(), config, tmp_path).record, "older states go on"


def test_groups_have_their_own_rate_and_decay_with_the_schedule(tmp_path: Path) -> None:
    groups = (
        ParameterGroup(pattern="*.norm.*", weight_decay=0.0),
        ParameterGroup(pattern="blocks.0.*", learning_rate=1e-3),
        ParameterGroup(pattern="blocks.*.bias", frozen=True),
    )
    config = replace(SETTINGS, groups=groups)
    start, trainer = Fit().state_dict(), train(tmp_path, config)
    frozen = {"blocks.1.linear.bias"}, {"blocks.0.linear.bias"}
    after = trainer.loss.state_dict()
    assert {name for name in start if torch.equal(start[name], after[name])} == frozen[0]
    assert frozen[0].isdisjoint(trainer.named) and frozen[1] <= trainer.named.keys(), "the first that matches"
    own = {name: group for group in trainer.optimizer.param_groups
           for name, p in trainer.named.items() if any(p is q for q in group["params"])}  # fmt: skip
    factor = SETTINGS.learning_rate_at(5) / SETTINGS.learning_rate
    expected = {
        "blocks.1.norm.bias": (1e-2, 0.0),
        "blocks.0.linear.weight": (1e-3, 0.01),
        "out.bias": (1e-2, 0.01),
    }
    for name, (rate, decay) in expected.items():
        assert own[name]["lr"] == pytest.approx(rate * factor) and own[name]["weight_decay"] == decay
    assert factor < 0.5 and len(own) == len(trainer.named) == len(start) - 1
    assert json.loads(json.dumps(config.record()))["groups"][1]["learning_rate"] == 1e-3
    assert "groups" not in SETTINGS.record(), "older states go on"
    assert fit_killed_and_resumed(tmp_path / "parts", None, config) == trainer.losses[3:]
    with pytest.raises(ValueError, match="another run: groups"):
        train(tmp_path, replace(config, groups=groups[:2]))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((ParameterGroup(pattern="*.nrom.*"),), r"'\*.nrom.\*' matches no parameter .*blocks.0.linear.weig"),
        ((ParameterGroup(pattern="*"), ParameterGroup(pattern="out.*")), "'out.*' matches only parameters"),
        ((ParameterGroup(pattern="*", frozen=True),), "nothing to train"),
    ],
)  # fmt: skip
def test_groups_that_select_nothing_are_refused(
    groups: tuple[ParameterGroup, ...], message: str, tmp_path: Path
) -> None:
    loss = Fit()
    with pytest.raises(ValueError, match=message):
        Trainer(loss, Points(), replace(SETTINGS, groups=groups), tmp_path)
    assert message == "nothing to train" or all(p.requires_grad for p in loss.parameters())


def test_weights_of_half_precision_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loss = Fit()
    loss.out.to(torch.bfloat16)
    Trainer(loss, Points(), SETTINGS, tmp_path)
    [message] = [record.getMessage() for record in caplog.records]
    assert "2 of 10 trained tensors are torch.bfloat16, such as out.weight, and small updates" in message
    loss.out.requires_grad_(False)
    Trainer(loss, Points(), SETTINGS, tmp_path)
    assert len(caplog.records) == 1, "what is frozen may be of half precision"


def test_bad_optimizers_and_groups_are_named(tmp_path: Path) -> None:
    for make, changes, message in (
        (lambda groups: groups, {}, "optimizer must be a torch.optim class, .* it returned a list"),
        ("SGD", {}, "optimizer must be a torch.optim class, .* returns an optimizer; got 'SGD'"),
        (lambda groups: torch.optim.SGD(groups[0]["params"][1:]), {}, "each parameter .*it has 9 of the 10"),
        (torch.optim.SGD, {"adam_beta2": 0.99}, "adam_beta2 is of the AdamW .* without `optimizer`, .*SGD"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Trainer(Fit(), Points(), replace(SETTINGS, **changes), tmp_path, optimizer=make)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group 'a' is frozen: its learning_rate has no effect"):
        ParameterGroup(pattern="a", learning_rate=1.0, frozen=True)
    with pytest.raises(ValueError, match="weight_decay must be 0 or more, got -1"):
        ParameterGroup(pattern="a", weight_decay=-1.0)
    with pytest.raises(ValueError, match="groups must be a tuple of ParameterGroup, got 'a'"):
        replace(SETTINGS, groups="a")  # type: ignore[arg-type]
