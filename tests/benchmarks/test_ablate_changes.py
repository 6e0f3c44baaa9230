"""Each published change of benchmarks/ablate/changes, and the lessons that they are compared in."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.ablate.change import CHANGES, read
from benchmarks.ablate.models import Pupil, example, flops
from benchmarks.ablate.scenes import Scenes
from benchmarks.ablate.study import Job, check, pupil_of, train
from benchmarks.ablate.texts import Texts
from benchmarks.ablate.things import Things
from benchmarks.tiny.detector import Detector
from kolors_core.chatglm import ChatGLM
from kolors_core.config import TINY
from kolors_core.tokenizer import TokenBatch
from kolors_core.unet import UNet
from tests.support.ablations import SMALL, job, predict, run
from tests.support.scene_recipes import needs_fonts

NAMES = sorted(file.stem for file in CHANGES.glob("[a-z]*.py"))


@pytest.mark.parametrize("text", ["", "v_prediction", "rectified_flow", "zero_terminal_snr"])
def test_the_held_out_error_is_that_of_x0_whatever_is_predicted(lesson: Things, text: str) -> None:
    """Of a network that always returns 0 it is known."""

    class Zero(UNet):
        def forward(self, latents: Tensor, *given: Any, **more: Any) -> Tensor:
            return 0 * latents

    variant = read(text, 4)
    pupil = Pupil(variant, nn.Identity(), Zero(TINY.unet), None, 0, [])
    image, draw = lesson.latents, torch.Generator().manual_seed(1)
    for sigma, error in zip(lesson.levels, lesson.errors(pupil), strict=True):
        x = image + sigma * torch.randn(image.shape, generator=draw)
        x0 = {"": x, "rectified_flow": x / (sigma + 1)}.get(text, x / (sigma**2 + 1))
        assert error == pytest.approx(min(1, sigma**-2) * float((x0 - image).square().mean()), rel=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bidirectional_encoder"])
def test_each_published_change_of_a_denoiser_is_trained_and_draws(lesson: Things, name: str) -> None:
    cost, pupil, unused = check(lesson, job(name), read("", 4))
    assert not unused and cost.step > 3 * cost.forward / 2 > 0
    own = {name.rpartition(".")[2] for name in pupil.own}
    expected = {"qk_norm": {"norm"}, "self_conditioning": {"weight"}}.get(name, set())
    assert own == expected or name == "dit"
    assert read(name, 4).about.endswith(".") and "Source: https://" in (CHANGES / f"{name}.py").read_text()
    steps = replace(SMALL, steps=1)
    assert pupil.variant.training(steps).prediction_type == pupil.variant.change.scheduler.prediction_type
    drawn = lesson.draw(pupil.eval(), 0)
    assert drawn.shape == (9, 3, 32, 32) and drawn.isfinite().all()


def test_qk_norm_keeps_logits_whatever_the_scale_of_queries(lesson: Things) -> None:
    net = read("qk_norm", 4).change.denoiser(replace(TINY.unet, sample_size=4)).eval()
    x, before = torch.randn(2, 4, 4, 4), []
    for _ in range(2):
        with torch.no_grad():
            before.append(predict(net, x))
            for parameter_name, parameter in net.named_parameters():
                if parameter_name.endswith(("to_q.weight", "to_k.weight")):
                    parameter.mul_(100)
    torch.testing.assert_close(before[0], before[1], atol=1e-4, rtol=1e-4)


def test_self_conditioning_passes_an_estimate_on(lesson: Things) -> None:
    variant, rows = read("self_conditioning", 4), example()
    net = variant.change.denoiser(replace(TINY.unet, sample_size=4)).eval()
    schedule, x = variant.change.scheduler.schedule(4), torch.randn(2, 4, 4, 4)
    seen = list[Tensor]()
    net.register_forward_pre_hook(lambda module, given: seen.append(given[0][:, 4:]))
    with torch.no_grad():
        denoise = variant.change.guided(net, schedule, rows)
        first, second = denoise(x, 2.0), denoise(x, 1.0)
    assert not torch.equal(first, second) and len(seen) == 3, "the first step makes its own estimate"
    assert not seen[0].any() and seen[1].any() and torch.equal(seen[2], first)
    pupil, config = pupil_of(lesson, job("self_conditioning"), read("", 4))
    assert pupil.denoiser is not None
    pupil.denoiser.register_forward_pre_hook(lambda module, given: seen.append(given[0][:, 4:]))
    pupil.objective(lesson.batches(pupil, config).batch(0, slice(0, 2), torch.device("cpu")))
    assert seen[-1][0].any() and not seen[-1][1].any(), "half of the images have one"


def test_the_dit_has_the_unets_flops() -> None:
    x = torch.randn(2, 4, 8, 8)
    costs = []
    for text in ("", "dit"):
        variant = read(text, 8)
        net = variant.change.denoiser(variant.config)
        costs.append(flops(lambda net=net: predict(net, x)))
    assert costs[1] == pytest.approx(costs[0], rel=0.05)


def test_the_bidirectional_encoder_reads_what_comes_later() -> None:
    change = read("bidirectional_encoder", 4).change
    assert change.text_encoder is not None
    torch.manual_seed(0)
    causal = ChatGLM(TINY.text_encoder).eval()
    both = change.text_encoder(TINY.text_encoder).eval()
    both.load_state_dict(causal.state_dict())
    ids = torch.tensor([[0, 0, 5, 6, 7], [0, 0, 5, 6, 8]])
    mask = torch.tensor([[False, False, True, True, True]]).expand(2, -1)
    tokens = TokenBatch(ids, mask, torch.tensor([[0, 0, 0, 1, 2]]).expand(2, -1))
    with torch.no_grad():
        for encoder, reads in ((causal, False), (both, True)):
            found = encoder(tokens).tokens
            assert (float((found[0, 2] - found[1, 2]).abs().max()) > 1e-3) == reads
            merged = encoder(tokens.merge_padding()).tokens
            torch.testing.assert_close(merged[:, 1:], found[:, 2:], atol=1e-5, rtol=1e-5)


def test_a_text_encoder_is_trained_with_the_denoiser(lesson: Things) -> None:
    _, pupil, unused = check(lesson, job("bidirectional_encoder"), read("", 4))
    assert pupil.text_encoder is not None and not unused and not pupil.own
    assert torch.equal(
        pupil.text_encoder.get_parameter("embedding.weight"), lesson.text_encoder.embedding.weight
    ), "it starts as the embedded model's"


# Lessons


def test_a_variant_that_diverges_is_a_result(lesson: Things, file: Path) -> None:
    found, images = run(lesson, f"{file}:wild", base=f"{file}:Plain")
    assert found.diverged == 0 and images is None and set(found.scores.values()) == {None}


@needs_fonts
def test_captions_are_a_lesson_of_text_encoders() -> None:
    lesson = Texts(8, replace(Texts(8).recipe, batch_size=2, dtype=torch.float32))
    cost, pupil, unused = check(lesson, job("bidirectional_encoder"), read("", 4))
    assert not pupil.own and not unused and cost.step > cost.forward > 0
    (a, _), (b, _) = (run(lesson, text, base="") for text in ("", "bidirectional_encoder"))
    assert a.losses != b.losses and a.scores["held-out loss"] > 0 and a.scores.keys() == b.scores.keys()


@needs_fonts
def test_scenes_go_on_from_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    monkeypatch.setattr(Scenes, "steps", 2)
    with pytest.raises(FileNotFoundError, match=r"detector.safetensors: no such file, expected the detector"):
        Scenes(tmp_path, 1)
    save_file(Detector().state_dict(), tmp_path / "detector.safetensors")
    lesson = Scenes(tmp_path, 1)
    lesson.recipe = replace(lesson.recipe, batch_size=2, dtype=torch.float32)
    one = Job(label="A", variant=read("v_prediction", 16), seed=0, steps=2)
    pupil, config = pupil_of(lesson, one, read("", 16))
    assert not pupil.own and pupil.denoiser is not None
    start = lesson.pipe.unet.conv_in.weight
    assert torch.equal(pupil.denoiser.get_parameter("conv_in.weight"), start)
    found, images = train(lesson, one, read("", 16), lambda text: None)
    assert images is not None and images.shape == (2, 3, 128, 128) and "whole prompt" in found.scores
    flow = pupil_of(lesson, replace(one, variant=read("rectified_flow", 16)), read("", 16))
    times = lesson.batches(*flow).batch(0, slice(0, 2), torch.device("cpu")).timesteps
    evenly = lesson.batches(pupil, config).batch(0, slice(0, 2), torch.device("cpu")).timesteps
    assert not torch.equal(times, evenly), "drawn as the change says"
    encoder = replace(pupil, text_encoder=nn.Identity())
    with pytest.raises(ValueError, match="scenes train no text encoder"):
        lesson.batches(encoder, config)
