"""Two architectures trained side by side: step by step in turns, A B B A, on the same batches.

All random numbers are those of a seed and a step, so that they are the same for both, and in every run.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.ablate.architecture import Architecture, build_both, predict
from benchmarks.ablate.lesson import Lesson
from benchmarks.side_by_side import race
from kolors_core.training.data import derive_seed
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer, TrainingConfig

POINTS = 8  # of the training, at which the held-out loss is measured
ROUNDS = 40  # of denoising steps, A B B A


@dataclass(kw_only=True)
class Run:
    """What was measured of one architecture with one seed.

    losses: of each training step. held_out: the loss at each of `points`. nearest: of each prompt's image
    the thing that it looks like most; right: the share of those that were asked for. train_ms, denoise_ms: of
    each training step, and of some guided steps of one image.
    """

    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    nearest: list[int] = field(default_factory=list)
    right: float = math.nan
    train_ms: list[float] = field(default_factory=list)
    denoise_ms: list[float] = field(default_factory=list)


def points(steps: int) -> list[int]:
    """After how many steps the held-out loss is measured: the last is `steps`."""
    return sorted({math.ceil(steps * i / POINTS) for i in range(1, POINTS + 1)})


class Side(Trainer):
    """One of the two, trained a step at a time; nothing is saved."""

    def __init__(self, name: str, net: nn.Module, lesson: Lesson, config: TrainingConfig) -> None:
        objective = DiffusionLoss(net, None, lesson.sigmas, config)  # type: ignore[arg-type]
        super().__init__(objective, lesson.seeded(config), config, folder="")
        self.name, self.net, self.lesson, self.run = name, net, lesson, Run()

    def seed(self) -> None:
        """Make what a module draws in its forward a function of seed and step."""
        torch.manual_seed(derive_seed(self.config.seed, self.step))

    def advance(self) -> None:
        """One step; FloatingPointError with the architecture's name if its loss is not finite."""
        self.seed()
        start = time.perf_counter()
        try:
            self.run.losses.append(self.one_step().loss)
        except FloatingPointError as error:
            raise FloatingPointError(f"{self.name}: {error}") from None
        self.run.train_ms.append(1000 * (time.perf_counter() - start))
        self.step += 1

    @torch.no_grad()
    def hold_out(self) -> None:
        """Measure the loss on prompts and noise that are the same for all."""
        self.net.eval()
        self.seed()
        losses = [self.loss(batch).item() for batch in self.lesson.held_out]
        self.run.held_out.append(sum(losses) / len(losses))
        self.net.train()

    def draw(self) -> Tensor:
        """Draw all prompts and see what they look like; the images [P, 3, H, W]."""
        self.net.eval()
        self.seed()
        images, things = self.lesson.draw(self.net, self.config.seed), len(self.lesson.names)
        self.run.nearest = self.lesson.detect_component(images)
        right = [found == i % things for i, found in enumerate(self.run.nearest)]
        self.run.right = sum(right) / len(right)
        return images

    @torch.no_grad()
    def denoise_ms(self) -> dict[str, float]:
        """How long a guided step of one image takes."""
        start = time.perf_counter()
        predict(self.net, self.lesson.step)
        return {"ms": 1000 * (time.perf_counter() - start)}


@dataclass(frozen=True)
class Pair:
    """What one seed gave. images: of A and B, [P, 3, H, W]. shared: how many tensors of B started as A's;
    own: those that did not.
    """

    runs: tuple[Run, Run]
    images: tuple[Tensor, Tensor]
    shared: int
    own: list[str]


def side_by_side(
    a: Architecture,
    b: Architecture,
    lesson: Lesson,
    config: TrainingConfig,
    say: Callable[[str], None] = lambda text: None,
    rounds: int = ROUNDS,
) -> Pair:
    """Train both with the config's seed, measuring on the way. rounds: of denoising steps, A B B A."""
    first, second, own = build_both(a, b, config.seed)
    named = (f"A: {a.text}", first), (f"B: {b.text}", second)
    sides = [Side(name, net, lesson, config) for name, net in named]
    for step in range(config.steps):
        for side in sides if step % 2 == 0 else sides[::-1]:
            side.advance()
        if step + 1 in points(config.steps):
            for side in sides:
                side.hold_out()
            held = " ".join(f"{s.name[0]} {s.run.losses[-1]:.4f} ({s.run.held_out[-1]:.4f})" for s in sides)
            say(f"seed {config.seed}, step {step + 1} of {config.steps}: loss (held out) {held}")
    images = [side.draw() for side in sides]
    found = race({side.name: side.denoise_ms for side in sides}, rounds).contestants
    for side in sides:
        side.run.denoise_ms = found[side.name]["ms"].all
    shared = len(list(second.parameters())) - len(own)
    say(f"seed {config.seed}: drawn right A {sides[0].run.right:.1%}, B {sides[1].run.right:.1%}")
    return Pair((sides[0].run, sides[1].run), (images[0], images[1]), shared, own)


def ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """How much longer B took than A in each round of turns A B B A."""
    return [(b[i] + b[i + 1]) / (a[i] + a[i + 1]) for i in range(0, len(a) - 1, 2)]
