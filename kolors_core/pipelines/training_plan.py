"""Memory plans of training: a step runs without values, and what each process would allocate is counted.

    plan_training(loss, config, processes=8)  # on the meta device too: no weight is read or copied

Counted are weights, gradients, the optimizer's state, the moving average, what is kept for the backward pass
by block, and what a step allocates on top of it, with the config's autocast, checkpointing, parts of a batch
and way to divide it. Each process of DDP has all of it, and gradients in its buckets all the time; of FSDP2
its share of the rows of each weight, and whole the blocks in use.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from kolors_core.chatglm import TextEmbedding
from kolors_core.devices import planned_device
from kolors_core.module import find_blocks, is_block
from kolors_core.performance.memory_tracker import META, MemoryTracker, copy_to_meta
from kolors_core.performance.training_memory import Autocast, training_tracker
from kolors_core.pipelines.memory_plan import GIB
from kolors_core.tokenizer import TokenBatch
from kolors_core.training.average import make_average
from kolors_core.training.config import TrainingConfig
from kolors_core.training.data import Batch
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.optimizer import MakeOptimizer, create_state, freeze, make_optimizer
from kolors_core.validation import check_int

PASSES, UPDATE = "forward and backward", "update"
PIXELS = 8  # a side of what a latent stands for


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Memory of one process of a run, in GiB (2^30 bytes).

    weights, optimizer, average: all the time. passes, update: the most on top of them in the forward and
    backward passes, and in the optimizer's step, gradients included. gradients: of one batch, in the end.
    Parts of passes: FSDP2's whole blocks (gathered); autocast's copies of the
    trained weights (copies), until the forward pass ends, or of blocks that are not recomputed the backward
    pass; and what is kept for the backward pass by block, by its path in the loss ("" outside of blocks).
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    gathered: float
    copies: float
    kept: Mapping[str, float]
    passes: float
    update: float
    run: str

    @property
    def total(self) -> float:
        """The most at once."""
        return self.weights + self.optimizer + self.average + max(self.passes, self.update)

    def levels(self) -> dict[str, float]:
        """Sum what is kept by the part of the model that blocks are in, such as "unet.down.1"."""
        sums = dict[str, float]()
        for path, size in self.kept.items():
            level = re.sub(r"(\.(attentions|resnets|blocks|layers)\b.*)|(\.\d+)$", "", path)
            sums[level or "outside of blocks"] = sums.get(level or "outside of blocks", 0) + size
        return sums

    def __str__(self) -> str:
        parts = {name: getattr(self, name) for name in ("weights", "optimizer", "average")}
        rows = [*((name, size) for name, size in parts.items() if size), (PASSES, self.passes)]
        rows += [("  of it gradients", self.gradients)] if self.gradients else []
        rows += [("  of it whole blocks", self.gathered)] if self.gathered else []
        rows += [("  copies by autocast", self.copies)] if self.copies else []
        rows += [(f"  kept, {level}", size) for level, size in self.levels().items()]
        rows += [(UPDATE, self.update), ("the most at once", self.total)]
        return "\n".join([f"GiB for {self.run}", *(f"{name:<34}{size:>9.3f}" for name, size in rows)])


def plan_training(
    loss: nn.Module, config: TrainingConfig, height: int = 1024, width: int = 1024, *, processes: int = 1,
    batch: Any = None, device: torch.device | str | None = None, optimizer: MakeOptimizer | None = None,
    is_printed: bool = True,
) -> TrainingPlan:  # fmt: skip
    """Print and return what each process of a run needs on its device, before anything is computed.

    loss: what a `Trainer` is given, with or without weights; it stays as it is. height, width: of the images,
    without a batch. batch: a part of one process, for a loss of one's own; if None, a `Batch` of captions of
    `max_tokens`. device: as for `plan`; if None, the loss's own, or the best there is. optimizer: the
    Trainer's.
    Not counted: what the device's own libraries keep, workspaces of an accelerator's convolutions, gaps
    between allocations, and images drawn on the way. A frozen copy that holds the average (`average=` of the
    Trainer) is among the weights: plan with an `ema_decay` of 0 there. ValueError for a batch that cannot be
    divided, sizes that are no multiples of 8, blocks that are not there; NotImplementedError for a loss that
    reads values.
    """
    check_int("processes", processes)
    parts = config.gradient_accumulation_steps
    if config.batch_size % (processes * parts):
        number = f"{processes} processes times gradient_accumulation_steps {parts}"
        raise ValueError(f"batch_size must be a multiple of {number}, got {config.batch_size}")
    for name, side in (("height", height), ("width", width)):
        if check_int(name, side) % PIXELS:
            raise ValueError(f"{name} must be a positive multiple of {PIXELS}, got {side}")
    own = next(loss.parameters()).device
    target = planned_device(own if device is None and own.type != "meta" else device)
    twin = _copy(loss)
    freeze(twin, config.groups)
    rows = config.batch_size // (processes * parts)
    make = partial(_moved, batch)
    if batch is None:
        make = partial(example_batch, twin, config, rows, height, width)
    step = _Step(twin, config, make, target.type, optimizer)
    step.run(passes=2 if parts > 1 or (processes > 1 and not config.shard) else 1, shard=config.shard)
    how = "FSDP2" if config.shard else "DDP"
    on = f"{processes} processes by {how}" if processes > 1 else "one process"
    what = f"{rows} of {width}x{height} at a time" if batch is None else "the batch given at a time"
    run = f"{what}, {parts} times a step, in {config.dtype} on {target.type}, {on}".replace("torch.", "")
    plan = step.plan(processes, run)
    if is_printed:
        print(plan)
    return plan


def example_batch(loss: nn.Module, config: TrainingConfig, rows: int, height: int, width: int) -> Batch:
    """Make a batch without values of what this `DiffusionLoss` reads; TypeError for another loss."""
    if not isinstance(loss, DiffusionLoss):
        raise TypeError(f"batch: a {type(loss).__name__} needs one of its own, as its data source makes")
    unet, encoder, length = loss.unet, loss.text_encoder, config.max_tokens
    channels = unet.config.out_channels
    latents = torch.empty(rows, channels, height // PIXELS, width // PIXELS, device=META)
    extra = torch.empty(rows, unet.config.in_channels - channels, *latents.shape[2:], device=META)
    if encoder is None:
        tokens = torch.empty(rows, length, unet.config.text_dim, device=META)
        text = TextEmbedding(tokens, tokens[:, 0].clone())
    else:
        ids, mask = (torch.empty(rows, length, dtype=t, device=META) for t in (torch.long, torch.bool))
        text = TokenBatch(ids, mask, ids)
    steps = torch.empty(rows, dtype=torch.long, device=META)
    control = None if loss.controlnet is None else torch.empty(rows, 3, height, width, device=META)
    sizes, noise = torch.empty(rows, 6, device=META), torch.empty_like(latents)
    return Batch(latents, text, sizes, steps, noise, control, extra if extra.shape[1] else None)


def _moved(batch: Any) -> Any:
    """Copy a batch to the meta device."""
    return batch.to(META) if hasattr(batch, "to") else tree_map_only(Tensor, lambda one: one.to(META), batch)


def _copy(loss: nn.Module) -> nn.Module:
    """Copy a loss to the meta device, but for its own tensors that are not of the model, such as sigmas."""
    modules = list(loss.modules())
    kept = [value for module in modules for value in vars(module).values() if isinstance(value, Tensor)]
    return copy_to_meta(loss, modules, kept)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def _share(tensor: Tensor, processes: int) -> int:
    """Return the bytes of the first process's rows of a tensor, as FSDP2 divides it."""
    rows = tensor.shape[0] if tensor.ndim else 1
    return -(-rows // processes) * tensor.nbytes // max(rows, 1)


class _Step:
    """Step of a loss on the meta device, as the trainer's, and what it allocates."""

    def __init__(
        self, loss: nn.Module, config: TrainingConfig, make_batch: Callable[[], Any], device_type: str,
        make: MakeOptimizer | None,
    ) -> None:  # fmt: skip
        self.loss, self.config, self.make_batch, self.device_type = loss, config, make_batch, device_type
        self.named = {n: p for n, p in loss.named_parameters() if p.requires_grad}
        if not self.named:
            raise ValueError("nothing to train: no parameter requires a gradient")
        self.blocks = {path: module for path, module in loss.named_modules() if is_block(module)}
        if config.checkpoint_blocks:
            find_blocks(loss, "recompute")
        self.optimizer = make_optimizer(self.named, config, make)
        for group in self.optimizer.param_groups if device_type == "cuda" else ():
            if "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = True  # as torch's optimizers choose there
        create_state(self.optimizer)
        self.average = make_average(self.named, {}) if config.ema_decay else {}
        self.tracker: MemoryTracker = training_tracker(device_type)
        self.cast, self.kept = Autocast(device_type, config.dtype), dict[str, int]()
        self.is_backward, self.copied = False, 0

    def run(self, passes: int, shard: bool) -> None:
        """Run the passes and the update; shard: a gradient is freed as soon as it is there.

        In a second pass, which more would repeat, gradients are there already, as DDP's are in every one.
        """
        hooks = [p.register_post_accumulate_grad_hook(_drop) for p in self.named.values()] if shard else []
        with self._watched_blocks(), self.tracker:
            self.tracker.stage = PASSES
            for _ in range(passes):
                self._pass()
            for hook in hooks:
                hook.remove()
            if shard:
                for parameter in self.named.values():
                    parameter.grad = torch.zeros_like(parameter)
            self.tracker.stage = UPDATE
            if limit := self.config.max_grad_norm:
                clip_grad_norm_(self.named.values(), limit)
            self.optimizer.step()
            self.optimizer.zero_grad()
            for name, average in self.average.items():
                average.lerp_(self.named[name].detach(), 0.5)

    def _pass(self) -> None:
        """Run the forward and backward pass of one part, and note what is kept between them."""
        before, batch = self.tracker.allocated, self.make_batch()
        with self.cast.region():
            loss = self.loss(batch) / self.config.gradient_accumulation_steps
            self.copied = self.cast.copied
            kept = self.tracker.allocated - before - self.copied
        in_blocks = sum(size for path, size in self.kept.items() if path)
        self.kept[""] = max(0, kept - in_blocks)
        self.is_backward = True
        loss.backward()
        self.is_backward = False

    @contextmanager
    def _watched_blocks(self) -> Iterator[None]:
        """Note what each block keeps, and recompute it in the backward pass if the config says so."""
        for path, block in self.blocks.items():
            block.forward = partial(self._run_block, path, block.forward)
        try:
            yield
        finally:
            for block in self.blocks.values():
                del block.forward

    def _run_block(self, path: str, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
        def run(*args: Any, **named: Any) -> Any:
            # Torch calls `backward` without its function modes, and so what is recomputed in it.
            with self.tracker.kernels if self.is_backward else nullcontext(), self.cast.region():
                return forward(*args, **named)

        before = self.tracker.allocated - self.cast.copied
        if self.config.checkpoint_blocks:
            run = partial(checkpoint, run, use_reentrant=False)
        result = run(*args, **named)
        self.kept[path] = max(self.kept.get(path, 0), self.tracker.allocated - self.cast.copied - before)
        return result

    def plan(self, processes: int, run: str) -> TrainingPlan:
        """Return what one of so many processes needs."""
        shard, trained = self.config.shard, list(self.named.values())
        share = partial(_share, processes=processes) if shard else lambda tensor: tensor.nbytes
        weights = {id(t): share(t) for t in chain(self.loss.parameters(), self.loss.buffers())}
        gradients = sum(map(share, trained))
        part = gradients / max(1, _bytes(trained))  # of what all processes have
        states = chain.from_iterable(state.values() for state in self.optimizer.state.values())
        states = [state for state in states if isinstance(state, Tensor)]
        passes, update = self.tracker.activations[PASSES], self.tracker.activations[UPDATE]
        gathered = self._gathered() if shard and processes > 1 else 0
        if shard:
            if self.config.gradient_accumulation_steps > 1:  # whole until the last part of a batch
                gradients += _bytes(trained)
            passes += gathered + gradients
        sizes = {
            "weights": sum(weights.values()), "gradients": gradients, "passes": passes,
            "optimizer": sum(map(share, states)), "average": sum(map(share, self.average.values())),
            "gathered": gathered, "copies": self.copied, "update": update * part,
        }  # fmt: skip
        kept = {path: size / GIB for path, size in self.kept.items()}
        return TrainingPlan(**{name: size / GIB for name, size in sizes.items()}, kept=kept, run=run)

    def _gathered(self) -> int:
        """Return the bytes of weights that FSDP2 gathers: those in no block, and the two largest blocks.

        While a block computes, the next one is gathered. Gradients of a block are whole until reduced.
        """
        of_blocks = {path: list(block.parameters()) for path, block in self.blocks.items()}
        inside = {id(p) for own in of_blocks.values() for p in own}
        outside = [p for p in self.loss.parameters() if id(p) not in inside]
        largest = sorted((_bytes(own) for own in of_blocks.values()), reverse=True)[:2]
        trained = [[p for p in own if p.requires_grad] for own in (outside, *of_blocks.values())]
        gradients = _bytes(trained[0]) + max(map(_bytes, trained[1:]), default=0)
        return _bytes(outside) + sum(largest) + gradients


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
