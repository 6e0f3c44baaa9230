"""What the loss gives to its models, whichever they are; and wrong input, named with what is expected."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kolors_core.chatglm import ChatGLM, TextEmbedding
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.tokenizer import Tokenizer
from kolors_core.training.data import Batch, LatentDataset, MaskedLatentDataset, repeat_padding
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer, TrainingConfig
from kolors_core.unet import UNet
from tests.examples.models.bidirectional import Reader, ReaderConfig
from tests.support.cache_worker import CPU
from tests.support.caches import memory
from tests.support.small import SMALL

CONFIG = TrainingConfig(steps=1, batch_size=4)
SIGMAS = EulerDiscreteScheduler().training_sigmas()
WIDTH = SMALL.unet.text_dim


@dataclass(frozen=True)
class Sizes:
    in_channels: int = 4
    text_dim: int = WIDTH


class Sum(nn.Module):
    """A denoiser that returns its latents plus a sum of the text and of what is added."""

    def __init__(self, config: Sizes = Sizes()) -> None:
        super().__init__()
        self.config, self.gain = config, nn.Parameter(torch.ones(()))

    def forward(
        self, latents: Tensor, timestep: Tensor, text_tokens: Tensor, pooled_text: Tensor, size_ids: Tensor,
        text_counts: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        text = text_tokens if text_counts is None else text_tokens * text_counts[..., None]
        return latents + self.gain * text.mean((1, 2))[:, None, None, None]


class Adding(Sum):
    def forward(self, *given: Any, added: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        more = 0 if added is None else added.mean(1)[:, None, None, None]
        return super().forward(*given) + more


def batch_of(text: Any = None, **changes: Any) -> Batch:
    draw = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 4, 4, generator=draw)
    tokens = torch.randn(2, 3, WIDTH, generator=draw)
    text = TextEmbedding(tokens, tokens[:, 0]) if text is None else text
    return replace(Batch(latents, text, torch.zeros(2, 6), torch.tensor([5, 900]), noise), **changes)


def loss_of(unet: Any = None, encoder: Any = None, sigmas: Any = SIGMAS) -> DiffusionLoss:
    return DiffusionLoss(Sum() if unet is None else unet, encoder, sigmas, CONFIG)


def test_an_encoder_that_reads_no_counts_gets_all_pads(
    pictures: Path, small_tokenizer: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer(small_tokenizer)
    whole = tokenizer(["", "a red apple", "a big red apple and a small blue car"], 40)
    for tokens in (whole, tokenizer(["a" * 400], 8)):  # of the last no pad is merged
        again = repeat_padding(tokens.merge_padding())
        pairs = ((getattr(again, part), getattr(tokens, part)) for part in ("ids", "mask", "positions"))
        assert all(torch.equal(*pair) for pair in pairs) and again.counts is None
    encoder = Reader(ReaderConfig(hidden_size=WIDTH, vocab_size=tokenizer.size, layers=1))
    loss = loss_of(encoder=encoder)
    expected, found = encoder(whole), loss.text(batch_of(whole.merge_padding()))
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.pooled, expected.pooled)

    data = memory(LatentDataset, pictures, small_tokenizer)  # with a frozen encoder, then without
    data.text.clear()
    before = encoder.words.weight.detach().clone()
    Trainer(loss, data, replace(CONFIG, warmup=0), tmp_path).fit(progress=False)
    assert not torch.equal(encoder.words.weight, before)


def test_what_a_batch_carries_is_added_to_the_time() -> None:
    added = torch.tensor([[1.0, 3.0], [-2.0, 0.0]])
    batch, net = batch_of(more={"added": added}), Adding()
    loss = loss_of(net)
    noised = loss.noised(batch)
    plain = loss.predict(noised, replace(batch, more={}))
    assert torch.allclose(loss.predict(noised, batch) - plain, torch.tensor([2.0, -1.0])[:, None, None, None])
    with pytest.raises(TypeError, match="`Conditioning.added` needs kolors_core's UNet, .* is a Sum"):
        loss_of(Sum()).predict(noised, batch)


def test_sigmas_of_float64_are_those_of_float32() -> None:
    assert torch.equal(loss_of(sigmas=SIGMAS.double()).each(batch_of()), loss_of().each(batch_of()))


class Short(Sum):
    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return latents


class OneChannel(Sum):
    def forward(self, *given: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(*given)[:, :1]


class Returns(nn.Module):
    """A text encoder that returns this."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found, self.weight = found, nn.Parameter(torch.ones(()))

    def forward(self, batch: Any) -> Any:
        return self.found


def test_wrong_input_is_named_with_what_was_wanted(small_tokenizer: Path) -> None:
    tokens = Tokenizer(small_tokenizer)(["a red apple", ""], 12)
    right = batch_of().text
    cases: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "a Short is no denoiser: its forward is called with latents, .*text_counts, and has",
         lambda: loss_of(Short())),
        (TypeError, r"sigmas must be a tensor, one a training timestep, got \[1.0\]",
         lambda: loss_of(sigmas=[1.0])),
        (ValueError, "sigmas of 500 timesteps, and the batch has timestep 900: give its dataset `timesteps`",
         lambda: loss_of(sigmas=SIGMAS[:500])(batch_of())),
        (ValueError, r"the Sum reads 9 channels of latents \(in_channels\), got 4",
         lambda: loss_of(Sum(Sizes(in_channels=9)))(batch_of())),
        (ValueError, rf"the Sum reads 7 numbers of a text token \(text_dim\), got {WIDTH}",
         lambda: loss_of(Sum(Sizes(text_dim=7)))(batch_of())),
        (ValueError, r"the UNet reads 64 numbers that are added to the time \(time_dim\), got 1",
         lambda: loss_of(UNet(SMALL.unet))(batch_of(more={"added": torch.ones(2, 1)}))),
        (ValueError, r"a OneChannel must return \[2, 4, 4, 4\], got \[2, 1, 4, 4\]",
         lambda: loss_of(OneChannel())(batch_of())),
        (ValueError, "captions are tokens: expected a text encoder", lambda: loss_of()(batch_of(tokens))),
        (ValueError, "a ChatGLM learns nothing of encoded captions: make the data without a frozen",
         lambda: loss_of(encoder=ChatGLM(SMALL.text_encoder))(batch_of())),
        (TypeError, "a Returns must return a TextEmbedding, got Tensor",
         lambda: loss_of(encoder=Returns(right.tokens))(batch_of(tokens))),
        (ValueError, rf"a Returns must return tokens \[2, S, C\], got \[1, 3, {WIDTH}\]",
         lambda: loss_of(encoder=Returns(replace(right, tokens=right.tokens[:1])))(batch_of(tokens))),
        (ValueError, rf"a Returns must return pooled \[2, {WIDTH}\], got \[2, 1\]",
         lambda: loss_of(encoder=Returns(replace(right, pooled=right.pooled[:, :1])))(batch_of(tokens))),
        (ValueError, r"a Returns must return counts \[2, 3\], got \[2, 4\]",
         lambda: loss_of(encoder=Returns(replace(right, counts=torch.ones(2, 4))))(batch_of(tokens))),
    ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


def test_a_batch_of_another_size_than_the_trainers_is_named(pictures: Path, small_tokenizer: Path) -> None:
    message = "batch_size must be the trainer's: the data's batches have 4 images, rows 2 to 5 are asked for"
    for kind in (LatentDataset, MaskedLatentDataset):
        with pytest.raises(ValueError, match=message):
            memory(kind, pictures, small_tokenizer).batch(0, slice(2, 6), CPU)
