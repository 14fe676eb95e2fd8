"""LePE, the depthwise convolution of the values: kernels and their launches."""
