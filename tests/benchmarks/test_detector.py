"""The detector of scenes: what it reads from planted logits, how it learns, how far apart images are."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.tiny.detector import (
    KINDS,
    TRAINING,
    Detector,
    Found,
    Reading,
    Readings,
    Scenes,
    SceneSource,
    accuracy,
    halved,
    peaks,
    pixels,
    read,
    truth,
    with_large,
)
from benchmarks.tiny.emoji import FONT
from benchmarks.tiny.scenes import CHARACTERS, GROUNDS, SIGN, SIGN_FONT, Item, Scene, crowd
from kolors_core.training.trainer import Trainer, TrainingConfig

CPU = torch.device("cpu")
needs_fonts = pytest.mark.skipif(
    not (FONT.exists() and SIGN_FONT.exists()),
    reason="Debian's fonts-noto-color-emoji and fonts-noto-cjk are not installed",
)
FOX, CAT = "🦊", "🐱"
SCENE = Scene(
    "night",
    (
        (Item(FOX, 30, 30, 40, 44, 44), Item(FOX, 90, 33, 38, 40, 40)),
        (Item(SIGN, 64, 92, 88, 36, 36, text="可图A"),),
    ),
)


def planted(scene: Scene, strength: float = 12.0) -> Readings:
    """What a detector would say that is sure of a scene."""
    kinds, boxes, characters, ground = truth(scene)
    grids = [
        F.one_hot(grid, count + 1).permute(2, 0, 1)[None] * strength
        for grid, count in ((kinds, len(KINDS)), (characters, len(CHARACTERS)))
    ]
    return Readings(
        grids[0], boxes[None], grids[1], F.one_hot(torch.tensor([ground]), len(GROUNDS)) * strength
    )


def test_planted_logits_are_read_as_the_scene_that_they_say() -> None:
    (found,) = read(planted(SCENE))
    assert found.kinds == Counter({FOX: 2, SIGN: 1}) and found.ground == "night"
    assert found.text == "可图A", "from left to right"
    places = {(item.kind, round(item.x), round(item.y), round(item.width)) for item in found.items}
    assert places == {(FOX, 30, 30, 40), (FOX, 90, 33, 38), (SIGN, 64, 92, 88)}
    (other,) = read(planted(Scene("sky", ((Item(CAT, 30, 30, 40, 44, 44),),))))
    assert (other.kinds, other.ground, other.text) == (Counter({CAT: 1}), "sky", "")


def test_an_item_between_two_cells_is_one_and_neighbours_stay_two() -> None:
    logits = torch.zeros(3, 16, 16)
    logits[2] = 12.0  # nothing
    logits[:, 4, 4] = logits[:, 4, 5] = torch.tensor([6.0, 0.0, 6.0])  # half an item in each
    logits[:, 10, 10] = torch.tensor([0.0, 9.0, 0.0])
    logits[:, 10, 12] = torch.tensor([9.0, 0.0, 0.0])
    logits[:, 1, 1] = torch.tensor([0.0, 6.0, 8.0])  # rather not
    found = sorted((kind, row, column) for kind, row, column, _ in peaks(logits))
    assert found == [(0, 4, 4), (0, 10, 12), (1, 10, 10)]
    logits[:, 4, 5] = torch.tensor([0.0, 0.0, 12.0])
    assert (0, 4, 4) not in {each[:3] for each in peaks(logits - torch.tensor([2.0, 0, 0])[:, None, None])}


def test_what_is_large_is_found_in_the_halved_image_where_the_whole_one_has_nothing() -> None:
    images = torch.zeros(1, 3, 128, 128)
    images[:, :, :64, 64:] = 1.0
    half = halved(images)
    assert half.shape == images.shape and half[0, 0, 40, 90] == half[0, 0, 0, 127] == 1.0
    assert half[0, 0, 90, 40] == half[0, 0, 127, 0] == half[0, 0, 10, 10] == 0.0
    fox, near, far = (Item(kind, x, x, 40, 36, 40) for kind, x in ((FOX, 20), (CAT, 50), (CAT, 80)))
    whole = Found((fox,), "sky", "A")
    small, missed = replace(far, width=30, height=30, size=30), Found((near, far), "night", "B")
    found = with_large(whole, missed)
    assert (found.ground, found.text) == ("sky", "A")
    assert found.items == (fox, Item(CAT, 96, 96, 80, 72, 80)), "the other's box has the fox's middle"
    assert with_large(whole, Found((small,), "sky")).items == (fox,), "what is not large is read in the whole"


@needs_fonts
def test_a_training_batch_depends_on_seed_and_step_and_a_part_of_it_is_the_wholes() -> None:
    source = SceneSource(TrainingConfig(steps=1, batch_size=4, seed=3))
    whole, part = source.batch(2, slice(0, 4), CPU), source.batch(2, slice(1, 3), CPU)
    assert whole.images.shape == (4, 3, 128, 128) and whole.images.abs().max() <= 1
    for name in ("images", "kinds", "boxes", "characters", "grounds"):
        assert torch.equal(getattr(whole, name)[1:3], getattr(part, name))
    assert not torch.equal(whole.images, source.batch(1, slice(0, 4), CPU).images)
    assert (whole.kinds < len(KINDS)).sum() > 4


@needs_fonts
def test_a_crowd_does_not_overlap() -> None:
    items = [group[0] for group in crowd(random.Random(1), (SIGN, "🐘", FOX, CAT, "🐙"), "好天气")]
    assert len(items) >= 3 and items[0].text == "好天气"
    assert not any(a.overlaps(b) for i, a in enumerate(items) for b in items[i + 1 :])


class OneBatch:
    """A source whose batches are all the same scenes."""

    def __init__(self, scenes: list[Scene]) -> None:
        self.images = torch.stack([pixels(scene) for scene in scenes])
        kinds, boxes, characters, grounds = zip(*map(truth, scenes), strict=True)
        truths = torch.stack(kinds), torch.stack(boxes), torch.stack(characters), torch.tensor(grounds)
        self.scenes = Scenes(self.images, *truths)

    def batch(self, step: int, rows: slice, device: torch.device) -> Scenes:
        """All of it."""
        return self.scenes

    def record(self) -> dict[str, object]:
        """Nothing."""
        return {}


@needs_fonts
def test_a_detector_learns_to_read_its_scenes_by_the_librarys_loop(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scenes = [SCENE, Scene("grass", ((Item(CAT, 70, 70, 56, 60, 60),),))]
    detector, source = Detector(), OneBatch(scenes)
    assert sum(parameter.numel() for parameter in detector.parameters()) < 1.5e6
    config = TrainingConfig(steps=45, batch_size=2, learning_rate=2e-3, warmup=5)
    losses = Trainer(Reading(detector), source, config, tmp_path).fit(progress=False)
    assert losses[-1] < 0.1 * losses[0]
    found = detector.detect(source.images)
    assert [each.kinds for each in found] == [{FOX: 2, SIGN: 1}, {CAT: 1}]
    assert [each.ground for each in found] == ["night", "grass"] and found[0].text == "可图A"
    cat = found[1].items[0]
    assert cat.x == pytest.approx(70, abs=4) and cat.width == pytest.approx(56, abs=12)
    nothing = accuracy(Detector().eval(), 4)
    assert nothing["kinds and numbers"] == 0.0 and nothing["all"] == 0.0 and nothing["things"] < 0.1


def test_the_distance_is_0_for_equal_images_and_grows_with_change() -> None:
    torch.manual_seed(0)
    detector = Detector()
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    near, far = images + 0.05 * torch.randn(images.shape), images.flip(0)
    assert detector.distance(images, images).abs().max() < 1e-6
    assert (detector.distance(images, near) < detector.distance(images, far)).all()
    assert torch.allclose(detector.distance(images, far), detector.distance(far, images))
    assert TRAINING.ema_decay > 0, "a trained detector has the average's weights"
