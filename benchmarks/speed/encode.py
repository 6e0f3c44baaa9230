"""Two prompts of about 20 tokens through ChatGLM3's full width: `python -m benchmarks.speed.encode OUT`.

`encode_prompt` of both pipelines, in bfloat16 and in float32, each a row. All widths and the vocabulary are
the released ones, the weights random, and of the 28 layers there are 8, to fit memory (8 GB). Ours computes
of the last layer only the last position, which is worth more of 8 layers than of 28: so four layers are
measured too, and the ratio at 28 layers is reckoned from what a layer in the middle takes. The value is that
ratio. The embedded model's tokenizer stands for the real one: what it takes is nothing beside the layers.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import torch

from benchmarks.pairs import make_pair
from benchmarks.side_by_side import Race, Row, faster, race, timed
from benchmarks.speed import arguments
from kolors_core import KolorsPipeline
from kolors_core.checkpoint import EMBEDDED
from kolors_core.config import KOLORS, TINY, ChatGLMConfig
from kolors_core.precompute import Savings

PROMPTS = [
    "a photo of a ladybug, a red apple and a basketball, please", "请画彩虹,一张瓢虫的照片,还有一幅企鹅的图"
]  # fmt: skip
MANY, FEW = 8, 4
SEED = 20240707


def encoders(config: ChatGLMConfig, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Each pipeline's way from two prompts to their embeddings, over all layers and over the first few."""
    theirs = diffusers.KolorsPipeline.from_pretrained(EMBEDDED, text_encoder=None, dtype=dtype)
    ours = KolorsPipeline.from_pretrained("tiny", text_encoder=None)
    ours.savings = Savings(cached_prompts=0)
    theirs.text_encoder, ours.text_encoder = make_pair("text_encoder", config, SEED, dtype)
    layers = {
        "reference": (theirs, theirs.text_encoder.encoder, theirs.text_encoder.encoder.layers),
        "ours": (ours, ours.text_encoder, ours.text_encoder.layers),
    }

    def runner(side: str, count: int) -> Callable[[], Any]:
        pipe, holder, whole = layers[side]

        def run() -> Any:
            holder.layers = whole[:count]
            if side == "reference":
                holder.num_layers = count
            with torch.no_grad():
                return pipe.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)

        return run

    sides = ("reference", "ours")
    return {f"{side}, {count} layers": runner(side, count) for count in (MANY, FEW) for side in sides}


def at(layers: int, side: str, result: Race) -> float:
    """Seconds at so many layers, on the line through the two measured counts."""
    many, few = (result.median(f"{side}, {count} layers") for count in (MANY, FEW))
    return many + (layers - MANY) * (many - few) / (MANY - FEW)


def difference(runs: dict[str, Callable[[], Any]]) -> float:
    """Largest difference of the embeddings by the largest value."""
    (theirs, _, theirs_pooled, _), (ours, _, ours_pooled, _) = (
        runs[f"{side}, {MANY} layers"]() for side in ("reference", "ours")
    )
    pairs = ((theirs.float(), ours.float()), (theirs_pooled.float(), ours_pooled.float()))
    return max(float((b - a).abs().max() / a.abs().max()) for a, b in pairs)


def measure(dtype: torch.dtype, rounds: int, is_small: bool) -> Row:
    """One row."""
    kind = str(dtype).removeprefix("torch.")
    config = replace((TINY if is_small else KOLORS).text_encoder, layers=MANY)
    runs = encoders(config, dtype)
    error = difference(runs)
    result = race({name: timed(run) for name, run in runs.items()}, rounds)
    measured = result.ratio(f"reference, {MANY} layers", f"ours, {MANY} layers")
    whole = KOLORS.text_encoder.layers
    tokens = KolorsPipeline.from_pretrained("tiny").tokenizer(PROMPTS).mask.sum(1).tolist()
    return Row(
        name=f"encode_{kind}", work=f"encode 2 prompts of {tokens[0]} and {tokens[1]} tokens, {kind}",
        goal=faster(6), value=at(whole, "reference", result) / at(whole, "ours", result), race=result,
        is_rehearsal=is_small,
        note=f"full width; reckoned for {whole} layers, at {MANY} layers {measured:.2f} times as fast",
        details={
            "layers": MANY, "hidden_size": config.hidden_size, "vocabulary": config.vocab_size,
            "ratio_at_these_layers": measured, "difference": error,
        },
    )  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--small", action="store_true", help="rehearse at the embedded model's width")
    options = parser.parse_args()
    for dtype in (torch.bfloat16, torch.float32):
        measure(dtype, options.rounds, options.small).write(options.out)


if __name__ == "__main__":
    main()
