"""What kernels cost, read from their machine code: no GPU needed."""
