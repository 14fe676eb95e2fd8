"""Launches of the pooling kernels: shapes of outputs, grids, tiles. No synchronisation with the device."""

import torch
from torch import Tensor

from ..lib.integers import cdiv, next_power_of_2
from ..lib.maps import row_stride
from . import cells as kernels
from .problem import MAX, PoolingGradients, RegionPooling

# Two 16-byte loads in flight a thread. Predicted, not measured; with twice as much float32 spills.
TILE_BYTES = 4096
MAX_BLOCK_CHANNELS = 64
NUM_WARPS = 4
# Programs that share a sum over the tokens of an image; more would only make their partial sums larger.
MAX_STRIPS = 1024


def pool_forward(
    x: Tensor,
    fill: Tensor | None,
    pooling: RegionPooling,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Reduces the tokens of every region to cells.

    Args:
        x: `(N, H, W, C)` under `pooling.grid`; float32, float16 or bfloat16. A channel slice of a contiguous
            map.
        fill: `(C,)`, contiguous: what tokens past the map's edge hold; needed where the grid is padded.
        pooling: the cells and how they are reduced.
        weight: `(C, kernel height, kernel width)`, for `WEIGHTED`.
        bias: `(C,)`, for `WEIGHTED`.

    Returns:
        The pooled map `(N, rows*h', columns*w', C)`, contiguous, of the dtype of `x`; and for `MAX` the
        token of its region that each element is, row-major, int32 of that shape, else None.
    """
    grid = pooling.pooled_grid
    pooled = x.new_empty(x.shape[0], grid.height, grid.width, x.shape[-1])
    argmax = torch.empty_like(pooled, dtype=torch.int32) if pooling.mode == MAX else None
    if pooled.numel():
        constants = _constants(x, pooling, weight)
        tiles = cdiv(grid.height * grid.width, constants["BLOCK_T"])
        with torch.cuda.device_of(x):
            kernels.pool[x.shape[0] * tiles, _channel_blocks(constants)](
                x,
                _or(fill, x),
                x if weight is None else _taps_first(weight),
                x if bias is None else bias.float(),
                pooling.row_cells,
                pooling.column_cells,
                pooled,
                _or(argmax, pooling.row_cells),
                *_sizes(pooling),
                MODE=pooling.mode,
                **constants,
            )
    return pooled, argmax


def pool_backward(
    grad_pooled: Tensor,
    x: Tensor,
    fill: Tensor | None,
    argmax: Tensor | None,
    pooling: RegionPooling,
    weight: Tensor | None,
    grad_x: Tensor,
) -> PoolingGradients:
    """Gradients of `pool_forward`, the same bits for the same input.

    Args:
        grad_pooled: `(N, rows*h', columns*w', C)`, contiguous.
        x: the forward's; its values are read for `WEIGHTED` alone.
        fill: the forward's.
        argmax: the forward's.
        pooling: the forward's.
        weight: the forward's.
        grad_x: where to write the gradient of `x`; `(N, H, W, C)` with the strides of `x`. Every element is
            written once.
    """
    constants = _constants(grad_x, pooling, weight)
    grid = pooling.grid
    padded_tokens = grid.n_regions * grid.region_tokens
    strips, strip_tiles = _strips(cdiv(padded_tokens, constants["BLOCK_T"]))
    programs, channels = x.shape[0] * strips, x.shape[-1]
    partials = x.new_empty(programs if grid.is_padded else 0, channels, dtype=torch.float32)
    if grad_x.numel():
        with torch.cuda.device_of(x):
            kernels.pool_backward[programs, _channel_blocks(constants)](
                grad_pooled,
                _or(argmax, pooling.row_cells),
                x if weight is None else _taps_first(weight),
                pooling.row_cells,
                pooling.column_cells,
                *_holders(pooling),
                grad_x,
                partials,
                *_sizes(pooling),
                strips,
                strip_tiles,
                MODE=pooling.mode,
                **constants,
            )
    grad_fill = partials.sum(0) if grid.is_padded else None
    if weight is None:
        return PoolingGradients(grad_fill)
    grad_bias = grad_pooled.sum((0, 1, 2), dtype=torch.float32)
    return PoolingGradients(grad_fill, _weight_gradient(grad_pooled, x, fill, pooling, weight), grad_bias)


def _holders(pooling: RegionPooling) -> tuple[Tensor, Tensor]:
    """For each axis `(tokens, 2)`: the first cell that holds each token, and the first past them."""
    grid = pooling.grid
    rows = _invert(pooling.row_cells, grid.region_height)
    if pooling.column_cells is pooling.row_cells and grid.region_width == grid.region_height:
        return rows, rows
    return rows, _invert(pooling.column_cells, grid.region_width)


def _invert(cells: Tensor, side: int) -> Tensor:
    holders = cells.new_empty(side, 2)
    kernels.invert_cells[(cdiv(side, 32),)](
        cells, holders, cells.shape[0], side, BLOCK=32, BLOCK_CELLS=32, num_warps=1
    )
    return holders


def _weight_gradient(
    grad_pooled: Tensor, x: Tensor, fill: Tensor | None, pooling: RegionPooling, weight: Tensor
) -> Tensor:
    constants = _constants(x, pooling, weight)
    pooled = pooling.pooled_grid
    tiles = x.shape[0] * cdiv(pooled.height * pooled.width, constants["BLOCK_T"])
    strips, strip_tiles = _strips(tiles)
    channels, taps = x.shape[-1], weight[0].numel()
    partials = x.new_empty(strips, taps, channels, dtype=torch.float32)
    if partials.numel():
        with torch.cuda.device_of(x):
            kernels.weight_gradient[strips, _channel_blocks(constants), taps](
                grad_pooled,
                x,
                _or(fill, x),
                pooling.row_cells,
                pooling.column_cells,
                partials,
                *_sizes(pooling),
                tiles,
                strip_tiles,
                **constants,
            )
    return partials.sum(0).t().reshape(weight.shape)


def _constants(x: Tensor, pooling: RegionPooling, weight: Tensor | None) -> dict:
    """Compile-time arguments that the kernels have in common."""
    channels = x.shape[-1]
    block_c = min(MAX_BLOCK_CHANNELS, next_power_of_2(channels))
    return {
        "KERNEL_WIDTH": 1 if weight is None else weight.shape[-1],
        "PADDED": pooling.grid.is_padded,
        "TOKEN_STRIDE": row_stride(x),
        "CHANNELS": channels,
        "BLOCK_T": TILE_BYTES // (x.element_size() * block_c),
        "BLOCK_C": block_c,
        "num_warps": NUM_WARPS,
    }


def _sizes(pooling: RegionPooling) -> tuple[int, ...]:
    """Run-time numbers that the kernels have in common."""
    grid = pooling.grid
    return (
        *(grid.height, grid.width, grid.region_height, grid.region_width, grid.rows, grid.columns),
        *(pooling.cells_high, pooling.cells_wide),
    )


def _channel_blocks(constants: dict) -> int:
    return cdiv(constants["CHANNELS"], constants["BLOCK_C"])


def _strips(tiles: int) -> tuple[int, int]:
    """Number of strips that tiles are dealt out to, and tiles in each."""
    strip_tiles = cdiv(tiles, MAX_STRIPS)
    return (cdiv(tiles, strip_tiles) if tiles else 0), strip_tiles


def _taps_first(weight: Tensor) -> Tensor:
    """`(C, kernel height, kernel width)` to `(taps, C)` in float32."""
    return weight.flatten(1).t().float().contiguous()


def _or(tensor: Tensor | None, unread: Tensor) -> Tensor:
    """Some pointer for an argument that the kernel will not read."""
    return unread if tensor is None else tensor
