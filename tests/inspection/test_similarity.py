"""CKA: its estimate is unbiased and knows rotations, and both models read the same latents."""

from copy import deepcopy
from itertools import permutations
from pathlib import Path

import pytest
import torch

from kolors_core import KolorsPipeline
from kolors_core.inspection.prompt_template import PromptTemplate
from kolors_core.inspection.similarity import cka, gram, hsic, similarity
from tests.support.inspected import QUESTION, QUICK, small_pipe


@pytest.fixture(scope="module")
def pipe(small_tokenizer: Path) -> KolorsPipeline:
    return small_pipe(small_tokenizer)


def features(seed: int, n: int, width: int) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.numerical
def test_hsic_is_the_mean_over_different_images() -> None:
    """Of the definition's three expectations, each over all choices of 2, 4 and 3 different images."""
    a, b = (gram(7, features(seed, 7, 3)) for seed in (0, 1))
    two = [a[i, j] * b[i, j] for i, j in permutations(range(7), 2)]
    four = [a[i, j] * b[k, m] for i, j, k, m in permutations(range(7), 4)]
    three = [a[i, j] * b[i, k] for i, j, k in permutations(range(7), 3)]
    wanted = sum(sign * torch.stack(terms).mean() for sign, terms in ((1, two), (1, four), (-2, three)))
    assert torch.allclose(hsic(a, b), torch.as_tensor(wanted), atol=1e-12)


def batches(x: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Gram matrices [1, 1, B, B] of each batch, as of one layer in one step."""
    return [gram(size, part)[None, None] for part in x.split(size)]


@pytest.mark.numerical
def test_cka_is_1_of_rotated_features_and_0_of_others_however_few_the_images() -> None:
    x, other = features(0, 48, 20), features(1, 48, 300)
    rotation = torch.linalg.qr(features(2, 20, 20))[0]
    value, error = cka(batches(x, 8), batches(3 * x @ rotation + 5, 8))
    assert value.item() == pytest.approx(1, abs=1e-10) and error.item() < 1e-10
    value, error = cka(batches(x, 8), batches(other, 8))
    assert abs(value.item()) < 0.15 and abs(value.item()) < error.item() < 0.4
    half, error = cka(batches(x, 8), batches(torch.cat([x[:, :10], other[:, :10]], 1), 8))
    assert 0.3 < half.item() < 0.7


def test_the_interval_of_cka_holds_0_where_nothing_is_common() -> None:
    """Of 24 layers and 24 others, each in 6 batches of 8 images: in about 95% of the pairs."""
    a, b = (
        [torch.stack([gram(8, features(100 * seed + k, 48, 6)[8 * i : 8 * i + 8])[None] for k in range(24)])
         for i in range(6)]
        for seed in (1, 2)
    )  # fmt: skip
    values, errors = cka(a, b)
    assert values.shape == (24, 24, 1) and 0.9 < (values.abs() < errors).double().mean() < 0.985


def test_a_changed_layer_is_seen_where_it_is_and_not_before(pipe: KolorsPipeline) -> None:
    """And not in the latents of the next step: they would differ, but the second model reads the first's."""
    other = KolorsPipeline(**pipe.components | {"unet": deepcopy(pipe.unet)})
    other.set_progress_bar_config(disable=True)
    other.unet.conv_out.weight.data.neg_()
    other.unet.mid.resnets[1].conv2.weight.data.zero_()
    whole, by_step = similarity(pipe, other, PromptTemplate.parse(QUESTION), images=12, **QUICK)
    assert by_step.rows == whole.columns == ["conv_in", "down.0", "down.1", "mid", "up.0", "up.1"]
    assert torch.allclose(by_step.values[:3], torch.ones(3, 2).double(), atol=1e-8)
    assert (by_step.values[3] < 1 - 1e-5).all()
    assert torch.allclose(whole.values[:3, :3], whole.values[:3, :3].T, atol=1e-8)
    assert "24 images; the second model's images shuffled: " in whole.note
    shuffled = float(whole.note.partition("shuffled: ")[2].split(",")[0])
    assert abs(shuffled) < 0.3 < whole.values[0, 1]


def test_bad_input_is_named(pipe: KolorsPipeline) -> None:
    template = PromptTemplate.parse(QUESTION)
    with pytest.raises(ValueError, match="expected at least 24 images in all, got 22"):
        similarity(pipe, pipe, template, images=11, **QUICK)
    other = KolorsPipeline(**pipe.components | {"scheduler": deepcopy(pipe.scheduler)})
    other.set_progress_bar_config(disable=True)
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, steps_offset=0)
    with pytest.raises(ValueError, match="the models have other layers or timesteps"):
        similarity(pipe, other, template, "mid", images=12, **QUICK)
