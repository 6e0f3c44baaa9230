"""Optimizations of time and memory: offload, quantization, tiles, compilation, CUDA graphs, caches."""
