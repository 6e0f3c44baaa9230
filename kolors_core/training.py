"""Training: Kolors' objective, and one loop for full models and LoRA, on one process or many.

The objective (https://arxiv.org/abs/2006.11239, eq. 14): predict the noise in sqrt(a) latents + sqrt(1 - a)
noise, at a timestep drawn evenly from the 1,100 of the schedule. Everything random of a step is drawn on the
CPU from (seed, step) for the whole batch, and each rank takes its part: so a killed run goes on to the same
losses, and many processes train as one does. Run under `torchrun` for DDP, or with `shard=True` for FSDP2.
Shapes: B pictures of the whole batch, b of one rank's part, T training timesteps.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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

from kolors_core.chatglm import ChatGLM, TextEmbedding
from kolors_core.compiling import BLOCKS
from kolors_core.conditioning import size_ids
from kolors_core.dataset import Batches, Example, Sample, load_pixels, mix
from kolors_core.fields import finite, whole_number
from kolors_core.textual_inversion import vectors_of
from kolors_core.tokenizer import TokenBatch, Tokenizer
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from weights_convert.source import Source as Weights
from weights_convert.source import save_tensors


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train. Master weights are float32; `dtype` is what the forward computes in (autocast).

    min_snr_gamma: weigh a timestep's loss by min(snr, gamma) / snr (https://arxiv.org/abs/2303.09556); None
    is off.
    noise_offset: add this much of one normal number a channel to the noise. ema: decay of the weights' moving
    average, 0 is off; it warms up as min(ema, (1 + step) / (10 + step)). schedule: "constant" or "cosine" to
    0.
    accumulate: parts that a batch is computed in. shard: FSDP2 in place of DDP. checkpoint_blocks: recompute
    each block's activations in the backward pass.
    """

    steps: int
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.0
    min_snr_gamma: float | None = None
    noise_offset: float = 0.0
    max_tokens: int = 256
    dtype: torch.dtype = torch.float32
    checkpoint_blocks: bool = False
    shard: bool = False
    save_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_every", "max_tokens"):
            whole_number(name, getattr(self, name))
        whole_number("warmup", self.warmup, least=0)
        whole_number("seed", self.seed, least=0, most=2**63 - 1)
        for name in ("learning_rate", "weight_decay", "clip", "noise_offset"):
            finite(name, getattr(self, name), 0)
        finite("ema", self.ema, 0, 1)
        if self.min_snr_gamma is not None and finite("min_snr_gamma", self.min_snr_gamma) <= 0:
            raise ValueError(f"min_snr_gamma must be above 0, got {self.min_snr_gamma}")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule must be 'constant' or 'cosine', got {self.schedule!r}")
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {self.dtype}")

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then constant or a half cosine that ends at 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        if self.schedule == "constant":
            return self.learning_rate * warm
        done = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True)
class Batch:
    """What the objective reads, for one rank's pictures. text: embedded, or to be encoded."""

    latents: Tensor  # [b, 4, H/8, W/8]
    text: TextEmbedding | TokenBatch
    size_ids: Tensor  # [b, 6]
    timesteps: Tensor  # [b]
    noise: Tensor  # as latents


class Objective(nn.Module):
    """The loss as one module, which DDP and FSDP need. text_encoder: None unless it is trained too."""

    def __init__(
        self, unet: UNet, text_encoder: ChatGLM | None, sigmas: Tensor, config: TrainingConfig
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.config = unet, text_encoder, config
        self.sigmas = sigmas  # [T]; not a buffer: it is no part of the model

    def forward(self, batch: Batch) -> Tensor:
        """The mean loss of the rank's pictures."""
        text = batch.text
        if isinstance(text, TokenBatch):
            assert self.text_encoder is not None
            text = self.text_encoder(text)
        sigma = self.sigmas.to(batch.latents.device)[batch.timesteps][:, None, None, None]  # [b, 1, 1, 1]
        noisy = (batch.latents + sigma * batch.noise) / (sigma**2 + 1).sqrt()
        predicted = self.unet(
            noisy, batch.timesteps.float(), text.tokens, text.pooled, batch.size_ids, text.counts
        )
        loss = (predicted.float() - batch.noise).square().mean(dim=(1, 2, 3))  # [b]
        if self.config.min_snr_gamma is not None:
            snr = sigma.flatten() ** -2
            loss = loss * (snr.clamp(max=self.config.min_snr_gamma) / snr)
        return loss.mean()

    def learn_words(self, *words: str) -> None:
        """Let only these words be trained: textual inversion (https://arxiv.org/abs/2208.01618, eq. 2).

        The encoder has them already (`textual_inversion.add_words`): the paper starts from the embedding of a
        word that says roughly what it is. ValueError for a word that it has not.
        """
        have = {} if self.text_encoder is None else vectors_of(self.text_encoder)
        if not words:
            raise ValueError("no word to be learned")
        if unknown := [word for word in words if word not in have]:
            raise ValueError(f"{unknown[0]} is no learned word; there are: {', '.join(have) or 'none'}")
        self.requires_grad_(False)
        for word in words:
            have[word].requires_grad_(True)


class Data:
    """Latents of every picture, encoded once; captions as tokens, or encoded once by a frozen encoder."""

    def __init__(
        self,
        examples: Sequence[Example],
        batches: Batches,
        vae: VAE,
        tokenizer: Tokenizer,
        config: TrainingConfig,
        frozen_text: ChatGLM | None,
        timesteps: int = 1100,
        words: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """words: of textual inversion in the captions, each with its ids."""
        self.batches, self.config = batches, config
        self.tokenizer = partial(tokenizer, max_length=config.max_tokens, words=words)
        self.timesteps = timesteps  # how many the schedule has
        self.latents: dict[int, tuple[Tensor, Tensor]] = {}
        self.sizes: dict[int, Tensor] = {}
        for size, members in batches.members.items():
            for i in members:
                pixels, crop = load_pixels(examples[i], size)
                with torch.no_grad():
                    found = vae.encode(pixels[None].to(vae.post_quant_conv.weight))
                self.latents[i] = (found.mean[0].float().cpu(), found.std[0].float().cpu())
                self.sizes[i] = size_ids((examples[i].height, examples[i].width), crop, size)
        self.text: dict[str, TextEmbedding] = {}
        if frozen_text is not None:
            for caption in sorted({caption for example in examples for caption in example.captions} | {""}):
                with torch.no_grad():
                    tokens = self.tokenizer([caption]).collapse()
                    text = frozen_text(tokens.to(frozen_text.embedding.weight.device))
                self.text[caption] = text.to("cpu")

    def at(self, step: int, part: slice, device: torch.device) -> Batch:
        """The pictures `part` of the batch of a step; noise and timesteps are drawn for all of it."""
        _, samples = self.batches.at(step)
        draw = torch.Generator().manual_seed(mix(self.config.seed, step, 1))
        mean, std = (torch.stack([self.latents[s.example][k] for s in samples]) for k in (0, 1))
        latents = mean + std * torch.randn(mean.shape, generator=draw)
        noise = torch.randn(mean.shape, generator=draw)
        if self.config.noise_offset:
            noise += self.config.noise_offset * torch.randn(*mean.shape[:2], 1, 1, generator=draw)
        timesteps = torch.randint(self.timesteps, (len(samples),), generator=draw)
        ids = torch.cat([self.sizes[sample.example] for sample in samples])
        text = self._text(samples[part])
        moved = (tensor[part].to(device) for tensor in (latents, ids, timesteps, noise))
        latents, ids, timesteps, noise = moved
        return Batch(latents, text.to(device), ids, timesteps, noise)

    def _text(self, samples: Sequence[Sample]) -> TextEmbedding | TokenBatch:
        captions = [sample.caption for sample in samples]
        if not self.text:
            return self.tokenizer(captions).collapse()
        return TextEmbedding.cat([self.text[caption] for caption in captions])


class Source(Protocol):
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
        data: Source,
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
        if config.checkpoint_blocks:
            checkpoint_blocks(objective)
        self.module = self._spread()
        self.named = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        if not self.named:
            raise ValueError("nothing to train: no parameter requires a gradient")
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
        tensors = {}
        for name, parameter in self.named.items():
            tensors[f"weights.{name}"] = _whole(parameter)
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = _whole(self.optimizer.state[parameter][moment])
            if self.ema:
                tensors[f"ema.{name}"] = _whole(self.ema[name])
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(tensors, self.folder / "state.safetensors", {"step": str(self.step)})
        if self.world > 1:
            dist.barrier()

    @torch.no_grad()
    def _resume(self) -> None:
        file = self.folder / "state.safetensors"
        if not file.exists():
            return
        source = Weights([file])
        step = (source.metadata(file) or {}).get("step", "")
        kinds = ("weights", "exp_avg", "exp_avg_sq", *(("ema",) if self.ema else ()))
        wanted = [f"{kind}.{name}" for kind in kinds for name in self.named]
        if missing := [name for name in wanted if name not in source]:
            raise ValueError(f"{file}: is of another run: it has no {missing[0]}")
        if not step.isdecimal():
            raise ValueError(f"{file}: its metadata give step {step[:100]!r}, wanted a whole number")
        self.step = int(step)
        tensors = load_file(file, device=str(self.device))
        for name, parameter in self.named.items():
            _fill(parameter, tensors[f"weights.{name}"])
            state = self.optimizer.state[parameter]
            state["step"] = torch.tensor(float(self.step))
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter)
                _fill(state[moment], tensors[f"{moment}.{name}"])
            if self.ema:
                _fill(self.ema[name], tensors[f"ema.{name}"])

    @torch.no_grad()
    def take_average(self) -> None:
        """Put the moving average in the weights' place, for use; to train on from there is another run."""
        for name, average in self.ema.items():
            self.named[name].copy_(average)


def checkpoint_blocks(model: nn.Module) -> None:
    """Make every resnet and transformer block recompute its activations in the backward pass."""
    for block in _blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _blocks(model: nn.Module) -> Iterable[nn.Module]:
    return [module for module in model.modules() if isinstance(module, BLOCKS)]


def _whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all ranks if it is sharded, on the CPU."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().contiguous()


def _fill(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole value in, or this rank's shard of it."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
    tensor.copy_(value)
