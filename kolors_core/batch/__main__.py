"""The command line for many prompts: see kolors_core/batch/worker.py."""

from kolors_core.batch.worker import main

if __name__ == "__main__":
    raise SystemExit(main())
