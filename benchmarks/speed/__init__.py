"""How fast, and in how much memory, beside the reference: one file a group of rows."""

import argparse
import os
from pathlib import Path

# Read by the reference when it is imported: a row's outcome should not drown in what it says about loading.
for library in ("DIFFUSERS", "TRANSFORMERS"):
    os.environ.setdefault(f"{library}_VERBOSITY", "error")

RESULTS = Path(__file__).parents[1] / "results" / "speed"


def arguments(about: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """What every group of rows is told; rounds: the default, None where there is no choice."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", type=Path, nargs="?", default=RESULTS, help="folder of the rows' JSON files")
    if rounds is not None:
        parser.add_argument("--rounds", type=_positive, default=rounds, help="rounds, of two runs each")
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
