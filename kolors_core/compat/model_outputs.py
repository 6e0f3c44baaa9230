"""Results of models, as the reference's: read as attributes, by name, by number, or unpacked as a tuple."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kolors_core.sampling import Generators, randn_latents


@dataclass(frozen=True)
class ModelOutput:
    """Result of a model; fields that are None are left out of its names and of its tuple."""

    def keys(self) -> list[str]:
        """List the names of the values."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values."""
        return tuple(getattr(self, name) for name in self.keys())

    def __getitem__(self, key: str | int | slice) -> Any:
        values = self.to_tuple()
        return dict(zip(self.keys(), values, strict=True))[key] if isinstance(key, str) else values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclass(frozen=True)
class UNet2DConditionOutput(ModelOutput):
    """Predicted noise [B, 4, H, W]."""

    sample: Tensor


@dataclass(frozen=True)
class ControlNetOutput(ModelOutput):
    """Residuals of each skip connection and of the middle block."""

    down_block_res_samples: tuple[Tensor, ...]
    mid_block_res_sample: Tensor


@dataclass(frozen=True)
class DecoderOutput(ModelOutput):
    """Decoded images [B, 3, H, W]."""

    sample: Tensor


@dataclass(frozen=True)
class AutoencoderKLOutput(ModelOutput):
    """Distribution of an image's latents, not scaled."""

    latent_dist: "DiagonalGaussianDistribution"


class DiagonalGaussianDistribution:
    """Diagonal Gaussian over latents, not scaled: `parameters` [B, 8, H, W] are means and log-variances."""

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)

    def sample(self, generator: Generators = None) -> Tensor:
        """Draw latents; without a generator by torch's own on the latents' device."""
        shape, device, dtype = self.mean.shape, self.mean.device, self.mean.dtype
        if generator is None:
            return self.mean + self.std * torch.randn(shape, device=device, dtype=dtype)
        return self.mean + self.std * randn_latents(tuple(shape), generator, device, dtype)

    def mode(self) -> Tensor:
        """Return the means."""
        return self.mean

    def nll(self, sample: Tensor) -> Tensor:
        """Compute the negative log-likelihood of latents: [B]."""
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * terms.sum((1, 2, 3))

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> Tensor:
        """Compute the KL divergence from `other`, or from a standard normal distribution: [B]."""
        mean, var, logvar = (0.0, 1.0, 0.0) if other is None else (other.mean, other.var, other.logvar)
        terms = (self.mean - mean) ** 2 / var + self.var / var - 1.0 - self.logvar + logvar
        return 0.5 * terms.sum((1, 2, 3))


@dataclass(frozen=True)
class ChatGLMOutput(ModelOutput):
    """Hidden states [L, B, C]: the embeddings, then each layer's output, all before the final norm."""

    hidden_states: tuple[Tensor, ...]

    @property
    def last_hidden_state(self) -> Tensor:
        """Raise AttributeError: the final norm is not loaded, since Kolors does not read it."""
        raise AttributeError("last_hidden_state: the final norm is not loaded, use hidden_states[-1]")
