"""Benchmarks, the demo, and the static cost of the kernels."""
