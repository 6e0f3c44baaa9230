"""What the embedded model is controlled by, learned from scenes: edges, image prompts, masks."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from benchmarks.tiny import image_encoder, ip_adapter
from benchmarks.tiny.captions import NUMBERS, Grammar
from benchmarks.tiny.controlnet import contrast, followed
from benchmarks.tiny.emoji import CONCEPTS, SIZE, Concept
from benchmarks.tiny.image_encoder import ENCODER, ImageReading, SceneImageSource, new_encoder, scene_images
from benchmarks.tiny.img2img import RED, sketch
from benchmarks.tiny.inpaint import MaskedScenes
from benchmarks.tiny.ip_adapter import Answers, ImagePromptLoss, new_adapter, save
from benchmarks.tiny.scenes import SIGN, compose, render
from benchmarks.tiny.sparse_scenes import (
    EMPTY,
    PromptedScenes,
    SparseScenes,
    another,
    brief_caption,
    sparse_caption,
)
from benchmarks.tiny.text import SIDE
from kolors_core import KolorsPipeline, canny
from kolors_core.adapters import ip_adapter_files
from kolors_core.adapters.clip_vision import CLIPVision, preprocess_clip
from kolors_core.adapters.ip_adapter import IPAdapter, attach, attached, cross_attentions
from kolors_core.chatglm import ChatGLM
from kolors_core.config import TINY
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.tokenizer import Tokenizer
from kolors_core.training.data import derive_seed
from kolors_core.training.trainer import Trainer, TrainingConfig
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.scene_recipes import SMALLEST_VAE, needs_fonts
from tests.support.small import SHALLOW, SMALL_CLIP, randomise, relative_error

CPU = torch.device("cpu")
Parts = tuple[Grammar, Tokenizer, ChatGLM, VAE]
CONFIG = TrainingConfig(steps=3, batch_size=4, learning_rate=1e-3, warmup=1, max_tokens=48)


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return Grammar([Concept(c, (f"thing{i}q",), (f"东西{i}号",)) for i, c in enumerate(CONCEPTS)])


@pytest.fixture(scope="module")
def parts(grammar: Grammar, small_tokenizer: Path) -> Parts:
    """A grammar, tokenizer, text encoder and VAE, small and random, for sources of scenes."""
    text_encoder, vae = ChatGLM(SHALLOW.text_encoder), VAE(SMALLEST_VAE)
    for seed, model in enumerate((text_encoder, vae)):
        randomise(model.eval().requires_grad_(False), seed)
    return grammar, Tokenizer(small_tokenizer), text_encoder, vae


@pytest.fixture
def encoder() -> CLIPVision:
    encoder = CLIPVision(SMALL_CLIP).requires_grad_(False)
    randomise(encoder)
    return encoder


def ring() -> Image.Image:
    page = Image.new("RGB", (SIZE, SIZE), "white")
    ImageDraw.Draw(page).ellipse((20, 30, 90, 100), fill="blue")
    return page


def test_edges_are_followed_by_the_image_they_are_of_and_noise_has_no_contrast_there() -> None:
    edges, white = canny(ring()), Image.new("RGB", (SIZE, SIZE), "white")
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    assert followed(edges, ring()) == 1.0 and contrast(edges, ring()) > 5
    assert followed(edges, white) == 0.0 and contrast(edges, white) == 1.0
    assert followed(edges, Image.fromarray(noise)) > 0.5, "noise has edges everywhere"
    assert contrast(edges, Image.fromarray(noise)) == pytest.approx(1, abs=0.1)
    moved = Image.new("RGB", (SIZE, SIZE), "white")
    moved.paste(ring(), (12, 0))
    assert followed(edges, moved) < 0.6 and contrast(edges, moved) < contrast(edges, ring()) / 2


@needs_fonts
def test_another_scene_shows_the_same_things_elsewhere() -> None:
    for seed in range(40):
        scene, other = compose(seed), another(compose(seed), 5)
        assert other.kinds == scene.kinds and other.ground == scene.ground
        assert [len(group) for group in other.groups] == [len(group) for group in scene.groups]
        assert [item.text for item in other.items] == [item.text for item in scene.items]
        assert all(a.box != b.box for a, b in zip(other.items, scene.items, strict=True))


@needs_fonts
def test_sparse_captions_leave_out_number_place_and_ground(grammar: Grammar) -> None:
    scenes = [scene for scene in map(compose, range(300)) if len(scene.items) > len(scene.groups)]
    words = {word for number in (2, 3) for word in NUMBERS[number]} | {"left", "on a", "背景", "左"}
    for i, scene in enumerate(scenes):
        text = brief_caption(grammar, scene, random.Random(i), i % 2)
        assert text and not any(word in text.split() or f"{word}个" in text for word in words), text
        named = {kind for kind in scene.kinds if kind != SIGN and grammar.names[kind].english[0] in text}
        assert named <= set(scene.kinds)
    draws = [sparse_caption(grammar, scenes[0], random.Random(i)) for i in range(1000)]
    assert abs(sum(not text for text in draws) / 1000 - EMPTY) < 0.05
    assert len(set(draws)) > 30


@needs_fonts
def test_a_batch_has_the_edges_of_its_own_scenes(parts: Parts) -> None:
    data = SparseScenes(*parts, CONFIG, control=canny)
    batch = data.batch(3, slice(0, 4), CPU)
    assert batch.control is not None and batch.control.shape == (4, 3, SIZE, SIZE)
    for row in range(4):
        edges = torch.from_numpy(np.array(canny(render(compose(data.scene_seed(3, row)))))).permute(2, 0, 1)
        assert torch.equal(batch.control[row], edges / 255)
    assert data.record() != MaskedScenes(*parts, CONFIG).record(), "another share of empty captions"


@needs_fonts
def test_image_prompts_are_of_the_same_things_and_dropped_at_times(
    parts: Parts, encoder: CLIPVision, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = PromptedScenes(encoder, *parts, CONFIG)
    whole, again = data.batch(2, slice(0, 4), CPU), PromptedScenes(encoder, *parts, CONFIG)
    part = again.batch(2, slice(1, 3), CPU)
    assert whole.states is not None and part.states is not None
    assert torch.allclose(part.states, whole.states[1:3], atol=1e-5), "a rank's part is the whole's"
    assert torch.equal(part.noise, whole.noise[1:3])
    seed = data.scene_seed(2, 0)
    picture = render(another(compose(seed), derive_seed(seed, 1)))
    expected = encoder.penultimate(preprocess_clip([picture], SMALL_CLIP.image_size))[0]
    monkeypatch.setattr("benchmarks.tiny.sparse_scenes.IMAGELESS", 0.0)
    kept = data.batch(2, slice(0, 4), CPU).states
    assert kept is not None and torch.allclose(kept[0], expected, atol=1e-5)
    monkeypatch.setattr("benchmarks.tiny.sparse_scenes.IMAGELESS", 1.0)
    dropped = data.batch(2, slice(0, 4), CPU).states
    none = encoder.penultimate(torch.zeros(1, 3, SMALL_CLIP.image_size, SMALL_CLIP.image_size))
    assert dropped is not None and torch.allclose(dropped, none.expand_as(dropped), atol=1e-6)


@needs_fonts
def test_a_fully_masked_scene_is_gray_to_the_unet(parts: Parts) -> None:
    data = MaskedScenes(*parts, replace(CONFIG, batch_size=8))
    extra = data.batch(0, slice(0, 8), CPU).extra
    assert extra is not None and extra.shape == (8, 5, SIZE // 8, SIZE // 8)
    assert set(extra[:, 0].unique().tolist()) == {0.0, 1.0}
    is_full = extra[:, 0].flatten(1).min(1).values == 1
    assert 0 < is_full.sum() < 8, "seed 0 has masks of both kinds"
    with torch.no_grad():
        gray = data.vae.encode_images(torch.zeros(1, 3, SIZE, SIZE))
    far = (extra[:, 1:] - gray.mean).abs().div(gray.std).flatten(1).max(1).values
    assert (far[is_full] < 5).all() and (far[~is_full] > far[is_full].max()).all()


@needs_fonts
def test_the_encoder_sees_scenes_and_their_mirror_images() -> None:
    source = SceneImageSource(replace(CONFIG, batch_size=8), 64)
    batch, again = (
        source.batch(1, slice(0, 8), CPU),
        SceneImageSource(source.config, 64).batch(1, slice(4, 8), CPU),
    )
    assert torch.equal(batch.pixels[4:], again.pixels) and torch.equal(batch.grid[4:], again.grid)
    mirrored = 0
    for row in range(8):
        scene = source._scene(1, row)
        grid = scene.grid.unflatten(1, (SIDE, SIDE))[0]
        is_plain = torch.equal(batch.pixels[row], scene.pixels[0])
        mirrored += not is_plain
        expected = (scene.pixels[0], grid) if is_plain else (scene.pixels[0].flip(-1), grid.flip(-1))
        assert torch.equal(batch.pixels[row], expected[0])
        assert torch.equal(batch.grid[row], expected[1].flatten())
    assert 0 < mirrored < 8


@needs_fonts
def test_a_sign_is_one_kind_whatever_it_says() -> None:
    scenes = [scene for scene in map(compose, range(60)) if SIGN in scene.kinds]
    kinds = {int(kind) for scene in scenes for kind in image_encoder.grid_of(scene)}
    assert max(kinds) == len(image_encoder.KINDS) and image_encoder.KINDS.index(SIGN) in kinds
    for scene in scenes:
        grid = image_encoder.grid_of(scene).unflatten(0, (SIDE, SIDE))
        for item in scene.items:
            x, y = (min(SIDE - 1, int(side * SIDE / SIZE)) for side in (item.x, item.y))
            assert image_encoder.KINDS[int(grid[y, x])] == item.kind


@needs_fonts
def test_the_encoder_learns_and_every_weight_of_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(ENCODER, image_size=64, patch_size=8, hidden_size=48, feed_forward_size=64)
    reading = ImageReading(new_encoder(config))
    reading(scene_images([1, 2], 64)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in reading.parameters())
    monkeypatch.setattr(image_encoder, "TESTED", 2)
    training = replace(CONFIG, steps=12, batch_size=8, learning_rate=3e-3, schedule="cosine")
    image_encoder.train(config, training, tmp_path, CPU)
    losses = load_file(tmp_path / "state.safetensors")["losses"]
    assert losses[-3:].mean() < 0.8 * losses[0]
    with pytest.raises(ValueError, match="expected 8 patches a side"):
        image_encoder.train(replace(config, patch_size=16), training, tmp_path, CPU)


def test_an_adapter_starts_from_the_keys_and_values_of_text() -> None:
    unet = UNet(SHALLOW.unet)
    randomise(unet)
    adapter = new_adapter(unet, SMALL_CLIP.hidden_size)
    pairs = list(zip(adapter.branches.values(), cross_attentions(unet).values(), strict=True))
    assert len(pairs) > 1
    for branch, place in pairs:
        assert isinstance(branch.to_k, torch.nn.Linear) and isinstance(branch.to_v, torch.nn.Linear)
        assert torch.equal(branch.to_k.weight, place.to_k.weight)
        assert torch.equal(branch.to_v.weight, place.to_v.weight)


def test_encoder_and_adapter_of_the_embedded_model_take_two_megabytes_at_most() -> None:
    with torch.device("meta"):
        models = CLIPVision(ENCODER), new_adapter(UNet(TINY.unet), ENCODER.hidden_size)
    assert sum(2 * p.numel() for model in models for p in model.parameters()) < 1.95e6


@needs_fonts
def test_only_the_adapter_learns(parts: Parts, encoder: CLIPVision, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet(SHALLOW.unet).requires_grad_(False)
    randomise(unet)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    adapter = new_adapter(unet, SMALL_CLIP.hidden_size)
    first = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    handle = attach(unet, adapter)
    sigmas = EulerDiscreteScheduler().training_sigmas()
    loss = ImagePromptLoss(unet, adapter, sigmas, replace(CONFIG, min_snr_gamma=5.0))
    Trainer(loss, PromptedScenes(encoder, *parts, CONFIG), CONFIG, tmp_path).fit(progress=False)
    changed = [name for name, tensor in adapter.state_dict().items() if not torch.equal(tensor, first[name])]
    assert changed == list(first)
    handle.detach()
    assert before.keys() == unet.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())


@pytest.fixture
def saved(encoder: CLIPVision, tmp_path: Path) -> Iterator[tuple[KolorsPipeline, IPAdapter, Path]]:
    """A pipeline, and an adapter for it that is saved in a folder `ip_adapter`."""
    pipe = KolorsPipeline(VAE(SMALLEST_VAE), None, None, UNet(SHALLOW.unet), EulerDiscreteScheduler())
    randomise(pipe.unet)
    adapter = new_adapter(pipe.unet, SMALL_CLIP.hidden_size)
    randomise(adapter)
    save(adapter, encoder, tmp_path / "ip_adapter")
    yield pipe, adapter, tmp_path


def test_what_is_saved_is_loaded_as_a_user_loads_it(
    saved: tuple[KolorsPipeline, IPAdapter, Path], encoder: CLIPVision, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, adapter, folder = saved
    pipe.load_ip_adapter(folder / "ip_adapter")
    (handle,) = attached(pipe.unet)
    assert isinstance(handle.adapter, IPAdapter) and handle.adapter.config == adapter.config
    (states,) = pipe.prepare_ip_adapter_image_embeds(ring(), do_classifier_free_guidance=False)
    expected = encoder.penultimate(preprocess_clip(ring(), SMALL_CLIP.image_size))[None]
    assert relative_error(states, expected) < 1e-2, "in float16"
    assert relative_error(handle.adapter.tokens(states), adapter.tokens(expected)) < 1e-2
    pipe.unload_ip_adapter()
    monkeypatch.setattr(ip_adapter_files, "EMBEDDED", folder)
    pipe.load_ip_adapter("tiny")
    (handle,) = attached(pipe.unet)
    assert handle.source == "tiny" and handle.encoder is not None
    with pytest.raises(FileNotFoundError, match=r"\./tiny"):
        pipe.load_ip_adapter("./tiny")
    assert attached(pipe.unet) == [handle], "a failed load changes nothing"


@needs_fonts
def test_answers_count_kinds_ground_and_what_was_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = next(s for s in map(compose, range(100)) if len(s.kinds) == 2 and SIGN not in s.kinds)
    prompt, reading = render(scene), ImageReading(CLIPVision(replace(ENCODER, layers=1)))
    kinds = torch.zeros(1, len(image_encoder.KINDS), dtype=torch.bool)
    kinds[0, [image_encoder.KINDS.index(scene.kinds[0]), len(CONCEPTS)]] = True  # one of two, and a sign
    ground = torch.tensor([image_encoder.GROUNDS.index(scene.ground)])
    monkeypatch.setattr(ImageReading, "kinds", lambda *given: (kinds, ground))
    answers = Answers([], [], [], [])
    answers.add(reading, scene, prompt, prompt)
    assert answers.means() == {"kinds": 0.5, "wanted": 0.5, "ground": 1.0, "edges": 1.0}
    assert all(SIGN not in one.kinds for one in ip_adapter.unseen_scenes(5))


def test_a_sketch_has_the_shapes_and_colours_that_it_is_asked_for() -> None:
    page = sketch("blue", (("disc", (10, 10, 40, 40), RED), ("triangle", (60, 60, 100, 100), (0, 255, 0))))
    assert page.size == (SIZE, SIZE)
    assert page.getpixel((25, 25)) == RED and page.getpixel((80, 80)) == (0, 255, 0)
    assert page.getpixel((11, 11)) == page.getpixel((62, 62)) == page.getpixel((120, 5)), (
        "the corners are free"
    )
