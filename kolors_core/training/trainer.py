"""Training: one loop for full models, LoRA, ControlNets and words, on one process or many.

Each rank takes its part of a batch that depends on seed and step alone (objective.py): so a killed run goes
on to the same losses, and many processes train as one does. Run under `torchrun` for DDP, or with
`shard=True` for FSDP2.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from kolors_core.module import is_block
from kolors_core.training.loss import TrainingConfig
from weights_convert.safetensors_files import Source, save_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each weight


class Steps(Protocol):
    """Where a run's batches come from: a function of the step alone, so that a run can be taken up again."""

    def at(self, step: int, part: slice, device: torch.device) -> Any:
        """The pictures `part` of the batch of a step."""
        ...


class Trainer:
    """One run: `fit()` goes from the last saved state in `folder`, or from the start, to `config.steps`.

    objective: a module that makes a mean loss of one of `data`'s batches; its parameters that require a
    gradient are trained. on_step(step, loss): on every rank, after each step; the loss is that of the whole
    batch.
    """

    def __init__(
        self,
        objective: nn.Module,
        data: Steps,
        config: TrainingConfig,
        folder: str | Path,
        on_step: Callable[[int, float], None] = lambda step, loss: None,
    ) -> None:
        self.objective, self.data, self.config, self.on_step = objective, data, config, on_step
        self.folder = Path(folder)
        self.device = next(objective.parameters()).device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if config.batch_size % (self.world * config.accumulate):
            parts = f"{self.world} processes times accumulate {config.accumulate}"
            raise ValueError(f"batch_size must be a multiple of {parts}, got {config.batch_size}")
        if not any(parameter.requires_grad for parameter in objective.parameters()):
            raise ValueError("nothing to train: no parameter requires a gradient")
        if config.checkpoint_blocks:
            checkpoint_blocks(objective)
        self.module = self._spread()
        self.named = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.named.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.ema = {n: p.detach().clone() for n, p in self.named.items()} if config.ema else {}
        self.step = 0

    def _spread(self) -> nn.Module:
        """The objective as it is run: alone, under DDP, or sharded in place by FSDP2."""
        if self.config.shard:
            for block in _blocks(self.objective):
                fully_shard(block)
            fully_shard(self.objective)
            return self.objective
        return DistributedDataParallel(self.objective) if self.world > 1 else self.objective

    def fit(self) -> list[float]:
        """Train to the end; returns the loss of each step of this call."""
        self._resume()
        losses = []
        while self.step < self.config.steps:
            losses.append(self._one_step())
            self.on_step(self.step, losses[-1])
            self.step += 1
            if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                self.save()
        return losses

    def _one_step(self) -> float:
        config, share = self.config, self.config.batch_size // self.world
        size = share // config.accumulate
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(self.step)
        total = torch.zeros((), device=self.device)
        for i in range(config.accumulate):
            start = self.rank * share + i * size
            batch = self.data.at(self.step, slice(start, start + size), self.device)
            self._sync_gradients(i == config.accumulate - 1)
            with torch.autocast(self.device.type, config.dtype, enabled=config.dtype != torch.float32):
                loss = self.module(batch) / config.accumulate
            loss.backward()
            total += loss.detach()
        if config.clip:
            nn.utils.clip_grad_norm_(self.named.values(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._average()
        if self.world > 1:
            dist.all_reduce(total)
        loss = total.item() / self.world
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of step {self.step} is {loss}: a lower learning rate may help"
            )
        return loss

    def _sync_gradients(self, is_last: bool) -> None:
        """Ranks exchange gradients once a step, not once a part of it."""
        if self.config.shard:
            self.module.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        elif self.world > 1:
            self.module.require_backward_grad_sync = is_last  # type: ignore[assignment]

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        for name, average in self.ema.items():
            average.lerp_(self.named[name], 1 - decay)

    def save(self) -> None:
        """Write step, weights, moments and average to `folder/state.safetensors`, whole or not at all."""
        tensors = {name: _whole(tensor) for name, tensor in self._state().items()}
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(tensors, self.folder / "state.safetensors", {"step": str(self.step)})
        if self.world > 1:
            dist.barrier()

    def _state(self) -> dict[str, Tensor]:
        """The tensors that a run goes on with, by their names in the file; AdamW has its moments by then."""
        state = {f"weights.{name}": parameter for name, parameter in self.named.items()}
        for moment in MOMENTS:
            state |= {f"{moment}.{name}": self.optimizer.state[p][moment] for name, p in self.named.items()}
        return state | {f"ema.{name}": average for name, average in self.ema.items()}

    @torch.no_grad()
    def _resume(self) -> None:
        file = self.folder / "state.safetensors"
        if not file.exists():
            return
        for parameter in self.named.values():  # as AdamW makes it before its first step
            moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        source, state = Source([file]), self._state()
        step = (source.metadata(file) or {}).get("step", "")
        for name, tensor in state.items():
            if name not in source:
                raise ValueError(f"{file}: is of another run: it has no {name}")
            if (got := source.shape(name)) != (wanted := tuple(tensor.shape)):
                raise ValueError(f"{file}: is of another run: {name} is {list(got)}, wanted {list(wanted)}")
        if not step.isdecimal():
            raise ValueError(f"{file}: its metadata give step {step[:100]!r}, wanted a whole number")
        self.step = int(step)
        tensors = load_file(file, device=str(self.device))
        for name, tensor in state.items():
            _fill(tensor, tensors[name])
        for parameter in self.named.values():
            self.optimizer.state[parameter]["step"].fill_(self.step)

    @torch.no_grad()
    def take_average(self) -> None:
        """Put the moving average in the weights' place, for use; to train on from there is another run.

        ValueError if the config asks for none.
        """
        if not self.ema:
            raise ValueError(f"there is no moving average to take: ema is {self.config.ema}")
        for name, average in self.ema.items():
            self.named[name].copy_(average)


def checkpoint_blocks(model: nn.Module) -> None:
    """Recompute the activations of every block in the backward pass; see `Module.is_block`."""
    for block in _blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_block(module)]


def _whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all ranks if it is sharded, on the CPU."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().contiguous()


def _fill(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole value in, or this rank's shard of it."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
    tensor.copy_(value)
