"""Variants beside A: what is shared, what is repeatable, how a study goes on, and bad input."""

import argparse
import hashlib
import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.ablate import things as lessons
from benchmarks.ablate.__main__ import (
    check_options,
    check_widths,
    command,
    main,
    open_study,
    steps_of,
    times_of,
)
from benchmarks.ablate.board import main as board
from benchmarks.ablate.change import read
from benchmarks.ablate.models import Cost, Pupil
from benchmarks.ablate.report import rows_of, write
from benchmarks.ablate.study import Run, Seeded, check, points, pupil_of, run_all
from benchmarks.ablate.thing_captions import THINGS, UNSEEN, captions
from benchmarks.ablate.things import Things, draw_pictures
from benchmarks.ablate.timing import Timed
from benchmarks.tiny.emoji import CONCEPTS
from kolors_core.unet import UNet
from tests.support.ablations import NARROW, SMALL, STEPS, job, predict, run
from tests.support.scene_recipes import needs_fonts


@pytest.fixture(scope="module")
def changed(lesson: Things) -> list[Run]:
    """Narrow, and without attention at the second level, with two seeds."""
    both = {"A": NARROW, "B": f"{NARROW}, depths=(0, 0, 1)"}
    return [run(lesson, text, seed, label)[0] for seed in range(2) for label, text in both.items()]


def test_the_same_variant_twice_differs_by_exactly_nothing(lesson: Things, file: Path) -> None:
    """Also one that draws random numbers in its forward."""
    (a, images), (b, others) = (run(lesson, f"{file}:Noisy", label=label) for label in "AB")
    assert (a.losses, a.curve, a.scores) == (b.losses, b.curve, b.scores)
    assert torch.equal(images, others)
    assert run(lesson, f"{file}:Noisy", seed=1)[0].losses != a.losses, "seeds differ"
    later = [replace(each, seed=1) for each in (a, b)]
    for row in rows_of(lesson, [a, b, *later], [], ["A", "B"]):
        assert row.change.mean == 0.0 and row.verdict == "no difference shown"


def test_a_run_repeats_to_the_bit_and_another_variant_does_not(lesson: Things, changed: list[Run]) -> None:
    again = run(lesson, f"{NARROW}, depths=(0, 0, 1)", 1, "B")[0]
    b = changed[3]
    assert (again.losses, again.curve, again.scores) == (b.losses, b.curve, b.scores)
    assert changed[2].losses != b.losses and changed[2].scores != b.scores
    assert len(b.losses) == STEPS == b.curve[-1][0] and b.curve[-1][1] == b.scores["held-out error"]


def test_variants_start_from_the_same_values_unless_they_are_meant_to_differ(
    lesson: Things, file: Path
) -> None:  # fmt: skip
    def pupil(text: str, base: str) -> Pupil:
        return pupil_of(lesson, job(text, seed=5), read(base, 4))[0]

    first, second = pupil(NARROW, NARROW), pupil(f"{NARROW}, depths=(0, 0, 2)", NARROW)
    assert first.denoiser is not None and second.denoiser is not None
    known, values = (dict(each.denoiser.named_parameters()) for each in (first, second))
    assert second.own and all(".blocks.1." in name for name in second.own) and not first.own
    assert all(torch.equal(known[name], values[name]) for name in values if name not in second.own)
    quiet = pupil(f"{file}:Quiet", "")
    assert quiet.own == ["conv_out.weight"] == pupil("", f"{file}:Quiet").own, "the other way as well"
    assert quiet.denoiser is not None and not quiet.denoiser.get_parameter("conv_out.weight").any()


def test_what_a_module_draws_is_a_function_of_seed_and_step(lesson: Things) -> None:
    """Whatever others drew before."""
    pupil, config = pupil_of(lesson, job(NARROW), read(NARROW, 4))
    source, drawn = Seeded(lesson.batches(pupil, config), 7), list[float]()
    for step in (0, 1, 0):
        torch.rand(len(drawn))
        source.batch(step, slice(0, 2), torch.device("cpu"))
        drawn.append(float(torch.rand(())))
    assert drawn[0] == drawn[2] != drawn[1]


def test_an_older_unet_file_is_a_variant(lesson: Things, tmp_path: Path) -> None:
    (tmp_path / "before.py").write_text(Path(inspect.getfile(UNet)).read_text())
    before, now = (pupil_of(lesson, job(t, seed=3), read("", 4))[0]
                   for t in (f"{tmp_path / 'before.py'}:UNet", ""))  # fmt: skip
    assert before.denoiser is not None and now.denoiser is not None
    assert type(before.denoiser) is not type(now.denoiser) and before.own == []
    x = torch.randn(2, 4, 4, 4)
    assert torch.equal(*(predict(each.denoiser, x) for each in (before, now)))


def test_held_out_prompts_are_not_trained_on_and_levels_cover_the_schedule(lesson: Things) -> None:
    assert not set(lesson.prompts) & set(lesson.data.text)
    assert lesson.levels == sorted(lesson.levels) and lesson.levels[0] < 0.3 and lesson.levels[-1] > 15
    assert points(240) == [60, 120, 180, 240] and points(3) == [1, 2, 3]
    assert lesson.recognize(lesson.known.repeat(3, 1, 1, 1)) == 3 * [0, 1, 2]


def test_a_seed_is_an_order_of_images_and_a_noise(lesson: Things) -> None:
    pupil = pupil_of(lesson, job(NARROW), read(NARROW, 4))[0]
    one, same, other = (lesson.batches(pupil, replace(SMALL, seed=seed)) for seed in (1, 1, 2))
    orders = [[data.batches.samples(step) for step in range(9)] for data in (one, same, other)]
    assert orders[0] == orders[1] != orders[2]
    noises = [data.batch(0, slice(0, 2), torch.device("cpu")).noise for data in (one, same, other)]
    assert torch.equal(noises[0], noises[1]) and not torch.equal(noises[0], noises[2])


def test_the_things_and_their_captions_stay_those_of_published_results() -> None:
    """Whatever the embedded model learns next: it knows them all, and each has its phrasings."""
    assert len(THINGS) == 40 and set(THINGS) <= set(CONCEPTS)
    every = [caption for name in THINGS.values() for caption in captions(name)]
    assert hashlib.sha256("\n".join(every).encode()).hexdigest()[:16] == "cb16a25280419f80"
    assert not {phrase.format(x=name) for phrase in UNSEEN for name in THINGS.values()} & set(every)


# The command


def options(out: Path, a: str, *b: str, **more: Any) -> argparse.Namespace:
    given = {"lesson": "things", "steps": None, "flops": None, "minutes": None, "seeds": 3, "widths": False,
             "concepts": 2, "size": 32, "prompts": 1, "detector": None}  # fmt: skip
    return argparse.Namespace(out=out, a=a, b=list(b), **{**given, **more})


def test_runs_that_are_done_are_kept(lesson: Things, file: Path, tmp_path: Path) -> None:
    base, said = read(f"{file}:Plain", 4), list[str]()
    jobs = [job(f"{file}:Plain", label, seed) for seed in range(2) for label in "AB"]
    first = run_all(lesson, jobs, base, tmp_path, said.append)
    (tmp_path / "runs" / "B-seed-1.json").unlink()
    again = run_all(lesson, jobs, base, tmp_path, said.append)
    assert len(said) == 5 and [each.losses for each in again] == [each.losses for each in first]
    assert sorted(each.name for each in (tmp_path / "runs").iterdir()) == [
        "A-seed-0.json", "A-seed-0.safetensors", "A-seed-1.json",
        "B-seed-0.json", "B-seed-0.safetensors", "B-seed-1.json",
    ]  # fmt: skip
    labels = {"A": base, "B": base}
    costs = {(label, 1.0): Cost(parameters=1, forward=2, step=3) for label in labels}
    text, rows, _ = write(tmp_path, lesson, labels, again, [], costs, ["a line"], {"steps": 3})
    assert "a line" in text and text.count("no difference shown") == 4 == len(rows)
    assert json.loads((tmp_path / "ablate.json").read_text())["rows"][0]["change"]["mean"] == 0
    assert Image.open(tmp_path / "samples.png").size[0] == 3 * 96


def test_another_study_is_refused_and_times_are_not_taken_under_load(lesson: Things, tmp_path: Path) -> None:
    open_study(tmp_path / "new", {"budget": ["steps", 2]})
    open_study(tmp_path / "new", {"budget": ["steps", 2]})
    with pytest.raises(ValueError, match="has another study, other budget: expected a new folder"):
        open_study(tmp_path / "new", {"budget": ["steps", 3]})
    with pytest.raises(FileExistsError, match="exists already and has no study.json"):
        open_study(tmp_path, {})
    assert times_of(tmp_path, lesson, {}, read("", 4), 3.0, once=False) == []


@needs_fonts
def test_the_whole_command(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    out, wide = tmp_path / "new" / "out", f"{file}:Wide"
    given = options(out, wide, wide, flops=4e6, widths=True)
    main(given)
    said = capsys.readouterr().out
    written = {"ablate.json", "ablate.md", "ablate.png", "runs", "samples.png", "study.json"}
    assert {each.name for each in out.iterdir()} - {"times.json"} == written
    assert "| held-out error |" in said and said.count("no difference shown") >= 4
    assert "B does not use 2 of its parameters (unet.spare.weight, unet.spare.bias)." in said
    assert "| B | " in said and "exponent" in said, "three widths"
    before = {each: each.stat().st_mtime_ns for each in (out / "runs").iterdir()}
    main(given)
    assert before == {each: each.stat().st_mtime_ns for each in (out / "runs").iterdir()}
    many = options(out, "", "dit", "a=1, b=2", steps=9, seeds=5, concepts=40, size=64, prompts=60)
    assert command(many, "a=1, b=2") == 'python -m benchmarks.ablate OUT --b "a=1, b=2" --steps 9'
    board(out.parent, None)
    assert (out.parent / "README.md").read_text().count("modules.py:Wide --flops") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depth=(0, 0, 1)", "depth is no field: .* resnets_per_level"),
        ("text_dim=64", "text_dim is given by"),
        ("prediction_type='sample'", "prediction_type is no field"),
        ("learning_rate='x'", "learning_rate must be a number"),
        ("depths=(0, 1)", r"depths is \(0, 1\), expected 3 whole numbers"),
        ("depths=1", "depths is 1, expected 3"),
        ("channels=(64, 96)", r"heads is \(2, 3, 5\), expected 2"),
        ("heads=(1, 0, 1)", "heads must be a positive whole number, got 0"),
        ("norm_eps='x'", "norm_eps must be a number"),
        ("print(1)", "expected fields of the UNet's config.* changes: bidirectional_encoder, dit"),
        ("depths=open('x')", "expected fields of the UNet's config"),
        ("absent.py:make", "absent.py: no such file"),
        ("{file}:absent", "has no function and no Change absent"),
        ("{file}:number", "has no function and no Change number"),
        ("{file}:fixed", "fixed sets prediction_type, which the command or the scheduler gives"),
    ],
)
def test_variants_that_cannot_be_read_are_named(text: str, message: str, file: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read(text.format(file=file), 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("channels=(33, 64, 64)", "made no module: ValueError: num_channels"),
        ("heads=(2, 5, 5)", "failed on what UNet.forward is given: RuntimeError"),
        ("{file}:nothing", "returned NoneType, expected a torch.nn.Module"),
        ("{file}:broken", "made no module: AttributeError: .*width"),
        ("{file}:Narrower", r"returned a tensor \[2, 3, 4, 4\], expected one of \[2, 4, 4, 4\]"),
        ("{file}:Text", "its forward returned str, expected one of"),
        ("{file}:Constant", "depends on no parameter"),
        ("{file}:OtherArguments", "failed on what UNet.forward is given: TypeError"),
        ("{file}:encoder", "failed on what ChatGLM.forward is given: TypeError"),
    ],
)
def test_bad_modules_are_named_before_anything_is_trained(
    text: str, message: str, lesson: Things, file: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        check(lesson, job(text.format(file=file)), read(f"{file}:Plain", 4))
    assert check(lesson, job(f"{file}:Plain"), read(f"{file}:Plain", 4))[2] == [
        "unet.spare.weight", "unet.spare.bias"
    ]  # fmt: skip


def test_minutes_are_of_the_variants_own_time() -> None:
    costs = {(label, width): Cost(parameters=1, forward=1, step=round(100 * width))
             for label in "AB" for width in (1.0, 0.5)}  # fmt: skip
    timed = Timed(name="training step", ms={"A": 100.0, "B": 300.0}, parts={})
    found = steps_of("minutes", 1, costs, [timed])
    assert found == {("A", 1.0): 600, ("A", 0.5): 1200, ("B", 1.0): 200, ("B", 0.5): 400}


def test_a_variant_that_ignores_the_width_is_refused(file: Path) -> None:
    cost = Cost(parameters=1, forward=2, step=3)
    check_widths({"A": read(f"{file}:Plain", 4)}, {("A", 1.0): cost})
    with pytest.raises(ValueError, match="Plain has the same FLOPs at two widths, expected a module"):
        check_widths({"A": read(f"{file}:Plain", 4)}, {("A", 1.0): cost, ("A", 0.5): cost})


def test_other_bad_input(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    for name, value in (("seeds", 2), ("concepts", 1000), ("size", 30)):
        with pytest.raises(ValueError, match=f"--{name} must be a"):
            main(options(out, "", "", **{name: value}))
    with pytest.raises(ValueError, match="--steps 0 pays for 0 training steps"):
        steps_of(
            *check_options(options(out, "", "", steps=0)),
            {("A", 1.0): Cost(parameters=1, forward=1, step=1)},
            [],
        )
    with pytest.raises(ValueError, match="expected 25 at most"):
        main(options(out, "", *[""] * 26))
    with pytest.raises(ValueError, match="--detector judges scenes"):
        main(options(out, "", "", detector=tmp_path))
    monkeypatch.setattr(lessons, "FONT", tmp_path / "absent.ttf")
    with pytest.raises(FileNotFoundError, match=r"absent.ttf.*fonts-noto-color-emoji"):
        draw_pictures(2, tmp_path / "pictures")
    assert not out.exists()
