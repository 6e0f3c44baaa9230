"""Schedulers under the reference's names, with its stateful interface for loops of your own.

Each is a frozen description, as pipelines use it, of the class of the same name in `kolors_core.schedulers`.
Source: the files of diffusers' schedulers that the plain classes name.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kolors_core import schedulers as plain
from kolors_core.compat.stateful_scheduler import STATEFUL, StatefulScheduler, column
from kolors_core.sampling import Generators, euler, randn_latents
from kolors_core.schedule import Scheduler


@dataclass(frozen=True, kw_only=True, init=False)
class EulerDiscreteScheduler(StatefulScheduler, plain.EulerDiscreteScheduler):
    """Scheduler of Euler's method; fields beside Kolors' are the reference's, at the values that it uses."""

    def step(  # pyright: ignore[reportIncompatibleMethodOverride] (the reference's own arguments)
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, s_churn: float = 0.0,
        s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
        generator: Generators = None, return_dict: bool = True
    ) -> Any:  # fmt: skip
        """Compute the next latents of the loop and the clean ones from the model's output.

        s_churn, s_tmin, s_tmax, s_noise: noise added in each step, as in Karras et al., algorithm 2.
        """
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"timestep must be one of scheduler.timesteps, got the integer {timestep}")
        sigma = self._check_step(model_output, timestep, sample)
        next_sigma = self._state.schedule.sigmas[self._locate(timestep) + 1].item()
        churn = min(s_churn / len(self.timesteps), math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        raised = sigma * (churn + 1)
        x = sample.to(torch.float32)
        if churn > 0:
            shape, device = tuple(model_output.shape), model_output.device
            noise = randn_latents(shape, generator, device, model_output.dtype)
            x = x + noise * s_noise * math.sqrt(raised**2 - sigma**2)
        x0 = self.target.x0(x, raised, model_output)
        x = euler(lambda _x, _sigma: x0, x, (raised, next_sigma))
        return self._count(x.to(model_output.dtype), x0, return_dict)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Compute the velocity of v-prediction, (noise - sigma * sample) / sqrt(sigma^2 + 1).

        Unlike the reference's, which looks timesteps up in a table that runs against them.
        """
        indices = [self.index_for_timestep(timestep) for timestep in timesteps.reshape(-1).tolist()]
        sigma = column([self._state.levels[i] for i in indices], sample)
        return (noise - sigma * sample) / (sigma**2 + 1) ** 0.5


@dataclass(frozen=True, kw_only=True, init=False)
class DPMSolverMultistepScheduler(StatefulScheduler, plain.DPMSolverMultistepScheduler):
    """Scheduler of DPM-Solver++, DPM-Solver and their SDE forms."""

    gives_clean = False


@dataclass(frozen=True, kw_only=True, init=False)
class DPMSolverSinglestepScheduler(StatefulScheduler, plain.DPMSolverSinglestepScheduler):
    """Scheduler of the single-step DPM-Solver++ and DPM-Solver."""

    gives_clean = False


@dataclass(frozen=True, kw_only=True, init=False)
class UniPCMultistepScheduler(StatefulScheduler, plain.UniPCMultistepScheduler):
    """Scheduler of UniPC."""

    gives_clean = False


@dataclass(frozen=True, kw_only=True, init=False)
class DEISMultistepScheduler(StatefulScheduler, plain.DEISMultistepScheduler):
    """Scheduler of DEIS."""

    gives_clean = False


@dataclass(frozen=True, kw_only=True, init=False)
class EulerAncestralDiscreteScheduler(StatefulScheduler, plain.EulerAncestralDiscreteScheduler):
    """Scheduler of Euler's method with noise in each step."""


@dataclass(frozen=True, kw_only=True, init=False)
class HeunDiscreteScheduler(StatefulScheduler, plain.HeunDiscreteScheduler):
    """Scheduler of Heun's method."""


@dataclass(frozen=True, kw_only=True, init=False)
class KDPM2DiscreteScheduler(StatefulScheduler, plain.KDPM2DiscreteScheduler):
    """Scheduler of DPM-Solver-2 in sigmas."""


@dataclass(frozen=True, kw_only=True, init=False)
class KDPM2AncestralDiscreteScheduler(StatefulScheduler, plain.KDPM2AncestralDiscreteScheduler):
    """Scheduler of DPM-Solver-2 with noise in each step."""


@dataclass(frozen=True, kw_only=True, init=False)
class LMSDiscreteScheduler(StatefulScheduler, plain.LMSDiscreteScheduler):
    """Scheduler of the linear multistep method."""


@dataclass(frozen=True, kw_only=True, init=False)
class DPMSolverSDEScheduler(StatefulScheduler, plain.DPMSolverSDEScheduler):
    """Scheduler of DPM-Solver++(2S) with noise in each step."""


@dataclass(frozen=True, kw_only=True, init=False)
class DDIMScheduler(StatefulScheduler, plain.DDIMScheduler):
    """Scheduler of DDIM."""


@dataclass(frozen=True, kw_only=True, init=False)
class DDPMScheduler(StatefulScheduler, plain.DDPMScheduler):
    """Scheduler of DDPM."""


@dataclass(frozen=True, kw_only=True, init=False)
class PNDMScheduler(StatefulScheduler, plain.PNDMScheduler):
    """Scheduler of PNDM."""

    gives_clean = False


@dataclass(frozen=True, kw_only=True, init=False)
class LCMScheduler(StatefulScheduler, plain.LCMScheduler):
    """Scheduler of latent consistency models."""


@dataclass(frozen=True, kw_only=True, init=False)
class TCDScheduler(StatefulScheduler, plain.TCDScheduler):
    """Scheduler of trajectory consistency."""


@dataclass(frozen=True, kw_only=True, init=False)
class FlowMatchEulerDiscreteScheduler(StatefulScheduler, plain.FlowMatchEulerDiscreteScheduler):
    """Scheduler of Euler's method for rectified flows."""

    gives_clean = False


@dataclass(frozen=True, kw_only=True, init=False)
class EDMEulerScheduler(StatefulScheduler, plain.EDMEulerScheduler):
    """Scheduler of Euler's method for models in EDM's parametrization."""


@dataclass(frozen=True, kw_only=True, init=False)
class EDMDPMSolverMultistepScheduler(StatefulScheduler, plain.EDMDPMSolverMultistepScheduler):
    """Scheduler of DPM-Solver++ for models in EDM's parametrization."""

    gives_clean = False


STATEFUL |= {kind.__bases__[1]: kind for kind in StatefulScheduler.__subclasses__()}


def of(scheduler: Scheduler) -> Scheduler:
    """Return the stateful scheduler of a plain one's fields; another class, such as your own, unchanged."""
    kind = STATEFUL.get(type(scheduler))
    return scheduler if kind is None else kind(**asdict(scheduler))


def check_unchanged(scheduler: Any) -> None:
    """Raise TypeError for a scheduler whose class changes a step, which pipelines would not call."""
    kind = next((kind for kind in STATEFUL.values() if isinstance(scheduler, kind)), type(scheduler))
    for name in ("step", "scale_model_input", "set_timesteps", "add_noise"):
        if getattr(type(scheduler), name, None) is not getattr(kind, name, None):
            where = f"{type(scheduler).__name__}.{name}"
            raise TypeError(f"{where} is for custom loops, a pipeline does not call it: set pipe.sampler")
