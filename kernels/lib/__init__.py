"""What several kernels, or their launches, share: addresses, products, exponentials, integers, precision."""
