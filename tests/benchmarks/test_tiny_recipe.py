"""The recipe of the embedded model: its captions, its autoencoder's batches and loss, what is measured."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.tiny.autoencoder import Pixels, Pool, Reconstruction, new_vae, standardise
from benchmarks.tiny.emoji import (
    CHINESE_UNSEEN,
    CONCEPTS,
    ENGLISH_UNSEEN,
    FONT,
    draw,
    read_concepts,
    write,
)
from benchmarks.tiny.inpaint import nine_channels
from benchmarks.tiny.quality import interval
from benchmarks.tiny.text import CaptionSource, train
from kolors_core.checkpoint import EMBEDDED, load_component
from kolors_core.config import TINY
from kolors_core.pipelines.lora_recipe import nearest
from kolors_core.tokenizer import Tokenizer
from kolors_core.training.data import Example, read_folder
from kolors_core.training.trainer import Trainer, TrainingConfig
from kolors_core.vae import VAE
from tests.support.small import EXACT, SMALL, randomise, relative_error

CPU = torch.device("cpu")


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
    assert (
        "a photo of a ladybug" in ladybug.captions()
        and f"一张{ladybug.chinese[0]}的照片" in ladybug.captions()
    )


def test_the_unseen_phrasings_are_not_trained_on(names: Path) -> None:
    trained = {caption for concept in read_concepts(names) for caption in concept.captions()}
    asked = {
        phrase.format(x=name)
        for concept in read_concepts(names)
        for phrases, known in ((ENGLISH_UNSEEN, concept.english), (CHINESE_UNSEEN, concept.chinese))
        for phrase in phrases
        for name in known
    }
    assert len(trained) > 10_000 and not trained & asked


@pytest.mark.skipif(not FONT.exists(), reason="Debian's fonts-noto-color-emoji is not installed")
def test_pictures_and_captions_make_a_training_folder(names: Path, tmp_path: Path) -> None:
    concepts = read_concepts(names)[:3]
    write(concepts, tmp_path)
    examples = read_folder(tmp_path)
    assert [(e.height, e.width) for e in examples] == [(128, 128)] * 3
    assert examples[0].captions == tuple(concepts[0].captions())
    with pytest.raises(ValueError, match="has no image of"):
        draw(" ")


def glyphs(count: int) -> torch.Tensor:
    return torch.randint(
        256, (count, 128, 128, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_batches_depend_on_seed_and_step_alone_and_grow_to_whole_pictures() -> None:
    pool = Pool(glyphs(5), favourites=2, whole_from=3, batch_size=4, seed=1)
    first, again = (pool.batch(2, slice(0, 4), CPU) for _ in range(2))
    assert torch.equal(first.images, again.images) and torch.equal(first.noise, again.noise)
    assert first.images.shape == (4, 3, 64, 64) and first.noise.shape == (4, 4, 8, 8)
    assert not torch.equal(first.images, pool.batch(1, slice(0, 4), CPU).images)
    assert pool.batch(3, slice(1, 3), CPU).images.shape == (2, 3, 128, 128)
    part = pool.batch(2, slice(1, 3), CPU).images
    assert torch.equal(part, first.images[1:3]), "a rank's part is the whole's"
    assert first.images.min() >= -1 and first.images.max() <= 1


def test_the_autoencoder_learns_by_the_librarys_loop(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = new_vae(TINY.vae)
    one = Pixels(torch.rand(1, 3, 64, 64) * 2 - 1, torch.zeros(1, 4, 8, 8))
    Reconstruction(vae)(one).backward()
    assert all(parameter.grad is not None for parameter in vae.parameters())
    config = TrainingConfig(steps=12, batch_size=4, learning_rate=2e-3, warmup=1)
    plain = torch.tensor([200, 30, 60, 255], dtype=torch.uint8).expand(1, 128, 128, 4)
    pool = Pool(plain, favourites=1, whole_from=12, batch_size=4, seed=0)
    losses = Trainer(Reconstruction(vae), pool, config, tmp_path).fit()
    assert losses[-1] < 0.7 * losses[0]


def test_the_text_encoder_learns_which_picture_is_meant(tmp_path: Path, small_tokenizer: Path) -> None:
    words = ("red cat", "ladybug", "猫")
    phrases = ("{x}", "a photo of the {x}", "high {x}", "{x} film", "small {x} sign", "一张{x}的照片")
    examples = [
        Example(Path(f"{i}.png"), tuple(phrase.format(x=word) for phrase in phrases), 64, 64)
        for i, word in enumerate(words)
    ]
    tokenizer = Tokenizer(small_tokenizer)
    config = TrainingConfig(steps=100, batch_size=16, learning_rate=2e-3, warmup=1, max_tokens=24)
    source = CaptionSource(examples, tokenizer, config)
    batch, again = (source.batch(3, slice(0, 16), CPU) for _ in range(2))
    assert torch.equal(batch.tokens.ids, again.tokens.ids) and torch.equal(batch.pictures, again.pictures)
    assert set(batch.pictures.tolist()) <= {0, 1, 2}
    learned = train(SMALL.text_encoder, examples, tokenizer, config, tmp_path, CPU)
    asked = tokenizer([f"holding {word} in film" for word in words], 24).merge_padding()
    with torch.no_grad():
        for head in learned.scores(asked):
            assert head.argmax(1).tolist() == [0, 1, 2], "in a phrasing that it was not trained on"


def test_standardised_latents_decode_to_the_same_pictures() -> None:
    vae = VAE(TINY.vae).double()
    randomise(vae)
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(3, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = vae.decode_latents(vae.encode_images(images).sample(noise))
        standardise(vae, images)
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
