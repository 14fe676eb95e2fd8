"""Functions that kernels share: addresses of tokens, matrix products, exponentials, integer arithmetic."""
