"""The smallest training, in milliseconds: linear blocks learn a linear map, alone or on two processes."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from kolors_core.performance.compile import compile_blocks
from kolors_core.performance.processes import join_processes
from kolors_core.training.config import TrainingConfig
from kolors_core.training.optimizer import MakeOptimizer
from kolors_core.training.step import Means, Step
from kolors_core.training.trainer import Trainer
from weights_convert.safetensors_files import save_tensors

SETTINGS = TrainingConfig(
    steps=6, batch_size=8, learning_rate=1e-2, warmup=2, save_every=3, schedule="cosine", ema_decay=0.9
)


class Block(nn.Module):
    """A linear map with a norm."""

    is_block = True

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        draw = torch.Generator().manual_seed(seed)
        for parameter in self.linear.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)).tanh()


class Fit(nn.Module):
    """The squared error of two blocks and an output."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, seed) for seed in range(2)])
        self.out = nn.Linear(width, 1)
        self.out.weight.data.fill_(0.5)
        self.out.bias.data.zero_()
        self.means = Means()

    def each(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, wanted = batch
        for block in self.blocks:
            x = block(x)
        return (self.out(x) - wanted).square().mean(dim=1)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        each = self.each(batch)
        self.means.add("error_right", each, batch[0][:, 0] > 0)
        return each.mean()


class Points:
    """Random points and the sums of their coordinates; of another seed, others."""

    def __init__(self, count: int = SETTINGS.batch_size, seed: int = 0, width: int = 6) -> None:
        self.count, self.seed, self.width = count, seed, width

    def batch(self, step: int, rows: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(1000 * self.seed + step)
        x = torch.randn(self.count, self.width, generator=draw)
        return x[rows].to(device), x.sum(1, keepdim=True)[rows].to(device)

    def record(self) -> dict[str, Any]:
        return {"points": self.seed}


class EightBit(torch.optim.Optimizer):
    """Momentum kept in 8 bits with a scale, as bitsandbytes keeps it; the step is a Python number."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            group["passes"] = group.get("passes", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, codes=torch.zeros_like(p, dtype=torch.int8), scale=torch.ones(1))
                state["step"] += 1
                momentum = 0.9 * state["codes"].float() * state["scale"] + p.grad
                state["scale"] = (momentum.abs().max() / 127).clamp(min=1e-12).reshape(1)
                state["codes"] = (momentum / state["scale"]).round().to(torch.int8)
                p -= group["lr"] * momentum / (1 + 0.1 * state["step"] + 0.1 * group["passes"])


def read_log(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def momentum_sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True)


def fit_killed_and_resumed(
    folder: Path,
    make: MakeOptimizer | None,
    config: TrainingConfig,
    change: Callable[[Path], None] | None = None,
) -> Sequence[float]:
    """Return the losses from the state saved after three steps, once it is changed, of a killed run."""

    def kill(step: Step) -> None:
        if step.step == 4:
            raise InterruptedError

    first = Trainer(Fit(), Points(), config, folder, kill, optimizer=make)
    try:
        first.fit(progress=False)
    except InterruptedError:
        if change is not None:
            change(folder / "state.safetensors")
        return Trainer(Fit(), Points(), config, folder, optimizer=make).fit(progress=False)
    raise AssertionError("it was to be killed")


# Torch's Adafactor computes with none but whole tensors.
ON_TWO: dict[tuple[str, bool], MakeOptimizer | None] = {
    ("Adafactor", False): torch.optim.Adafactor, ("8 bits", False): EightBit,
    ("SGD", True): momentum_sgd, ("NAdam", True): torch.optim.NAdam,
}  # fmt: skip


def fit_on_two(out: Path) -> int:
    """One process of two: optimizers with DDP, or FSDP2; the first writes the losses after resuming."""
    join_processes()
    lines = list[str]()
    for (name, shard), make in ON_TWO.items():
        config = replace(SETTINGS, shard=shard, gradient_accumulation_steps=2)
        losses = fit_killed_and_resumed(out / f"{name} on two", make, config)
        lines.append(f"{name}|{list(losses)}")
    lines.append(f"exchanges and buckets|{count_exchanges(out / 'counted')}")
    lines.append(f"compiled|{list(fit_compiled(out / 'compiled on two'))}")
    if dist.get_rank() == 0:
        (out / "losses.txt").write_text("\n".join(lines))
    return 0


def fit_compiled(folder: Path) -> Sequence[float]:
    """Train compiled blocks with FSDP2, recomputed too; refused where they were compiled before."""
    config, loss = replace(SETTINGS, shard=True, checkpoint_blocks=True), Fit()
    compile_blocks(early := Fit(), backend="aot_eager")
    with pytest.raises(ValueError, match="FSDP2's hooks cannot be compiled"):
        Trainer(early, Points(), config, folder)
    trainer = Trainer(loss, Points(), config, folder)
    assert compile_blocks(loss, backend="aot_eager") == 1
    losses = trainer.fit(progress=False)
    with pytest.raises(ValueError, match="blocks.0.linear.weight is sharded over processes: continue"):
        save_tensors(loss.state_dict(), folder / "loss.safetensors")
    return losses


def count_exchanges(folder: Path) -> tuple[int, int]:
    """Count DDP's exchanges in three batches of two parts, and the storages of gradients after them."""
    config, counted = replace(SETTINGS, steps=3, gradient_accumulation_steps=2), list[int]()
    trainer = Trainer(Fit(), Points(), config, folder)

    def hook(_state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        counted.append(bucket.index())
        return default_hooks.allreduce_hook(None, bucket)

    assert isinstance(trainer.module, DistributedDataParallel)
    trainer.module.register_comm_hook(None, hook)
    trainer.fit(progress=False)
    gradients = [p.grad for p in trainer.named.values() if p.grad is not None]
    assert len(gradients) == len(trainer.named)
    return len(counted), len({gradient.untyped_storage().data_ptr() for gradient in gradients})


def fit_sharded(out: Path, steps: int) -> int:
    """One of some processes with FSDP2: to `steps` steps, with a held-out loss and an image; log and best."""
    join_processes()
    config = replace(SETTINGS, steps=steps, schedule="constant", shard=True, save_every=2, evaluate_every=2)

    def draw() -> Sequence[Image.Image]:
        """Call a part of the loss by itself, as a pipeline does."""
        value = loss.out(loss.blocks[0](torch.ones(1, 6))).item()
        return [Image.new("L", (1, 1), round(100 + 50 * value))]

    loss = Fit()
    trainer = Trainer(loss, Points(), config, out, held_out=Points(seed=7), draw=draw)
    trainer.fit(progress=False)
    return 0
