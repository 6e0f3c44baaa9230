"""Schedulers with the reference's stateful interface, for scripts that write their own denoising loop.

Each is a frozen description, as pipelines use it, of the class of the same name in `kolors_core.schedulers`;
the state of a custom loop is one separate object beside the fields, which hash and equality leave out.
Latents are scaled as the reference scales them: for DPM-Solver++ to variance 1.
Source: diffusers' schedulers/scheduling_euler_discrete.py and scheduling_dpmsolver_multistep.py.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from kolors_core import checkpoint
from kolors_core import schedulers as plain
from kolors_core.checkpoint import SCHEDULER_FILE
from kolors_core.compat.configs import ReadOnlyConfig
from kolors_core.compat.model_outputs import ModelOutput
from kolors_core.devices import loading_device
from kolors_core.diffusion import DiffusionScheduler
from kolors_core.sampling import Generators, dpmpp_step, euler, randn_latents
from kolors_core.schedule import Schedule, Scheduler
from kolors_core.validation import as_path, check_int


class Fields(TypedDict, total=False):
    """Fields of the reference's two classes; some take only the values that change nothing."""

    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    trained_betas: Sequence[float] | None
    prediction_type: str
    timestep_spacing: str
    steps_offset: int
    use_karras_sigmas: bool
    use_exponential_sigmas: bool | None
    use_beta_sigmas: bool | None
    rescale_betas_zero_snr: bool
    final_sigmas_type: str
    interpolation_type: str
    sigma_min: float | None
    sigma_max: float | None
    timestep_type: str
    algorithm_type: str
    solver_order: int
    solver_type: str
    lower_order_final: bool
    euler_at_final: bool
    thresholding: bool
    dynamic_thresholding_ratio: float
    sample_max_value: float
    use_lu_lambdas: bool | None
    use_flow_sigmas: bool | None
    flow_shift: float | None
    lambda_min_clipped: float
    variance_type: None
    use_dynamic_shifting: bool
    time_shift_type: str


# Values of fields that `step` computes; pipelines, which do not call it, take all.
STEP_VALUES: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon",), "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    "solver_order": (1, 2), "solver_type": ("midpoint",),
}  # fmt: skip


class SchedulerConfig(ReadOnlyConfig):
    """Config of a scheduler, read only."""

    hint = "pipe.scheduler = type(pipe.scheduler).from_config(config, {}=...)"


@dataclass(frozen=True)
class SchedulerOutput(ModelOutput):
    """Result of a step: the next latents."""

    prev_sample: Tensor


@dataclass(frozen=True)
class EulerDiscreteSchedulerOutput(SchedulerOutput):
    """Result of a step: the next latents, and the predicted clean ones."""

    pred_original_sample: Tensor


@dataclass(eq=False)
class LoopState:
    """State of one custom loop."""

    schedule: Schedule
    timesteps: Tensor  # [n], on the loop's device
    sigmas: Tensor  # float32 [n + 1], on the CPU
    num_inference_steps: int | None = None  # None before `set_timesteps`
    step_index: int | None = None
    begin_index: int | None = None
    last: tuple[Tensor, float] | None = None  # the last step's clean latents and sigma, for order 2


class StatefulScheduler(DiffusionScheduler):
    """Scheduler with the reference's interface: `set_timesteps`, then `step` for each of its timesteps."""

    order = 1
    _state: LoopState

    def __init__(self, **given: Unpack[Fields]) -> None:
        super().__init__(**self.own_fields({**given}))
        table = self.training_sigmas()  # before `set_timesteps` there is a step for each training timestep
        sigmas = np.append(table.numpy()[::-1], np.float32(0))
        every_timestep = [float(timestep) for timestep in reversed(range(len(table)))]
        object.__setattr__(self, "_state", _begin(self._finish(sigmas, every_timestep, table), "cpu"))

    def __copy__(self) -> Self:
        twin = type(self)(**asdict(self))
        object.__setattr__(twin, "_state", copy.copy(self._state))
        return twin

    def __len__(self) -> int:
        return self.num_train_timesteps

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, *,
        revision: str | None = None, cache_dir: str | Path | None = None, local_files_only: bool = False,
        token: str | bool | None = None, force_download: bool = False, **changes: Unpack[Fields],
    ) -> Self:  # fmt: skip
        """Load from a folder or hub repository, or "tiny", whichever class of scheduler is saved there.

        subfolder: "scheduler", of a whole Kolors. changes: fields at other values than the saved ones.
        FileNotFoundError or ValueError names the file or field.
        """
        file = _file_of(
            pretrained_model_name_or_path, subfolder, revision=revision, cache_dir=cache_dir,
            local_files_only=local_files_only, token=token, force_download=force_download,
        )  # fmt: skip
        loaded = checkpoint.open_scheduler(file, cls)
        return cls.from_config(loaded.config, **changes) if changes else loaded

    @classmethod
    def load_config(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **hub: Any
    ) -> dict[str, Any]:
        """Read a saved config, for `from_config`; hub: as for `kolors_core.hub.fetch`."""
        return checkpoint.read_json(_file_of(pretrained_model_name_or_path, subfolder, **hub))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `scheduler_config.json` into a folder, for this class and the reference's."""
        folder = as_path("save_directory", save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(self.to_public(), folder / SCHEDULER_FILE)

    @property
    def config(self) -> SchedulerConfig:
        """The fields of the reference's class, for another's `from_config`."""
        return SchedulerConfig({name: values[0] for name, values in self.fixed.items()} | asdict(self))

    @property
    def compatibles(self) -> list[type[Scheduler]]:
        """The classes that take this scheduler's config."""
        return list(_STATEFUL.values())

    @property
    def timesteps(self) -> Tensor:
        """The UNet's input at each step: [n]."""
        return self._state.timesteps

    @property
    def sigmas(self) -> Tensor:
        """The standard deviation of the noise at each step and at the end: float32 [n + 1], on the CPU."""
        return self._state.sigmas

    @property
    def alphas_cumprod(self) -> Tensor:
        """The share of the image in the variance at each training timestep: float32 [T]."""
        return torch.cumprod(self.alphas, dim=0)

    @property
    def alphas(self) -> Tensor:
        """The share of the image that each training timestep leaves: float32 [T]."""
        return 1.0 - self.betas

    @property
    def betas(self) -> Tensor:
        """The variance that each training timestep adds: float32 [T]."""
        return self.training_betas()

    @property
    def init_noise_sigma(self) -> float:
        """The factor on the initial standard normal noise."""
        run = self._state.schedule
        return run.init_noise_sigma / self.latent_scale(run.sigmas[0].item())

    @property
    def num_inference_steps(self) -> int | None:
        """The number of steps, None before `set_timesteps`."""
        return self._state.num_inference_steps

    @property
    def step_index(self) -> int | None:
        """The index of the next step, None before the first."""
        return self._state.step_index

    @property
    def begin_index(self) -> int | None:
        """The index of the first step, None if its timestep tells."""
        return self._state.begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin with this step, such as when a given image is noised up to it."""
        last = len(self.timesteps) - 1
        self._state.begin_index = check_int("begin_index", begin_index, least=0, most=last)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None
    ) -> None:  # fmt: skip
        """Begin a loop of so many steps, or of given timesteps (n) or sigmas (n + 1); see `schedule`."""
        schedule = self.schedule(num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        state = _begin(schedule, "cpu" if device is None else loading_device(device))
        state.num_inference_steps = len(schedule.timesteps)
        object.__setattr__(self, "_state", state)

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """Return the index of a timestep; the second if it is there twice, as in the reference."""
        known, value = self.timesteps.tolist(), float(timestep)
        if not (found := [i for i, one in enumerate(known) if one == value]):
            expected = f"one of scheduler.timesteps, {known[0]:g} to {known[-1]:g}"
            raise ValueError(f"timestep must be {expected}, got {value:g}")
        return found[:2][-1]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Add noise to clean latents [B, ...], as much as they have at timesteps [B] or [1].

        With a begin index the timesteps are not read: it is the noise at the loop's step.
        """
        state, times = self._state, timesteps.reshape(-1).tolist()
        index = state.begin_index if state.step_index is None else state.step_index
        if state.begin_index is None or index is None:
            indices = [self.index_for_timestep(timestep) for timestep in times]
        else:
            indices = [index] * len(times)
        sigmas = [state.schedule.sigmas[i].item() for i in indices]
        scale = _column([self.latent_scale(sigma) for sigma in sigmas], original_samples)
        return (original_samples + noise * _column(sigmas, original_samples)) / scale

    def _sigmas_of(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor
    ) -> tuple[float, float]:  # fmt: skip
        """Return the sigmas that a step leads from and to; ValueError for fields that only pipelines take."""
        for name, taken in STEP_VALUES.items():
            if (value := getattr(self, name, taken[0])) not in taken:
                expected = f"step() computes {name} {', '.join(map(repr, taken))} only"
                raise ValueError(
                    f"{expected}, got {value!r}: a pipeline takes it, or a sampler of kolors_core"
                )
        if model_output.shape != sample.shape:
            got = f"{list(model_output.shape)}, {list(sample.shape)}"
            raise ValueError(f"model_output and sample must be of one shape, got {got}")
        index = self._locate(timestep)
        sigma, next_sigma = self._state.schedule.sigmas[index : index + 2].tolist()
        return sigma, next_sigma

    def _count(self, output: ModelOutput, return_dict: bool) -> Any:
        """Count a step; return its result, as a tuple without return_dict."""
        self._state.step_index = (self._state.step_index or 0) + 1
        return output if return_dict else output.to_tuple()

    def _locate(self, timestep: float | Tensor) -> int:
        """Return the index of the next step: at the first the begin index, or else the timestep's."""
        state = self._state
        if state.step_index is None:
            begin = state.begin_index
            state.step_index = self.index_for_timestep(timestep) if begin is None else begin
        if state.step_index >= len(state.timesteps):
            raise ValueError(f"all {len(state.timesteps)} steps are done, begin again by set_timesteps")
        return state.step_index


@dataclass(frozen=True, kw_only=True, init=False)
class EulerDiscreteScheduler(StatefulScheduler, plain.EulerDiscreteScheduler):
    """Scheduler of Euler's method; fields beside Kolors' are the reference's, at the values that it uses."""

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """Scale latents to variance 1, as the UNet takes them."""
        return sample / math.sqrt(self._state.schedule.sigmas[self._locate(timestep)].item() ** 2 + 1)

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, s_churn: float = 0.0,
        s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
        generator: Generators = None, return_dict: bool = True
    ) -> Any:  # fmt: skip
        """Compute an `EulerDiscreteSchedulerOutput` from the UNet's output, or a tuple without return_dict.

        s_churn, s_tmin, s_tmax, s_noise: noise added in each step, as in Karras et al., algorithm 2.
        """
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"timestep must be one of scheduler.timesteps, got the integer {timestep}")
        sigma, next_sigma = self._sigmas_of(model_output, timestep, sample)
        churn = min(s_churn / len(self.timesteps), math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        raised = sigma * (churn + 1)
        x = sample.to(torch.float32)
        if churn > 0:
            shape, device = tuple(model_output.shape), model_output.device
            noise = randn_latents(shape, generator, device, model_output.dtype)
            x = x + noise * s_noise * math.sqrt(raised**2 - sigma**2)
        x0 = x - raised * model_output
        x = euler(lambda _x, _sigma: x0, x, (raised, next_sigma))
        return self._count(EulerDiscreteSchedulerOutput(x.to(model_output.dtype), x0), return_dict)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Compute the velocity of v-prediction, (noise - sigma * sample) / sqrt(sigma^2 + 1).

        Unlike the reference's, which looks timesteps up in a table that runs against them.
        """
        indices = [self.index_for_timestep(timestep) for timestep in timesteps.reshape(-1).tolist()]
        sigma = _column([self._state.schedule.sigmas[i].item() for i in indices], sample)
        return (noise - sigma * sample) / (sigma**2 + 1) ** 0.5


@dataclass(frozen=True, kw_only=True, init=False)
class DPMSolverMultistepScheduler(StatefulScheduler, plain.DPMSolverMultistepScheduler):
    """Scheduler of DPM-Solver++; fields beside Kolors' are the reference's, at the values that it uses."""

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Return the latents: they have variance 1 already."""
        return sample

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, generator: Generators = None,
        variance_noise: Tensor | None = None, return_dict: bool = True
    ) -> Any:  # fmt: skip
        """Compute a `SchedulerOutput` from the UNet's output, or a tuple without return_dict.

        variance_noise: of the SDE form, drawn from the generator if None.
        """
        sigma, next_sigma = self._sigmas_of(model_output, timestep, sample)
        state, scale = self._state, self.latent_scale(sigma)
        x0 = (sample - sigma / scale * model_output) * scale
        noise = None
        if self.algorithm_type == "sde-dpmsolver++":
            noise = variance_noise
            if noise is None:
                noise = randn_latents(tuple(x0.shape), generator, x0.device, torch.float32)
            noise = noise.to(x0.device, torch.float32)
        is_last = state.step_index == len(state.timesteps) - 1 and state.schedule.orders[-1] == 1
        last = None if self.solver_order == 1 or is_last else state.last
        x = dpmpp_step(sample.to(torch.float32) * scale, x0, sigma, next_sigma, last, noise)
        state.last = x0, sigma
        return self._count(SchedulerOutput((x / self.latent_scale(next_sigma)).to(x0.dtype)), return_dict)


_STATEFUL: dict[type[Scheduler], type[StatefulScheduler]] = {
    plain.EulerDiscreteScheduler: EulerDiscreteScheduler,
    plain.DPMSolverMultistepScheduler: DPMSolverMultistepScheduler,
}


def of(scheduler: Scheduler) -> Scheduler:
    """Return the stateful scheduler of a plain one's fields; another class, such as your own, unchanged."""
    kind = _STATEFUL.get(type(scheduler))
    return scheduler if kind is None else kind(**asdict(scheduler))


def _file_of(name: str | Path, subfolder: str | None, **hub: Any) -> Path:
    """Fetch the scheduler of a folder or hub repository, or of "tiny"; return its file."""
    inside = subfolder or ""
    if name == checkpoint.EMBEDDED_NAME:
        inside = inside or "scheduler"
    folder = checkpoint.fetch_component(name, "scheduler", inside, None, False, **hub)
    file = folder / inside / SCHEDULER_FILE
    if not file.exists() and (folder / "scheduler" / SCHEDULER_FILE).exists():
        raise FileNotFoundError(f"{file}: no such file, give subfolder='scheduler'")
    return file


def check_unchanged(scheduler: Any) -> None:
    """Raise TypeError for a scheduler whose class changes a step, which pipelines would not call."""
    kind = next((kind for kind in _STATEFUL.values() if isinstance(scheduler, kind)), type(scheduler))
    for name in ("step", "scale_model_input", "set_timesteps", "add_noise"):
        if getattr(type(scheduler), name, None) is not getattr(kind, name, None):
            where = f"{type(scheduler).__name__}.{name}"
            raise TypeError(f"{where} is for custom loops, a pipeline does not call it: set pipe.sampler")


def _begin(schedule: Schedule, device: torch.device | str) -> LoopState:
    dtype = torch.int64 if schedule.whole_timesteps else torch.float32
    return LoopState(schedule, schedule.timesteps.to(device, dtype), schedule.sigmas.float())


def _column(values: list[float], like: Tensor) -> Tensor:
    return like.new_tensor(values).view(-1, *[1] * (like.ndim - 1))  # [B, 1, 1, 1]
