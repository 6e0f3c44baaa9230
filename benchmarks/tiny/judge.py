"""Judge of generated images: the prompts of held-out scenes, and whether an image shows what its prompt says.

A prompt is a caption of a scene whose pair of things or sign text is never trained on, half of the time in a
phrasing that is never trained on either. The detector reads an image; the same rules that wrote the caption
(captions.py) say what must hold, with `MARGIN` pixels of tolerance where a rule has a threshold.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.tiny.captions import (
    CHINESE_UNSEEN,
    ENGLISH_UNSEEN,
    HIGH,
    LOW,
    SLOPE,
    Caption,
    Grammar,
    english,
)
from benchmarks.tiny.detector import Found
from benchmarks.tiny.scenes import SIZE, Item, Scene, compose

MARGIN = 4.0  # pixels by which a middle may miss the threshold of a place or a relation
FIRST = 3 * 10**9  # seed of the first prompt's scene, far from those of training
ANY_CORNER = ("in a corner", "角落里")
LANGUAGES = ("english", "chinese")


@dataclass(frozen=True)
class Prompt:
    """A prompt, the scene that it describes, and its caption's claims of places and relations."""

    text: str
    scene: Scene
    claims: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What an image has right. present: each kind is there; exact: in the right number, and nothing else.

    number: each kind of which several are asked for is there as often, None if there is none. places,
    relations: each claim's; characters: each of the sign's; text: the whole sign, None without one.
    """

    present: bool
    exact: bool
    number: bool | None
    places: tuple[bool, ...]
    relations: tuple[bool, ...]
    ground: bool
    characters: tuple[bool, ...]
    text: bool | None

    @property
    def is_right(self) -> bool:
        """Return whether everything that the prompt says holds."""
        return self.exact and self.ground and all(self.places + self.relations) and self.text is not False


def write_prompts(grammar: Grammar, count: int, language: int) -> list[Prompt]:
    """Write `count` prompts in English, 0, or Chinese, 1; the scenes are the same in both."""
    return [write_prompt(grammar, FIRST + i, language) for i in range(count)]


def write_prompt(grammar: Grammar, seed: int, language: int) -> Prompt:
    """Write a prompt of the held-out scene of a seed."""
    scene, order = compose(seed, is_trained=False), random.Random(f"{seed} {language}")
    caption: Caption = grammar.say(scene, order, language, is_wrapped=False)
    text = caption.text
    if order.random() < 0.5:
        text = order.choice((ENGLISH_UNSEEN, CHINESE_UNSEEN)[language]).format(x=text)
    return Prompt(text, scene, caption.claims)


def write_single_prompts(grammar: Grammar, language: int) -> list[tuple[str, str]]:
    """Write a plain prompt for each kind: (prompt, kind)."""
    return [
        ((english(concept.english[0], 1), concept.chinese[0])[language], kind)
        for kind, concept in grammar.names.items()
    ]


def judge(prompt: Prompt, found: Found) -> Verdict:
    """Judge what was found in a prompt's image."""
    scene, text = prompt.scene, "".join(item.text for item in prompt.scene.items)
    several = [group for group in scene.groups if len(group) > 1]
    claims = [(len(claim) == 2, holds(claim, found.items, prompt.text)) for claim in prompt.claims]
    return Verdict(
        present=all(found.kinds[kind] for kind in scene.kinds),
        exact=found.kinds == {group[0].kind: len(group) for group in scene.groups},
        number=all(found.kinds[group[0].kind] == len(group) for group in several) if several else None,
        places=tuple(right for is_place, right in claims if is_place),
        relations=tuple(right for is_place, right in claims if not is_place),
        ground=found.ground == scene.ground,
        characters=tuple(found.text[i : i + 1] == character for i, character in enumerate(text)),
        text=found.text == text if text else None,
    )


def holds(claim: Sequence[str], items: Sequence[Item], text: str = "") -> bool:
    """Return whether (place, kind) or (relation, kind, other kind) is true of items that are all there.

    text: the prompt, in which a corner may be "a corner", of which any will do.
    """
    word, *kinds = claim
    groups = [[item for item in items if item.kind == kind] for kind in kinds]
    if not all(groups):
        return False
    if len(groups) == 2:
        return all(_is_related(word, a, b) for a in groups[0] for b in groups[1])
    is_any = " " in word and any(words in text.lower() for words in ANY_CORNER)
    corners = ("top left", "top right", "bottom left", "bottom right")
    return any(_is_at(place, groups[0]) for place in (corners if is_any else (word,)))


def _is_at(place: str, items: Sequence[Item]) -> bool:
    """Return whether all items may be at a place; the height of several "on the left" is free."""
    words = set(place.split())
    across = next(iter(words & {"left", "right"}), "middle")
    down = next(iter(words & {"top", "bottom"}), "middle")
    is_across = all(_is_in({"left": 0, "right": 2}.get(across, 1), item.x) for item in items)
    is_down = all(_is_in({"top": 0, "bottom": 2}.get(down, 1), item.y) for item in items)
    if len(items) > 1 and len(words) == 1 and place != "middle":
        return is_down if across == "middle" else is_across
    return is_across and is_down


def _is_in(third: int, value: float) -> bool:
    """Return whether a coordinate is in the page's first, middle or last part, or misses it by `MARGIN`."""
    least, most = ((0.0, LOW), (LOW, HIGH), (HIGH, float(SIZE)))[third]
    return least - MARGIN <= value <= most + MARGIN


def _is_related(relation: str, a: Item, b: Item) -> bool:
    """Return whether a stands so to b, or misses it by `MARGIN` pixels in either direction."""
    right, down = a.x - b.x, a.y - b.y
    along, beside = {
        "left of": (-right, down), "right of": (right, down), "above": (-down, right), "below": (down, right),
    }[relation]  # fmt: skip
    return along > 0 and along + MARGIN > SLOPE * max(0.0, abs(beside) - MARGIN)
