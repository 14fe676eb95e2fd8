"""Token-to-token attention over the routed regions: kernels, their launches, and when masking is cheaper."""
