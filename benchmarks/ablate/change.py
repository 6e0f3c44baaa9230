"""Change: what a variant does otherwise than Kolors, in any part of training or drawing; and how it is named.

A part that is not given is Kolors' own, so a published change is a file of one `CHANGE = Change(...)`, such
as those of changes/.
"""

import ast
import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from kolors_core.config import TINY, ChatGLMConfig, UNetConfig
from kolors_core.guidance import GuidanceRule, guided
from kolors_core.sampling import Sampler, dpmpp_2m
from kolors_core.schedule import Scheduler
from kolors_core.schedulers import DPMSolverMultistepScheduler
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import TrainingConfig
from kolors_core.unet import UNet
from kolors_core.validation import check_float, check_int

CHANGES = Path(__file__).parent / "changes"
FIXED = ("sample_size", "in_channels", "out_channels", "text_dim")  # by TINY's encoders and the images
NOT_FREE = (  # given by the command or the scheduler, or of no effect here
    "steps", "seed", "prediction_type", "save_every", "shard",
    "evaluate_every", "held_out_batches", "patience",
)  # fmt: skip
PLAIN = partial(guided, precompute=False)  # nothing is computed ahead, so that all are timed alike
WANTED = (
    'fields of the UNet\'s config or of the training\'s such as "depths=(0, 0, 1)", a name of '
    "benchmarks/ablate/changes, or file.py:name"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Change:
    """Parts of training and drawing; the defaults are Kolors' own.

    denoiser: makes a module, called as `UNet.forward` is, from TINY's `UNetConfig`. text_encoder: makes one,
    called as `ChatGLM.forward` is, which is trained too; None: the embedded model's, frozen. loss: makes a
    module of `DiffusionLoss`'s arguments. scheduler: has the sigmas and the target that are trained on, and
    the steps that draw. guided: of `guided`'s signature. sampler: of `denoise`, x and sigmas. training:
    fields of `TrainingConfig`.
    """

    denoiser: Callable[[UNetConfig], nn.Module] = UNet
    text_encoder: Callable[[ChatGLMConfig], nn.Module] | None = None
    loss: Callable[..., nn.Module] = DiffusionLoss
    scheduler: Scheduler = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    guided: GuidanceRule = PLAIN
    sampler: Sampler = dpmpp_2m
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """A change as it was asked for. config: the UNet's. source: digest of the file that it is from, if any.

    about: the first line of that file's docstring.
    """

    text: str
    config: UNetConfig
    change: Change = Change()
    source: str = ""
    about: str = ""

    def training(self, recipe: TrainingConfig, **given: Any) -> TrainingConfig:
        """Return the recipe with this change's settings, and those given."""
        own = {"prediction_type": self.change.scheduler.prediction_type, **self.change.training}
        return replace(recipe, **{**own, **given})

    def scaled(self, factor: float) -> "Variant":
        """Return the variant at another width, in multiples of 32 rounded up; heads are as wide as before."""
        widths = self.config.channels
        channels = tuple(32 * -(-round(width * factor) // 32) for width in widths)
        of_a_head = [width // heads for width, heads in zip(widths, self.config.heads, strict=True)]
        heads = tuple(max(1, width // of) for width, of in zip(channels, of_a_head, strict=True))
        return replace(self, config=replace(self.config, channels=channels, heads=heads))


def read(text: str, latents: int) -> Variant:
    """Read a variant as it is named on the command line; "" is TINY's UNet. latents: of a side.

    ValueError or FileNotFoundError names what is wrong.
    """
    config = replace(TINY.unet, sample_size=latents)
    if not text.strip():
        return Variant("TINY", config)
    if (CHANGES / f"{text}.py").is_file():
        return replace(_of_file(text, CHANGES / f"{text}.py", "CHANGE", config), text=text)
    if match := re.fullmatch(r"(.+\.py):(\w+)", text):
        return _of_file(text, Path(match[1]), match[2], config)
    return _changed(text, config)


def _changed(text: str, config: UNetConfig) -> Variant:
    try:
        call = ast.parse(f"config({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not call.keywords:
            raise ValueError
        changes = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        names = ", ".join(sorted(file.stem for file in CHANGES.glob("[a-z]*.py")))
        raise ValueError(f"{text!r}: expected {WANTED}; changes: {names}") from None
    free = [one.name for one in fields(UNetConfig) if one.name not in FIXED]
    settings = [one.name for one in fields(TrainingConfig) if one.name not in NOT_FREE]
    for name, value in changes.items():
        if name in free:
            _check_field(config, name, value)
        elif name not in settings:
            why = "is given by TINY's encoders and the images" if name in FIXED else "is no field"
            raise ValueError(f"{name} {why}: the fields to change are {', '.join([*free, *settings])}")
    config = replace(config, **{name: value for name, value in changes.items() if name in free})
    levels = len(config.channels) if isinstance(config.channels, tuple) else 3
    for name in ("channels", "heads", "depths"):
        value = getattr(config, name)
        if not isinstance(value, tuple) or len(value) != levels:
            raise ValueError(f"{name} is {value}, expected {levels} whole numbers, one a level")
    training = {name: value for name, value in changes.items() if name in settings}
    replace(TrainingConfig(steps=1), **training)  # ValueError for what it does not take
    return Variant(text, config, Change(training=training))


def _check_field(config: UNetConfig, name: str, value: Any) -> None:
    if isinstance(getattr(config, name), tuple):
        for number in value if isinstance(value, tuple) else ():
            check_int(name, number, least=0 if name == "depths" else 1)
    elif name == "norm_eps":
        check_float(name, value, 0)
    else:
        check_int(name, value)


def _of_file(text: str, file: Path, name: str, config: UNetConfig) -> Variant:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    spec = importlib.util.spec_from_file_location(str(file.resolve()), file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.resolve().parent))  # it may import its neighbours, as a script may
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file}: cannot be run: {told(error)}") from error
    found = getattr(module, name, None)
    if not isinstance(found, Change) and not callable(found):
        raise ValueError(f"{file}: has no function and no Change {name}")
    change = found if isinstance(found, Change) else Change(denoiser=found)
    if refused := [name for name in change.training if name in NOT_FREE]:
        raise ValueError(f"{file}: {name} sets {refused[0]}, which the command or the scheduler gives")
    source = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return Variant(text, config, change, source, (module.__doc__ or "").strip().split("\n")[0])


def told(error: Exception) -> str:
    """Describe an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
