"""What the kernels have in common: addresses, matrix products, exponentials, integer arithmetic."""
