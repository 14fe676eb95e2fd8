"""Tables of cells along a side of a region, and the maxima and means of cells in plain PyTorch.

A cell is a rectangle of tokens that down-sampling reduces to one token. A table is `(cells, 2)` int32: for
each cell the number of its first token and of the token after its last, counted along the side.
"""

import torch
from torch import Tensor

from .kernels.grid import larger

Cells = tuple[Tensor, Tensor]  # the tables along a region's height and along its width


def fractional_cells(side: int, count: int, window: int, sample: Tensor) -> Tensor:
    """The table of fractional max-pooling; places the cells as PyTorch's `fractional_max_pool2d` does.

    Args:
        side: tokens along the side.
        count: cells along the side.
        window: tokens of a cell along the side.
        sample: random number in `[0, 1)`, a float32 scalar; the table is made on its device.

    Returns:
        `(count, 2)` int32.
    """
    index = torch.arange(count, dtype=torch.float32, device=sample.device)
    distance = (side - window) / larger(1, count - 1)
    starts = ((index + sample) * distance).int() - (sample * distance).int()
    starts = torch.where(index == count - 1, side - window, starts)
    return torch.stack((starts, starts + window), dim=1)


def windows_of(x: Tensor, dim: int, cells: Tensor, window: int) -> Tensor:
    """The tokens of each cell along dimension `dim` of `x`, which becomes two: cells, and `window` tokens.

    No cell may have more than `window` tokens; a cell with fewer repeats its last one.
    """
    position = cells[:, :1] + torch.arange(window, dtype=torch.int32, device=x.device)
    last = cells[:, 1:] - 1
    # torch.where and reshape, because ONNX's opset 11 has no minimum of integers and no unflatten.
    position = torch.where(position < last, position, last)
    shape = (*x.shape[:dim], cells.shape[0], window, *x.shape[dim + 1 :])
    return x.index_select(dim, position.flatten()).reshape(shape)


def window_maxima(x: Tensor, dim: int, cells: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Maxima of `x` over cells along dimension `dim`, and their positions in the cells (int64).

    No cell may have more than `window` tokens. Of equal maxima the first one counts and gets the gradient.
    """
    return windows_of(x, dim, cells, window).max(dim + 1)


def mean_matrix(cells: Tensor, side: int, like: Tensor) -> Tensor:
    """Weights `(cells, side)` for means: 1 / (tokens of the cell) inside it, else 0; dtype of `like`."""
    token = torch.arange(side, dtype=torch.int32, device=cells.device)
    start, end = cells[:, :1], cells[:, 1:]
    return ((token >= start) & (token < end)).to(like.dtype) / (end - start).to(like.dtype)
