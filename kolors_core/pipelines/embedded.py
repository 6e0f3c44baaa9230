"""Embedded model: the things that it draws, in English and Chinese, and a warning for all others.

`kolors_core/tiny/concepts.json` lists them; `benchmarks/tiny` wrote it with the model.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from kolors_core.checkpoint import EMBEDDED, EMBEDDED_NAME, logger, read_json
from kolors_core.devices import unwrap_compiled
from kolors_core.image import Size
from kolors_core.module import settings
from kolors_core.pipelines.base import Components
from kolors_core.pipelines.fingerprint import fingerprint

SIZE = (128, 128)  # that it was trained at
ORDINARY = {
    "a", "an", "and", "draw", "for", "image", "in", "of", "on", "photo", "please", "the", "with",
}  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """Thing that the model draws: its emoji, and its names, the everyday one first."""

    emoji: str
    english: tuple[str, ...]
    chinese: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.emoji} {', '.join(self.english)}; {', '.join(self.chinese)}"


@cache
def concepts() -> tuple[Concept, ...]:
    """List the things that the embedded model draws."""
    rows = read_json(EMBEDDED / "concepts.json")["concepts"]
    return tuple(Concept(row["emoji"], tuple(row["english"]), tuple(row["chinese"])) for row in rows)


def named_in(prompt: str) -> list[Concept]:
    """List the things that a prompt names, in English, also in the plural, or in Chinese."""
    text = prompt.lower()
    return [
        one for one in concepts()
        if any(re.search(rf"\b{re.escape(name.lower())}(s|es)?\b", text, re.ASCII) for name in one.english)
        or any(name in prompt for name in one.chinese)
    ]  # fmt: skip


def nearest(prompt: str, count: int = 3) -> list[Concept]:
    """List the things that a prompt names, or else those of the most similar names, the nearest first."""
    if found := named_in(prompt):
        return found[:count]
    words = [word for word in re.findall(r"[a-z]+", prompt.lower()) if word not in ORDINARY]

    def similarity(concept: Concept) -> float:
        parts = [part for name in concept.english for part in (name.lower(), *name.lower().split())]
        shared = [len({*name} & {*prompt}) / len({*name}) for name in concept.chinese]
        ratios = [difflib.SequenceMatcher(None, word, part).ratio() for word in words for part in parts]
        return max([*shared, *ratios])

    return sorted(concepts(), key=similarity, reverse=True)[:count]


def warn_unknown(pipe: Components, prompts: str | Sequence[str] | None, size: Size) -> None:
    """Log a warning if a pipeline is the embedded model, and draws another thing or at another size.

    With a LoRA, learned words or another UNet it may know more, and there is none.
    """
    if pipe.name_or_path not in (EMBEDDED_NAME, str(EMBEDDED)) or prompts is None:
        return
    unet: Any = unwrap_compiled(pipe.unet)
    if settings(unet) or pipe._placeholder_words() or fingerprint(unet) != _fingerprint():
        return
    if size != SIZE:
        got, best = f"{size[1]}x{size[0]}", f"{SIZE[1]}x{SIZE[0]}"
        logger.warning("the embedded model draws at %s: expect a worse image at %s", best, got)
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        if prompt.strip() and not named_in(prompt):
            near = ", ".join(f"{one.english[0]} {one.chinese[0]}" for one in nearest(prompt))
            text, count = prompt if len(prompt) <= 60 else f"{prompt[:60]}...", len(concepts())
            known = f"nearest of its {count} things"
            logger.warning("the embedded model knows nothing in %r; %s: %s", text, known, near)


@cache
def _fingerprint() -> str:
    return read_json(EMBEDDED / "concepts.json")["unet"]
