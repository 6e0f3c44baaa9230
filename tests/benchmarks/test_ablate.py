"""Two architectures side by side: what is shared, what is repeatable, what is concluded, and bad input."""

import argparse
import hashlib
import inspect
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from benchmarks.ablate import lesson as lessons
from benchmarks.ablate.__main__ import RECIPE, main
from benchmarks.ablate.architecture import build_both, check, cost, example, predict, read
from benchmarks.ablate.captions import THINGS, UNSEEN, captions
from benchmarks.ablate.intervals import T, over_seeds, ratio_over_seeds
from benchmarks.ablate.lesson import Lesson, draw_pictures
from benchmarks.ablate.report import rows_of, write
from benchmarks.ablate.study import Pair, points, ratios, side_by_side
from benchmarks.tiny.emoji import CONCEPTS
from kolors_core.training.data import Example
from kolors_core.unet import UNet

NARROW = "channels=(32, 32, 32), heads=(1, 1, 1)"
CONFIG = replace(RECIPE, steps=3, batch_size=2, warmup=1)
MODULES = '''
from dataclasses import replace
import torch
from torch import nn
from kolors_core.unet import UNet

class Plain(nn.Module):
    """One convolution, and a layer that is not used."""
    def __init__(self, config):
        super().__init__()
        self.conv, self.spare = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(2, 2)
    def forward(self, latents, timestep, text_tokens, pooled_text, size_ids, text_counts=None, residuals=()):
        return self.conv(latents)

class Narrower(Plain):
    def forward(self, *given, **more):
        return super().forward(*given, **more)[:, :3]

class Constant(Plain):
    def forward(self, latents, *given, **more):
        return latents

class OtherArguments(Plain):
    def forward(self, latents, timestep):
        return self.conv(latents)

class Quiet(UNet):
    """A UNet whose output starts as zeros."""
    def __init__(self, config):
        super().__init__(config)
        nn.init.zeros_(self.conv_out.weight)

class Noisy(UNet):
    """Narrow; draws in its forward."""
    def __init__(self, config):
        super().__init__(replace(config, channels=(32, 32, 32), heads=(1, 1, 1)))
    def forward(self, latents, *given, **more):
        return super().forward(latents + 0.1 * torch.randn_like(latents), *given, **more)

number = 3
def nothing(config):
    return None
def broken(config):
    return config.width
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("modules") / "modules.py"
    file.write_text(MODULES)
    return file


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Lesson:
    """Three discs, small."""
    folder, names, examples = tmp_path_factory.mktemp("pictures"), ("tomato", "lemon", "pear"), []
    for name, colour in zip(names, ("red", "yellow", "green"), strict=True):
        picture = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(picture).ellipse((6, 6, 26, 26), fill=colour)
        picture.save(folder / f"{name}.png")
        examples.append(Example(folder / f"{name}.png", (name, f"a {name}"), 32, 32))
    return Lesson(examples, names, 32, CONFIG)


def train(lesson: Lesson, a: str, b: str, seed: int = 0) -> Pair:
    return side_by_side(read(a, 4), read(b, 4), lesson, replace(CONFIG, seed=seed), rounds=1)


@pytest.fixture(scope="module")
def twice(lesson: Lesson, file: Path) -> list[Pair]:
    """The same architecture twice, with two seeds; it draws random numbers in its forward."""
    return [train(lesson, f"{file}:Noisy", f"{file}:Noisy", seed) for seed in range(2)]


@pytest.fixture(scope="module")
def changed(lesson: Lesson) -> list[Pair]:
    """Without attention at the second level."""
    return [train(lesson, NARROW, f"{NARROW}, depths=(0, 0, 1)", seed) for seed in range(2)]


def test_the_same_architecture_twice_differs_by_exactly_nothing(twice: list[Pair]) -> None:
    for pair in twice:
        a, b = pair.runs
        assert (a.losses, a.held_out, a.nearest, a.right) == (b.losses, b.held_out, b.nearest, b.right)
        assert torch.equal(*pair.images)
    assert twice[0].runs[0].losses != twice[1].runs[0].losses, "seeds differ"
    for row in rows_of(twice)[:3]:
        assert row.change.mean == 0.0 and row.verdict == "no difference shown"


def test_a_run_repeats_to_the_bit_and_another_architecture_does_not(
    lesson: Lesson, changed: list[Pair]
) -> None:
    again = train(lesson, NARROW, f"{NARROW}, depths=(0, 0, 1)", seed=1)
    for run, first in zip(again.runs, changed[1].runs, strict=True):
        assert (run.losses, run.held_out) == (first.losses, first.held_out)
    assert all(torch.equal(x, y) for x, y in zip(again.images, changed[1].images, strict=True))
    a, b = again.runs
    assert a.losses != b.losses and a.held_out != b.held_out
    assert len(a.losses) == CONFIG.steps == len(a.held_out) and len(a.nearest) == len(lesson.prompts) == 9


def test_both_start_from_the_same_values_unless_they_are_meant_to_differ(file: Path) -> None:
    a, b, own = build_both(read(NARROW, 4), read(f"{NARROW}, depths=(0, 0, 2)", 4), seed=5)
    first, second = dict(a.named_parameters()), dict(b.named_parameters())
    assert own and all(".blocks.1." in name for name in own)
    assert all(torch.equal(first[name], second[name]) for name in second if name not in own)
    plain, quiet, own = build_both(read("", 4), read(f"{file}:Quiet", 4), seed=5)
    assert own == ["conv_out.weight"] and not quiet.get_parameter(own[0]).any()
    assert plain.get_parameter(own[0]).any()
    assert build_both(read(f"{file}:Quiet", 4), read("", 4), seed=5)[2] == own, "the other way as well"


def test_an_older_unet_file_is_an_architecture(tmp_path: Path) -> None:
    (tmp_path / "before.py").write_text(Path(inspect.getfile(UNet)).read_text())
    before, now, own = build_both(read(f"{tmp_path / 'before.py'}:UNet", 4), read("", 4), seed=3)
    assert type(before) is not type(now) and own == []
    assert torch.equal(predict(before, example(4)), predict(now, example(4)))


def test_held_out_prompts_cover_the_schedule_and_are_not_trained_on(lesson: Lesson) -> None:
    assert not set(lesson.prompts) & set(lesson.data.text)
    times = torch.cat([batch.timesteps for batch in lesson.held_out]).sort().values
    assert times[0] < 100 and times[-1] >= 1000 and len(set(times.tolist())) == len(times)
    assert points(240) == [30, 60, 90, 120, 150, 180, 210, 240] and points(3) == [1, 2, 3]
    known = lesson.known.repeat(3, 1, 1, 1)
    assert lesson.detect_component(known) == 3 * [0, 1, 2]


def test_a_seed_is_an_order_of_pictures_and_a_noise(lesson: Lesson) -> None:
    one, same, other = (lesson.seeded(replace(CONFIG, seed=seed)) for seed in (1, 1, 2))
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


class OneAttention(nn.Module):
    """Of tokens that are the latents' pixels, and nothing else."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, 4, bias=False)

    def forward(self, latents: Tensor, *given: Tensor, residuals: tuple = ()) -> Tensor:
        x = latents.flatten(2).transpose(1, 2)[:, None]
        return F.scaled_dot_product_attention(self.to_q(x), x, x).squeeze(1).transpose(1, 2).view_as(latents)


def test_flops_are_counted_with_attention() -> None:
    found = cost(replace(read("", 4), make=OneAttention), example(4))
    assert (found.parameters, found.flops) == (16, 2 * 16 * 4 * 4 + 2 * (2 * 16 * 16 * 4))


def test_intervals() -> None:
    found = over_seeds([1.0, 2.0, 6.0])
    assert found.mean == 3 and found.high - 3 == pytest.approx(4.303 * math.sqrt(7 / 3))
    assert found.holds(0.0) and not over_seeds([1.0, 1.1, 0.9]).holds(0.0)
    assert over_seeds([0.1, 0.1, 0.1], grain=0.1).holds(0.03), "equal counts are no proof"
    a, b = ratio_over_seeds([2.0, 2.2, 1.9]), ratio_over_seeds([1 / 2.0, 1 / 2.2, 1 / 1.9])
    assert a.low == pytest.approx(1 / b.high) and a.mean == pytest.approx(1 / b.mean)
    assert ratios([1, 2, 4, 4], [2, 4, 2, 2]) == [2.0, 0.5]
    assert list(T) == sorted(T, reverse=True)


def test_the_verdict_says_what_the_interval_does(changed: list[Pair]) -> None:
    for pair in changed:
        a, b = pair.runs
        b.held_out[-1], b.right = a.held_out[-1] + 0.1, a.right + 0.5
        a.train_ms, b.train_ms = [1.0, 1.0, 9.0, 1.0], [2.0, 2.0, 2.0, 2.0]
        a.denoise_ms = b.denoise_ms = [1.0, 1.0]
    held, _, right, step, denoising = rows_of(changed)
    assert (held.verdict, right.verdict, step.verdict) == ("B is worse", "B is better", "B is slower")
    assert denoising.verdict == "no difference shown" and "+0.1000 (" in str(held)
    assert step.change.mean == pytest.approx(statistics.median([2.0, 0.4])), "the median of the rounds"


def test_what_is_written(twice: list[Pair], lesson: Lesson, tmp_path: Path) -> None:
    both = [read(NARROW, 4)] * 2
    costs = [cost(each, lesson.step) for each in both]
    text = write(twice, costs, lesson, ["one", "two"], ["a line"], {"steps": 4}, tmp_path)
    assert "- B: `two`" in text and text.count("no difference shown") >= 3 and "a line" in text
    told = json.loads((tmp_path / "ablate.json").read_text())
    assert told["steps"] == 4 and [row["change"]["mean"] for row in told["rows"][:3]] == [0, 0, 0]
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [run["architecture"] + str(run["seed"]) for run in runs] == ["A0", "B0", "A1", "B1"]
    assert runs[0]["losses"] == twice[0].runs[0].losses
    assert Image.open(tmp_path / "samples.png").size == (3 * 96, 3 * (96 + 18))


@pytest.mark.skipif(not lessons.FONT.exists(), reason="Debian's fonts-noto-color-emoji is not installed")
def test_the_whole_command(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    sizes = {"steps": 2, "seeds": 3, "concepts": 2, "size": 32}
    main(argparse.Namespace(out=tmp_path / "new" / "out", a=f"{file}:Plain", b=f"{file}:Plain", **sizes))
    said, out = capsys.readouterr().out, tmp_path / "new" / "out"
    written = ["ablate.json", "ablate.md", "ablate.png", "runs.jsonl", "samples.png"]
    assert sorted(each.name for each in out.iterdir()) == written
    assert "| held-out loss |" in said and said.count("no difference shown") >= 3
    assert "B does not use 2 of its parameters (spare.weight, spare.bias)." in said
    assert Image.open(out / "ablate.png").size == (1080, 720)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depth=(0, 0, 1)", "depth is no field: .* resnets_per_level"),
        ("text_dim=64", "text_dim is given by"),
        ("depths=(0, 1)", r"depths is \(0, 1\), expected 3 whole numbers"),
        ("depths=1", "depths is 1, expected 3"),
        ("channels=(64, 96)", r"heads is \(2, 3, 5\), expected 2"),
        ("heads=(1, 0, 1)", "heads must be a positive whole number, got 0"),
        ("channels=(33, 64, 64)", "made no module: ValueError: num_channels"),
        ("heads=(2, 5, 5)", "failed on what UNet.forward is given: RuntimeError"),
        ("norm_eps='x'", "norm_eps must be a number"),
        ("print(1)", "expected fields of the UNet's config"),
        ("depths=open('x')", "expected fields of the UNet's config"),
        ("absent.py:make", "absent.py: no such file"),
        ("{file}:absent", "has no function absent"),
        ("{file}:number", "has no function number"),
        ("{file}:nothing", "returned NoneType, expected a torch.nn.Module"),
        ("{file}:broken", "made no module: AttributeError: .*width"),
        ("{file}:Narrower", r"returned a tensor \[2, 3, 4, 4\], expected one of \[2, 4, 4, 4\]"),
        ("{file}:Constant", "depends on no parameter"),
        ("{file}:OtherArguments", "failed on what UNet.forward is given: TypeError"),
    ],
)
def test_bad_architectures_are_named_and_nothing_is_left_behind(
    text: str, message: str, file: Path, tmp_path: Path
) -> None:
    given = {
        "a": f"{file}:Plain",
        "b": text.format(file=file),
        "steps": 2,
        "seeds": 3,
        "concepts": 2,
        "size": 32,
    }
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(argparse.Namespace(out=tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()


def test_other_bad_input(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"out": tmp_path, "a": "", "b": "", "steps": 2, "seeds": 3, "concepts": 2, "size": 32}
    with pytest.raises(FileExistsError, match="exists already"):
        main(argparse.Namespace(**given))
    for name, value in (("seeds", 2), ("concepts", 1000), ("size", 30), ("steps", 0)):
        with pytest.raises(ValueError, match=f"--{name} must be a"):
            main(argparse.Namespace(**given | {"out": tmp_path / "out", name: value}))
    assert check(read(f"{file}:Plain", 4), example(4)) == ["spare.weight", "spare.bias"]
    assert read(f"{file}:Quiet", 4).build(0).config == UNet(read("", 4).config).config
    monkeypatch.setattr(lessons, "FONT", tmp_path / "absent.ttf")
    with pytest.raises(FileNotFoundError, match="absent.ttf.*fonts-noto-color-emoji"):
        draw_pictures(2, tmp_path / "pictures")
