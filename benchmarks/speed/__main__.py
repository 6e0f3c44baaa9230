"""Every group of rows, each in a process of its own, then the report: `python -m benchmarks.speed OUT`.

At full size it takes about an hour on two cores that nothing else uses, 12 GB of memory and 6 GB of disk.
`benchmarks.speed.whole`, which needs more, is run by itself.
"""

import subprocess
import sys

from benchmarks.speed import arguments

GROUPS = {
    "encode": True,
    "unet_step": True,
    "tiny": False,
    "load": True,
    "alignment": True,
    "start": False,
    "gpu": False,
}


def main() -> None:
    """Run all; stops at the first that fails."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--small", action="store_true", help="rehearse what has a small size")
    options = parser.parse_args()
    for group, has_small in GROUPS.items():
        command = [sys.executable, "-m", f"benchmarks.speed.{group}", str(options.out)]
        small = ["--small"] if options.small and has_small else []
        rounds = [] if group == "gpu" else ["--rounds", str(options.rounds)]
        subprocess.run([*command, *rounds, *small], check=True)
    subprocess.run([sys.executable, "-m", "benchmarks.speed.report", str(options.out)], check=True)


if __name__ == "__main__":
    main()
