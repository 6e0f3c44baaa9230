"""Lesson "texts": a text encoder learns, from scratch, to tell from a caption what stands where in its scene.

It is the embedded model's first stage (benchmarks/tiny/text.py): a reader that is trained with the encoder
asks its tokens as a UNet would. An encoder that is learned together with a UNet learns no words in minutes.
"""

from collections.abc import Callable

import torch

from benchmarks.ablate.change import Variant
from benchmarks.ablate.lesson import Measure, Result, embedded
from benchmarks.ablate.models import Pupil, build, check_text_encoder, share_values
from benchmarks.ablate.scenes import check_fonts, known_concepts
from benchmarks.tiny.text import Captions, CaptionSource, SceneReading, accuracy
from kolors_core.chatglm import ChatGLM
from kolors_core.config import TINY
from kolors_core.training.trainer import TrainingConfig

RECIPE = TrainingConfig(
    steps=1, batch_size=32, learning_rate=1.5e-3, schedule="cosine", warmup=30, dtype=torch.bfloat16
)  # fmt: skip
HELD_OUT = 10**7  # a step that no training comes to
BATCHES = 4  # of held-out captions


class Texts:
    """Lesson of captions. count: held-out captions."""

    name, one_is = "texts", "one caption encoded"

    def __init__(self, count: int = 256, recipe: TrainingConfig = RECIPE) -> None:
        check_fonts()
        pipe = embedded()
        assert pipe.tokenizer is not None
        self.recipe, self.tokenizer, self.grammar, self.count = (
            recipe,
            pipe.tokenizer,
            known_concepts(),
            count,
        )
        self.measures = [Measure(name="held-out loss", more_is="worse")]
        for name in ("kinds and numbers", "ground", "sign", "third"):
            self.measures.append(
                Measure(name=name, more_is="better", form=".1f", unit="%", grain=100 / count)
            )
        self.about = [f"Captions of scenes, half of them Chinese; {count} held-out ones are read."]

    def pupil(self, variant: Variant, base: Variant, config: TrainingConfig) -> Pupil:
        """Build an encoder, and a reader of it; both start as A's where names and shapes agree."""
        found = [
            SceneReading(build(one, one.change.text_encoder or ChatGLM, TINY.text_encoder, config.seed))
            for one in (base, variant)
        ]  # type: ignore[arg-type]
        check_text_encoder(variant, found[1].text_encoder)
        own = share_values(dict(found[0].named_parameters()), found[1])
        shared = len(list(found[1].parameters())) - len(own)
        return Pupil(variant, found[1], None, found[1].text_encoder, shared, own)

    def batches(self, pupil: Pupil, config: TrainingConfig) -> CaptionSource:
        """Return captions of the config's seed."""
        return CaptionSource(self.grammar, self.tokenizer, config)

    def _held_out(self) -> list[Captions]:
        source = CaptionSource(self.grammar, self.tokenizer, self.recipe)
        source.config = TrainingConfig(steps=1, batch_size=self.count // BATCHES, seed=0)
        rows = slice(0, self.count // BATCHES)
        return [source.batch(HELD_OUT + i, rows, torch.device("cpu")) for i in range(BATCHES)]

    @torch.no_grad()
    def held_out(self, pupil: Pupil) -> float:
        """Measure the mean loss of held-out captions."""
        losses = [float(pupil.objective(batch)) for batch in self._held_out()]
        return sum(losses) / len(losses)

    def measure(self, pupil: Pupil, seed: int) -> Result:
        """Measure the held-out loss, and shares of captions of which the pooled state tells each part."""
        assert isinstance(pupil.objective, SceneReading)
        found = [accuracy(pupil.objective, batch) for batch in self._held_out()]
        scores = {self.measures[0].name: self.held_out(pupil)}
        for name in (measure.name for measure in self.measures[1:]):
            scores[name] = 100 * sum(one[name] for one in found) / len(found)
        return Result(scores)

    def one(self, pupil: Pupil) -> Callable[[], object]:
        """Return a call that encodes one caption."""
        tokens, encoder = self.tokenizer(["a photo of a cat"]).merge_padding(), pupil.text_encoder
        assert encoder is not None
        return torch.no_grad()(lambda: encoder(tokens))
