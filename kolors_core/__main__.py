"""The command line: see kolors_core/cli/generate.py."""

from kolors_core.cli.generate import main

if __name__ == "__main__":
    raise SystemExit(main())
