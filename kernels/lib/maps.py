"""Strides of maps. A map is NHWC and dense, except that its channels may be a slice of wider rows."""

from ..arrays import Array


def image_tokens(x: Array) -> int:
    """Tokens in one image of a map."""
    return x.shape[1] * x.shape[2]


def row_stride(x: Array) -> int:
    """Elements from one token of a map to the next."""
    if 0 in x.shape:
        return x.shape[3]  # an empty map is never read and may have any strides
    images, rows, columns, channels = x.shape
    of_image, of_row, of_column, of_channel = x.stride()
    # Skip axes of length 1: PyTorch ignores their strides when it calls a map contiguous.
    stride = of_column if columns > 1 else of_row if rows > 1 else of_image
    assert of_channel == 1 or channels == 1
    assert rows == 1 or of_row == columns * stride
    assert images == 1 or of_image == rows * columns * stride
    return stride
