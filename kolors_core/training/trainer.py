"""Training loop for full models, LoRA, ControlNets and learned words, on one process or many.

A resumed run has the same losses, and many processes train as one, each on its rows of every batch (data.py).
A state is saved with the record of its run (run_record.py), and another run does not go on from it.
Run under `torchrun` for DDP, or with `shard=True` for FSDP2.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from kolors_core.module import find_blocks, is_block
from kolors_core.training.average import averaged, check_copies, make_average
from kolors_core.training.config import TrainingConfig
from kolors_core.training.evaluation import as_images, best_step, is_best, is_over, undisturbed
from kolors_core.training.logs import RunLog
from kolors_core.training.optimizer import (
    MakeOptimizer,
    create_state,
    forget_state,
    freeze,
    group_numbers,
    make_optimizer,
    record_optimizer,
    set_group_numbers,
    set_numbers,
    set_rate,
    state_tensors,
)
from kolors_core.training.run_record import Losses, differences, digest, record_run
from kolors_core.training.state import SavedState, write_state
from kolors_core.training.step import Means, OnStep, Step, peak_memory
from kolors_core.validation import short_repr
from weights_convert.untrusted_files import parse_object

if TYPE_CHECKING:
    from PIL.Image import Image

OTHER_RUN = "resume='never' starts anew, resume='always' goes on from it"
RESUME = ("same", "always", "never")
SHOWN = 20  # steps of the mean loss that the progress bar shows
logger = logging.getLogger("kolors_core")


class BatchSource(Protocol):
    """Source of a run's batches: a function of the step alone, so that a run can be resumed."""

    def batch(self, step: int, rows: slice, device: torch.device) -> Any:
        """Build the `rows` of a step's batch."""

    def record(self) -> Mapping[str, Any]:
        """Record what batches depend on besides the step, as JSON: settings, digests, lists of digests."""
        ...


class Trainer:
    """Trainer of one run: `fit()` trains from the last state in `folder`, or from step 0, to `config.steps`.

    loss: a module that maps one of `data`'s batches to its mean loss; its parameters that require a gradient
    are trained. on_step: called on every rank after each step (step.py; logs.py has loggers of other
    libraries). folder: has the state, and a log (logs.py).
    resume: from a state in `folder` that is of the "same" run (`fit` raises ValueError with what differs),
    "always", or "never", which starts at step 0 and replaces it. losses: of all steps, also before resuming.
    optimizer: makes one from parameter groups, as the classes of torch.optim do; AdamW if None.
    average: modules of the loss, by the names of those whose moving average they hold, for a loss that
    computes with it: frozen copies. held_out: whose loss is measured every `evaluate_every` steps, of the
    average if there is one; the weights of the best are kept in `folder/best.safetensors`. draw: called then
    on every rank, with the average too; returns images for the log, of prompts that stay the same.
    """

    def __init__(
        self, loss: nn.Module, data: BatchSource, config: TrainingConfig, folder: str | Path,
        on_step: OnStep = lambda step: None, *, resume: str = "same",
        optimizer: MakeOptimizer | None = None, average: Mapping[str, nn.Module] | None = None,
        held_out: BatchSource | None = None, draw: "Callable[[], Sequence[Image]] | None" = None,
    ) -> None:  # fmt: skip
        if resume not in RESUME:
            raise ValueError(f"resume must be 'same', 'always' or 'never', got {short_repr(resume)}")
        self.loss, self.data, self.config, self.on_step = loss, data, config, on_step
        self.held_out, self.draw = held_out, draw
        self.held_out_losses: dict[int, float] = {}  # by the steps that were done
        if config.patience is not None and held_out is None:
            raise ValueError("patience has no effect without held_out")
        self.resume, self.is_resumed, self.losses = resume, False, Losses()
        self.folder, self.step, self.device = Path(folder), 0, next(loss.parameters()).device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if config.batch_size % (self.world * (accumulated := config.gradient_accumulation_steps)):
            parts = f"{self.world} processes times gradient_accumulation_steps {accumulated}"
            raise ValueError(f"batch_size must be a multiple of {parts}, got {config.batch_size}")
        freeze(loss, config.groups)
        if not any(parameter.requires_grad for parameter in loss.parameters()):
            raise ValueError("nothing to train: no parameter requires a gradient")
        if average and not config.ema_decay:
            raise ValueError("average has no effect with an ema_decay of 0")
        check_copies(loss, average or {})
        self.record = record_run(config.record(), loss, data.record())  # while its weights are whole
        self.blocks = [module for module in loss.modules() if is_block(module)]
        if config.checkpoint_blocks:
            find_blocks(loss, "recompute")
        if config.shard and any(module._compiled_call_impl for module in loss.modules()):
            raise ValueError(
                "shard: FSDP2's hooks cannot be compiled: call compile_blocks after Trainer(...)"
            )
        for module in [*self.blocks, loss] if config.shard else ():
            fully_shard(module)
        self.is_ddp, self.has_stepped = self.world > 1 and not config.shard, False
        self.module = DistributedDataParallel(loss, gradient_as_bucket_view=True) if self.is_ddp else loss
        self.named = {n: p for n, p in loss.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.named, config, optimizer)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]  # the peak of each
        self.first_numbers = group_numbers(self.optimizer)
        self.record |= {} if optimizer is None else record_optimizer(self.optimizer)
        if held_out is not None:
            measured = json.dumps([held_out.record(), config.held_out_batches], sort_keys=True, default=str)
            self.record["held out"] = digest(measured.encode())
        self.ema = make_average(self.named, average or {}) if config.ema_decay else {}

    def fit(self, progress: bool = True) -> Losses:
        """Train to the end; return the loss of each step of this call.

        progress: show a bar with the step, the mean loss of the last steps and the rate, on the first rank.
        """
        self._resume()
        if self.held_out is not None:
            next(self._parts(self.held_out, 0))  # what is wrong with it is raised now, not after many steps
        first = self.step
        if first == 0 and self.rank == 0:
            (self.folder / "best.safetensors").unlink(missing_ok=True)  # of a run that this one replaces
        facts = {"settings": asdict(self.config), "record": self.record}
        log = RunLog(self.folder, facts, first) if self.rank == 0 else None
        with self._checkpointed_blocks(), self._progress_bar(progress and self.rank == 0) as show:
            while self.step < self.config.steps and not self.is_over:
                step = self._evaluate(self.one_step())
                self.losses.append(step.loss)
                if log is not None:
                    log.write(step)
                self.on_step(step)
                self.step += 1
                show()
                if self.step % self.config.save_every == 0 or self.step == self.config.steps or self.is_over:
                    self.save()
        if self.is_over and self.rank == 0:
            best = best_step(self.held_out_losses)
            logger.warning("%s: ended after %d steps; the best held-out loss was after %d", self.folder,
                           self.step, best)  # fmt: skip
        return Losses(self.losses[first - self.losses.first :], first)

    @contextmanager
    def _checkpointed_blocks(self) -> Iterator[None]:
        """Recompute activations within the block, if the config says so; the model stays as it was."""
        blocks = self.blocks if self.config.checkpoint_blocks else []
        own = [vars(block).get("forward") for block in blocks]  # of its own, not of its class
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        try:
            yield
        finally:
            for block, forward in zip(blocks, own, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward

    @contextmanager
    def _progress_bar(self, is_shown: bool) -> Iterator[Callable[[], None]]:
        """Yield a function that shows the step that is done."""
        from tqdm.auto import tqdm

        def show() -> None:
            rate = self.config.learning_rate_at(self.step - 1)
            loss = self.losses.mean(slice(-SHOWN, None))
            bar.set_postfix_str(f"loss {loss:.4f}, learning rate {rate:.1e}", refresh=False)
            bar.update()

        with tqdm(total=self.config.steps, initial=self.step, desc="training", disable=not is_shown) as bar:
            yield show

    def one_step(self) -> Step:
        """Train one step, the next of `fit`; FloatingPointError if its loss or gradient is not finite."""
        start, config = time.perf_counter(), self.config
        rates = [config.learning_rate_at(self.step, rate) for rate in self.rates]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            set_rate(group, rate)  # a LambdaLR has a state to save
        total = torch.zeros((), device=self.device)
        for part, is_last in self._parts(self.data, self.step):
            if config.shard:  # only the last part of a batch reduces gradients over ranks
                self.module.set_requires_gradient_sync(is_last)  # type: ignore[operator]
            elif self.is_ddp:
                self.module.require_backward_grad_sync = is_last  # type: ignore[assignment]
            loss = self._loss(part)
            loss.backward()
            total += loss.detach()
        norm = self._limit_gradients()
        self.optimizer.step()
        # DDP's gradients stay in its buckets, which it lays out anew after the first step.
        self.optimizer.zero_grad(set_to_none=not (self.is_ddp and self.has_stepped))
        self.has_stepped = True
        decay = min(config.ema_decay, (1 + self.step) / (10 + self.step))
        for name, average in self.ema.items():
            average.lerp_(self.named[name].detach(), 1 - decay)
        loss, means = self._over_ranks(total)
        for what, value in (("loss", loss), ("gradient's norm", length := norm.item())):
            if not math.isfinite(value):  # here, as its weights must not be saved over good ones
                hint = "a lower learning rate may help"
                raise FloatingPointError(f"the {what} of step {self.step} is {value}: {hint}")
        if length == self.step == self.rank == 0:
            logger.warning("the gradient of step 0 is 0: nothing that is trained acts on its loss")
        return Step(
            step=self.step, loss=loss, gradient_norm=length, means=means, samples=config.batch_size,
            learning_rates=tuple(rates),
            seconds=time.perf_counter() - start, memory=peak_memory(self.device), resumed=self.is_resumed,
        )  # fmt: skip

    def _parts(self, source: BatchSource, step: int) -> Iterator[tuple[Any, bool]]:
        """Yield the parts of this rank's rows of a batch, and whether it is the last."""
        rows, parts = self.config.batch_size // self.world, self.config.gradient_accumulation_steps
        size = rows // parts
        for i in range(parts):
            start = self.rank * rows + i * size
            yield source.batch(step, slice(start, start + size), self.device), i == parts - 1

    def _loss(self, part: Any) -> Tensor:
        """Compute a part's contribution to the mean loss of the rank's rows."""
        dtype = self.config.dtype
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return self.module(part) / self.config.gradient_accumulation_steps

    def _limit_gradients(self) -> Tensor:
        """Scale gradients to the largest norm that is allowed; return the norm before."""
        if limit := self.config.max_grad_norm:
            norm = nn.utils.clip_grad_norm_(self.named.values(), limit)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.named.values() if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _evaluate(self, step: Step) -> Step:
        """Draw and measure the held-out loss, if it is time; keep the best weights; add what was found."""
        done = self.step + 1
        is_due = done % self.config.evaluate_every == 0 or done == self.config.steps
        if not is_due or (self.held_out is None and self.draw is None):
            return step
        images, found = (), dict[str, float]()
        with self.averaged(), undisturbed(self.loss, self.device), self._unsharded():
            if self.held_out is not None:
                found = self._held_out_loss(self.held_out)
                if is_best(found["loss"], self.held_out_losses):
                    write_state(self.folder, "best", done, self._weights(), {}, {"held_out": found})
                self.held_out_losses[done] = found["loss"]
            if self.draw is not None:
                images = as_images(self.draw())
        return replace(step, held_out=found, images=images)

    def _held_out_loss(self, source: BatchSource) -> dict[str, float]:
        """Compute the mean loss of the held-out batches, and what the loss module measured of them."""
        total, count = torch.zeros((), device=self.device), self.config.held_out_batches
        for step in range(count):
            for part, _ in self._parts(source, step):
                total += self._loss(part) / count
        loss, means = self._over_ranks(total)
        return {"loss": loss, **means}

    @property
    def is_over(self) -> bool:
        """Whether the held-out loss ended the run."""
        return is_over(self.held_out_losses, self.config.patience)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Exchange the weights and their moving average, if there is one, within the block."""
        with averaged(self.named, self.ema):
            yield

    @contextmanager
    def _unsharded(self) -> Iterator[None]:
        """Keep what is in no block whole, so that a part of the loss can be called by itself."""
        if self.config.shard:
            self.module.unshard()  # type: ignore[operator]
        try:
            yield
        finally:
            if self.config.shard:
                self.module.reshard()  # type: ignore[operator]

    def _over_ranks(self, total: Tensor) -> tuple[float, dict[str, float]]:
        """Average a loss over ranks, and what the loss module measured; one transfer for all."""
        measured = getattr(self.loss, "means", None)
        means = measured.take() if isinstance(measured, Means) else {}
        sums = torch.cat([total[None], *means.values()])
        if self.world > 1:
            dist.all_reduce(sums)
        loss, *rest = sums.tolist()
        pairs = zip(means, rest[::2], rest[1::2], strict=True)
        return loss / self.world, {name: value / count for name, value, count in pairs if count}

    def save(self) -> None:
        """Write step, weights, the optimizer's state and the average to `folder/state.safetensors`."""
        small = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        if self.held_out_losses:
            small["held_out"] = torch.tensor([*self.held_out_losses.items()], dtype=torch.float64)  # [n, 2]
        facts = {"run": self.record, "optimizer": {"groups": self._changed_numbers()}}
        write_state(self.folder, "state", self.step, self._state(), small, facts)

    def _weights(self) -> dict[str, Tensor]:
        return {f"weights.{name}": parameter for name, parameter in self.named.items()}

    def _state(self) -> dict[str, Tensor]:
        """List the tensors of a run's state by their names in the file."""
        state = self._weights() | state_tensors(self.optimizer, self.named)
        return state | {f"ema.{name}": average for name, average in self.ema.items()}

    def _changed_numbers(self) -> list[dict[str, Any]]:
        """List the numbers of each parameter group that changed while training."""
        both = zip(group_numbers(self.optimizer), self.first_numbers, strict=True)
        return [{key: v for key, v in now.items() if v != before.get(key)} for now, before in both]

    def _resume(self) -> None:
        file = self.folder / "state.safetensors"
        if self.resume == "never" or not file.exists():
            return
        saved = SavedState(file)
        run = saved.metadata.get("run")
        self._check_same_run(file, saved.step, run)
        if json.loads(run or "{}").get("optimizer") == self.record.get("optimizer"):
            self._resume_with_optimizer(saved)
        else:
            saved.copy_to(self._state())
        self.is_resumed, self.step, losses = True, saved.step, saved.numbers("losses").flatten().tolist()
        self.losses = Losses(losses, self.step - len(losses))
        self.held_out_losses = {int(step): loss for step, loss in saved.numbers("held_out").tolist()}

    def _resume_with_optimizer(self, saved: SavedState) -> None:
        create_state(self.optimizer)
        forget_state(self.optimizer, self.named, saved)
        state = self._state()
        steps = {name: tensor for name, tensor in state.items() if name.startswith("step.")}
        if not any(name in saved for name in steps):  # of a version that did not save AdamW's
            for name, tensor in steps.items():
                state.pop(name)
                tensor.fill_(saved.step)
        saved.copy_to(state)
        set_numbers(self.optimizer, self.named, state)
        changed = parse_object(saved.metadata.get("optimizer", "{}").encode(), f"{saved.file}: optimizer")
        numbers = changed.get("groups", self.first_numbers)
        if len(numbers) == len(self.first_numbers):  # else of other groups, from which it is asked to go on
            for each in self.first_numbers, numbers:
                set_group_numbers(self.optimizer, each)

    def _check_same_run(self, file: Path, step: int, saved: str | None) -> None:
        """Log the step of a state of the same run; ValueError with what differs, unless that is asked for."""
        if saved is None:
            different = ["it is of an older version, which did not record settings and data"]
        else:
            different = differences(saved, self.record)
        if step > self.config.steps:
            different.append(f"steps: {step} done there, {self.config.steps} here")
        if different and self.resume == "same":
            raise ValueError(f"{file}: is of another run: {'; '.join(different)}. {OTHER_RUN}")
        if self.rank == 0:
            run = f" of another run ({'; '.join(different)})" if different else ""
            logger.warning("%s: already at step %d of %d%s", file, step, self.config.steps, run)

    def load_best_weights(self) -> int:
        """Copy the weights of the best held-out loss to the model; return after how many steps it was.

        FileNotFoundError if none was measured.
        """
        saved = SavedState(self.folder / "best.safetensors")
        saved.copy_to(self._weights())
        return saved.step

    @torch.no_grad()
    def load_ema_weights(self) -> None:
        """Copy the moving average to the weights, for inference; ValueError if `ema_decay` is 0."""
        if not self.ema:
            raise ValueError(f"there is no moving average to load: ema_decay is {self.config.ema_decay}")
        for name, average in self.ema.items():
            self.named[name].copy_(average)
