"""The plan of training: within a tenth of what a step then allocates, as torch's own profiler counts it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from kolors_core.adapters.lora import attach
from kolors_core.chatglm import TextEmbedding
from kolors_core.config import UNetConfig
from kolors_core.devices import onednn_convolves
from kolors_core.module import is_block
from kolors_core.performance.training_memory import Autocast, training_tracker
from kolors_core.pipelines.training_plan import TrainingPlan, example_batch, plan_training
from kolors_core.registry import SkipInit
from kolors_core.training.config import ParameterGroup, TrainingConfig
from kolors_core.training.data import Batch
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer
from kolors_core.unet import UNet
from tests.support.small_training import SETTINGS, Fit, Points, momentum_sgd

GIB = 2**30
MEDIUM = UNetConfig(
    sample_size=16, channels=(64, 128), heads=(1, 2), depths=(0, 1), resnets_per_level=1,
    text_dim=64, context_dim=96, size_dim=16,
)  # fmt: skip
SIZE = 128
CONFIG = TrainingConfig(steps=3, batch_size=4, ema_decay=0.9, max_tokens=24)
# Without oneDNN's, bfloat16 takes minutes on a CPU.
HALF = torch.bfloat16 if onednn_convolves(torch.bfloat16) else torch.float32
# Without AVX2, and on other kinds of CPU, convolutions take a workspace by thread, which is in no plan: it is
# then a lower bound.
OVER = 0.1 if torch.backends.cpu.get_cpu_capability().startswith("AVX") else 0.5
SIGMAS = torch.linspace(0.03, 14, 1100)


class Noise:
    """A source of random batches."""

    def batch(self, step: int, rows: slice, device: torch.device) -> Batch:
        count, side = len(range(CONFIG.batch_size)[rows]), SIZE // 8
        latents, tokens = torch.randn(count, 4, side, side), torch.randn(count, CONFIG.max_tokens, 64)
        text = TextEmbedding(tokens, tokens[:, 0].clone())
        timesteps = torch.randint(1100, (count,))
        return Batch(latents, text, torch.ones(count, 6), timesteps, torch.randn_like(latents))

    def record(self) -> dict[str, Any]:
        return {}


def make_loss(config: TrainingConfig, rank: int | None = None) -> DiffusionLoss:
    unet = UNet(MEDIUM)
    if rank is not None:
        attach(unet.requires_grad_(False), rank)
    return DiffusionLoss(unet, None, SIGMAS, config)


def measure(trainer: Trainer) -> float:
    """GiB of the most that a step allocates beside what was there before, weights and states among it."""
    with trainer._checkpointed_blocks():
        trainer.one_step()
        trainer.step += 1
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            trainer.one_step()
    now = most = 0
    result: Any = watched.profiler
    for event in sorted(result.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most / GIB


def held(trainer: Trainer) -> float:
    """GiB of weights, states and the moving average."""
    states = [t for state in trainer.optimizer.state.values() for t in state.values()]
    tensors = [*trainer.loss.parameters(), *states, *trainer.ema.values()]
    return sum(tensor.nbytes for tensor in tensors) / GIB


@pytest.mark.numerical
@pytest.mark.parametrize(
    ("rank", "settings"),
    [
        (None, {}),
        (None, {"checkpoint_blocks": True, "gradient_accumulation_steps": 2, "dtype": HALF}),
        (8, {"ema_decay": 0.0, "dtype": HALF}),
    ],
    ids=["full", "full, recomputed, in parts", "LoRA"],
)
def test_a_step_takes_what_was_planned(
    rank: int | None, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On top of the weights, and as a whole; what is kept by block is a part of it."""
    config = replace(CONFIG, **settings)
    loss = make_loss(config, rank)
    made = plan_training(loss, config, SIZE, SIZE)
    assert capsys.readouterr().out == f"{made}\n"
    trainer = Trainer(loss, Noise(), config, tmp_path)
    measured = measure(trainer)
    assert (1 - OVER) * measured <= max(made.passes, made.update) <= 1.1 * measured
    assert (1 - OVER) * measured <= made.total - held(trainer) <= 1.1 * measured
    assert made.weights + made.optimizer + made.average == pytest.approx(held(trainer), rel=1e-3)
    assert set(made.kept) == {""} | {name for name, module in loss.named_modules() if is_block(module)}
    assert made.gradients == sum(p.nbytes for p in trainer.named.values()) / GIB
    assert sum(made.levels().values()) == pytest.approx(sum(made.kept.values()))
    assert sum(made.kept.values()) < made.passes and made.update < 1.3 * made.gradients


def plan_fit(config: TrainingConfig, loss: Fit | None = None, **arguments: Any) -> TrainingPlan:
    """Plan the smallest training, wide enough to be seen."""
    batch = Points(2, width=64).batch(0, slice(0, 2), torch.device("cpu"))
    loss = loss or Fit(64)
    return plan_training(loss, config, batch=batch, is_printed=False, **arguments)


def test_processes_have_all_or_their_share() -> None:
    """DDP has gradients all the time, as second parts do; FSDP2 rows of weights, two whole blocks, the rest.

    The expected bytes are written out.
    """
    config, block, rest = replace(SETTINGS, batch_size=64), 4 * (64 * 64 + 3 * 64), 4 * 65
    whole = 2 * block + rest
    alone, ddp = plan_fit(config), plan_fit(config, processes=8)
    assert alone.weights == alone.gradients == alone.average == whole / GIB
    assert alone.optimizer == (2 * whole + 4 * 10) / GIB  # and the number of steps of each parameter
    in_parts = plan_fit(replace(config, gradient_accumulation_steps=2))
    assert replace(ddp, run=in_parts.run) == in_parts and alone.passes < ddp.passes < 2 * alone.passes
    for processes, rows in ((8, 8), (64, 1)):
        shard = replace(config, shard=True)
        shared = plan_fit(shard, processes=processes)
        own = 4 * (2 * (64 * rows + 3 * rows) + -(-64 // 64) * 64 + 1)  # the output's one row is the first's
        assert shared.weights == shared.average == shared.gradients == own / GIB
        assert shared.gathered == (rest + 2 * block + rest + block) / GIB
        assert shared.passes > shared.gathered
    in_parts = plan_fit(replace(config, shard=True, gradient_accumulation_steps=8), processes=8)
    assert in_parts.gradients == (whole + 4 * (2 * (64 * 8 + 3 * 8) + 65)) / GIB  # whole until the last part
    assert plan_fit(replace(config, shard=True)).gathered == 0


def test_the_batch_is_of_the_latents_and_inputs_that_the_unet_has() -> None:
    """Of an autoencoder with other channels, beside a mask and masked latents."""
    loss = DiffusionLoss(UNet(replace(MEDIUM, in_channels=17, out_channels=8)), None, SIGMAS, CONFIG)
    batch = example_batch(loss, CONFIG, 2, SIZE, 64)
    assert batch.latents.shape == batch.noise.shape == (2, 8, SIZE // 8, 8) and batch.extra is not None
    assert batch.extra.shape == (2, 9, SIZE // 8, 8)
    assert plan_training(loss, CONFIG, SIZE, 64, is_printed=False).passes > 0


def test_what_is_frozen_and_other_optimizers_take_less() -> None:
    frozen = replace(SETTINGS, groups=(ParameterGroup(pattern="blocks.0.*", frozen=True),))
    whole, less = plan_fit(SETTINGS), plan_fit(frozen)
    assert less.weights == whole.weights and less.gradients < 0.6 * whole.gradients
    assert plan_fit(SETTINGS, optimizer=momentum_sgd).optimizer == whole.gradients
    assert plan_fit(replace(SETTINGS, ema_decay=0.0)).average == 0


def test_planning_changes_nothing_and_needs_no_weights() -> None:
    config = replace(CONFIG, checkpoint_blocks=True, batch_size=1)
    with torch.device("meta"), SkipInit():
        empty = make_loss(config)
    with pytest.raises(ValueError, match="no blocks to recompute"):
        plan_fit(config, loss=nn.Linear(64, 1))  # type: ignore[arg-type]
    loss, state = Fit(64), torch.get_rng_state()
    called, before = list[int](), {name: (p, p.clone()) for name, p in loss.named_parameters()}
    loss.out.register_forward_hook(lambda *_: called.append(1))
    plan_fit(replace(SETTINGS, checkpoint_blocks=True), loss)
    assert not called and not loss.means.sums and torch.equal(state, torch.get_rng_state())
    for name, parameter in loss.named_parameters():
        assert before[name][0] is parameter and torch.equal(before[name][1], parameter)
        assert parameter.requires_grad and parameter.grad is None
    assert all("forward" not in vars(module) for module in loss.modules())
    made = plan_training(empty, config, 64, 64, device="cuda", is_printed=False)
    assert made.weights == sum(p.nbytes for p in empty.parameters()) / GIB
    # On CUDA torch's AdamW computes with all parameters at once, on a CPU with one after another.
    assert made.update == pytest.approx(2 * made.gradients, rel=0.01)


@pytest.mark.parametrize("name", ["linear", "conv2d", "layer_norm", "group_norm", "softmax", "matmul"])
def test_autocast_casts_what_torch_does(name: str) -> None:
    run: dict[str, Callable[[Tensor], Tensor]] = {
        "linear": lambda x: F.linear(x, x), "conv2d": lambda x: F.conv2d(x[None, None], x[None, None]),
        "layer_norm": lambda x: F.layer_norm(x, (8,)), "group_norm": lambda x: F.group_norm(x[None], 2),
        "softmax": lambda x: x.softmax(-1), "matmul": lambda x: x @ x,
    }  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            expected = run[name](torch.ones(8, 8, dtype=dtype)).dtype
        empty = torch.empty(8, 8, dtype=dtype, device="meta")
        with training_tracker("cpu"), Autocast("cpu", torch.bfloat16).region():
            assert run[name](empty).dtype == expected
        with training_tracker("cuda"), Autocast("cuda", torch.bfloat16).region():
            in_half = name in ("linear", "conv2d", "matmul")
            assert run[name](empty).dtype == (torch.bfloat16 if in_half else torch.float32)


class Reading(Fit):
    """A loss that reads a value."""

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().forward(batch) * batch[0].sum().item()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"height": 100}, ValueError, "height must be a positive multiple of 8, got 100"),
        ({"width": 0}, ValueError, "width must be a positive whole number, got 0"),
        ({"processes": 3}, ValueError, "batch_size must be a multiple of 3 processes times gradient_accum"),
        ({"device": "toaster"}, ValueError, "expected a device of this machine"),
        ({"batch": None}, TypeError, "batch: a Fit needs one of its own, as its data source makes"),
        ({"loss": Reading(64)}, NotImplementedError, "the model reads one of a torch.float32"),
        ({"loss": Fit(64).requires_grad_(False)}, ValueError, "nothing to train"),
    ],
)
def test_errors_say_what_came_and_what_was_wanted(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    given: dict[str, Any] = {"loss": Fit(64), "config": SETTINGS, "is_printed": False}
    given["batch"] = Points(2, width=64).batch(0, slice(0, 2), torch.device("cpu"))
    with pytest.raises(error, match=message):
        plan_training(**given | arguments)
