"""One page on how far ours is from the reference: `python -m benchmarks.parity OUT`."""
