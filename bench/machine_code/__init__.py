"""The cost of kernels, read from their machine code; no GPU is needed."""
