"""How the maps lie in memory that launches hand to kernels: NHWC, dense but for their channels."""

from torch import Tensor


def image_tokens(x: Tensor) -> int:
    """Tokens in one image of a map."""
    return x.shape[1] * x.shape[2]


def row_stride(x: Tensor) -> int:
    """Elements from one token of a map to the next."""
    if not x.numel():
        return x.shape[3]  # an empty batch is never read, and may have any strides
    # A map of a single column may carry any stride there, and PyTorch still calls it contiguous.
    stride = x.stride(2) if x.shape[2] > 1 else x.stride(1) if x.shape[1] > 1 else x.stride(0)
    assert x.stride(3) == 1 or x.shape[3] == 1
    assert x.shape[1] == 1 or x.stride(1) == x.shape[2] * stride
    assert x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.shape[2] * stride
    return stride
