"""What a report of a fault has of the machine."""

import re
import tomllib
from pathlib import Path

import pytest
import torch

from kolors_core.__main__ import main
from kolors_core.attention import attention_kernel
from kolors_core.cli.env import NEEDED
from kolors_core.config import VERSION

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def printed(capsys: pytest.CaptureFixture) -> dict[str, str]:
    """The lines of the command by their names."""
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines)


def test_versions_devices_and_kernels_are_printed(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = printed(capsys)
    assert found["kolors_core"] == VERSION
    assert f"torch {torch.__version__}" in found["needs"] and "missing" not in found["needs"]
    assert torch.backends.cpu.get_cpu_capability() in found["CPU"] and "GiB available" in found["CPU"]
    assert found["environment"] == "OMP_NUM_THREADS=3"
    assert found["attention"].startswith("'sdpa'")
    with attention_kernel("matmul"):
        assert printed(capsys)["attention"].startswith("'matmul'")


def test_every_package_that_is_needed_is_named() -> None:
    assert {re.split("[>=<]", text)[0] for text in PROJECT["dependencies"]} == {*NEEDED}


def test_it_takes_no_arguments(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["env", "cuda"])
    assert capsys.readouterr().err == "error: unknown argument 'cuda'\n"
