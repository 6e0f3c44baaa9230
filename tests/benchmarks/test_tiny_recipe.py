"""The recipe of the embedded model: names, what its encoders learn from, their losses, what is measured."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.tiny.autoencoder import (
    CROP,
    CROPS,
    EmojiCrops,
    Pixels,
    Reconstruction,
    SceneCrops,
    new_vae,
    psnr,
    standardise,
)
from benchmarks.tiny.captions import Grammar
from benchmarks.tiny.emoji import CONCEPTS, FONT, Concept, draw, read_concepts
from benchmarks.tiny.inpaint import nine_channels
from benchmarks.tiny.quality import interval
from benchmarks.tiny.scenes import CHARACTERS, GROUNDS, SIGN, SIGN_FONT, Item, Scene
from benchmarks.tiny.text import (
    ABSENT,
    KINDS,
    SEEN,
    SIDE,
    CaptionSource,
    SceneReading,
    Whitening,
    accuracy,
    told_sides,
    train,
    truth,
    whiten,
)
from kolors_core.chatglm import ChatGLM
from kolors_core.checkpoint import EMBEDDED, load_component
from kolors_core.config import TINY
from kolors_core.pipelines.embedded import concepts
from kolors_core.pipelines.lora_recipe import nearest
from kolors_core.tokenizer import Tokenizer
from kolors_core.training.trainer import Trainer, TrainingConfig
from kolors_core.vae import VAE
from tests.support.small import EXACT, SMALL, randomise, relative_error

CPU = torch.device("cpu")
needs_font = pytest.mark.skipif(not FONT.exists(), reason="Debian's fonts-noto-color-emoji is not installed")
needs_both_fonts = pytest.mark.skipif(
    not FONT.exists() or not SIGN_FONT.exists(),
    reason="Debian's fonts-noto-color-emoji and fonts-noto-cjk are not installed",
)


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return Grammar([Concept(one.emoji, one.english, one.chinese) for one in concepts()])


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of emoji names of the real one's format."""
    folder = tmp_path_factory.mktemp("package")
    for language, word in (("en", "thing"), ("zh", "东西")):
        (folder / language).mkdir()
        entries = [
            {
                "emoji": c,
                "hexcode": f"{ord(c):X}",
                "label": f"{word} {i}",
                "type": 1,
                "version": 1,
                "group": 3,
            }
            for i, c in enumerate(CONCEPTS)
        ]
        (folder / language / "data.json").write_text(json.dumps(entries))
    return folder


def test_concepts_have_names_of_their_own_in_both_languages(names: Path) -> None:
    concepts = read_concepts(names)
    assert len(concepts) == len(set(CONCEPTS)) >= 100
    every = [name for concept in concepts for name in concept.english + concept.chinese]
    assert len(set(every)) == len(every), "no two concepts share a name"
    ladybug = next(concept for concept in concepts if concept.character == "🐞")
    assert ladybug.english[0] == "ladybug"
    assert ladybug.chinese == ("东西 43",)


@needs_font
def test_an_emoji_is_in_the_middle_of_nothing() -> None:
    picture = draw("🐞")
    assert picture.size == (128, 128) and picture.getpixel((2, 2))[3] == 0 < picture.getpixel((64, 64))[3]
    with pytest.raises(ValueError, match="has no image of"):
        draw(" ")


def glyphs(count: int) -> torch.Tensor:
    return torch.randint(
        256, (count, 128, 128, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_batches_of_emoji_depend_on_seed_and_step_alone() -> None:
    data = EmojiCrops(glyphs(5), favourites=2, batch_size=4, seed=1)
    first, again = (data.batch(2, slice(0, 4), CPU) for _ in range(2))
    assert torch.equal(first.images, again.images) and torch.equal(first.noise, again.noise)
    assert first.images.shape == (4, 3, CROP, CROP) and first.noise.shape == (4, 4, CROP // 8, CROP // 8)
    assert not torch.equal(first.images, data.batch(1, slice(0, 4), CPU).images)
    part = data.batch(2, slice(1, 3), CPU)
    assert torch.equal(part.images, first.images[1:3]), "a rank's part is the whole's"
    assert torch.equal(part.noise, first.noise[1:3])
    assert first.images.min() >= -1 and first.images.max() <= 1


@needs_both_fonts
def test_batches_of_scenes_likewise() -> None:
    data = SceneCrops(batch_size=4, seed=1)
    first, part = data.batch(2, slice(0, 4), CPU), data.batch(2, slice(CROPS, 4), CPU)
    assert first.images.shape == (4, 3, CROP, CROP) and first.noise.shape == (4, 4, CROP // 8, CROP // 8)
    assert torch.equal(part.images, first.images[CROPS:]) and torch.equal(part.noise, first.noise[CROPS:])
    assert not torch.equal(first.images, data.batch(3, slice(0, 4), CPU).images)
    assert first.images.min() >= -1 and first.images.max() <= 1
    assert (first.images.flatten(1).std(dim=1) > 0.01).all(), "each has some of a thing on it"


def test_disturbed_latents_are_decoded_to_the_same_pictures() -> None:
    """The loss compares with the images themselves, and grows with the disturbance."""
    torch.manual_seed(0)
    vae, draw = new_vae(TINY.vae).eval(), torch.Generator().manual_seed(1)
    images, noise = torch.rand(2, 3, 64, 64, generator=draw) * 2 - 1, torch.randn(2, 4, 8, 8, generator=draw)
    quiet, loud = Pixels(images, 0 * noise, 0 * noise), Pixels(images, 0 * noise, noise)
    with torch.no_grad():
        still = Reconstruction(vae, 0.5)(quiet)
        assert torch.equal(still, Reconstruction(vae)(loud)), "undisturbed"
        assert not torch.equal(Reconstruction(vae, 0.5)(loud), still)
    assert Reconstruction(vae, 0.5).state_key() != Reconstruction(vae).state_key()


def test_the_autoencoder_learns_by_the_librarys_loop(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = new_vae(TINY.vae)
    one = Pixels(torch.rand(1, 3, 64, 64) * 2 - 1, torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))
    Reconstruction(vae)(one).backward()
    assert all(parameter.grad is not None for parameter in vae.parameters())
    config = TrainingConfig(steps=12, batch_size=4, learning_rate=2e-3, warmup=1)
    plain = torch.tensor([200, 30, 60, 255], dtype=torch.uint8).expand(1, 128, 128, 4)
    data = EmojiCrops(plain, favourites=1, batch_size=4, seed=0)
    losses = Trainer(Reconstruction(vae), data, config, tmp_path).fit()
    assert losses[-1] < 0.7 * losses[0]


def test_what_captions_are_to_tell_is_the_scenes_truth() -> None:
    """Eight places a side, of 16 pixels each: the boxes' places have their kinds, a sign's its characters."""
    cat, dogs = Item("🐱", 32, 32, 32, 32, 32), [Item("🐶", 96, y, 32, 32, 32) for y in (32, 96)]
    sign = Item(SIGN, 32, 104, 60, 32, 32, text="A图")
    scene = Scene("night", ((cat,), tuple(dogs), (sign,)))
    grid, numbers, ground, characters, thirds = truth(scene, {"🐶"})
    grid = grid.view(SIDE, SIDE)
    assert (grid[1:3, 1:3] == SEEN.index("🐱")).all() and (grid == SEEN.index("🐱")).sum() == 4
    assert (grid[1:3, 5:7] == SEEN.index("🐶")).all() and (grid == SEEN.index("🐶")).sum() == 8
    assert (grid == len(SEEN)).sum() > 30, "nothing elsewhere"
    assert {KINDS[i]: int(numbers[i]) for i in numbers.nonzero().flatten()} == {"🐱": 1, "🐶": 2, SIGN: 1}
    assert GROUNDS[ground] == "night" and [CHARACTERS[i] for i in characters[:2]] == ["A", "图"]
    assert characters[2] == len(CHARACTERS)
    row = grid[6].tolist()
    assert row.index(SEEN.index("A")) < row.index(SEEN.index("图")), "from left to right"
    assert thirds[KINDS.index("🐶")].tolist() == [2, 1], "the middle of both dogs"
    assert (thirds != ABSENT).sum() == 2, "of what the caption tells alone"


@needs_font
def test_captions_depend_on_seed_and_step_alone(small_tokenizer: Path, grammar: Grammar) -> None:
    """Each scene in both languages; a rank's part is the whole's."""
    config = TrainingConfig(steps=1, batch_size=8, max_tokens=96)
    source = CaptionSource(grammar, Tokenizer(small_tokenizer), config)
    batch, again, part = (source.batch(3, slice(first, 8), CPU) for first in (0, 0, 4))
    assert torch.equal(batch.tokens.ids, again.tokens.ids) and torch.equal(batch.grid, again.grid)
    assert ((batch.thirds == ABSENT) | ((batch.thirds >= 0) & (batch.thirds < 3))).all()
    assert (batch.thirds != ABSENT).any() and torch.equal(batch.thirds[4:], part.thirds)
    for name in ("grid", "numbers", "grounds", "characters"):
        whole = getattr(batch, name)
        assert torch.equal(whole[4:], getattr(part, name)) and torch.equal(whole[::2], whole[1::2])
    assert not torch.equal(batch.grid, source.batch(4, slice(0, 8), CPU).grid)
    assert (batch.numbers.sum(1) > 0).all()


@needs_font
def test_the_text_encoder_learns_what_captions_tell(
    tmp_path: Path, small_tokenizer: Path, grammar: Grammar
) -> None:
    tokenizer = Tokenizer(small_tokenizer)
    config = TrainingConfig(steps=12, batch_size=8, learning_rate=2e-3, warmup=1, max_tokens=64)
    batch = CaptionSource(grammar, tokenizer, config).batch(50, slice(0, 8), CPU)
    source, text_encoder = CaptionSource(grammar, tokenizer, config), ChatGLM(SMALL.text_encoder)
    first = SceneReading(text_encoder)
    first(batch).backward()
    assert all(parameter.grad is not None for parameter in first.parameters())
    with torch.no_grad():
        loss = first(batch)
    learned = train(text_encoder, whiten(text_encoder, source, CPU), source, config, tmp_path, CPU)
    assert learned.text_encoder is text_encoder
    with torch.no_grad():
        assert learned(batch) < 0.7 * loss, "of captions that it was not trained on"
    assert set(accuracy(learned, batch)) == {"kinds and numbers", "ground", "sign", "third"}
    with torch.no_grad():  # a reader to whom all captions are one tells no sides
        learned.to_pooled_occupied.weight.zero_()
    told = told_sides(learned, grammar, tokenizer)
    assert told["English places from pooled"] == pytest.approx(0, abs=1e-6)
    assert told["Chinese places from tokens"] != 0


def test_whitened_tokens_have_mean_0_and_covariance_1() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    tokens = 3 + torch.randn(4000, 6, generator=generator) @ mixing
    white = Whitening(tokens, ridge=0)(tokens)
    assert white.mean(0).abs().max() < 1e-4
    assert (white.T @ white / len(white) - torch.eye(6)).abs().max() < 1e-3
    assert Whitening(tokens, ridge=1)(tokens).std() < 0.9, "directions of little variance stay small"


def test_standardised_latents_decode_to_the_same_pictures() -> None:
    vae = VAE(TINY.vae).double()
    randomise(vae)
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(3, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = vae.decode_latents(vae.encode_images(images).sample(noise))
        decibels = psnr(vae, images)
        standardise(vae, images)
        assert psnr(vae, images) == pytest.approx(decibels)
        found = vae.encode_images(images)
        assert relative_error(vae.decode_latents(found.sample(noise)), before) < EXACT
        assert found.mean.mean((0, 2, 3)).abs().max() < EXACT
        assert (found.mean.std((0, 2, 3)) - 1).abs().max() < EXACT


def test_nearest_and_interval() -> None:
    known = torch.stack([torch.full((3, 4, 4), value) for value in (-1.0, 0.0, 1.0)])
    assert nearest(torch.stack([known[2] * 0.8, known[0] + 0.1, known[1]]), known) == [2, 0, 1]
    low, high = interval(0.8, 500)
    assert low == pytest.approx(0.763, abs=1e-3) and high == pytest.approx(0.833, abs=1e-3)


def test_the_embedded_model_with_nine_channels_draws_what_it_drew() -> None:
    plain = load_component(EMBEDDED, "unet")
    nine = nine_channels(plain.config)
    draw, width = torch.Generator().manual_seed(0), plain.config.text_dim
    latents, tokens = torch.randn(1, 9, 16, 16, generator=draw), torch.randn(1, 3, width, generator=draw)
    told = torch.tensor(500.0), tokens, tokens[:, -1], torch.full((1, 6), 128.0)
    with torch.no_grad():
        made, expected = nine(latents, *told), plain(latents[:, :4], *told)
    assert relative_error(made, expected) < 1e-5
