"""What tests of the ablation share: a small lesson, a file of makers, and runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from benchmarks.ablate.change import read
from benchmarks.ablate.models import example
from benchmarks.ablate.study import Job, Run, train
from benchmarks.ablate.things import RECIPE, Things
from kolors_core.training.data import Example

NARROW = "channels=(32, 32, 32), heads=(1, 1, 1)"
SMALL = replace(RECIPE, batch_size=2, warmup=1)
STEPS = 3
MODULES = '''
from dataclasses import replace
import torch
from torch import nn
from kolors_core.unet import UNet

class Plain(nn.Module):
    """One convolution, and a layer that is not used."""
    def __init__(self, config):
        super().__init__()
        self.conv, self.spare = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(2, 2)
    def forward(self, latents, timestep, text_tokens, pooled_text, size_ids, text_counts=None, residuals=()):
        return self.conv(latents)

class Wide(Plain):
    """Two convolutions, as wide as the config's channels."""
    def __init__(self, config):
        super().__init__(config)
        self.conv = nn.Sequential(nn.Conv2d(4, config.channels[0], 1), nn.Conv2d(config.channels[0], 4, 1))

class Narrower(Plain):
    def forward(self, *given, **more):
        return super().forward(*given, **more)[:, :3]

class Constant(Plain):
    def forward(self, latents, *given, **more):
        return latents

class Text(Plain):
    def forward(self, *given, **more):
        return "noise"

class OtherArguments(Plain):
    def forward(self, latents, timestep):
        return self.conv(latents)

class Quiet(UNet):
    """A UNet whose output starts as zeros."""
    def __init__(self, config):
        super().__init__(config)
        nn.init.zeros_(self.conv_out.weight)

class Noisy(UNet):
    """Narrow; draws in its forward."""
    def __init__(self, config):
        super().__init__(replace(config, channels=(32, 32, 32), heads=(1, 1, 1)))
    def forward(self, latents, *given, **more):
        return super().forward(latents + 0.1 * torch.randn_like(latents), *given, **more)

from benchmarks.ablate.change import Change
from kolors_core.training.loss import DiffusionLoss
class Wild(DiffusionLoss):
    def each(self, batch):
        return super().each(batch) * float("inf")
wild = Change(denoiser=Plain, loss=Wild)
encoder = Change(denoiser=Plain, text_encoder=lambda config: nn.Linear(3, 3))
fixed = Change(denoiser=Plain, training={"prediction_type": "sample"})
number = 3
def nothing(config):
    return None
def broken(config):
    return config.width
'''


def small_lesson(folder: Path) -> Things:
    """Make a lesson of three discs, small, which draws in few steps."""
    names, examples = ("tomato", "lemon", "pear"), []
    for name, color in zip(names, ("red", "yellow", "green"), strict=True):
        picture = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(picture).ellipse((6, 6, 26, 26), fill=color)
        picture.save(folder / f"{name}.png")
        examples.append(Example(folder / f"{name}.png", (name, f"a {name}"), 32, 32))
    lesson = Things(examples, names, 32, SMALL)
    lesson.steps = 3
    return lesson


def write_modules(folder: Path) -> Path:
    """Write a file of makers, good and bad."""
    (folder / "modules.py").write_text(MODULES)
    return folder / "modules.py"


def job(text: str, label: str = "A", seed: int = 0, steps: int = STEPS) -> Job:
    """Make a job of a variant, as it is named."""
    return Job(label=label, variant=read(text, 4), seed=seed, steps=steps)


def run(lesson: Any, text: str, seed: int = 0, label: str = "A", base: str = NARROW) -> tuple[Run, Any]:
    """Train and measure a variant; its run and images."""
    return train(lesson, job(text, label, seed), read(base, 4), lambda text: None)


def predict(net: nn.Module, x: Tensor) -> Tensor:
    """Call a denoiser at a timestep in the middle, with nothing to read."""
    rows = example()
    inputs = rows.text_tokens, rows.pooled_text, rows.size_ids, rows.text_counts
    return net(x, torch.full((len(x),), 500.0), *inputs)
