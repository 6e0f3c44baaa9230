"""Targets: what a model predicts from noisy latents, as pure functions of x = image + sigma * noise.

A model sees x scaled to a variance of about 1. Karras et al. (https://arxiv.org/abs/2206.00364, eq. 7) write
x0 = c_skip * x + c_out * output(c_in * x); the targets differ in these three factors of s = sigma:

    prediction_type   c_in               model's output                    x0
    epsilon           1 / sqrt(1 + s^2)  noise                             x - s * output
    v_prediction      1 / sqrt(1 + s^2)  (noise - s * image) * c_in        x / (1 + s^2) - s * c_in * output
    sample            1 / sqrt(1 + s^2)  image                             output
    flow_prediction   1 / (1 + s)        noise - image                     (x - s * output) / (1 + s)
    (EDM, table 1)    1 / sqrt(d^2 + s^2), with d the images' standard deviation: see `EDM`

In the first three the model's input is cos(a) * image + sin(a) * noise with tan(a) = s (appendix D of
https://arxiv.org/abs/2202.00512), in rectified flow (https://arxiv.org/abs/2209.03003) (1 - t) * image +
t * noise with t / (1 - t) = s. Names and formulas are those of `convert_model_output` in diffusers'
schedulers/scheduling_dpmsolver_multistep.py.
Shapes: x, images, noise and outputs are [B, 4, H/8, W/8]; sigma is a float, or [B, 1, 1, 1].
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from kolors_core.validation import did_you_mean, short_repr

Sigma = float | Tensor
Time = TypeVar("Time", float, Tensor)


@dataclass(frozen=True)
class Target(ABC):
    """Target of a variance-preserving process; it has no state."""

    def scale(self, sigma: Any) -> Any:
        """Return the ratio of x to the model's input, 1 / c_in; pure noise times it starts a run."""
        return (sigma**2 + 1) ** 0.5

    def model_input(self, x: Tensor, sigma: Sigma) -> Tensor:
        """Scale x to the model's input, c_in * x."""
        return x / self.scale(sigma)

    def timestep(self, of_schedule: Time, sigma: Time, total: int) -> Time:
        """Compute the time that the model's input has, from 0 to `total` training timesteps.

        of_schedule: the timestep that the schedule has for this sigma.
        """
        return of_schedule

    @abstractmethod
    def x0(self, x: Tensor, sigma: Sigma, output: Tensor) -> Tensor:
        """Compute the prediction of the image from the model's output at x."""

    @abstractmethod
    def output(self, image: Tensor, noise: Tensor, sigma: Sigma) -> Tensor:
        """Compute the output that a model is trained on: what `x0` converts back to the image."""

    @abstractmethod
    def error_ratio(self, snr: Tensor) -> Tensor:
        """Compute the squared error of the output per squared error of x0, 1 / c_out^2; snr: 1 / sigma^2."""

    def min_snr(self, sigma: Tensor, gamma: float) -> Tensor:
        """Compute the weight of an output's squared error that is a weight min(snr, gamma) of x0's.

        Source: https://arxiv.org/abs/2303.09556, section 3.4, for the first three; for flow_prediction the
        same rule gives min(snr, gamma) * t^2 = min(snr, gamma) / (1 + sqrt(snr))^2. It is 0 at an snr of 0
        for all but epsilon.
        """
        snr = sigma**-2
        return snr.clamp(max=gamma) / self.error_ratio(snr)


class Epsilon(Target):
    """Target of Kolors: the noise (https://arxiv.org/abs/2006.11239)."""

    def x0(self, x: Tensor, sigma: Sigma, output: Tensor) -> Tensor:
        """Subtract the noise."""
        return x - sigma * output

    def output(self, image: Tensor, noise: Tensor, sigma: Sigma) -> Tensor:
        """Return the noise."""
        return noise

    def error_ratio(self, snr: Tensor) -> Tensor:
        """Return snr."""
        return snr


class VPrediction(Target):
    """Target of progressive distillation, defined also without any signal, at zero terminal SNR."""

    def x0(self, x: Tensor, sigma: Sigma, output: Tensor) -> Tensor:
        """Rotate the input and the output by the angle whose tangent is sigma."""
        return x / (sigma**2 + 1) - sigma / (sigma**2 + 1) ** 0.5 * output

    def output(self, image: Tensor, noise: Tensor, sigma: Sigma) -> Tensor:
        """Compute cos(a) * noise - sin(a) * image."""
        return (noise - sigma * image) / (sigma**2 + 1) ** 0.5

    def error_ratio(self, snr: Tensor) -> Tensor:
        """Compute snr + 1."""
        return snr + 1


class Sample(Target):
    """Target that is the image itself."""

    def x0(self, x: Tensor, sigma: Sigma, output: Tensor) -> Tensor:
        """Return the output."""
        return output

    def output(self, image: Tensor, noise: Tensor, sigma: Sigma) -> Tensor:
        """Return the image."""
        return image

    def error_ratio(self, snr: Tensor) -> Tensor:
        """Return 1 for each."""
        return snr**0


class Flow(Target):
    """Target of rectified flow: the velocity of (1 - t) * image + t * noise; the model's time is t itself."""

    def scale(self, sigma: Any) -> Any:
        """Return the ratio of x to (1 - t) * image + t * noise."""
        return sigma + 1

    def timestep(self, of_schedule: Time, sigma: Time, total: int) -> Time:
        """Compute t * total, t = sigma / (1 + sigma)."""
        return total * sigma / (sigma + 1)

    def x0(self, x: Tensor, sigma: Sigma, output: Tensor) -> Tensor:
        """Go back along the velocity from t to 0."""
        return (x - sigma * output) / (sigma + 1)

    def output(self, image: Tensor, noise: Tensor, sigma: Sigma) -> Tensor:
        """Compute the velocity, noise - image."""
        return noise - image

    def error_ratio(self, snr: Tensor) -> Tensor:
        """Compute 1 / t^2 = (1 + sqrt(snr))^2."""
        return (1 + snr**0.5) ** 2


@dataclass(frozen=True)
class EDM(Target):
    """Target of Karras et al., table 1: an output and an input of variance 1 at every sigma.

    sigma_data: the standard deviation of images. sign: 1, or -1 for what the reference's EDM schedulers call
    v_prediction, which is VPrediction at sigma_data 1. The model's time is log(sigma) / 4.
    """

    sigma_data: float = 0.5
    sign: int = 1

    def scale(self, sigma: Any) -> Any:
        """Return the standard deviation of x."""
        return (sigma**2 + self.sigma_data**2) ** 0.5

    def timestep(self, of_schedule: Time, sigma: Time, total: int) -> Time:
        """Compute c_noise, log(sigma) / 4."""
        log: Any = sigma.log() if isinstance(sigma, Tensor) else math.log(sigma)
        return log / 4

    def x0(self, x: Tensor, sigma: Sigma, output: Tensor) -> Tensor:
        """Compute c_skip * x + c_out * output."""
        scale, data = self.scale(sigma), self.sigma_data
        return (data / scale) ** 2 * x + self.sign * sigma * data / scale * output

    def output(self, image: Tensor, noise: Tensor, sigma: Sigma) -> Tensor:
        """Compute (image - c_skip * x) / c_out."""
        data = self.sigma_data
        return self.sign * (sigma * image - data**2 * noise) / (data * self.scale(sigma))

    def error_ratio(self, snr: Tensor) -> Tensor:
        """Compute snr + 1 / sigma_data^2."""
        return snr + self.sigma_data**-2


TARGETS: dict[str, Target] = {
    "epsilon": Epsilon(), "v_prediction": VPrediction(), "sample": Sample(), "flow_prediction": Flow(),
}  # fmt: skip


def target_of(prediction_type: str) -> Target:
    """Return the target of a `prediction_type`; ValueError for another name."""
    if not isinstance(prediction_type, str) or prediction_type not in TARGETS:
        hint = did_you_mean(prediction_type, TARGETS) if isinstance(prediction_type, str) else ""
        expected = f"one of {', '.join(map(repr, TARGETS))}"
        raise ValueError(f"prediction_type must be {expected}, got {short_repr(prediction_type)}{hint}")
    return TARGETS[prediction_type]
