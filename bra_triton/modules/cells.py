"""Cells of a region, along one side: where they lie, and what is computed over them in plain PyTorch.

A table of cells is `(cells, 2)` int32: the first token of each cell, and the one past its last.
"""

import torch
from torch import Tensor

from ..kernels.grid import larger

Cells = tuple[Tensor, Tensor]  # along the rows and along the columns


def fractional_cells(side: int, count: int, window: int, sample: Tensor) -> Tensor:
    """Cells of fractional max-pooling along one side, as PyTorch's `fractional_max_pool2d` places them.

    Args:
        side: tokens along the side.
        count: cells.
        window: tokens in each cell.
        sample: float32 scalar in `[0, 1)`, on the device where the cells shall be.

    Returns:
        `(count, 2)` int32.
    """
    index = torch.arange(count, dtype=torch.float32, device=sample.device)
    distance = (side - window) / larger(1, count - 1)
    starts = ((index + sample) * distance).int() - (sample * distance).int()
    starts = torch.where(index == count - 1, side - window, starts)
    return torch.stack((starts, starts + window), dim=1)


def window_maxima(x: Tensor, dim: int, cells: Tensor, window: int) -> Tensor:
    """Maxima of `x` over the cells along a dimension, all of at most `window` tokens."""
    position = cells[:, :1] + torch.arange(window, dtype=torch.int32, device=x.device)
    last = cells[:, 1:] - 1  # taken again and again in smaller cells
    # Neither torch.minimum nor unflatten: in opset 11 there is no minimum of integers, and no unflatten.
    position = torch.where(position < last, position, last)
    shape = (*x.shape[:dim], cells.shape[0], window, *x.shape[dim + 1 :])
    windows = x.index_select(dim, position.flatten()).reshape(shape)
    return windows.max(dim + 1).values  # the gradient goes to one of equals; amax would share it out


def mean_matrix(cells: Tensor, side: int, like: Tensor) -> Tensor:
    """`(cells, side)`: one over the cell's size where it contains the token, else 0; dtype of `like`."""
    token = torch.arange(side, dtype=torch.int32, device=cells.device)
    start, end = cells[:, :1], cells[:, 1:]
    return ((token >= start) & (token < end)).to(like.dtype) / (end - start).to(like.dtype)
