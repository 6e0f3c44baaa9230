"""Training the embedded model's text encoder: to tell from a caption what stands where in its scene.

Kolors' text encoder comes from a language model and is frozen while the UNet learns. This one learns what a
small one needs: names, numbers, places, grounds and what a sign says, in either language and however they are
asked for. A reader that asks as the UNet will (queries of places, cross-attention to the tokens, the pads
counted) is trained with it and thrown away.
Shapes: B captions, L tokens, C their width, P places of a grid, K kinds, S of all that may be at a place.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tiny.captions import (
    CHINESE_AFTER,
    CHINESE_BEFORE,
    ENGLISH_AFTER,
    ENGLISH_BEFORE,
    Grammar,
)
from benchmarks.tiny.emoji import CONCEPTS, SIZE
from benchmarks.tiny.processes import is_first
from benchmarks.tiny.scenes import CHARACTERS, GROUNDS, KINDS, LENGTHS, Scene, compose
from kolors_core.attention import attention, log_multiplicity_bias, split_heads
from kolors_core.chatglm import ChatGLM, TextEmbedding
from kolors_core.config import ChatGLMConfig
from kolors_core.tokenizer import TokenBatch, Tokenizer
from kolors_core.training.data import derive_seed
from kolors_core.training.run_record import digest
from kolors_core.training.trainer import Trainer, TrainingConfig

SEEN = (*KINDS, *CHARACTERS)  # what may be at a place
PLACES = 8  # of the grid's side
LONGEST = max(LENGTHS)  # characters on a sign
NOTHING_WEIGHT = 0.15  # of a place where nothing stands
READER_WIDTH, READER_HEADS, READER_LAYERS = 128, 4, 2


@dataclass(frozen=True)
class Captions:
    """Tokens of B captions, and their scenes' truth.

    grid: what is at each place [B, P], of `SEEN`, S for nothing. numbers: of each kind [B, K]. grounds: [B].
    characters: of the sign [B, LONGEST], as many as there are characters in all for none.
    """

    tokens: TokenBatch
    grid: Tensor
    numbers: Tensor
    grounds: Tensor
    characters: Tensor


def truth(scene: Scene) -> tuple[Tensor, Tensor, int, Tensor]:
    """What a caption's tokens are to tell of a scene: a row of each of the truths of `Captions`."""
    numbers, characters = torch.zeros(len(KINDS), dtype=torch.long), torch.full((LONGEST,), len(CHARACTERS))
    for item in scene.items:
        numbers[KINDS.index(item.kind)] += 1
        for i, character in enumerate(item.text):
            characters[i] = CHARACTERS.index(character)
    return grid_of(scene, SEEN), numbers, GROUNDS.index(scene.ground), characters


def grid_of(scene: Scene, seen: Sequence[str] = KINDS) -> Tensor:
    """What of `seen`, kinds or characters, is at each place of a scene, [P]; their number for nothing."""
    grid, cell = torch.full((PLACES, PLACES), len(seen)), SIZE / PLACES
    for part in (part for item in scene.items for part in (item, *item.characters) if part.kind in seen):
        left, top, right, bottom = (round(side / cell) for side in part.box)
        grid[max(0, top) : max(1, bottom), max(0, left) : max(1, right)] = seen.index(part.kind)
    return grid.flatten()


class ReaderLayer(nn.Module):
    """Cross-attention to the text, attention among places, and an MLP, each after a norm."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.to_q, self.to_kv = nn.Linear(width, width), nn.Linear(text_width, 2 * width, bias=False)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.outs = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, text: Tensor, bias: Tensor | None) -> Tensor:
        """Map x [B, P, C]; text: [B, L, C]."""
        q, (k, v) = self.to_q(self.norms[0](x)), self.to_kv(text).chunk(2, dim=-1)
        q, k, v = (split_heads(part, READER_HEADS) for part in (q, k, v))
        x = x + self.outs[0](attention(q, k, v, bias).transpose(1, 2).flatten(2))
        q, k, v = (split_heads(p, READER_HEADS) for p in self.to_qkv(self.norms[1](x)).chunk(3, dim=-1))
        x = x + self.outs[1](attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[2](x))


class SceneReading(nn.Module):
    """Cross-entropies of all that a caption's scene is known by."""

    def __init__(self, text_encoder: ChatGLM) -> None:
        super().__init__()
        self.text_encoder, width = text_encoder, text_encoder.config.hidden_size
        self.places = nn.Parameter(0.1 * torch.randn(PLACES**2, READER_WIDTH))
        self.layers = nn.ModuleList([ReaderLayer(READER_WIDTH, width) for _ in range(READER_LAYERS)])
        self.norm, self.to_pooled = nn.LayerNorm(width), nn.Linear(width, READER_WIDTH)
        self.to_kind = nn.Linear(READER_WIDTH, len(SEEN) + 1)
        self.to_number = nn.Linear(width, len(KINDS) * 4)
        self.to_ground = nn.Linear(width, len(GROUNDS))
        self.to_character = nn.Linear(width, LONGEST * (len(CHARACTERS) + 1))

    def read(self, text: TextEmbedding) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits of the grid [B, P, S + 1], numbers [B, K, 4], grounds and characters [B, 3, ...]."""
        bias = None if text.counts is None else log_multiplicity_bias(text.counts, text.tokens.dtype)
        pooled = self.norm(text.pooled)
        x = self.places + self.to_pooled(pooled)[:, None]  # [B, P, C]
        tokens = self.norm(text.tokens)
        for layer in self.layers:
            x = layer(x, tokens, bias)
        return (
            self.to_kind(x), self.to_number(pooled).unflatten(-1, (len(KINDS), 4)), self.to_ground(pooled),
            self.to_character(pooled).unflatten(-1, (LONGEST, -1)),
        )  # fmt: skip

    def forward(self, batch: Captions) -> Tensor:
        """The mean loss of the batch."""
        grid, numbers, grounds, characters = (x.float() for x in self.read(self.text_encoder(batch.tokens)))
        weights = grid.new_ones(len(SEEN) + 1)
        weights[-1] = NOTHING_WEIGHT
        of_numbers = F.cross_entropy(numbers.flatten(0, 1), batch.numbers.flatten(), reduction="none")
        is_there = batch.numbers.flatten() > 0
        has_sign = batch.numbers[:, -1] > 0
        losses = [
            F.cross_entropy(grid.flatten(0, 1), batch.grid.flatten(), weights),
            of_numbers[is_there].mean() + 20 * of_numbers[~is_there].mean(),
            F.cross_entropy(grounds, batch.grounds),
            F.cross_entropy(characters[has_sign].flatten(0, 1), batch.characters[has_sign].flatten())
            if has_sign.any() else characters.sum() * 0,
        ]  # fmt: skip
        return torch.stack(losses).sum()


class CaptionSource:
    """Captions of the scenes of a step, each scene's in English and in Chinese."""

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer, config: TrainingConfig) -> None:
        self.grammar, self.tokenizer, self.config = grammar, tokenizer, config

    def batch(self, step: int, rows: slice, device: torch.device) -> Captions:
        """The `rows` of a step's captions."""
        texts, truths = [], []
        for i in range(*rows.indices(self.config.batch_size)):
            scene = compose(derive_seed(self.config.seed, step, i // 2))
            order = random.Random(derive_seed(self.config.seed, step, i // 2, i % 2))
            texts.append(self.grammar.say(scene, order, i % 2).text)
            truths.append(truth(scene))
        tokens = self.tokenizer(texts, self.config.max_tokens).merge_padding()
        grid, numbers, grounds, characters = zip(*truths, strict=True)
        return Captions(
            tokens.to(device), torch.stack(grid).to(device), torch.stack(numbers).to(device),
            torch.tensor(grounds, device=device), torch.stack(characters).to(device),
        )  # fmt: skip

    def record(self) -> dict[str, object]:
        """What its batches depend on besides the step and the settings."""
        names = digest(repr(sorted(self.grammar.names.items())).encode())
        return {"names": names, "tokenizer": digest(self.tokenizer.model_bytes)}


@torch.no_grad()
def accuracy(reading: SceneReading, batch: Captions) -> dict[str, float]:
    """The shares of captions whose numbers of all kinds, ground and sign the pooled state tells rightly, and
    of the places with something on them whose kind is read.
    """
    grid, numbers, grounds, characters = reading.read(reading.text_encoder(batch.tokens))
    things, signs = batch.grid < len(CONCEPTS), (batch.grid >= len(KINDS)) & (batch.grid < len(SEEN))
    has_sign = batch.numbers[:, -1] > 0
    return {
        "kinds and numbers": float((numbers.argmax(-1) == batch.numbers).all(1).float().mean()),
        "ground": float((grounds.argmax(-1) == batch.grounds).float().mean()),
        "sign": float((characters.argmax(-1) == batch.characters)[has_sign].all(1).float().mean()),
        "thing at a place": float((grid.argmax(-1) == batch.grid)[things].float().mean()),
        "character at a place": float((grid.argmax(-1) == batch.grid)[signs].float().mean()),
    }


def train(
    config: ChatGLMConfig, grammar: Grammar, tokenizer: Tokenizer, training: TrainingConfig, folder: Path,
    device: torch.device,
) -> SceneReading:  # fmt: skip
    """Train an encoder with its reader, or take up the run in `folder`."""
    torch.manual_seed(training.seed)  # of the first weights
    objective = SceneReading(ChatGLM(config)).to(device)
    source = CaptionSource(grammar, tokenizer, training)

    def report(step: int, loss: float) -> None:
        if step % 100 == 99 and is_first():
            with torch.autocast(device.type, training.dtype, enabled=training.dtype != torch.float32):
                found = accuracy(objective, source.batch(10**6, slice(0, training.batch_size), device))
            shares = ", ".join(f"{name} {share:.1%}" for name, share in found.items())
            print(f"text encoder step {step + 1}: loss {loss:.4f}; {shares}", flush=True)

    Trainer(objective, source, training, folder, report).fit(progress=False)
    return objective.eval()


def tokenizer_lines(grammar: Grammar, scenes: Sequence[int]) -> list[str]:
    """Captions to learn pieces from, of scenes of these seeds, without what signs say."""
    lines = [*ENGLISH_BEFORE, *ENGLISH_AFTER, *CHINESE_BEFORE, *CHINESE_AFTER] * 20
    for seed in scenes:
        scene = compose(seed)
        lines += [
            grammar.say(scene, random.Random(seed), language, is_wrapped=False).text for language in (0, 1)
        ]
    return lines
