"""Training the embedded model's text encoder: to tell from a caption what stands where in its scene.

Kolors' text encoder comes from a language model and is frozen while the UNet learns. This one learns what a
small one needs: names, numbers, places, grounds and what a sign says, in either language and however they are
asked for. A reader that asks as the UNet will (queries of places, cross-attention to the tokens, the pads
counted, and the pooled state) is trained with it and thrown away.
Two stages: what there is, and then, with a new reader of whitened tokens, also where. Without the whitening
a few directions, those of the kinds, hide the words of places from whoever attends to the tokens.
Shapes: B captions, L tokens, C their width, P places of a grid, K kinds, S of all that may be at a place.
"""

import random
from collections.abc import Collection, Sequence
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
    HIGH,
    LOW,
    PLACES,
    Grammar,
)
from benchmarks.tiny.emoji import SIZE
from benchmarks.tiny.processes import is_first
from benchmarks.tiny.scenes import CHARACTERS, GROUNDS, KINDS, LENGTHS, Scene, compose
from kolors_core.attention import attention, log_multiplicity_bias, split_heads
from kolors_core.chatglm import ChatGLM, TextEmbedding
from kolors_core.tokenizer import TokenBatch, Tokenizer
from kolors_core.training.data import derive_seed
from kolors_core.training.run_record import digest
from kolors_core.training.step import Step
from kolors_core.training.trainer import Trainer, TrainingConfig

SEEN = (*KINDS, *CHARACTERS)  # what may be at a place
SIDE = 8  # places of the grid's side
LONGEST = max(LENGTHS)  # characters on a sign
ABSENT = -100  # what a cross-entropy leaves out
WHITENED_FROM = slice(0, 128)  # rows of the captions whose tokens are made white
NOTHING_WEIGHT = 0.15  # of a place where nothing stands
READER_WIDTH, READER_HEADS, READER_LAYERS = 128, 4, 2


@dataclass(frozen=True)
class Captions:
    """Tokens of B captions, and their scenes' truth.

    grid: what is at each place [B, P], of `SEEN`, S for nothing. numbers: of each kind [B, K]. grounds: [B].
    characters: of the sign [B, LONGEST], as many as there are characters in all for none. thirds: of the
    page, across and down, in which the middle of each kind's things is [B, K, 2]; `ABSENT` if untold.
    """

    tokens: TokenBatch
    grid: Tensor
    numbers: Tensor
    grounds: Tensor
    characters: Tensor
    thirds: Tensor


def truth(scene: Scene, placed: Collection[str]) -> tuple[Tensor, Tensor, int, Tensor, Tensor]:
    """What a caption's tokens are to tell of a scene: a row of each of the truths of `Captions`.

    placed: kinds of whose place the caption tells something.
    """
    numbers, characters = torch.zeros(len(KINDS), dtype=torch.long), torch.full((LONGEST,), len(CHARACTERS))
    for item in scene.items:
        numbers[KINDS.index(item.kind)] += 1
        for i, character in enumerate(item.text):
            characters[i] = CHARACTERS.index(character)
    thirds = torch.full((len(KINDS), 2), ABSENT)
    for group in (group for group in scene.groups if group[0].kind in placed):
        middle = torch.tensor([[float(item.x), float(item.y)] for item in group]).mean(0)
        thirds[KINDS.index(group[0].kind)] = (middle > LOW).long() + (middle > HIGH).long()
    return grid_of(scene, SEEN), numbers, GROUNDS.index(scene.ground), characters, thirds


def grid_of(scene: Scene, seen: Sequence[str] = KINDS) -> Tensor:
    """What of `seen`, kinds or characters, is at each place of a scene, [P]; their number for nothing."""
    grid, cell = torch.full((SIDE, SIDE), len(seen)), SIZE / SIDE
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


class Whitening(nn.Module):
    """A fixed linear map, after which the tokens it was made from have mean 0 and covariance 1.

    tokens: [N, C], of many captions. ridge: of the mean variance, added to that of each direction.
    """

    def __init__(self, tokens: Tensor, ridge: float = 1e-4) -> None:
        super().__init__()
        x = tokens.double()
        mean = x.mean(0)
        variances, directions = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
        weight = directions @ torch.diag((variances + ridge * variances.mean()).rsqrt()) @ directions.T
        self.weight, self.bias = (
            nn.Parameter(part.float(), requires_grad=False) for part in (weight, -weight @ mean)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [..., C]."""
        return F.linear(tokens, self.weight, self.bias)


@dataclass(frozen=True)
class Reading:
    """Logits, as a reader of captions gives them.

    From the tokens: grid [B, P, S + 1], and whether anything is there, occupied [B, P]. From the pooled
    state: pooled_occupied [B, P], thirds [B, K, 2, 3], numbers [B, K, 4], grounds [B, ...] and characters
    [B, LONGEST, ...].
    """

    grid: Tensor
    occupied: Tensor
    pooled_occupied: Tensor
    thirds: Tensor
    numbers: Tensor
    grounds: Tensor
    characters: Tensor


class SceneReading(nn.Module):
    """Cross-entropies of all that a caption's scene is known by.

    whitening: of the tokens, for the reader; None: a LayerNorm.
    """

    def __init__(self, text_encoder: ChatGLM, whitening: Whitening | None = None) -> None:
        super().__init__()
        self.text_encoder, width = text_encoder, text_encoder.config.hidden_size
        self.token_norm = nn.LayerNorm(width) if whitening is None else whitening
        self.places = nn.Parameter(torch.randn(SIDE**2, READER_WIDTH))
        self.layers = nn.ModuleList([ReaderLayer(READER_WIDTH, width) for _ in range(READER_LAYERS)])
        self.norm, self.to_pooled = nn.LayerNorm(width), nn.Linear(width, READER_WIDTH)
        self.to_kind, self.to_occupied = nn.Linear(READER_WIDTH, len(SEEN) + 1), nn.Linear(READER_WIDTH, 1)
        self.to_pooled_occupied = nn.Linear(width, SIDE**2)
        self.to_third = nn.Linear(width, len(KINDS) * 6)
        self.to_number = nn.Linear(width, len(KINDS) * 4)
        self.to_ground = nn.Linear(width, len(GROUNDS))
        self.to_character = nn.Linear(width, LONGEST * (len(CHARACTERS) + 1))

    def read(self, text: TextEmbedding) -> Reading:
        """What the text is understood to ask for."""
        bias = None if text.counts is None else log_multiplicity_bias(text.counts, text.tokens.dtype)
        pooled = self.norm(text.pooled)
        x = self.places + self.to_pooled(pooled)[:, None]  # [B, P, C]
        tokens = self.token_norm(text.tokens)
        for layer in self.layers:
            x = layer(x, tokens, bias)
        return Reading(
            self.to_kind(x).float(), self.to_occupied(x).squeeze(-1).float(),
            self.to_pooled_occupied(pooled).float(),
            self.to_third(pooled).unflatten(-1, (len(KINDS), 2, 3)).float(),
            self.to_number(pooled).unflatten(-1, (len(KINDS), 4)).float(), self.to_ground(pooled).float(),
            self.to_character(pooled).unflatten(-1, (LONGEST, -1)).float(),
        )  # fmt: skip

    def forward(self, batch: Captions) -> Tensor:
        """The mean loss of the batch."""
        read = self.read(self.text_encoder(batch.tokens))
        weights = read.grid.new_ones(len(SEEN) + 1)
        weights[-1] = NOTHING_WEIGHT
        of_numbers = F.cross_entropy(read.numbers.flatten(0, 1), batch.numbers.flatten(), reduction="none")
        is_there, is_occupied = batch.numbers.flatten() > 0, (batch.grid < len(SEEN)).float()
        has_sign, is_told = batch.numbers[:, -1] > 0, batch.thirds != ABSENT
        losses = [
            F.cross_entropy(read.grid.flatten(0, 1), batch.grid.flatten(), weights),
            4 * F.binary_cross_entropy_with_logits(read.occupied, is_occupied),
            4 * F.binary_cross_entropy_with_logits(read.pooled_occupied, is_occupied),
            F.cross_entropy(read.thirds[is_told], batch.thirds[is_told])
            if is_told.any() else 0 * read.thirds.sum(),
            of_numbers[is_there].mean() + 20 * of_numbers[~is_there].mean(),
            F.cross_entropy(read.grounds, batch.grounds),
            F.cross_entropy(read.characters[has_sign].flatten(0, 1), batch.characters[has_sign].flatten())
            if has_sign.any() else 0 * read.characters.sum(),
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
            caption = self.grammar.teach(scene, order, i % 2)
            texts.append(caption.text)
            truths.append(truth(scene, {kind for _, *kinds in caption.claims for kind in kinds}))
        tokens = self.tokenizer(texts, self.config.max_tokens).merge_padding()
        grid, numbers, grounds, characters, thirds = zip(*truths, strict=True)
        return Captions(
            tokens.to(device), torch.stack(grid).to(device), torch.stack(numbers).to(device),
            torch.tensor(grounds, device=device), torch.stack(characters).to(device),
            torch.stack(thirds).to(device),
        )  # fmt: skip

    def record(self) -> dict[str, object]:
        """What its batches depend on besides the step and the settings."""
        names = digest(repr(sorted(self.grammar.names.items())).encode())
        return {"names": names, "tokenizer": digest(self.tokenizer.model_bytes)}


@torch.no_grad()
def accuracy(reading: SceneReading, batch: Captions) -> dict[str, float]:
    """Of what the pooled state tells, the shares of captions whose numbers of all kinds, ground and sign, and
    of told thirds of the page, that are right.
    """
    read = reading.read(reading.text_encoder(batch.tokens))
    has_sign, is_told = batch.numbers[:, -1] > 0, batch.thirds != ABSENT
    return {
        "kinds and numbers": float((read.numbers.argmax(-1) == batch.numbers).all(1).float().mean()),
        "ground": float((read.grounds.argmax(-1) == batch.grounds).float().mean()),
        "sign": float((read.characters.argmax(-1) == batch.characters)[has_sign].all(1).float().mean()),
        "third": float((read.thirds.argmax(-1) == batch.thirds)[is_told].float().mean()),
    }


@torch.no_grad()
def told_sides(reading: SceneReading, grammar: Grammar, tokenizer: Tokenizer) -> dict[str, float]:
    """How much likelier something stands in the half that is asked for than in the other: the mean of all
    words of a side, for each language and what tells it, tokens or pooled state. 0 if places are not read.
    """
    cat, sides = grammar.names["🐱"], ("left", "right", "top", "bottom")
    found = dict[str, float]()
    for language, name in enumerate(("English", "Chinese")):
        asked = [(side, word) for side in sides for word in PLACES[side][language]]
        texts = [f"a {cat.english[0]} {word}" if language == 0 else f"{word}有一只{cat.chinese[0]}"
                 for _, word in asked]  # fmt: skip
        tokens = tokenizer(texts).merge_padding().to(reading.places.device)
        read = reading.read(reading.text_encoder(tokens))
        for source, logits in (("tokens", read.occupied), ("pooled", read.pooled_occupied)):
            grid = logits.sigmoid().unflatten(-1, (SIDE, SIDE))
            grid = torch.stack([rows.T if side in sides[:2] else rows
                                for (side, _), rows in zip(asked, grid, strict=True)])  # fmt: skip
            sign = grid.new_tensor([1.0 if side in ("left", "top") else -1.0 for side, _ in asked])
            difference = grid[:, : SIDE // 2].mean((1, 2)) - grid[:, SIDE // 2 :].mean((1, 2))
            found[f"{name} places from {source}"] = float((sign * difference).mean())
    return found


@torch.no_grad()
def whiten(text_encoder: ChatGLM, source: CaptionSource, device: torch.device) -> Whitening:
    """The whitening of a text encoder's tokens, from captions that it was not trained on."""
    return Whitening(text_encoder(source.batch(10**7, WHITENED_FROM, device).tokens).tokens.flatten(0, 1))


def train(
    text_encoder: ChatGLM, whitening: Whitening | None, source: CaptionSource, training: TrainingConfig,
    folder: Path, device: torch.device,
) -> SceneReading:  # fmt: skip
    """Train an encoder with a new reader, of tokens so whitened, or take up the run in `folder`."""
    torch.manual_seed(training.seed)  # of the reader's first weights
    objective = SceneReading(text_encoder, whitening).to(device)

    def report(step: Step) -> None:
        if step.step % 100 == 99 and is_first():
            with torch.autocast(device.type, training.dtype, enabled=training.dtype != torch.float32):
                found = accuracy(objective, source.batch(10**6, slice(0, training.batch_size), device))
                found |= told_sides(objective, source.grammar, source.tokenizer)
            shares = ", ".join(f"{name} {share:.2f}" for name, share in found.items())
            print(f"text encoder step {step.step + 1}: loss {step.loss:.4f}; {shares}", flush=True)

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
