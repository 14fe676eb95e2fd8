"""Host side of the kernels: output shapes, grids, tile choice. No synchronisation with the device."""
