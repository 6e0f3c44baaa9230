"""Similarity of two models' features: linear CKA between layers, with the same inputs for both.

CKA (Kornblith et al. 2019, https://arxiv.org/abs/1905.00414) compares the Gram matrices of the images in two
layers, whatever their widths; 1 is equal up to rotation and scale. HSIC is estimated without bias on each
batch and averaged over batches (Nguyen et al. 2021, https://arxiv.org/abs/2010.15327, eq. 3; Song et al.
2012), so that layers with nothing in common have 0 however few images there are. The second model gets the
first one's latents in each step.
Shapes: B images of a batch, P batches, T steps, L and M layers.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kolors_core.inspection.features import Patterns, capture, inject
from kolors_core.inspection.heat_map import HeatMap
from kolors_core.inspection.intervals import t_quantile
from kolors_core.inspection.prompt_template import (
    LEVELS,
    TIMESTEPS,
    Example,
    PromptTemplate,
    Track,
    check_calls,
    generate,
    last_tensor,
)  # fmt: skip
from kolors_core.inspection.token_attention import TextToImage

SMALLEST_BATCH = 4  # images, of which the unbiased estimate can be made
SHUFFLE_SEED = 0
PARTS = 6  # batches, the repeats of the interval


def gram(rows: int, x: Tensor) -> Tensor:
    """Compute the Gram matrix [B, B] of the last B rows of features [.., ...], with zeros on its diagonal."""
    flat = x.detach()[-rows:].flatten(1).double()
    return (flat @ flat.T).fill_diagonal_(0).cpu()


def hsic(a: Tensor, b: Tensor) -> Tensor:
    """Estimate HSIC without bias from Gram matrices [..., B, B] with zeros on their diagonals: [...]."""
    n, sums = a.shape[-1], (a.sum(-1), b.sum(-1))  # [..., B]
    means = sums[0].sum(-1) * sums[1].sum(-1) / ((n - 1) * (n - 2))
    return ((a * b).sum((-1, -2)) + means - 2 / (n - 2) * (sums[0] * sums[1]).sum(-1)) / (n * (n - 3))


def cka(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Estimate CKA [L, M, T] from each batch's Gram matrices [L, T, B, B] and [M, T, B, B], and its error.

    The error is half of the 95% interval, by leaving out one batch after another (the jackknife).
    """
    between = torch.stack([hsic(one[:, None], other[None]) for one, other in zip(a, b, strict=True)])
    own = [torch.stack([hsic(grams, grams) for grams in part]) for part in (a, b)]  # [P, L, T], [P, M, T]

    def ratio(rows: list[int]) -> Tensor:
        first, second = (part[rows].sum(0).clamp(min=0) for part in own)
        return between[rows].sum(0) / (first[:, None] * second[None]).sqrt().clamp(min=1e-300)

    every = list(range(len(between)))
    left_out = torch.stack([ratio(every[:i] + every[i + 1 :]) for i in every])
    spread = (left_out - left_out.mean(0)).square().sum(0) * (len(every) - 1) / len(every)
    return ratio(every), t_quantile(len(every) - 1) * spread.sqrt()


def record_grams(
    pipe: TextToImage, other: TextToImage, layers: Patterns, batches: Sequence[Sequence[Example]], *,
    steps: int, track: Track = iter, **arguments: Any,
) -> tuple[list[list[Tensor]], list[str], list[int]]:  # fmt: skip
    """Record the Gram matrices of both models' layers, the second on the first's latents.

    Returns each model's batches [L, T, B, B], the layers' names and the timesteps. ValueError where the two
    have other layers or timesteps.
    """
    found: list[list[Tensor]] = [[], []]
    names, times = list[str](), list[list[int]]()
    for batch in track(list(batches)):
        inputs = dict[str, Any]()
        for i, each in enumerate((pipe, other)):
            with ExitStack() as stack:
                if i == 0:
                    inputs = stack.enter_context(capture(each.unet, "", "in"))
                else:
                    stack.enter_context(inject(each.unet, inputs, "in"))
                kept = stack.enter_context(capture(each.unet, layers, keep=partial(gram, len(batch))))
                times.append(generate(each, batch, steps, **arguments)[1])
            check_calls(kept, times[-1])
            names = names or list(kept)
            if list(kept) != names or times[-1] != times[0]:
                raise ValueError("the models have other layers or timesteps: no pair of them can be compared")
            found[i].append(torch.stack([torch.stack([last_tensor(x) for x in kept[n]]) for n in names]))
    return found, names, times[0]


def similarity(
    pipe: TextToImage, other: TextToImage, template: PromptTemplate, layers: Patterns = LEVELS, *,
    steps: int = 10, images: int = 4, seed: int = 0,
    track: Track = iter, **arguments: Any,
) -> list[HeatMap]:  # fmt: skip
    """Compare layers of two UNets on the prompt's rows: each with each, and those of one name by step.

    layers: patterns of `capture`, of modules called once a step. images: of each prompt; in all at least
    `SMALLEST_BATCH` for each of `PARTS` batches. arguments: the pipeline calls' others. ValueError for fewer
    images, and for models with other layers or timesteps.
    """
    examples = template.examples(images, seed)
    if len(examples) < SMALLEST_BATCH * PARTS:
        raise ValueError(f"expected at least {SMALLEST_BATCH * PARTS} images in all, got {len(examples)}")
    batches = [examples[i::PARTS] for i in range(PARTS)]
    (a, b), names, timesteps = record_grams(
        pipe, other, layers, batches, steps=steps, track=track, **arguments
    )
    values, error = cka(a, b)
    generator, shuffled = torch.Generator().manual_seed(SHUFFLE_SEED), []
    for grams in b:
        order = torch.randperm(grams.shape[-1], generator=generator)
        shuffled.append(grams[..., order, :][..., order])
    chance, _ = cka(a, shuffled)
    note = f"1: equal up to rotation and scale; {len(examples)} images; the second model's images shuffled: "
    note += f"{chance.mean():.2f}, at most {chance.max():.2f}; 95% intervals to ±"
    mean, widest = values.mean(2), error.amax(2)
    same, off = values.diagonal(dim1=0, dim2=1).T, error.diagonal(dim1=0, dim2=1).T  # [L, T]
    return [
        HeatMap("CKA of each layer with each, mean of the steps", f"{note}{widest.max():.2f}", "first model",
                names, "second model", names, mean, mean - widest, mean + widest),
        HeatMap("CKA of equal layers, by step", f"{note}{off.max():.2f}", "layer", names,
                TIMESTEPS, [str(t) for t in timesteps], same, same - off, same + off),
    ]  # fmt: skip
