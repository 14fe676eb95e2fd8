"""Pooling of regions in plain PyTorch, for any device and dtype; see `FusedKernels`.

Memory is linear in the size of the map. Sums are added up in a fixed order, without atomics on any device. A
cell is a span of rows times a span of columns. So means are products with one small matrix for each axis, and
maxima are taken along the columns first, then along the rows. If the size of the largest cell is not given,
it is read from the GPU; nothing else here synchronises with the GPU.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...cells import mean_matrix, window_maxima, windows_of
from ...kernels.grid import RegionGrid
from ...kernels.pooling.problem import MAX, PoolingGradients, RegionPooling
from ...kernels.problem import statistic_dtype
from . import devices
from .autocast import outside_autocast
from .regions import sum_over_padding, whole_map
from .sums import add_rows


@outside_autocast
def pool(
    x: Tensor,
    fill: Tensor | None,
    pooling: RegionPooling[Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `FusedKernels`; `x` may have any strides."""
    shape = (x.shape[0], pooling.pooled_grid.height, pooling.pooled_grid.width, x.shape[-1])
    regions = _to_regions(_pad(x, fill, pooling.grid), pooling.grid)
    if pooling.mode == MAX:
        pooled, argmax = _maximum(regions, pooling)
        return pooled.reshape(shape), argmax.to(torch.int32).reshape(shape)
    regions = regions.to(statistic_dtype(x.dtype))
    if weight is None or bias is None:
        pooled = _apply_matrices(regions, *_mean_matrices(pooling, regions))
    else:
        weight, pooled = weight.to(regions.dtype), bias.to(regions.dtype)
        for i, j, rows, columns in _taps(pooling, weight):
            pooled = pooled + weight[:, i, j] * regions.index_select(1, rows).index_select(3, columns)
    return pooled.to(x.dtype).reshape(shape), None


@outside_autocast
def pool_backward(
    grad_pooled: Tensor,
    x: Tensor,
    fill: Tensor | None,
    argmax: Tensor | None,
    pooling: RegionPooling[Tensor],
    weight: Tensor | None,
    grad_x: Tensor,
) -> PoolingGradients:
    """See `FusedKernels`."""
    grid = pooling.grid
    grad = _to_regions(grad_pooled, pooling.pooled_grid).to(statistic_dtype(x.dtype))
    gradients = PoolingGradients()
    if argmax is not None:
        grad_regions = _scatter(grad, _to_regions(argmax, pooling.pooled_grid), grid)
    elif weight is not None:
        regions = _to_regions(_pad(x, fill, grid), grid)
        grad_regions, gradients = _weighted_backward(grad, regions, pooling, weight)
    else:
        row_matrix, column_matrix = _mean_matrices(pooling, grad)
        grad_regions = _apply_matrices(grad, row_matrix.t(), column_matrix.t())
    padded = grad_regions.reshape(
        x.shape[0], grid.rows * grid.region_height, grid.columns * grid.region_width, x.shape[-1]
    )
    grad_x.copy_(padded[:, : grid.height, : grid.width])
    if not grid.is_padded:
        return gradients
    return PoolingGradients(sum_over_padding(padded, grid), gradients.weight, gradients.bias)


def _pad(x: Tensor, fill: Tensor | None, grid: RegionGrid) -> Tensor:
    """The map with `fill` past its edge, contiguous."""
    return whole_map(x, grid, None if fill is None else fill.to(x.dtype)).contiguous()


def _to_regions(x: Tensor, grid: RegionGrid) -> Tensor:
    """`(N, rows*h, columns*w, C)` to `(N*rows, h, columns, w, C)`, without a copy."""
    shape = (grid.region_height, grid.columns, grid.region_width, x.shape[-1])
    return x.view(x.shape[0] * grid.rows, *shape)


def _mean_matrices(pooling: RegionPooling[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices of the rows and of the columns."""
    row_matrix = mean_matrix(pooling.row_cells, pooling.grid.region_height, like)
    return row_matrix, mean_matrix(pooling.column_cells, pooling.grid.region_width, like)


def _apply_matrices(regions: Tensor, row_matrix: Tensor, column_matrix: Tensor) -> Tensor:
    """Multiplies the rows and the columns of regions by a matrix each.

    From `(B, h, columns, w, C)` to `(B, h', columns, w', C)`.
    """
    batch, height, columns, width, channels = regions.shape
    by_rows = row_matrix @ regions.reshape(batch, height, columns * width * channels)
    pooled = column_matrix @ by_rows.view(batch * len(row_matrix) * columns, width, channels)
    return pooled.view(batch, len(row_matrix), columns, len(column_matrix), channels)


def _maximum(regions: Tensor, pooling: RegionPooling[Tensor]) -> tuple[Tensor, Tensor]:
    """Maxima `(B, h', columns, w', C)`, and the numbers of their tokens inside the region, int64."""
    high, wide = pooling.largest or (None, None)
    if devices.kind(regions) == "cpu":
        high = wide = None  # on the CPU it costs nothing to read the size from the cells
    value, column = _maximum_along(regions, 3, pooling.column_cells, wide)
    value, row = _maximum_along(value, 1, pooling.row_cells, high)
    return value, row * pooling.grid.region_width + column.gather(1, row)


def _maximum_along(x: Tensor, dim: int, cells: Tensor, largest: int | None) -> tuple[Tensor, Tensor]:
    """The first maximum of each cell along a dimension: its value and its position in the region."""
    largest = int((cells[:, 1] - cells[:, 0]).max()) if largest is None else largest
    maxima = _window_maxima_on_cpu if devices.kind(x) == "cpu" else window_maxima
    value, position = maxima(x, dim, cells, largest)
    return value, position + cells[:, 0].view(-1, *(1,) * (x.dim() - 1 - dim))


def _window_maxima_on_cpu(x: Tensor, dim: int, cells: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """As `window_maxima`, but faster: on the CPU `max_pool2d` is vectorised, and `max` is not.

    It takes a fourth to a twentieth of the time, in float64 half to a fifth (maps of 40 to 56 tokens a side).

    Of several NaN in a cell the last one is the maximum, not the first.
    """
    windows = windows_of(x, dim, cells, window)
    shape = (*x.shape[:dim], len(cells), *x.shape[dim + 1 :])
    # As images of one row, with what follows the window as channels, in channels-last memory.
    images = windows.view(-1, 1, window, math.prod(x.shape[dim + 1 :])).permute(0, 3, 1, 2)
    value, position = F.max_pool2d(images, (1, window), return_indices=True)
    return value.view(shape), position.view(shape)


def _scatter(grad: Tensor, argmax: Tensor, grid: RegionGrid) -> Tensor:
    """Adds the gradients of cells `(B, h', columns, w', C)` to the tokens `argmax` of their regions."""
    batch, _, columns, _, channels = grad.shape
    row, column = argmax // grid.region_width, argmax % grid.region_width
    region_row = torch.arange(batch, device=grad.device).view(-1, 1, 1, 1, 1)
    region_column = torch.arange(columns, device=grad.device).view(-1, 1, 1)
    token = (region_row * grid.region_height + row) * columns + region_column
    token = token * grid.region_width + column
    element = (token * channels + torch.arange(channels, device=grad.device)).flatten()
    total = grad.new_zeros(batch, grid.region_height, columns, grid.region_width, channels)
    add_rows(total.view(-1), element, grad.flatten())
    return total


def _weighted_backward(
    grad: Tensor, regions: Tensor, pooling: RegionPooling[Tensor], weight: Tensor
) -> tuple[Tensor, PoolingGradients]:
    """Gradients of the regions, the weight and the bias."""
    grid = pooling.grid
    batch, _, columns, _, channels = grad.shape
    total = grad.new_zeros(regions.shape)
    grad_weight = grad.new_empty(weight.shape)
    by_rows = grad.new_empty(batch, pooling.cells_high, columns, grid.region_width, channels)
    for i, j, rows, spans in _taps(pooling, weight):
        tokens = regions.index_select(1, rows).index_select(3, spans)
        grad_weight[:, i, j] = (grad * tokens).sum((0, 1, 2, 3))
        # No token occurs twice in the rows or columns of one tap, so the order of index_add_ is irrelevant.
        by_rows.zero_().index_add_(3, spans, grad * weight[:, i, j].to(grad.dtype))
        total.index_add_(1, rows, by_rows)
    return total, PoolingGradients(None, grad_weight, grad.sum((0, 1, 2, 3)))


def _taps(pooling: RegionPooling[Tensor], weight: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """For every element of the kernel: its row and column, and the region's rows and columns it multiplies.

    The region's rows are a tensor with one entry for each cell, and so are its columns.
    """
    row_starts, column_starts = pooling.row_cells[:, 0], pooling.column_cells[:, 0]
    for i in range(weight.shape[1]):
        for j in range(weight.shape[2]):
            yield i, j, row_starts + i, column_starts + j
