"""Prompts with known answers, from a template: "a {thing: fox|cat} on the {place: left|right}".

Analyses run a pipeline on them, and compare what they find with what the prompt asks for.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

import torch
from torch import Tensor

from kolors_core.inspection.token_attention import TextToImage
from kolors_core.validation import check_int

Track = Callable[[list[Any]], Iterable[Any]]  # wraps a list that is worked through, for a progress bar
TIMESTEPS = "timestep, from noise to image"  # an axis
LEVELS = ("conv_in", "down.?", "mid", "up.?")  # patterns of a UNet's levels
Item = TypeVar("Item")
QUESTION = re.compile(r"{([^{}:|]+):([^{}]*)}")
BATCH, BATCH_PIXELS = 24, 2**16  # images at once, of the released model 4


@dataclass(frozen=True)
class Example:
    """Prompt, the index of its answer to each question, and the seed of its noise."""

    prompt: str
    answers: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class PromptTemplate:
    """Template of prompts: its text, and the possible answers to each of its questions, by name."""

    text: str
    questions: dict[str, tuple[str, ...]]

    @classmethod
    def parse(cls, text: str) -> "PromptTemplate":
        """Parse "{name: one answer|another}" in a text; ValueError for a question without two answers."""
        questions = dict[str, tuple[str, ...]]()
        for name, answers in QUESTION.findall(text):
            name, options = name.strip(), tuple(answer.strip() for answer in answers.split("|"))
            if len(set(options)) < max(2, len(options)):
                raise ValueError(f"{name!r}: expected two or more answers, all different, got {answers!r}")
            if name in questions:
                raise ValueError(f"{name!r} is asked twice in {text!r}")
            questions[name] = options
        if rest := re.search(r"[{}]", QUESTION.sub("", text)):
            raise ValueError(f"expected {{name: one answer|another}}, got a single {rest[0]!r} in {text!r}")
        return cls(text, questions)

    def prompts(self) -> list[tuple[str, tuple[int, ...]]]:
        """List each combination of answers: the prompt, and the answers' indices."""
        found = []
        for answers in product(*(range(len(options)) for options in self.questions.values())):
            words = iter([o[i] for o, i in zip(self.questions.values(), answers, strict=True)])
            found.append((QUESTION.sub(lambda _, words=words: next(words), self.text), answers))
        return found

    def examples(self, images: int, seed: int) -> list[Example]:
        """List `images` examples of each prompt, prompt by prompt, each of its own seed from `seed`."""
        check_int("images", images)
        pairs = [pair for pair in self.prompts() for _ in range(images)]
        return [Example(*pair, seed + i) for i, pair in enumerate(pairs)]


def in_batches(pipe: TextToImage, examples: Sequence[Item], copies: int = 1) -> list[Sequence[Item]]:
    """Split examples, of which each is drawn `copies` times, into batches of what is drawn at once.

    At most `BATCH` images, and as many as have `BATCH_PIXELS` pixels of latents in the model's own size.
    """
    size = max(1, min(BATCH, BATCH_PIXELS // pipe.unet.config.sample_size**2) // copies)
    return [examples[i : i + size] for i in range(0, len(examples), size)]


def generate(
    pipe: TextToImage, examples: Sequence[Example], steps: int, **arguments: Any
) -> tuple[Any, list[int]]:
    """Run a pipeline on examples, each of its own noise: the latents [B, C, H, W], and each step's timestep.

    arguments: the call's others; by an `output_type` there are images in place of latents.
    """
    timesteps = list[int]()

    def note(_pipe: Any, _step: int, timestep: Tensor, _tensors: dict[str, Any]) -> dict[str, Any]:
        timesteps.append(round(float(timestep)))
        return {}

    generators = [torch.Generator().manual_seed(example.seed) for example in examples]
    named = {"output_type": "latent", "num_inference_steps": steps, "generator": generators} | arguments
    images = pipe([example.prompt for example in examples], callback_on_step_end=note, **named)[0]
    return images, timesteps


def last_tensor(features: Any) -> Tensor:
    """Return the tensor that a module passes on: its output, or the last of the skips of a down level."""
    return features[-1] if isinstance(features, list | tuple) else features


def check_calls(kept: Mapping[str, Sequence[Any]], timesteps: Sequence[int]) -> None:
    """Raise ValueError for a module that was not called once a step, whose calls have no timestep."""
    for name, calls in kept.items():
        if len(calls) != len(timesteps):
            raise ValueError(
                f"{name} was called {len(calls)} times in {len(timesteps)} steps: expected a layer that is "
                "called in each step, and a sampler that calls the UNet once a step"
            )
