"""Textual inversion: learned words against the reference, step by step; trained; gone without a trace."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

from kolors_core import KolorsImg2ImgPipeline, KolorsPipeline
from kolors_core.adapters.textual_inversion import (
    add_words,
    learn_words,
    remove_words,
    save_words,
    vectors_of,
    words_of,
)
from kolors_core.chatglm import ChatGLM
from kolors_core.checkpoint import EMBEDDED, load_component
from kolors_core.cli.generate import main
from kolors_core.cli.options import with_word
from kolors_core.performance.prompt_cache import PromptCache
from kolors_core.performance.quantize import quantize
from kolors_core.pipelines.png_metadata import read_metadata
from kolors_core.precompute import Savings
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.tokenizer import Tokenizer
from kolors_core.training.data import Batches, LatentDataset, read_folder
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer, TrainingConfig
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.offloads import offloaded
from tests.support.pipelines import NO_SAVINGS, Pair, saving, steps_of
from tests.support.small import EXACT, FLOAT32, SMALL, relative_error
from tests.test_tokenizer import PROMPTS

WIDTH = SMALL.text_encoder.hidden_size
TABLE = SMALL.text_encoder.vocab_size
PROMPT = "a photo of <cat>, 一张<cat>的照片"


def vectors(n: int, seed: int = 0) -> Tensor:
    """Of the table's own size."""
    return torch.randn(n, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / 8


@pytest.fixture
def pipe(pipes: Pair) -> KolorsPipeline:
    """With a text encoder of its own."""
    return own(pipes[0])


def own(pipe: KolorsPipeline) -> KolorsPipeline:
    made = KolorsPipeline.from_pipe(pipe, text_encoder=deepcopy(pipe.text_encoder))
    made.prompt_cache, made.savings = PromptCache(), Savings()
    made.set_progress_bar_config(disable=True)
    return made


def encoder_of(pipe: KolorsPipeline) -> ChatGLM:
    assert pipe.text_encoder is not None
    return pipe.text_encoder


def embedded(pipe: KolorsPipeline, prompt: str | list[str] = PROMPT, **arguments: Any) -> Tensor:
    tokens, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, **arguments)
    return torch.cat([tokens, pooled[:, None]], dim=1)


# The tokenizer.

WORDS = ["<cat>", "<cat>-toy", "瓢虫", "<cat><cat>", "(*.|^$"]
TEXTS = [
    *(prompt for prompt in PROMPTS if len(prompt) < 300),
    *WORDS, PROMPT, "<cat>-toys", "a<cat>b", " <cat> ", "<cat> <cat>", "<cat><cat><cat>", "<cat",
    "x(*.|^$瓢虫", "瓢瓢虫虫 <CAT>", "the  <cat>\n two", "<cat>" * 90,
]  # fmt: skip


def test_prompts_are_split_as_the_reference_splits_them_at_added_tokens(small_tokenizer: Path) -> None:
    splits_as_the_reference(small_tokenizer)


def test_so_with_chatglms(chatglm_tokenizer: Path) -> None:
    splits_as_the_reference(chatglm_tokenizer)


def splits_as_the_reference(file: Path) -> None:
    ours, theirs = Tokenizer(file), ChatGLMTokenizer(str(file))
    theirs.add_tokens(WORDS)
    words = {word: [theirs.convert_tokens_to_ids(word)] for word in WORDS}
    given = {"padding": "max_length", "max_length": 256, "truncation": True, "return_tensors": "pt"}
    mine, other = ours(TEXTS, words=words), theirs(TEXTS, **given)
    for row, text in enumerate(TEXTS):
        assert torch.equal(mine.ids[row], other["input_ids"][row]), text[:40]
    assert torch.equal(mine.mask.long(), other["attention_mask"])
    assert torch.equal(mine.positions, other["position_ids"])


def test_what_stands_between_words_is_encoded_alone(small_tokenizer: Path) -> None:
    tokenizer = Tokenizer(small_tokenizer)
    words = {"<a>": [900, 901, 902], "<a>b": [903]}
    a, b = (tokenizer.pieces.encode(text) for text in ("a photo of ", ", red"))
    assert tokenizer.encode_text("a photo of <a>b<a>, red", words) == [*a, 903, 900, 901, 902, *b]
    assert tokenizer.encode_text("a photo of <a", words) == tokenizer.pieces.encode("a photo of <a")
    cut = tokenizer(["<a>" * 9], 10, words)
    assert cut.ids[0].tolist() == [
        tokenizer.special["[gMASK]"],
        tokenizer.special["sop"],
        *[900, 901, 902] * 2,
        900,
        901,
    ]


# The encoder and the pipeline.


def with_words(pipes: Pair, **words: Tensor) -> diffusers.KolorsPipeline:
    """The reference's pipeline with one added token a vector: <cat> is "<cat 0><cat 1>" there."""
    theirs = pipes[1]
    tokenizer, encoder = deepcopy(theirs.tokenizer), deepcopy(theirs.text_encoder)
    table = encoder.embedding.word_embeddings.weight
    for word, rows in words.items():
        for i, row in enumerate(rows):
            tokenizer.add_tokens([f"<{word} {i}>"])
            table.data[tokenizer.convert_tokens_to_ids(f"<{word} {i}>")] = row
    parts = {**theirs.components, "tokenizer": tokenizer, "text_encoder": encoder}
    made = diffusers.KolorsPipeline(**parts, force_zeros_for_empty_prompt=False)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.numerical
def test_every_step_equals_the_reference(pipes: Pair, pipe: KolorsPipeline) -> None:
    """In the prompt and in the negative one, with collapsed pads and in a batch; and it is noticed if not."""
    cat, dog = vectors(2), vectors(1, seed=1)
    theirs = with_words(pipes, cat=cat, dog=dog)
    pipe.load_textual_inversion({"<cat>": cat, "<dog>": dog})
    prompts, negatives = [PROMPT, "red<dog>"], ["", "<cat> 猫"]
    spelled = [[text.replace("<cat>", "<cat 0><cat 1>").replace("<dog>", "<dog 0>") for text in texts]
               for texts in (prompts, negatives)]  # fmt: skip
    expected = steps_of(theirs, prompt=spelled[0], negative_prompt=spelled[1])

    def errors() -> list[float]:
        mine = steps_of(pipe, prompt=prompts, negative_prompt=negatives)
        return [relative_error(a, b) for a, b in zip(mine, expected, strict=True)]

    assert len(expected) == 5 and max(errors()) < FLOAT32
    vectors_of(encoder_of(pipe))["<cat>"].data[1] *= 1.01
    assert errors()[0] > 10 * FLOAT32


def test_savings_and_batches_change_nothing(pipe: KolorsPipeline) -> None:
    pipe.load_textual_inversion({"<cat>": vectors(3)})
    batch = embedded(pipe, [PROMPT, "a dog", ""])
    for row, prompt in enumerate([PROMPT, "a dog", ""]):
        assert relative_error(embedded(pipe, prompt)[0], batch[row]) < EXACT
    with saving(pipe, NO_SAVINGS):
        assert relative_error(embedded(pipe, [PROMPT, "a dog", ""]), batch) < EXACT
    assert embedded(pipe, "<cat>" * 100).shape[1] == 257, "cut at 256 tokens"
    assert torch.equal(embedded(pipe, "<cat>" * 100), embedded(pipe, "<cat>" * 200))


def test_words_come_and_leave_without_a_trace(pipe: KolorsPipeline, tmp_path: Path) -> None:
    encoder = encoder_of(pipe)
    embedding, state = encoder.embedding, deepcopy(encoder.state_dict())
    before = steps_of(pipe, prompt=PROMPT)
    pipe.load_textual_inversion({"<cat>": vectors(3), "猫": vectors(1, seed=1)})
    assert words_of(encoder) == {"<cat>": [TABLE, TABLE + 1, TABLE + 2], "猫": [TABLE + 3]}
    both = steps_of(pipe, prompt=PROMPT)
    assert relative_error(both[0], before[0]) > 1e-4
    assert torch.equal(steps_of(pipe, prompt="a dog")[-1], steps_of(own(pipe), prompt="a dog")[-1])
    cat = steps_of(pipe, prompt="a 猫")
    pipe.unload_textual_inversion("<cat>")
    assert words_of(encoder) == {"猫": [TABLE]}, "ids move up"
    assert all(torch.equal(a, b) for a, b in zip(steps_of(pipe, prompt="a 猫"), cat, strict=True))
    assert KolorsImg2ImgPipeline.from_pipe(pipe).text_encoder is encoder, "other tasks have the words too"
    pipe.save_pretrained(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "text_encoder" / "model.safetensors")
    assert len(names) == len(state) and not [name for name in names if "learned" in name]
    pipe.unload_textual_inversion()
    assert encoder.embedding is embedding and not words_of(encoder)
    after = encoder.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
    assert all(torch.equal(a, b) for a, b in zip(steps_of(pipe, prompt=PROMPT), before, strict=True))
    pipe.unload_textual_inversion()  # nothing to do, and nothing happens


def test_the_prompt_cache_knows_the_vectors(pipe: KolorsPipeline, tmp_path: Path) -> None:
    """In memory and in a folder, which another process may have filled with another concept of this name."""
    pipe.savings = Savings(prompt_folder=tmp_path / "prompts")
    seen = list[Tensor]()
    for seed in (0, 1, 0):
        pipe.load_textual_inversion({"<cat>": vectors(2, seed)})
        seen.append(embedded(pipe))
        pipe.unload_textual_inversion()
    assert torch.equal(seen[0], seen[2]) and relative_error(seen[1], seen[0]) > 1e-4
    assert len(list((tmp_path / "prompts").iterdir())) == 2
    pipe.load_textual_inversion({"<cat>": vectors(2)})
    vectors_of(encoder_of(pipe))["<cat>"].data[1, 5] += 0.5  # past autograd's count of writes
    assert relative_error(embedded(pipe), seen[0]) > 1e-4


def quantised(pipe: KolorsPipeline) -> None:
    quantize(encoder_of(pipe), 8)


def moved(pipe: KolorsPipeline) -> None:
    encoder_of(pipe).float()


@pytest.mark.parametrize("change", [quantised, moved])
def test_a_changed_encoder_reads_them_too(
    change: Callable[[KolorsPipeline], None], pipe: KolorsPipeline
) -> None:
    other = own(pipe)
    pipe.load_textual_inversion({"<cat>": vectors(2)})
    change(pipe)
    change(other)
    other.load_textual_inversion({"<cat>": vectors(2)})
    found = embedded(pipe)
    assert torch.equal(found, embedded(other)) and found.dtype == encoder_of(pipe).embedding.weight.dtype
    other.unload_textual_inversion()
    assert relative_error(embedded(other), found) > 1e-4


@pytest.mark.parametrize("by_block", [False, True])
def test_they_come_to_the_accelerator(by_block: bool, pipe: KolorsPipeline) -> None:
    pipe.load_textual_inversion({"<cat>": vectors(2)})
    with saving(pipe, Savings(cached_prompts=0)):
        expected = steps_of(pipe, prompt=PROMPT)[-1]
        with offloaded(pipe, by_block):
            assert torch.equal(steps_of(pipe, prompt=PROMPT)[-1], expected)


# Files.


def test_spellings_of_files(pipe: KolorsPipeline, tmp_path: Path) -> None:
    cat, dog = vectors(2), vectors(1, seed=1)
    file, nameless, folder = tmp_path / "cat.safetensors", tmp_path / "a1111.safetensors", tmp_path / "repo"
    folder.mkdir()
    save_file({"<cat>": cat}, file)
    save_file({"emb_params": cat}, nameless)
    save_file({"<cat>": cat}, folder / "learned_embeds.safetensors")
    save_file({"x": cat}, folder / "other.safetensors")
    expected = None
    for source, token in [(file, None), (str(folder), None), (nameless, "<cat>"), (cat, "<cat>"),
                          ({"*": cat}, "<cat>"), ([file, {"x": dog[0]}], None),
                          ([nameless, dog], ["<cat>", "<dog>"])]:  # fmt: skip
        pipe.load_textual_inversion(source, token)
        found = embedded(pipe)
        expected = found if expected is None else expected
        assert torch.equal(found, expected)
        pipe.unload_textual_inversion()
    pipe.load_textual_inversion({"<cat>": cat, "<dog>": dog})
    save_words(encoder_of(pipe), tmp_path / "both.safetensors")
    pipe.unload_textual_inversion()
    pipe.load_textual_inversion(tmp_path / "both.safetensors")
    assert torch.equal(embedded(pipe), expected) and len(words_of(encoder_of(pipe))) == 2


@pytest.mark.parametrize(
    ("source", "token", "message"),
    [
        ({"<cat>": torch.zeros(2, 9)}, None, rf"<cat>: expected vectors \[n, {WIDTH}\], got \[2, 9\]"),
        ({"<cat>": torch.zeros(0, WIDTH)}, None, r"got \[0, 64\]"),
        ({"<cat>": torch.zeros(1, WIDTH).long()}, None, "floating-point vectors, got torch.int64"),
        ({"<cat>": torch.full((1, WIDTH), torch.nan)}, None, "expected finite"),
        ({"<new>": torch.zeros(WIDTH), "<old>": torch.zeros(WIDTH)}, None, "<old> is a learned word already"),
        ({"emb_params": torch.zeros(WIDTH)}, None, "emb_params names no word: say which"),
        (torch.zeros(WIDTH), None, "names no word"),
        (
            {"a": torch.zeros(WIDTH), "b": torch.zeros(WIDTH)},
            "<cat>",
            "has 2 words, and token gives one name",
        ),
        ([{"a": torch.zeros(WIDTH)}, {"a": torch.zeros(WIDTH)}], None, "the word a comes twice"),
        ([{"a": torch.zeros(WIDTH)}], ["b", "c"], "expected a token for each of 1 files, got 2"),
        ({" a": torch.zeros(WIDTH)}, None, "without space around it, got ' a'"),
        ({"": torch.zeros(WIDTH)}, None, "must be some text"),
        ({}, None, "has no vectors"),
        ({"a": [1.0]}, None, "a is list, expected a tensor"),
        ("nowhere.safetensors", None, "nowhere.safetensors"),
        ("concept.pt", None, "a pickle can run code"),
    ],
    ids=lambda value: "",
)
def test_bad_files_are_named_and_change_nothing(
    source: Any, token: Any, message: str, pipe: KolorsPipeline
) -> None:
    pipe.load_textual_inversion({"<old>": vectors(1)})
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        pipe.load_textual_inversion(source, token)
    assert "\n" not in str(caught.value) and list(words_of(encoder_of(pipe))) == ["<old>"]


def test_other_bad_input_is_named(pipe: KolorsPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="<cat> is no learned word; there are: none"):
        pipe.unload_textual_inversion("<cat>")
    pipe.load_textual_inversion({"<cat>": vectors(1)})
    with pytest.raises(ValueError, match="<dog> is no learned word; there are: <cat>"):
        pipe.unload_textual_inversion(["<cat>", "<dog>"])
    assert list(words_of(encoder_of(pipe))) == ["<cat>"]
    remove_words(encoder_of(pipe), ["<cat>"])
    with pytest.raises(ValueError, match="has no learned words to be written"):
        save_words(encoder_of(pipe), tmp_path / "x.safetensors")
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="no text encoder, and learned words are read by it"):
        pipe.load_textual_inversion({"<cat>": vectors(1)})


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The embedded model with another concept's vectors under a new word draws that concept."""
    tokenizer, encoder = Tokenizer(EMBEDDED / "tokenizer"), load_component(EMBEDDED, "text_encoder")
    assert isinstance(encoder, ChatGLM)
    file = tmp_path / "concept.safetensors"
    save_file({"emb_params": encoder.embedding.weight[tokenizer.pieces.encode("a red apple")].clone()}, file)
    assert (with_word(str(file)), with_word(f"{file}:<x>")) == ((str(file), None), (str(file), "<x>"))
    command = ["--steps", "2", "--seed", "1", "-q", "--device", "cpu", "--height", "64", "--width", "64"]
    out, plain = tmp_path / "word.png", tmp_path / "plain.png"
    assert main(["<x>", *command, "-o", str(out), "--textual-inversion", f"{file}:<x>"]) == 0
    assert main(["a red apple", *command, "-o", str(plain)]) == 0
    assert Image.open(out).tobytes() == Image.open(plain).tobytes()
    told = read_metadata(out)
    assert (told["learned_words"], told["textual_inversion"]) == ("<x>", f'{{"<x>": "{file}"}}')
    assert main(["<x>", *command, "-o", str(tmp_path / "no.png"), "--textual-inversion", str(file)]) == 2
    assert "emb_params names no word" in capsys.readouterr().err


# Training.

TRAINING = TrainingConfig(
    steps=10, batch_size=4, learning_rate=0.05, warmup=0, weight_decay=0.0, max_tokens=16, save_every=10
)


def test_a_concept_is_learned_and_nothing_else_changes(tmp_path: Path) -> None:
    """On the embedded model: two vectors that start as "square" come to mean a blue one with a yellow dot."""
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).rectangle((10, 10, 54, 54), fill=(30, 60, 220))
    ImageDraw.Draw(picture).ellipse((22, 22, 42, 42), fill=(250, 220, 40))
    (tmp_path / "pictures").mkdir()
    picture.save(tmp_path / "pictures" / "thing.png")
    (tmp_path / "pictures" / "thing.txt").write_text("a photo of <thing>")
    encoder, unet, vae = (load_component(EMBEDDED, name) for name in ("text_encoder", "unet", "vae"))
    assert isinstance(encoder, ChatGLM) and isinstance(unet, UNet) and isinstance(vae, VAE)
    tokenizer, examples = Tokenizer(EMBEDDED / "tokenizer"), read_folder(tmp_path / "pictures")
    start = encoder.embedding.weight[tokenizer.pieces.encode("square")].mean(0).detach()
    add_words(encoder, {"<thing>": start.repeat(2, 1), "<other>": start})
    data = LatentDataset(
        examples, Batches(examples, [(64, 64)], 4, 0), vae, tokenizer, TRAINING, None, words=words_of(encoder)
    )
    objective = DiffusionLoss(unet, encoder, EulerDiscreteScheduler().training_sigmas(), TRAINING)
    learn_words(objective, "<thing>")

    @torch.no_grad()
    def loss() -> float:
        """Of steps that are not trained on."""
        return (
            sum(objective(data.batch(100 + i, slice(0, 4), torch.device("cpu"))).item() for i in range(6)) / 6
        )

    first, before = loss(), {name: value.clone() for name, value in objective.state_dict().items()}
    trainer = Trainer(objective, data, TRAINING, tmp_path / "run")
    assert list(trainer.named) == ["text_encoder.embedding.learned.0"]
    trainer.fit()
    assert loss() < 0.95 * first
    changed = [name for name, value in objective.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["text_encoder.embedding.learned.0"]
    with pytest.raises(ValueError, match="<none> is no learned word; there are: <thing>, <other>"):
        learn_words(objective, "<thing>", "<none>")
    with pytest.raises(ValueError, match="no word to be learned"):
        learn_words(objective)
    save_words(encoder, tmp_path / "thing.safetensors")
    pipe = KolorsPipeline.from_pretrained("tiny")
    pipe.load_textual_inversion(tmp_path / "thing.safetensors")
    assert torch.equal(vectors_of(encoder_of(pipe))["<thing>"], vectors_of(encoder)["<thing>"])
