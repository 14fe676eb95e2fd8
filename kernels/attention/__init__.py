"""Token-to-token attention over the routed regions: kernels, launches, and when a mask is cheaper."""
