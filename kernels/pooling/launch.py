"""Launches of the pooling kernels: shapes of outputs, grids, tiles. Nothing waits for the device."""

import torch
from torch import Tensor

from ..lib.integers import cdiv, next_power_of_2
from ..lib.maps import row_stride
from .arguments import Cells, Holders, InvertConfig, PoolingConfig, Taps
from .cells import invert_cells_kernel, pool_backward_kernel, pool_kernel, pool_weight_gradient_kernel
from .problem import MAX, PoolingGradients, RegionPooling

# Each thread has two 16-byte loads in flight. Predicted, not measured; with twice as many bytes, registers
# spill in float32.
TILE_BYTES = 4096
MAX_BLOCK_CHANNELS = 64
NUM_WARPS = 4
# Most programs among which a sum over tokens is divided; more would only need more memory for their shares.
MAX_STRIPS = 1024


def pool(
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
        fill: `(C,)`, contiguous: what tokens past the map's edge hold; needed if the grid is padded.
        pooling: the cells, and how they are reduced.
        weight: `(C, kernel height, kernel width)`, for `WEIGHTED`.
        bias: `(C,)`, for `WEIGHTED`.

    Returns:
        The pooled map `(N, rows*h', columns*w', C)`, contiguous, of the dtype of `x`. For `MAX` also an
        int32 tensor of that shape, which says from which token of its region (row-major) each element comes;
        None for the other modes.
    """
    grid = pooling.pooled_grid
    pooled = x.new_empty(x.shape[0], grid.height, grid.width, x.shape[-1])
    argmax = torch.empty_like(pooled, dtype=torch.int32) if pooling.mode == MAX else None
    if pooled.numel():
        config = _config(x, pooling, weight)
        tiles = cdiv(grid.height * grid.width, config.BLOCK_T)
        taps = None if weight is None or bias is None else Taps(_taps_first(weight), bias.float())
        with torch.cuda.device_of(x):
            pool_kernel[x.shape[0] * tiles, _channel_blocks(config)](
                *(x, fill if pooling.grid.is_padded else None, taps, _cells(pooling), pooled, argmax),
                *_sizes(pooling),
                CONFIG=config,
                num_warps=NUM_WARPS,
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
    """Gradients of `pool`; the same input gives the same bits.

    Args:
        grad_pooled: `(N, rows*h', columns*w', C)`, contiguous.
        x: as given to `pool`; only `WEIGHTED` reads its values.
        fill: as given to `pool`.
        argmax: the second result of `pool`.
        pooling: as given to `pool`.
        weight: as given to `pool`.
        grad_x: where the gradient of `x` is written, `(N, H, W, C)` with the strides of `x`; every element is
            written once.
    """
    config = _config(grad_x, pooling, weight)
    grid = pooling.grid
    padded_tokens = grid.n_regions * grid.region_tokens
    strips, strip_tiles = _strips(cdiv(padded_tokens, config.BLOCK_T))
    programs, channels = x.shape[0] * strips, x.shape[-1]
    partials = x.new_empty(programs if grid.is_padded else 0, channels, dtype=torch.float32)
    if grad_x.numel():
        with torch.cuda.device_of(x):
            pool_backward_kernel[programs, _channel_blocks(config)](
                *(grad_pooled, argmax, None if weight is None else _taps_first(weight)),
                *(_cells(pooling), _holders(pooling), grad_x, partials if grid.is_padded else None),
                *(*_sizes(pooling), strips, strip_tiles),
                CONFIG=config,
                num_warps=NUM_WARPS,
            )
    grad_fill = partials.sum(0) if grid.is_padded else None
    if weight is None:
        return PoolingGradients(grad_fill)
    grad_bias = grad_pooled.sum((0, 1, 2), dtype=torch.float32)
    return PoolingGradients(grad_fill, _weight_gradient(grad_pooled, x, fill, pooling, weight), grad_bias)


def _cells(pooling: RegionPooling) -> Cells:
    return Cells(pooling.row_cells, pooling.column_cells)


def _holders(pooling: RegionPooling) -> Holders:
    """The cells that hold each token; both axes share one table if they have the same cells."""
    grid = pooling.grid
    rows = _invert(pooling.row_cells, grid.region_height)
    if pooling.column_cells is pooling.row_cells and grid.region_width == grid.region_height:
        return Holders(rows, rows)
    return Holders(rows, _invert(pooling.column_cells, grid.region_width))


def _invert(cells: Tensor, side: int) -> Tensor:
    holders = cells.new_empty(side, 2)
    config = InvertConfig(BLOCK=32, BLOCK_CELLS=32)
    invert_cells_kernel[(cdiv(side, config.BLOCK),)](
        cells, holders, cells.shape[0], side, CONFIG=config, num_warps=1
    )
    return holders


def _weight_gradient(
    grad_pooled: Tensor, x: Tensor, fill: Tensor | None, pooling: RegionPooling, weight: Tensor
) -> Tensor:
    config = _config(x, pooling, weight)
    pooled = pooling.pooled_grid
    tiles = x.shape[0] * cdiv(pooled.height * pooled.width, config.BLOCK_T)
    strips, strip_tiles = _strips(tiles)
    channels, taps = x.shape[-1], weight[0].numel()
    partials = x.new_empty(strips, taps, channels, dtype=torch.float32)
    if partials.numel():
        with torch.cuda.device_of(x):
            pool_weight_gradient_kernel[strips, _channel_blocks(config), taps](
                *(grad_pooled, x, fill if pooling.grid.is_padded else None, _cells(pooling), partials),
                *(*_sizes(pooling), tiles, strip_tiles),
                CONFIG=config,
                num_warps=NUM_WARPS,
            )
    return partials.sum(0).t().reshape(weight.shape)


def _config(x: Tensor, pooling: RegionPooling, weight: Tensor | None) -> PoolingConfig:
    channels = x.shape[-1]
    block_c = min(MAX_BLOCK_CHANNELS, next_power_of_2(channels))
    return PoolingConfig(
        MODE=pooling.mode,
        KERNEL_WIDTH=1 if weight is None else weight.shape[-1],
        TOKEN_STRIDE=row_stride(x),
        CHANNELS=channels,
        BLOCK_T=TILE_BYTES // (x.element_size() * block_c),
        BLOCK_C=block_c,
    )


def _sizes(pooling: RegionPooling) -> tuple[int, ...]:
    """Run-time numbers that all pooling kernels take."""
    grid = pooling.grid
    return (
        *(grid.height, grid.width, grid.region_height, grid.region_width, grid.rows, grid.columns),
        *(pooling.cells_high, pooling.cells_wide),
    )


def _channel_blocks(config: PoolingConfig) -> int:
    return cdiv(config.CHANNELS, config.BLOCK_C)


def _strips(tiles: int) -> tuple[int, int]:
    """Number of strips into which tiles are divided, and number of tiles in each."""
    strip_tiles = cdiv(tiles, MAX_STRIPS)
    return (cdiv(tiles, strip_tiles) if tiles else 0), strip_tiles


def _taps_first(weight: Tensor) -> Tensor:
    """`(C, kernel height, kernel width)` to `(taps, C)` in float32."""
    return weight.flatten(1).t().float().contiguous()
