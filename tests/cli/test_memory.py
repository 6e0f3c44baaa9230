"""What cannot fit in memory is refused before it is drawn, in flags of the command line."""

import os
import time
from pathlib import Path

import pytest

from kolors_core import KolorsPipeline
from kolors_core.__main__ import main
from kolors_core.cli.memory import check_memory
from kolors_core.cli.parsers import draw_parser
from tests.support.pipelines import picture

HUGE = ["--height", "16384", "--width", "16384"]  # 120 GiB
LARGER = ["--height", "16392", "--width", "16392"]


def test_what_cannot_fit_is_refused_with_numbers_and_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") > 110 * 2**30:
        pytest.skip("here it may fit")
    assert main(["a cat", *HUGE, "--steps", "1", "-q", "--device", "cpu", "-o", str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert "1 image of 16384x16384 with guidance on cpu needs " in error
    assert "--vae-tiling" in error and "; --force goes on" in error and "enable_" not in error
    assert len(error.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_only_in_tiles_there_is_a_size_without_a_plan() -> None:
    pipe, parse = KolorsPipeline.from_pretrained("tiny"), draw_parser().parse_args
    pipe._available_memory = lambda: 2**30
    with pytest.raises(ValueError, match=r"1 image of 16392x16392 .* and 1\.\d\d GiB can be had"):
        check_memory(pipe, parse(["a cat", *LARGER]))
    check_memory(pipe, parse(["a cat", *LARGER, "--vae-tiling"]))


def test_no_plan_is_made_where_there_is_room() -> None:
    pipe, parse = KolorsPipeline.from_pretrained("tiny"), draw_parser().parse_args
    pipe._available_memory = lambda: 4 * 2**30
    start = time.process_time()
    check_memory(pipe, parse(["a cat", "--height", "512", "--width", "512"]))
    assert time.process_time() - start < 0.1
    pipe._available_memory = lambda: 2**24  # a plan says what such an image needs
    with pytest.raises(ValueError, match=r"1 image of 512x512 .* and 0\.\d\d GiB can be had"):
        check_memory(pipe, parse(["a cat", "--height", "512", "--width", "512"]))
    pipe.offload.device = pipe.device  # weights come and go: only a plan knows
    pipe._available_memory = lambda: 4 * 2**30
    check_memory(pipe, parse(["a cat", "--height", "512", "--width", "512"]))
    assert time.process_time() - start > 0.2


def test_force_goes_on_and_small_images_are_not_asked_for() -> None:
    pipe, parse = KolorsPipeline.from_pretrained("tiny"), draw_parser().parse_args
    start = time.process_time()
    check_memory(pipe, parse(["a cat", *HUGE, "--force"]))
    check_memory(pipe, parse(["a cat", "--images", "4"]))
    check_memory(pipe, parse(["a cat"]), picture(0, 71, 65))
    assert time.process_time() - start < 0.1, "no plan is made of what 128x128 pixels need"
