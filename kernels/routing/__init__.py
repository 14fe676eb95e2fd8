"""Region means, the choice of regions, and the graph that it makes: kernels and their launches."""
