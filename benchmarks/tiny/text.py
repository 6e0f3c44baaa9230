"""Training the embedded model's text encoder: to tell from a caption which picture it is of.

Kolors' text encoder comes from a language model and is frozen while the UNet learns. This one learns what a
small one needs: that a name, in either language and however it is asked for, means one picture. Linear heads
read what the UNet will read (the pooled state, the last token's and a pad's) and are thrown away.
Shapes: B captions, L tokens, K pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.chatglm import ChatGLM
from kolors_core.config import ChatGLMConfig
from kolors_core.tokenizer import TokenBatch, Tokenizer
from kolors_core.training.data import Example, derive_seed
from kolors_core.training.run_record import digest
from kolors_core.training.trainer import Trainer, TrainingConfig


@dataclass(frozen=True)
class Captions:
    """Tokens of B captions, and of which picture each is: [B]."""

    tokens: TokenBatch
    pictures: Tensor


class Recognition(nn.Module):
    """Cross-entropy of the right picture, by three linear heads, with smoothed labels."""

    def __init__(self, text_encoder: ChatGLM, pictures: int) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.heads = nn.ModuleList(
            [nn.Linear(text_encoder.config.hidden_size, pictures) for _ in ("pooled", "last", "pad")]
        )

    def scores(self, tokens: TokenBatch) -> list[Tensor]:
        """Each head's logits [B, K]."""
        text = self.text_encoder(tokens)
        states = (text.pooled, text.tokens[:, -1], text.tokens[:, 0])
        return [head(state) for head, state in zip(self.heads, states, strict=True)]

    def forward(self, batch: Captions) -> Tensor:
        """The mean loss of the batch."""
        losses = [
            F.cross_entropy(logits.float(), batch.pictures, label_smoothing=0.1)
            for logits in self.scores(batch.tokens)
        ]
        return torch.stack(losses).mean()


class CaptionSource:
    """Captions drawn evenly over the pictures, and over each picture's captions."""

    def __init__(self, examples: Sequence[Example], tokenizer: Tokenizer, config: TrainingConfig) -> None:
        self.examples, self.tokenizer, self.config = examples, tokenizer, config

    def batch(self, step: int, rows: slice, device: torch.device) -> Captions:
        """The captions `part` of the batch of a step."""
        draw = torch.Generator().manual_seed(derive_seed(self.config.seed, step))
        pictures = torch.randint(len(self.examples), (self.config.batch_size,), generator=draw)
        chosen = []
        for picture in pictures.tolist():
            captions = self.examples[picture].captions
            chosen.append(captions[int(torch.randint(len(captions), (), generator=draw))])
        tokens = self.tokenizer(chosen[rows], self.config.max_tokens).merge_padding()
        return Captions(tokens.to(device), pictures[rows].to(device))

    def record(self) -> dict[str, object]:
        """What its batches depend on besides the step and the settings."""
        captions = [digest(repr(example.captions).encode()) for example in self.examples]
        return {"captions": captions, "tokenizer": digest(self.tokenizer.model_bytes)}


def train(
    config: ChatGLMConfig, examples: Sequence[Example], tokenizer: Tokenizer, training: TrainingConfig,
    folder: Path, device: torch.device,
) -> Recognition:  # fmt: skip
    """Train an encoder with its heads, or take up the run in `folder`."""
    torch.manual_seed(training.seed)  # of the first weights
    objective = Recognition(ChatGLM(config), len(examples)).to(device)

    def report(step: int, loss: float) -> None:
        if step % 100 == 0:
            print(f"text encoder step {step}: loss {loss:.4f}", flush=True)

    Trainer(objective, CaptionSource(examples, tokenizer, training), training, folder, report).fit(
        progress=False
    )
    return objective.eval()
