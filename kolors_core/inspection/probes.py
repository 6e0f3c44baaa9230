"""Linear probes: what a linear classifier reads from the UNet's features, by layer and timestep.

A probe (Alain and Bengio 2016, https://arxiv.org/abs/1610.01644) is ridge regression to the answer of a
prompt's question, one-hot, from features averaged over quarters of the feature map. It is fitted on images of
other noise than those that it is scored on, beside one fitted to shuffled answers (Hewitt and Liang 2019,
https://arxiv.org/abs/1909.03368). Under guidance the rows of the negative prompt, which read no word of the
prompt, are probed too: what they have of an answer is already in the latents.
Shapes: N images, D features, K answers, B images of a batch.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_core.inspection.features import Patterns, capture
from kolors_core.inspection.heat_map import HeatMap
from kolors_core.inspection.intervals import share_interval
from kolors_core.inspection.prompt_template import (
    LEVELS,
    TIMESTEPS,
    PromptTemplate,
    Track,
    check_calls,
    generate,
    in_batches,
    last_tensor,
)  # fmt: skip
from kolors_core.inspection.token_attention import TextToImage
from kolors_core.validation import check_int

FOLDS = 4
PENALTIES = tuple(
    10.0**k for k in range(-5, 3)
)  # of the ridge, in units of the Gram matrix's mean eigenvalue
SHUFFLE_SEED = 0


def pool(x: Tensor) -> Tensor:
    """Average a feature map [B, C, H, W] over its quarters, or tokens [B, N, C] over all: [B, D]."""
    x = x.detach().float()
    return (F.adaptive_avg_pool2d(x, 2).flatten(1) if x.ndim == 4 else x.flatten(1, -2).mean(1)).cpu()


def predict_held_out(x: Tensor, targets: Sequence[Tensor], folds: Tensor) -> list[Tensor]:
    """Predict the targets of each fold by ridge regression on the others: [N, K] each, of features [N, D].

    targets: [N, K] each. folds: [N], the fold of each image. A target's penalty is chosen on the fitted
    images alone, by the squared error of leaving one out.
    """
    x = x.double()
    predicted = [torch.zeros(target.shape, dtype=torch.float64) for target in targets]
    for fold in folds.unique():
        is_held = folds == fold
        mean, n = x[~is_held].mean(0), int((~is_held).sum())
        fitted, held = x[~is_held] - mean, x[is_held] - mean
        values, vectors = torch.linalg.eigh(fitted @ fitted.T)
        unit = values.mean().clamp(min=1e-12)
        for target, result in zip(targets, predicted, strict=True):
            middle = target[~is_held].double().mean(0)
            rotated = vectors.T @ (target[~is_held] - middle)
            best, least = rotated, float("inf")
            for penalty in PENALTIES:
                inverse = 1 / (values.clamp(min=0) + penalty * unit)
                dual = vectors @ (inverse[:, None] * rotated)  # [n, K]
                # 1 - h of each image, by the penalty; the mean, which is fitted too, takes 1 / n of it.
                freedom = vectors.square() @ inverse - 1 / (n * penalty * unit)
                error = float((dual / freedom[:, None]).square().sum())
                best, least = (dual, error) if error < least else (best, least)
            result[is_held] = held @ (fitted.T @ best) + middle
    return predicted


def record_pooled(
    pipe: TextToImage, template: PromptTemplate, layers: Patterns, *, steps: int, images: int, seed: int,
    track: Track, **arguments: Any,
) -> tuple[dict[tuple[str, str], list[Tensor]], list[int]]:  # fmt: skip
    """Pool the features of all examples: (prompt whose rows they are, layer) -> [N, D] of each step.

    Returns the timesteps too. Without guidance there are the prompt's rows alone.
    """
    parts, timesteps = defaultdict[tuple[str, str], list[list[Tensor]]](list), list[int]()
    for batch in track(in_batches(pipe, template.examples(images, seed))):
        with capture(pipe.unet, layers, keep=pool) as kept:
            _, timesteps = generate(pipe, batch, steps, **arguments)
        check_calls(kept, timesteps)
        rows = {"negative prompt": slice(0, len(batch)), "prompt": slice(-len(batch), None)}
        is_guided = any(len(last_tensor(calls[0])) > len(batch) for calls in kept.values())
        for half in rows if is_guided else ("prompt",):
            for name, calls in kept.items():
                parts[half, name].append([last_tensor(call)[rows[half]] for call in calls])
    found = {key: [torch.cat(step) for step in zip(*each, strict=True)] for key, each in parts.items()}
    return found, timesteps


def probe(
    pipe: TextToImage, template: PromptTemplate, layers: Patterns = LEVELS, *, steps: int = 10,
    images: int = 8, seed: int = 0, track: Track = iter, **arguments: Any,
) -> list[HeatMap]:  # fmt: skip
    """Probe layers in each step for the answer to each question: the share of held-out images that are right.

    template: with a question or more. layers: patterns of `capture`, of modules that are called once a step.
    images: of each prompt, at least `FOLDS`. track: wraps the list of batches, for a progress bar. arguments:
    the pipeline call's others. ValueError for a template without questions, and as in `check_calls`.
    """
    if not template.questions:
        raise ValueError(f"expected a question, such as {{thing: fox|cat}}, in the prompt {template.text!r}")
    check_int("images", images, least=FOLDS)
    found, timesteps = record_pooled(
        pipe, template, layers, steps=steps, images=images, seed=seed, track=track, **arguments
    )
    examples, names = template.examples(images, seed), list(dict.fromkeys(name for _, name in found))
    answers = torch.tensor([example.answers for example in examples])  # [N, questions]
    folds = torch.arange(len(examples)) % images % FOLDS
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(SHUFFLE_SEED))
    shuffle = torch.empty_like(order)  # within each fold, so that no answer is rarer where it is scored
    shuffle[folds.argsort(stable=True)] = order[folds[order].argsort(stable=True)]
    labels = [part[:, q] for q in range(answers.shape[1]) for part in (answers, answers[shuffle])]
    hits: dict[str, Tensor] = {}  # by half: [questions, true and shuffled, layers, steps]
    for (half, name), calls in found.items():
        for step, x in enumerate(calls):
            predicted = predict_held_out(x, [F.one_hot(label) for label in labels], folds)
            right = [(p.argmax(1) == label).sum() for p, label in zip(predicted, labels, strict=True)]
            table = hits.setdefault(half, torch.zeros(len(labels) // 2, 2, len(names), len(timesteps)))
            table[:, :, names.index(name), step] = torch.tensor(right).view(-1, 2).float()
    return [
        _heat_map(question, options, half, hits[half][q], len(examples), names, timesteps)
        for q, (question, options) in enumerate(template.questions.items())
        for half in hits
    ]


def _heat_map(
    question: str, options: Sequence[str], half: str, hits: Tensor, n: int, names: Sequence[str],
    timesteps: Sequence[int],
) -> HeatMap:  # fmt: skip
    low, high = share_interval(hits[0], n)
    shuffled, chance = hits[1] / n, 1 / len(options)
    note = (
        f"share of {n} held-out images right; 95% intervals to ±{float((high - low).max()) / 2:.2f}; "
        f"chance {chance:.2f}; shuffled answers {shuffled.mean():.2f}, at most {shuffled.max():.2f}"
    )
    return HeatMap(
        f"{question}: {', '.join(options)}; rows of the {half}", note, "layer", names,
        TIMESTEPS, [str(t) for t in timesteps], hits[0] / n, low, high, (chance, 1.0),
    )  # fmt: skip
