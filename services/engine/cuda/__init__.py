"""The forward pass on a GPU: fused weights, Triton kernels over pages, decode under CUDA graphs."""
