"""Linear probes: what is there is read, what is not there is not, and the penalty is chosen as it says."""

import pytest
import torch
import torch.nn.functional as F

from kolors_core.inspection import probes
from kolors_core.inspection.probes import pool, predict_held_out, probe
from kolors_core.inspection.prompt_template import PromptTemplate
from tests.support.explained import tiny


def planted(n: int, width: int, strength: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise [n, width] in which three classes lie apart, the classes, and folds in which each is as often."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    middles = strength * torch.randn(3, width, generator=generator)
    return torch.randn(n, width, generator=generator) + middles[labels], labels, torch.arange(n) // 3 % 4


@pytest.mark.parametrize("width", [8, 200])
def test_what_is_there_is_read_and_noise_is_not(width: int) -> None:
    for strength, least, most in ((2.0, 0.95, 1.0), (0.0, 0.2, 0.46)):
        x, labels, folds = planted(96, width, strength)
        [predicted] = predict_held_out(x, [F.one_hot(labels)], folds)
        right = float((predicted.argmax(1) == labels).double().mean())
        assert least <= right <= most, (strength, right)


@pytest.mark.numerical
def test_it_is_ridge_regression_with_the_best_penalty_of_leaving_one_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each image left out, and everything fitted anew, its mean too; by the primal equations."""
    x, labels, folds = planted(24, 5, 0.5)
    x, y = x.double(), F.one_hot(labels).double()

    def fit(rows: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        mean, middle = x[rows].mean(0), y[rows].mean(0)
        a = x[rows] - mean
        weights = torch.linalg.solve(a.T @ a + ridge * torch.eye(5).double(), a.T @ (y[rows] - middle))
        return weights, middle - mean @ weights

    rows = (folds != 0).nonzero()[:, 0]
    centred = x[rows] - x[rows].mean(0)
    unit = float((centred @ centred.T).diagonal().mean())
    errors = {}
    for penalty in probes.PENALTIES:
        monkeypatch.setattr(probes, "PENALTIES", (penalty,))
        weights, offset = fit(rows, penalty * unit)
        [alone] = predict_held_out(x, [y], folds)
        assert torch.allclose(alone[folds == 0], x[folds == 0] @ weights + offset, atol=1e-10)
        left = [
            (y[i] - x[i] @ w - b).square().sum()
            for i in rows
            for w, b in [fit(rows[rows != i], penalty * unit)]
        ]
        errors[penalty] = float(torch.stack(left).sum())
    monkeypatch.undo()
    best = min(errors, key=lambda penalty: errors[penalty])
    assert 1e-3 < best < 1e2, "neither the first nor the last"
    weights, offset = fit(rows, best * unit)
    [chosen] = predict_held_out(x, [y], folds)
    assert torch.allclose(chosen[folds == 0], x[folds == 0] @ weights + offset, atol=1e-10)


def test_features_are_pooled_by_quarters_or_over_tokens() -> None:
    x = torch.arange(32.0).view(1, 2, 4, 4)
    assert pool(x)[0].tolist() == [2.5, 4.5, 10.5, 12.5, 18.5, 20.5, 26.5, 28.5]
    assert pool(x.flatten(2).transpose(1, 2))[0].tolist() == [7.5, 23.5]


def test_the_prompts_rows_tell_its_answer_and_the_first_latents_do_not() -> None:
    """Rows of the negative prompt read no word: of the latents after a step they have what was drawn."""
    template = PromptTemplate.parse("{thing: 狐狸|熊猫}")
    negative, positive = probe(tiny(), template, images=8, steps=3)
    assert negative.rows[:4] == ["conv_in", "down.0", "down.1", "down.2"] and len(negative.columns) == 3
    assert negative.title.endswith("rows of the negative prompt") and positive.title.endswith("of the prompt")
    assert positive.values[2:-1].min() == 1.0 and positive.low[2:-1].min() > 0.75, (
        "behind the first attention"
    )
    assert torch.equal(positive.values[0], negative.values[0]), "conv_in reads latents alone"
    assert negative.values[:, 0].max() <= 0.8 and "16 held-out images" in negative.note
    assert negative.values[2:6, 2].min() >= 0.8, "in the last step the thing is there"
    [alone] = probe(tiny(), template, "mid", images=4, steps=1, guidance_scale=1.0)
    assert alone.title.endswith("rows of the prompt") and alone.values.tolist() == [[1.0]]


def test_bad_input_is_named() -> None:
    template = PromptTemplate.parse("{thing: 狐狸|熊猫}")
    with pytest.raises(ValueError, match="expected a question, such as .* in the prompt 'a cat'"):
        probe(tiny(), PromptTemplate.parse("a cat"))
    with pytest.raises(ValueError, match="images must be .*4.*, got 3"):
        probe(tiny(), template, images=3)
    with pytest.raises(ValueError, match="text_proj was called 1 times in 2 steps"):
        probe(tiny(), template, "text_proj", images=4, steps=2)
