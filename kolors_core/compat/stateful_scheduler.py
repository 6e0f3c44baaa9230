"""Scheduler with the reference's stateful interface, for scripts that write their own denoising loop.

Our samplers are functions of a whole run. `step` calls one with the model's outputs so far, until it asks for
the next, and returns the latents that it asks for: arithmetic on latents, a thousandth of the UNet's. So the
state of a loop is what the loop gave: latents, outputs and noise. It is one object beside the fields, which
hash and equality leave out. Latents are scaled as the reference's class of the same name scales them.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np
import torch
from torch import Tensor

from kolors_core import checkpoint
from kolors_core import schedulers as plain
from kolors_core.checkpoint import SCHEDULER_FILE
from kolors_core.compat.configs import ReadOnlyConfig
from kolors_core.compat.model_outputs import ModelOutput
from kolors_core.compat.scheduler_fields import Fields
from kolors_core.devices import loading_device
from kolors_core.diffusion import DiffusionScheduler
from kolors_core.sampling import Generators, Noise, randn_latents
from kolors_core.schedule import Schedule, Scheduler
from kolors_core.validation import as_path, check_int


class SchedulerConfig(ReadOnlyConfig):
    """Config of a scheduler, read only."""

    hint = "pipe.scheduler = type(pipe.scheduler).from_config(config, {}=...)"


@dataclass(frozen=True)
class SchedulerOutput(ModelOutput):
    """Result of a step: the next latents, and of most classes the predicted clean ones."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


@dataclass(eq=False)
class LoopState:
    """State of one custom loop, of which a step is one evaluation of the model."""

    schedule: Schedule
    levels: list[float]  # the sigma of each evaluation
    steps: list[int]  # the schedule's step that each belongs to
    timesteps: Tensor  # [evaluations], on the loop's device
    sigmas: Tensor  # float32 [evaluations + 1], on the CPU
    num_inference_steps: int | None = None  # None before `set_timesteps`
    step_index: int | None = None
    begin_index: int | None = None
    given: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # x and x0 of each evaluation so far
    noises: list[Tensor] = field(default_factory=list)  # drawn so far


class _Evaluation(Exception):
    """Carries out of a sampler the latents that it asks the model about."""

    def __init__(self, x: Tensor, sigma: float) -> None:
        self.x, self.sigma = x, sigma


class StatefulScheduler(Scheduler):
    """Scheduler with the reference's interface: `set_timesteps`, then `step` for each of its timesteps."""

    gives_clean = True  # whether a step's result has the predicted clean latents
    _state: LoopState

    def __init__(self, **given: Unpack[Fields]) -> None:
        super().__init__(**self.own_fields({**given}))
        object.__setattr__(self, "_state", self._begin(self._whole_schedule(), "cpu"))

    def _whole_schedule(self) -> Schedule:
        """Compute a schedule of a step for each training timestep, which is used before `set_timesteps`."""
        if not isinstance(self, DiffusionScheduler):
            return self.schedule(self.num_train_timesteps)
        table = self.training_sigmas()
        every_timestep = [float(timestep) for timestep in reversed(range(len(table)))]
        return self._finish(np.append(table.numpy()[::-1], np.float32(0)), every_timestep, table)

    def _begin(self, schedule: Schedule, device: torch.device | str, is_run: bool = False) -> LoopState:
        """Make the state of a loop; is_run: with the evaluations within steps, where there are any."""
        *levels, end = schedule.sigmas.tolist()
        times, steps = schedule.timesteps.tolist(), list(range(len(levels)))
        if is_run and self.evaluations(schedule) > len(levels):
            levels, steps = self._find_evaluations(schedule)
            times = [schedule.timestep(sigma) for sigma in levels]
        dtype = torch.int64 if schedule.whole_timesteps else torch.float32
        timesteps = torch.tensor(times, dtype=torch.float64, device="cpu").to(device, dtype)
        sigmas = torch.tensor([*levels, end], dtype=torch.float32, device="cpu")
        return LoopState(schedule, levels, steps, timesteps, sigmas)

    def _find_evaluations(self, schedule: Schedule) -> tuple[list[float], list[int]]:
        """Run the sampler on zeros; return the sigma and the step of each evaluation of the model."""
        levels, steps, done = list[float](), list[int](), [0]

        def denoise(x: Tensor, sigma: float) -> Tensor:
            levels.append(sigma)
            steps.append(done[0])
            return x

        def on_step(i: int, x: Tensor) -> Tensor:
            done[0] = i + 1
            return x

        zero = torch.zeros((), device="cpu")
        self.sampler(schedule, lambda: zero)(denoise, zero, schedule.sigmas, on_step)
        return levels, steps

    def __copy__(self) -> Self:
        twin = type(self)(**asdict(self))
        state = self._state
        twins = {"given": [*state.given], "noises": [*state.noises]}
        object.__setattr__(twin, "_state", replace(state, **twins))
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
        return list(STATEFUL.values())

    @property
    def order(self) -> int:
        """The number of evaluations of the model in a step."""
        return 2 if isinstance(self, plain.TwoEvaluations) else 1

    @property
    def timesteps(self) -> Tensor:
        """The model's input at each of its evaluations: [n], or more where a step takes two."""
        return self._state.timesteps

    @property
    def sigmas(self) -> Tensor:
        """The standard deviation of the noise at each evaluation and at the end: float32, on the CPU."""
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
        """The variance that each training timestep adds: float32 [T]; AttributeError if there is none."""
        if isinstance(self, DiffusionScheduler):
            return self.training_betas()
        raise AttributeError(f"{type(self).__name__} has no betas")

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
        """The index of the next evaluation, None before the first."""
        return self._state.step_index

    @property
    def begin_index(self) -> int | None:
        """The index of the first evaluation, None if its timestep tells."""
        return self._state.begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin with this evaluation, such as when a given image is noised up to it."""
        last = len(self.timesteps) - 1
        self._state.begin_index = check_int("begin_index", begin_index, least=0, most=last)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None
    ) -> None:  # fmt: skip
        """Begin a loop of so many steps, or of given timesteps (n) or sigmas (n + 1); see `schedule`."""
        schedule = self.schedule(num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        state = self._begin(schedule, "cpu" if device is None else loading_device(device), is_run=True)
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
        sigmas = [state.levels[i] for i in indices]
        scale = column([self.latent_scale(sigma) for sigma in sigmas], original_samples)
        return (original_samples + noise * column(sigmas, original_samples)) / scale

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Scale the loop's latents to the model's input."""
        sigma = self._state.levels[0 if timestep is None else self._locate(timestep)]
        ratio = self.target.scale(sigma) / self.latent_scale(sigma)
        return sample if ratio == 1 else sample / ratio

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, generator: Generators = None,
        variance_noise: Tensor | None = None, return_dict: bool = True, *, eta: float | None = None
    ) -> Any:  # fmt: skip
        """Compute the next latents of the loop from the model's output, or a tuple without return_dict.

        variance_noise: the noise of the step, drawn from the generator if None. eta: of DDIM and TCD.
        """
        sigma = self._check_step(model_output, timestep, sample)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32)) * self.latent_scale(sigma)
        x0 = self.target.x0(x, sigma, model_output)

        def draw() -> Tensor:
            if variance_noise is not None:
                return variance_noise.to(x)
            return randn_latents(tuple(x.shape), generator, x.device, torch.float32).to(x)

        following = self._resume(x, x0, draw, {} if eta is None else {"eta": eta})
        return self._count(following.to(model_output.dtype), x0, return_dict)

    def _resume(self, x: Tensor, x0: Tensor, draw: Noise, options: dict[str, float]) -> Tensor:
        """Run the sampler on all that was given, until it asks for more; return the latents that it has."""
        state, given, noises = self._state, [*self._state.given, (x, x0)], [*self._state.noises]
        run = state.schedule.keep_last(len(state.schedule.timesteps) - state.steps[self._first()])
        asked, drawn = iter(given), iter(noises.copy())
        answered = 0

        def denoise(x: Tensor, sigma: float) -> Tensor:
            nonlocal answered
            if (answer := next(asked, None)) is None:
                raise _Evaluation(x, sigma)
            answered += 1
            return answer[1]

        def on_step(i: int, x: Tensor) -> Tensor:  # the loop may have changed its latents
            return given[answered][0] if answered < len(given) else x

        def noise() -> Tensor:
            if (known := next(drawn, None)) is None:
                noises.append(known := draw())
            return known

        sampler: Callable[..., Tensor] = self.sampler(run, noise, **options)
        try:
            x, sigma = sampler(denoise, given[0][0], run.sigmas, on_step), run.sigmas[-1].item()
        except _Evaluation as asks:
            x, sigma = asks.x, asks.sigma
        state.given, state.noises = given, noises
        return x / self.latent_scale(sigma)

    def _check_step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor) -> float:
        """Return the sigma of a step; ValueError for tensors that do not fit, or a step out of turn."""
        if model_output.shape != sample.shape:
            got = f"{list(model_output.shape)}, {list(sample.shape)}"
            raise ValueError(f"model_output and sample must be of one shape, got {got}")
        return self._state.levels[self._locate(timestep)]

    def _count(self, following: Tensor, x0: Tensor, return_dict: bool) -> Any:
        """Count a step; return its result, as a tuple without return_dict."""
        self._state.step_index = (self._state.step_index or 0) + 1
        output = SchedulerOutput(following, x0 if self.gives_clean else None)
        return output if return_dict else output.to_tuple()

    def _first(self) -> int:
        """Return the index of the loop's first evaluation."""
        return (self._state.step_index or 0) - len(self._state.given)

    def _locate(self, timestep: float | Tensor) -> int:
        """Return the index of the next evaluation: at the first the begin index, or else the timestep's."""
        state = self._state
        if state.step_index is None:
            begin = state.begin_index
            state.step_index = self.index_for_timestep(timestep) if begin is None else begin
        if state.step_index >= len(state.timesteps):
            raise ValueError(f"all {len(state.timesteps)} steps are done, begin again by set_timesteps")
        return state.step_index


STATEFUL: dict[type[Scheduler], type[StatefulScheduler]] = {}  # by the plain class; filled by schedulers.py


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


def column(values: list[float], like: Tensor) -> Tensor:
    """Make a tensor of one value for each image: [B, 1, 1, 1]."""
    return like.new_tensor(values).view(-1, *[1] * (like.ndim - 1))
