"""Published changes, each a file with one `CHANGE`: `python -m benchmarks.ablate OUT --b dit`."""
