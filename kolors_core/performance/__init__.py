"""The same images in less time or memory: offload, quantization, tiles, compilation, CUDA graphs, caches."""
