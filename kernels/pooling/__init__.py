"""Down-sampling of keys and values inside each region: kernels, their launches, and the problem."""
