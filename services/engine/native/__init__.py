"""Kernels of our own for CPU cores, compiled on first use."""
