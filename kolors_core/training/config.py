"""Settings of a training run, and which of them make two runs different."""

import math
from dataclasses import asdict, dataclass, fields

import torch

from kolors_core.targets import target_of
from kolors_core.training.run_record import Record
from kolors_core.validation import LARGEST_SEED, check_float, check_int, short_repr

COUNTS = (
    "steps", "batch_size", "gradient_accumulation_steps", "save_every", "max_tokens", "evaluate_every",
    "held_out_batches",
)  # fmt: skip
# Settings that change how a run is computed or measured and not its steps, or only where they end.
FREE_SETTINGS = {
    "gradient_accumulation_steps", "checkpoint_blocks", "shard", "save_every", "evaluate_every", "patience",
    "held_out_batches",
}  # fmt: skip
# Recorded only at other values than their defaults: so states that were saved without them can be resumed.
LATER_SETTINGS = {"prediction_type", "logit_normal", "timestep_weights", "groups"}


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Group of the parameters whose names match a pattern and no earlier group's; None: the config's value.

    pattern: a glob (`fnmatch`, whose * also matches dots) over the names of the loss's parameters, such as
    "unet.*norm*". learning_rate: its peak, which the schedule scales as the config's. frozen: not trained;
    the parameters' `requires_grad` is set to False.
    """

    pattern: str
    learning_rate: float | None = None
    weight_decay: float | None = None
    frozen: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise TypeError(f"pattern must be a string, got {short_repr(self.pattern)}")
        for name in ("learning_rate", "weight_decay"):
            if (value := getattr(self, name)) is not None:
                check_float(name, value, 0)
                if self.frozen:
                    raise ValueError(f"group {self.pattern!r} is frozen: its {name} has no effect")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of a training run. Master weights are float32; `dtype` is the forward's, by autocast.

    gradient_accumulation_steps: micro-batches of a batch. schedule: "constant" or "cosine" to 0.
    adam_beta2: decay of AdamW's second moments. At high rates 0.99 is stabler: a part of the network whose
    gradients were tiny and grow is not moved by many times the rate. groups: parts of the model with a
    learning rate or weight decay of their own, or frozen.
    ema_decay: of the weights' moving average, warmed up as min(ema_decay, (1 + step) / (10 + step)); 0: off.
    prediction_type: what the model learns to predict, see kolors_core/targets.py. min_snr_gamma: weight a
    timestep's loss as min(snr, gamma) weights x0's (`Target.min_snr`); None is off. noise_offset: scale of a
    normal number added to each channel of the noise. logit_normal: mean and standard deviation, or
    timestep_weights: how timesteps are drawn, see `data.draw_timesteps`; evenly without both.
    evaluate_every: steps after which images are drawn and the held-out loss is measured, on the first
    held_out_batches batches. patience: end after so many measurements that are not below the best.
    checkpoint_blocks: recompute each block's activations in the backward pass. shard: FSDP2 instead of DDP.
    """

    steps: int
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup: int = 100
    weight_decay: float = 0.01
    adam_beta2: float = 0.999
    groups: tuple[ParameterGroup, ...] = ()
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    prediction_type: str = "epsilon"
    min_snr_gamma: float | None = None
    noise_offset: float = 0.0
    logit_normal: tuple[float, float] | None = None
    timestep_weights: tuple[float, ...] | None = None
    max_tokens: int = 256
    dtype: torch.dtype = torch.float32
    checkpoint_blocks: bool = False
    shard: bool = False
    save_every: int = 500
    evaluate_every: int = 500
    held_out_batches: int = 4
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in COUNTS:
            check_int(name, getattr(self, name))
        if self.patience is not None:
            check_int("patience", self.patience)
        check_int("warmup", self.warmup, least=0)
        check_int("seed", self.seed, least=0, most=LARGEST_SEED)
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "noise_offset"):
            check_float(name, getattr(self, name), 0)
        check_float("ema_decay", self.ema_decay, 0, 1)
        if check_float("adam_beta2", self.adam_beta2, 0, 1) == 1:
            raise ValueError("adam_beta2 must be below 1: with 1 the second moments stay 0")
        if self.min_snr_gamma is not None and check_float("min_snr_gamma", self.min_snr_gamma) <= 0:
            raise ValueError(f"min_snr_gamma must be above 0, got {self.min_snr_gamma}")
        if not isinstance(self.groups, tuple) or not all(isinstance(g, ParameterGroup) for g in self.groups):
            raise ValueError(f"groups must be a tuple of ParameterGroup, got {short_repr(self.groups)}")
        target_of(self.prediction_type)
        self._check_timesteps()
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule must be 'constant' or 'cosine', got {self.schedule!r}")
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {self.dtype}")

    def _check_timesteps(self) -> None:
        if self.logit_normal is not None:
            if self.timestep_weights is not None:
                raise ValueError("give logit_normal or timestep_weights, not both")
            if not isinstance(self.logit_normal, tuple) or len(self.logit_normal) != 2:
                expected = "two numbers, mean and standard deviation"
                raise ValueError(f"logit_normal must be {expected}, got {short_repr(self.logit_normal)}")
            mean, std = (check_float("logit_normal", number) for number in self.logit_normal)
            if std <= 0:
                raise ValueError(f"logit_normal must have a standard deviation above 0, got {(mean, std)}")
        if (weights := self.timestep_weights) is not None:
            if not isinstance(weights, tuple) or not weights:
                raise ValueError(f"timestep_weights must be a tuple of numbers, got {short_repr(weights)}")
            if min(check_float("timestep_weights", weight) for weight in weights) <= 0:
                raise ValueError(f"timestep_weights must be above 0, got {short_repr(weights)}")

    def record(self) -> Record:
        """Record the settings that determine the result; a constant schedule may go on for more steps."""
        free = FREE_SETTINGS | ({"steps"} if self.schedule == "constant" else set())
        free |= {field.name for field in fields(self)
                 if field.name in LATER_SETTINGS and getattr(self, field.name) == field.default}  # fmt: skip
        record = {name: value for name, value in asdict(self).items() if name not in free}
        return {name: str(v) if isinstance(v, torch.dtype) else v for name, v in record.items()}

    def learning_rate_at(self, step: int, peak: float | None = None) -> float:
        """Compute a step's rate: linear warm-up to a peak, then constant or a half cosine that ends at 0."""
        rate = self.learning_rate if peak is None else peak
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        if self.schedule == "constant":
            return rate * warm
        done = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        return rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
